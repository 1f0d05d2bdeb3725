//! The prefix cache as its users see it: how much of a prompt is cached, prefixes that are pinned, and the
//! reset. How content is found is the prefix tree's business, what is evicted when the pool's.

use super::KvCacheManager;
use crate::memory::Hit;
use crate::pool::NodeId;
use crate::{BlockId, CacheError, Prompt};

/// Names a pin made by [`CacheManager::pin_prefix`](crate::CacheManager::pin_prefix).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PinId(u64);

impl PinId {
    pub(crate) fn number(self) -> u64 {
        self.0
    }
}

/// A pin, and how much it covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PinnedPrefix {
    /// For [`CacheManager::unpin_prefix`](crate::CacheManager::unpin_prefix).
    pub id: PinId,
    /// Leading tokens whose blocks are pinned, a multiple of the block size.
    pub tokens: usize,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Pin {
    node: NodeId,
    /// Of all KV groups, heads first.
    blocks: Vec<BlockId>,
}

impl Pin {
    /// The node it refers to, and its blocks; for the audit.
    pub(super) fn parts(&self) -> (NodeId, &[BlockId]) {
        (self.node, &self.blocks)
    }
}

impl KvCacheManager {
    /// The last full block counts here, even if the prefix ends with it; for KV groups with a sliding
    /// window, the blocks are pinned that a sequence needs to continue right after the prefix.
    ///
    /// The blocks count as used and reduce what other sequences can have until
    /// they are unpinned. The same prefix can be pinned more than once.
    pub(super) fn pin_cached_prefix(&mut self, prefix: Prompt<'_>) -> Result<PinnedPrefix, CacheError> {
        let hit = if self.config.prefix_cache {
            self.memory.look_up(&self.geometry, prefix.salt, prefix.tokens, usize::MAX)
        } else {
            Hit::default()
        };
        let Some(&node) = hit.nodes.last() else { return Err(CacheError::NotCached) };
        let mut blocks = Vec::new();
        for group in 0..self.geometry.groups() {
            blocks.extend(self.memory.hit_blocks(&self.geometry, &hit, group));
        }
        for &block in &blocks {
            self.memory.device.acquire(block);
        }
        self.memory.tree.acquire(node);
        let id = PinId(self.next_pin);
        self.next_pin += 1;
        self.pins.insert(id, Pin { node, blocks });
        Ok(PinnedPrefix { id, tokens: self.geometry.tokens_in(hit.blocks()) })
    }

    pub(super) fn remove_pin(&mut self, id: PinId) -> Result<(), CacheError> {
        let pin = self.pins.remove(&id).ok_or(CacheError::UnknownPin(id.0))?;
        for &block in pin.blocks.iter().rev() {
            self.memory.device.release(block);
        }
        self.memory.tree.release(pin.node);
        Ok(())
    }

    /// Forgets every cached block, for example because the model's weights have changed. Costs the number of
    /// cached blocks. Returns how many there were.
    ///
    /// # Errors
    /// [`CacheError::InUse`] while any sequence or pin holds a block of either pool, or one is being copied:
    /// its content would otherwise come back into the cache.
    pub fn reset_prefix_cache(&mut self) -> Result<usize, CacheError> {
        let in_use = |usage: crate::PoolUsage| usage.used + usage.pending;
        let used = in_use(self.memory.device.usage()) + in_use(self.memory.host.usage());
        if used > 0 {
            return Err(CacheError::InUse { used });
        }
        let mut forgotten = 0;
        while let Some(block) = self.memory.device.least_recently_used() {
            self.memory.forget(block);
            forgotten += 1;
        }
        Ok(forgotten)
    }
}
