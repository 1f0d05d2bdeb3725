//! What the behaviour tests share: configurations, prompts, and calls that recount the cache after them.

#![allow(dead_code, reason = "each test binary uses its own part")]

use pagewise_kvcache::{
    BlockId, CacheConfig, CacheManager, KvCacheManager, KvGroup, NO_BLOCK, Prompt, SequenceId,
};

/// One full-attention group, no watermark, prefix cache on.
pub(crate) fn config(block_size: usize, device_blocks: usize, host_blocks: usize) -> CacheConfig {
    CacheConfig {
        block_size,
        device_blocks,
        host_blocks,
        groups: vec![KvGroup { window: None }],
        watermark: 0.0,
        prefix_cache: true,
    }
}

pub(crate) fn cache(block_size: usize, device_blocks: usize, host_blocks: usize) -> KvCacheManager {
    KvCacheManager::new(config(block_size, device_blocks, host_blocks)).unwrap()
}

pub(crate) fn id(id: u64) -> SequenceId {
    SequenceId(id)
}

pub(crate) fn prompt(tokens: &[u32]) -> Prompt<'_> {
    Prompt { tokens, salt: 0, use_prefix_cache: true }
}

/// `count` tokens that no other `start` a thousand away shares.
pub(crate) fn tokens(start: u32, count: usize) -> Vec<u32> {
    (start..start + count as u32).collect()
}

/// Allocates a prompt and reports what the prefix cache did not have as computed. Returns the cached tokens.
pub(crate) fn fill(cache: &mut KvCacheManager, sequence: u64, tokens: &[u32]) -> usize {
    let cached = cache.allocate(id(sequence), prompt(tokens)).unwrap().cached_tokens;
    cache.mark_computed(id(sequence), &tokens[cached..]).unwrap();
    cache.audit().unwrap();
    cached
}

/// Appends and computes tokens.
pub(crate) fn extend(cache: &mut KvCacheManager, sequence: u64, tokens: &[u32]) {
    cache.append(id(sequence), tokens.len()).unwrap();
    cache.mark_computed(id(sequence), tokens).unwrap();
    cache.audit().unwrap();
}

pub(crate) fn free(cache: &mut KvCacheManager, sequence: u64) {
    cache.free(id(sequence)).unwrap();
    cache.audit().unwrap();
}

/// Carries out everything that is waiting.
pub(crate) fn settle(cache: &mut KvCacheManager) {
    cache.take_block_ops();
    cache.confirm_block_ops().unwrap();
    cache.audit().unwrap();
}

pub(crate) fn table(cache: &KvCacheManager, sequence: u64) -> Vec<BlockId> {
    cache.block_table(id(sequence), 0).unwrap().to_vec()
}

/// Blocks that the sequence really holds in a group.
pub(crate) fn held(cache: &KvCacheManager, sequence: u64, group: usize) -> usize {
    cache.block_table(id(sequence), group).unwrap().iter().filter(|&&block| block != NO_BLOCK).count()
}
