//! The vocabulary of the cache: ids, configuration, admission answers, block ops. Plain data, no logic.

/// A physical block in one of the two pools. Index into the cache tensors of every layer of its KV group.
pub type BlockId = u32;

/// The entry of a block table whose block was freed because a sliding window has left it behind.
/// Attention never reads what such an entry stands for.
pub const NO_BLOCK: BlockId = BlockId::MAX;

/// A sequence: one continuation of one prompt. Chosen by the caller, never reused while alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub u64);

/// Layers that share a window share blocks: one KV group, one block table a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvGroup {
    /// Number of keys, its own included, that a query of these layers sees; `None` is all of them.
    pub window: Option<usize>,
}

/// What a cache is made of.
#[derive(Clone, Debug, PartialEq)]
pub struct CacheConfig {
    /// Tokens a block holds: a power of two from 1 to 256.
    pub block_size: usize,
    /// Blocks on the device, shared by all groups.
    pub device_blocks: usize,
    /// Blocks on the host to swap to; 0 turns swapping off.
    pub host_blocks: usize,
    /// At least one. A model without sliding windows has `[KvGroup { window: None }]`.
    pub groups: Vec<KvGroup>,
    /// Share of the device blocks that admission leaves free for the growth of running sequences.
    pub watermark: f64,
    /// Whether full computed blocks are kept and found again by content.
    pub prefix_cache: bool,
}

/// A prompt as the cache sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prompt<'a> {
    /// Its token ids.
    pub tokens: &'a [u32],
    /// Isolation: prompts of different salts never share prefix-cache entries.
    pub salt: u64,
    /// Whether cached prefixes may be used (prompt logprobs need every position computed).
    pub use_prefix_cache: bool,
}

/// Whether a sequence or a gang-scheduled group can be taken in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// It fits, and the watermark stays free.
    Now,
    /// It will fit once others have finished.
    Later,
    /// It can never fit: it needs more blocks than the pool has.
    Never,
}

/// What an allocation found and took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allocation {
    /// Leading tokens whose keys and values are already in the cache: always a multiple of the block size
    /// and never the whole prompt.
    pub cached_tokens: usize,
}

/// One block to copy: all layers of the group, keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockCopy {
    /// KV group whose layers are meant (index into [`CacheConfig::groups`]).
    pub group: usize,
    /// Where from.
    pub src: BlockId,
    /// Where to.
    pub dst: BlockId,
}

/// What a backend must do to the cache memory before it computes a step, in the order of the fields:
/// swap out, swap in, copy; the step's own writes come after all three.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockOps {
    /// Device to host.
    pub swap_out: Vec<BlockCopy>,
    /// Host to device.
    pub swap_in: Vec<BlockCopy>,
    /// Device to device: copy-on-write.
    pub copy: Vec<BlockCopy>,
}

impl BlockOps {
    /// Nothing to do?
    pub fn is_empty(&self) -> bool {
        self.swap_out.is_empty() && self.swap_in.is_empty() && self.copy.is_empty()
    }
}

/// Where the blocks of a pool are. `free + used + pending == total` after every call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolUsage {
    /// Blocks that an allocation can take; prefix-cache entries that no sequence uses count as free.
    pub free: usize,
    /// Blocks that sequences hold (or that are pinned).
    pub used: usize,
    /// Blocks whose copy is under way: neither free nor usable.
    pub pending: usize,
    /// All of them.
    pub total: usize,
}

/// What happened so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Prompt tokens looked up in the prefix cache.
    pub lookup_tokens: u64,
    /// Of those, found.
    pub hit_tokens: u64,
    /// Entries evicted to make room.
    pub evicted_blocks: u64,
    /// Blocks copied because a shared one was written.
    pub copied_blocks: u64,
    /// Blocks swapped out.
    pub swapped_out_blocks: u64,
    /// Blocks swapped in.
    pub swapped_in_blocks: u64,
}
