//! [`KvCacheManager`]: the state, its construction, and the map from the trait to the rooms that do the
//! work. Each room adds one `impl KvCacheManager` block:
//!
//! | room | what it does |
//! |---|---|
//! | `admission` | may these prompts come in? |
//! | `lifecycle` | allocate, append, fork, truncate, free |
//! | `computed` | what computed tokens change: prefix-cache entries, window blocks |
//! | `swapping` | groups to the host and back |
//! | `recompute` | groups dropped and rebuilt with their sharing |
//! | `prefixes` | pins, peeks and the reset of the prefix cache |
//! | `audit` | recounts everything, for tests |
//!
//! Every mutating call first counts what it needs, reading only; once it begins to change things it can no
//! longer fail. That is what makes it all-or-nothing, without any rollback.

mod admission;
mod audit;
mod computed;
mod lifecycle;
mod prefixes;
mod recompute;
mod swapping;

use rustc_hash::FxHashMap;

pub use prefixes::{PinId, PinnedPrefix};
pub use recompute::{RebuildStep, RecomputePlan};

use crate::copies::CopyQueue;
use crate::geometry::Geometry;
use crate::memory::Memory;
use crate::pool::BlockPool;
use crate::prefix_tree::PrefixTree;
use crate::sequence::{HOST_BIT, Place, Sequence};
use crate::{
    Admission, Allocation, BlockId, BlockOps, CacheConfig, CacheError, CacheManager, CacheStats, PoolUsage,
    Prompt, SequenceId,
};

/// The paged KV cache: block pools, block tables, copy-on-write, prefix cache and swap bookkeeping
/// (Kwon et al., *Efficient Memory Management for Large Language Model Serving with PagedAttention*, 2023,
/// sections 4.2 to 4.5).
///
/// Most of it is driven through [`CacheManager`]; what goes beyond the trait (recompute plans,
/// prefix-cache reset, audits) are methods of its own. `Clone` gives an independent cache in the same state
/// and `==` compares whole states, which is what "a failed call changes nothing" means in the tests.
#[derive(Clone, Debug, PartialEq)]
pub struct KvCacheManager {
    config: CacheConfig,
    geometry: Geometry,
    /// Device blocks that admission leaves free.
    watermark_blocks: usize,
    memory: Memory,
    sequences: FxHashMap<SequenceId, Sequence>,
    pins: FxHashMap<PinId, prefixes::Pin>,
    next_pin: u64,
}

impl KvCacheManager {
    /// An empty cache.
    ///
    /// # Errors
    /// [`CacheError::Config`] if the block size is not a power of two from 1 to 256, a pool has 2³¹ blocks
    /// or more (block ids travel as `i32`) or its bookkeeping does not fit in memory, the device pool is
    /// empty, there is no KV group, a window is 0, or the watermark is not in `0.0 .. 1.0`.
    pub fn new(config: CacheConfig) -> Result<Self, CacheError> {
        check(&config)?;
        let too_many = |name: &str, blocks: usize| {
            let message =
                format!("the bookkeeping of {blocks} {name} blocks does not fit in memory; use fewer");
            CacheError::Config(message)
        };
        let pool = |name: &str, blocks: usize| BlockPool::new(blocks).ok_or_else(|| too_many(name, blocks));
        let expected_nodes = if config.prefix_cache { config.device_blocks } else { 0 };
        Ok(Self {
            geometry: Geometry::new(&config),
            watermark_blocks: (config.watermark * config.device_blocks as f64).round() as usize,
            memory: Memory {
                device: pool("device", config.device_blocks)?,
                host: pool("host", config.host_blocks)?,
                tree: PrefixTree::new(config.block_size, config.groups.len(), expected_nodes)
                    .ok_or_else(|| too_many("device", expected_nodes))?,
                copies: CopyQueue::default(),
                stats: CacheStats::default(),
            },
            sequences: FxHashMap::default(),
            pins: FxHashMap::default(),
            next_pin: 0,
            config,
        })
    }

    /// Device blocks that admission leaves free for the growth of running sequences.
    pub fn watermark_blocks(&self) -> usize {
        self.watermark_blocks
    }

