//! A cache manager that checks its own books.

use pagewise_kvcache::{
    Admission, Allocation, BlockId, BlockOps, CacheConfig, CacheError, CacheManager, CacheStats,
    KvCacheManager, PinId, PinnedPrefix, PoolUsage, Prompt, SequenceId,
};

/// The real manager, with its books checked after every change.
pub(crate) struct Audited(pub(crate) KvCacheManager);

impl Audited {
    fn audit<T>(&self, value: T) -> T {
        self.0.audit().unwrap();
        value
    }
}

impl CacheManager for Audited {
    fn config(&self) -> &CacheConfig {
        self.0.config()
    }
    fn can_allocate(&self, prompts: &[Prompt<'_>]) -> Admission {
        self.0.can_allocate(prompts)
    }
    fn cached_tokens(&self, prompt: &Prompt<'_>) -> usize {
        self.0.cached_tokens(prompt)
    }
    fn pin_prefix(&mut self, prefix: Prompt<'_>) -> Result<PinnedPrefix, CacheError> {
        let value = self.0.pin_prefix(prefix);
        self.audit(value)
    }
    fn unpin_prefix(&mut self, id: PinId) -> Result<(), CacheError> {
        let value = self.0.unpin_prefix(id);
        self.audit(value)
    }
    fn allocate(&mut self, sequence: SequenceId, prompt: Prompt<'_>) -> Result<Allocation, CacheError> {
        let value = self.0.allocate(sequence, prompt);
        self.audit(value)
    }
    fn can_append(&self, sequence: SequenceId, tokens: usize) -> bool {
        self.0.can_append(sequence, tokens)
    }
    fn append(&mut self, sequence: SequenceId, tokens: usize) -> Result<(), CacheError> {
        let copied = |cache: &KvCacheManager| cache.stats().copied_blocks;
        let (before, len) = (copied(&self.0), self.0.len(sequence));
        let value = self.0.append(sequence, tokens);
        let within = len.is_some_and(|len| !len.is_multiple_of(self.0.config().block_size));
        assert!(copied(&self.0) == before || within, "a full block was copied");
        self.audit(value)
    }
    fn mark_computed(&mut self, sequence: SequenceId, tokens: &[u32]) -> Result<(), CacheError> {
        let value = self.0.mark_computed(sequence, tokens);
        self.audit(value)
    }
    fn fork(&mut self, parent: SequenceId, child: SequenceId) -> Result<(), CacheError> {
        let value = self.0.fork(parent, child);
        self.audit(value)
    }
    fn truncate(&mut self, sequence: SequenceId, len: usize) -> Result<(), CacheError> {
        self.0.truncate(sequence, len)
    }
    fn free(&mut self, sequence: SequenceId) -> Result<(), CacheError> {
        let value = self.0.free(sequence);
        self.audit(value)
    }
    fn swap_out(&mut self, group: &[SequenceId]) -> Result<(), CacheError> {
        let value = self.0.swap_out(group);
        self.audit(value)
    }
    fn can_swap_in(&self, group: &[SequenceId]) -> Admission {
        self.0.can_swap_in(group)
    }
    fn swap_in(&mut self, group: &[SequenceId]) -> Result<(), CacheError> {
        let value = self.0.swap_in(group);
        self.audit(value)
    }
    fn take_block_ops(&mut self) -> BlockOps {
        self.0.take_block_ops()
    }
    fn confirm_block_ops(&mut self) -> Result<(), CacheError> {
        let value = self.0.confirm_block_ops();
        self.audit(value)
    }
    fn abandon_block_ops(&mut self) -> Result<(), CacheError> {
        let value = self.0.abandon_block_ops();
        self.audit(value)
    }
    fn block_table(&self, sequence: SequenceId, group: usize) -> Option<&[BlockId]> {
        self.0.block_table(sequence, group)
    }
    fn len(&self, sequence: SequenceId) -> Option<usize> {
        self.0.len(sequence)
    }
    fn computed(&self, sequence: SequenceId) -> Option<usize> {
        self.0.computed(sequence)
    }
    fn device_usage(&self) -> PoolUsage {
        self.0.device_usage()
    }
    fn host_usage(&self) -> PoolUsage {
        self.0.host_usage()
    }
    fn stats(&self) -> CacheStats {
        self.0.stats()
    }
}
