//! The trait through which a scheduler drives a KV cache, so that other policies (a contiguous
//! reservation, say) can stand in the place of [`KvCacheManager`](crate::KvCacheManager).

use crate::{
    Admission, Allocation, BlockId, BlockOps, CacheConfig, CacheError, CacheStats, PinId, PinnedPrefix,
    PoolUsage, Prompt, SequenceId,
};

/// Says which block every token of every sequence lives in, and what must be copied so that it is true.
///
/// Every mutating call is all-or-nothing: on an error nothing has changed. No call does more work than the
/// number of blocks it touches.
///
/// The life of a sequence: [`allocate`](Self::allocate) its prompt, compute it (in one chunk or several) and
/// report each computed run through [`mark_computed`](Self::mark_computed); then for every generated token
/// [`append`](Self::append) a slot, compute, report. [`take_block_ops`](Self::take_block_ops) is called once
/// a step, after all bookkeeping of that step and before the device computes it.
pub trait CacheManager {
    /// What the cache was made of.
    fn config(&self) -> &CacheConfig;

    /// Whether these sequences can be taken in together (gang admission: all or none). `prompts` are the
    /// distinct prompts; each will need room for at least its tokens plus one generated token.
    fn can_allocate(&self, prompts: &[Prompt<'_>]) -> Admission;

    /// Leading tokens of the prompt that [`allocate`](Self::allocate) would find cached now. None where the manager
    /// keeps no prefixes.
    fn cached_tokens(&self, prompt: &Prompt<'_>) -> usize {
        let _ = prompt;
        0
    }

    /// Takes blocks for the whole prompt of a new sequence, sharing the cached prefix.
    ///
    /// # Errors
    /// [`CacheError::SequenceExists`], [`CacheError::EmptyPrompt`], [`CacheError::OutOfBlocks`].
    fn allocate(&mut self, sequence: SequenceId, prompt: Prompt<'_>) -> Result<Allocation, CacheError>;

    /// Whether [`append`](Self::append) of `tokens` slots would succeed now (new blocks and copies counted).
    fn can_append(&self, sequence: SequenceId, tokens: usize) -> bool;

    /// Adds `tokens` slots to the end of the sequence. If its last block is shared and partly filled it is
    /// replaced by a copy (copy-on-write), which shows up in the block ops.
    ///
    /// # Errors
    /// [`CacheError::UnknownSequence`], [`CacheError::OutOfBlocks`], [`CacheError::NotOnDevice`].
    fn append(&mut self, sequence: SequenceId, tokens: usize) -> Result<(), CacheError>;

    /// Reports that the next `tokens.len()` slots after the computed ones now hold the keys and values of
    /// exactly these tokens. Blocks that are full with it become prefix-cache entries; a block whose content
    /// is already cached merges into the cached one.
    ///
    /// # Errors
    /// [`CacheError::UnknownSequence`], [`CacheError::BeyondAllocated`], [`CacheError::NotOnDevice`].
    fn mark_computed(&mut self, sequence: SequenceId, tokens: &[u32]) -> Result<(), CacheError>;

    /// Makes `child` a second owner of all of `parent`'s blocks. Takes no block.
    ///
    /// # Errors
    /// [`CacheError::UnknownSequence`], [`CacheError::SequenceExists`], [`CacheError::NotOnDevice`].
    fn fork(&mut self, parent: SequenceId, child: SequenceId) -> Result<(), CacheError>;

    /// Cuts the sequence back to its first `len` tokens (speculation rolled back).
    ///
    /// # Errors
    /// [`CacheError::UnknownSequence`], [`CacheError::BeyondAllocated`], [`CacheError::BehindWindow`].
    fn truncate(&mut self, sequence: SequenceId, len: usize) -> Result<(), CacheError>;

    /// Gives back the sequence's blocks, wherever they are. Cached content stays findable until evicted.
    ///
    /// # Errors
    /// [`CacheError::UnknownSequence`].
    fn free(&mut self, sequence: SequenceId) -> Result<(), CacheError>;

    /// Moves a group of sequences to the host, keeping the sharing inside the group; blocks shared with a
    /// sequence outside of it stay on the device. The device blocks can be taken once the copies are
    /// confirmed, so room made by swapping is there in the next step.
    ///
    /// # Errors
    /// [`CacheError::UnknownSequence`], [`CacheError::OutOfHostBlocks`], [`CacheError::NotOnDevice`],
    /// [`CacheError::NamedTwice`]; [`CacheError::Pending`] if a block to move is part of a copy that is not
    /// confirmed (a step's swap-outs come before its copies).
    fn swap_out(&mut self, group: &[SequenceId]) -> Result<(), CacheError>;

    /// Whether [`swap_in`](Self::swap_in) would succeed and leave the watermark free, now or ever. `Never` also
    /// for what is not swapped out.
    fn can_swap_in(&self, group: &[SequenceId]) -> Admission;

    /// Moves a swapped-out group back to the device. It can be appended to, computed and forked in the same
    /// step.
    ///
    /// # Errors
    /// [`CacheError::UnknownSequence`], [`CacheError::OutOfBlocks`], [`CacheError::NotOnHost`],
    /// [`CacheError::NamedTwice`]; [`CacheError::Pending`] until its swap-out is confirmed.
    fn swap_in(&mut self, group: &[SequenceId]) -> Result<(), CacheError>;

    /// Keeps the cached blocks of a prefix (a system prompt, say) from being evicted, as if a sequence held them.
    ///
    /// # Errors
    /// [`CacheError::NotCached`] if not even its first block is cached, or the manager keeps no prefixes.
    fn pin_prefix(&mut self, prefix: Prompt<'_>) -> Result<PinnedPrefix, CacheError> {
        let _ = prefix;
        Err(CacheError::NotCached)
    }

    /// Removes a pin. The blocks stay cached and become the most recently used ones.
    ///
    /// # Errors
    /// [`CacheError::UnknownPin`].
    fn unpin_prefix(&mut self, id: PinId) -> Result<(), CacheError> {
        Err(CacheError::UnknownPin(id.number()))
    }

    /// The step's copies so far, in their fixed order; the manager starts a new list. Blocks that they touch
    /// are pending until [`confirm_block_ops`](Self::confirm_block_ops): one confirmation for each list taken,
    /// also if it is empty.
    fn take_block_ops(&mut self) -> BlockOps;

    /// The device has finished the block ops taken longest ago and not yet confirmed.
    ///
    /// # Errors
    /// [`CacheError::NothingToConfirm`].
    fn confirm_block_ops(&mut self) -> Result<(), CacheError>;

    /// The device has failed to carry out the block ops taken longest ago and not yet confirmed: what their
    /// destinations hold is unknown, so none of them is found as a cached prefix any longer. Sequences that
    /// hold one of them must be freed.
    ///
    /// A manager that keeps no prefixes has nothing to forget; for it this is the same as a confirmation.
    ///
    /// # Errors
    /// [`CacheError::NothingToConfirm`].
    fn abandon_block_ops(&mut self) -> Result<(), CacheError> {
        self.confirm_block_ops()
    }

    /// The block table of a sequence in one KV group: entry `i` holds the tokens
    /// `i * block_size .. (i + 1) * block_size`. Entries behind a window are [`NO_BLOCK`](crate::NO_BLOCK).
    /// `None` for an unknown sequence or group, and for a sequence that is swapped out.
    fn block_table(&self, sequence: SequenceId, group: usize) -> Option<&[BlockId]>;

    /// Tokens that the sequence has slots for.
    fn len(&self, sequence: SequenceId) -> Option<usize>;

    /// Tokens of the sequence whose keys and values are in the cache.
    fn computed(&self, sequence: SequenceId) -> Option<usize>;

    /// The device pool.
    fn device_usage(&self) -> PoolUsage;

    /// The host pool.
    fn host_usage(&self) -> PoolUsage;

    /// Counters since the cache was made.
    fn stats(&self) -> CacheStats;
}