    /// Whether the sequence is in the cache, on the device or on the host.
    pub fn contains(&self, sequence: SequenceId) -> bool {
        self.sequences.contains_key(&sequence)
    }

    /// Whether the sequence is swapped out. `None` if it is not in the cache.
    pub fn is_swapped_out(&self, sequence: SequenceId) -> Option<bool> {
        self.sequences.get(&sequence).map(|sequence| sequence.place == Place::Host)
    }

    /// Every sequence in the cache, in no particular order.
    pub fn sequences(&self) -> impl Iterator<Item = SequenceId> + '_ {
        self.sequences.keys().copied()
    }

    /// References to a device block: block-table entries and pins that hold it. 0 for an id outside of the
    /// pool.
    pub fn references(&self, block: BlockId) -> u32 {
        if (block as usize) < self.memory.device.total() { self.memory.device.refs(block) } else { 0 }
    }

    fn get(&self, id: SequenceId) -> Result<&Sequence, CacheError> {
        self.sequences.get(&id).ok_or(CacheError::UnknownSequence(id))
    }

    fn get_on_device(&self, id: SequenceId) -> Result<&Sequence, CacheError> {
        let sequence = self.get(id)?;
        if sequence.place == Place::Device { Ok(sequence) } else { Err(CacheError::NotOnDevice(id)) }
    }
}

fn check(config: &CacheConfig) -> Result<(), CacheError> {
    let refuse = |what: String| Err(CacheError::Config(what));
    let CacheConfig { block_size, device_blocks, host_blocks, groups, watermark, .. } = config;
    if !block_size.is_power_of_two() || *block_size > 256 {
        return refuse(format!("block size {block_size} is not a power of two from 1 to 256"));
    }
    if *device_blocks == 0 {
        return refuse("the device pool has no blocks; give it at least one".to_owned());
    }
    for (name, blocks) in [("device", device_blocks), ("host", host_blocks)] {
        if *blocks >= HOST_BIT as usize {
            return refuse(format!("{blocks} {name} blocks are too many; block ids are 31-bit numbers"));
        }
    }
    if groups.is_empty() {
        return refuse(
            "there is no KV group; a model without sliding windows has one with window None".to_owned(),
        );
    }
    if let Some(group) = groups.iter().position(|group| group.window == Some(0)) {
        return refuse(format!("the window of KV group {group} is 0; a query sees at least its own key"));
    }
    if !(0.0..1.0).contains(watermark) {
        return refuse(format!("watermark {watermark} is not a share from 0.0 to below 1.0"));
    }
    Ok(())
}

impl CacheManager for KvCacheManager {
    fn config(&self) -> &CacheConfig {
        &self.config
    }

    fn can_allocate(&self, prompts: &[Prompt<'_>]) -> Admission {
        self.admit(prompts)
    }

    fn cached_tokens(&self, prompt: &Prompt<'_>) -> usize {
        self.geometry.tokens_in(self.find_prefix(prompt).blocks())
    }

    fn allocate(&mut self, sequence: SequenceId, prompt: Prompt<'_>) -> Result<Allocation, CacheError> {
        self.allocate_sequence(sequence, prompt)
    }

    fn can_append(&self, sequence: SequenceId, tokens: usize) -> bool {
        self.check_append(sequence, tokens).is_ok()
    }

    fn append(&mut self, sequence: SequenceId, tokens: usize) -> Result<(), CacheError> {
        self.append_slots(sequence, tokens)
    }

    fn mark_computed(&mut self, sequence: SequenceId, tokens: &[u32]) -> Result<(), CacheError> {
        self.mark_tokens_computed(sequence, tokens)
    }

    fn fork(&mut self, parent: SequenceId, child: SequenceId) -> Result<(), CacheError> {
        self.fork_sequence(parent, child)
    }

    fn truncate(&mut self, sequence: SequenceId, len: usize) -> Result<(), CacheError> {
        self.truncate_sequence(sequence, len)
    }

    fn free(&mut self, sequence: SequenceId) -> Result<(), CacheError> {
        self.free_sequence(sequence)
    }

    fn swap_out(&mut self, group: &[SequenceId]) -> Result<(), CacheError> {
        self.swap_group_out(group)
    }

    fn can_swap_in(&self, group: &[SequenceId]) -> Admission {
        self.admit_swapped_group(group)
    }

    fn swap_in(&mut self, group: &[SequenceId]) -> Result<(), CacheError> {
        self.swap_group_in(group)
    }

    fn pin_prefix(&mut self, prefix: Prompt<'_>) -> Result<PinnedPrefix, CacheError> {
        self.pin_cached_prefix(prefix)
    }

    fn unpin_prefix(&mut self, id: PinId) -> Result<(), CacheError> {
        self.remove_pin(id)
    }

    fn take_block_ops(&mut self) -> BlockOps {
        self.memory.copies.take()
    }

    fn confirm_block_ops(&mut self) -> Result<(), CacheError> {
        if self.memory.confirm() { Ok(()) } else { Err(CacheError::NothingToConfirm) }
    }

    fn abandon_block_ops(&mut self) -> Result<(), CacheError> {
        if self.memory.abandon() { Ok(()) } else { Err(CacheError::NothingToConfirm) }
    }

    fn block_table(&self, sequence: SequenceId, group: usize) -> Option<&[BlockId]> {
        let sequence = self.get_on_device(sequence).ok()?;
        sequence.tables.get(group).map(|table| table.entries.as_slice())
    }

    fn len(&self, sequence: SequenceId) -> Option<usize> {
        self.sequences.get(&sequence).map(|sequence| sequence.len)
    }

    fn computed(&self, sequence: SequenceId) -> Option<usize> {
        self.sequences.get(&sequence).map(|sequence| sequence.computed)
    }

    fn device_usage(&self) -> PoolUsage {
        self.memory.device.usage()
    }

    fn host_usage(&self) -> PoolUsage {
        self.memory.host.usage()
    }

    fn stats(&self) -> CacheStats {
        self.memory.stats
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::KvGroup;

    #[test]
    fn the_manager_can_move_between_threads() {
        fn check<T: Send + Sync>() {}
        check::<KvCacheManager>();
        check::<CacheError>();
    }

    /// Without evictions, a hit is the longest common prefix with anything computed before under the same
    /// salt, in whole blocks and short of the last token. Also if every hash collides.
    #[test]
    fn hits_are_common_prefixes_even_if_every_hash_collides() {
        for collide in [false, true] {
            let mut cache = KvCacheManager::new(CacheConfig {
                block_size: 2,
                device_blocks: 4096,
                host_blocks: 0,
                groups: vec![KvGroup { window: None }],
                watermark: 0.0,
                prefix_cache: true,
            })
            .unwrap();
            if collide {
                cache.memory.tree.collide();
            }
            let mut before: Vec<(u64, Vec<u32>)> = Vec::new();
            let mut state = 1_u32;
            for sequence in 0..300 {
                let mut random = |below: u32| {
                    state = state.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
                    (state >> 16) % below
                };
                let salt = u64::from(random(2));
                let tokens: Vec<u32> = (0..1 + random(14)).map(|_| random(2)).collect();
                let common = |other: &Vec<u32>| tokens.iter().zip(other).take_while(|(a, b)| a == b).count();
                let same_salt = before.iter().filter(|(other, _)| *other == salt);
                let longest = same_salt.map(|(_, other)| common(other) / 2 * 2).max().unwrap_or(0);
                let expected = longest.min((tokens.len() - 1) / 2 * 2);
                let prompt = Prompt { tokens: &tokens, salt, use_prefix_cache: true };
                let cached = cache.allocate(SequenceId(sequence), prompt).unwrap().cached_tokens;
                assert_eq!(cached, expected, "salt {salt}, {tokens:?}");
                cache.mark_computed(SequenceId(sequence), &tokens[cached..]).unwrap();
                if sequence % 3 == 0 {
                    cache.free(SequenceId(sequence)).unwrap();
                }
                before.push((salt, tokens));
            }
            cache.audit().unwrap();
        }
    }
}
