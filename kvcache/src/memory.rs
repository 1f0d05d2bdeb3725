//! Everything below the sequences: both pools, the prefix tree, the copies under way and the counters, and
//! the few steps that must change two of them together. It knows no sequence.

use crate::copies::CopyQueue;
use crate::geometry::Geometry;
use crate::pool::{BlockPool, NO_NODE, NodeId};
use crate::prefix_tree::PrefixTree;
use crate::sequence::Entry;
use crate::{BlockCopy, BlockId, BlockOps, CacheError, CacheStats, NO_BLOCK};

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Memory {
    pub(crate) device: BlockPool,
    pub(crate) host: BlockPool,
    pub(crate) tree: PrefixTree,
    pub(crate) copies: CopyQueue,
    pub(crate) stats: CacheStats,
}

/// Cached prefix of a prompt.
#[derive(Debug, Default)]
pub(crate) struct Hit {
    /// The nodes of its blocks, first to last.
    pub(crate) nodes: Vec<NodeId>,
}

impl Hit {
    pub(crate) fn blocks(&self) -> usize {
        self.nodes.len()
    }
}

impl Memory {
    /// Adds a reference to each device block of `kept`, as often as it is named, and takes `wanted` others, which may
    /// evict; or changes nothing, where the free blocks do not suffice for both.
    pub(crate) fn keep_and_take_device(
        &mut self,
        kept: &[BlockId],
        wanted: usize,
    ) -> Result<Vec<BlockId>, CacheError> {
        let mut revived: Vec<BlockId> =
            kept.iter().copied().filter(|&block| self.device.is_free(block)).collect();
        revived.sort_unstable();
        revived.dedup();
        let free = self.device.free() - revived.len();
        if wanted > free {
            return Err(CacheError::OutOfBlocks { wanted, free });
        }
        for &block in kept {
            self.device.acquire(block);
        }
        let mut blocks = Vec::with_capacity(wanted);
        while blocks.len() < wanted
            && let Some(taken) = self.device.take()
        {
            if taken.evicted != NO_NODE {
                self.tree.clear_block(taken.evicted, taken.block);
                self.stats.evicted_blocks += 1;
            }
            blocks.push(taken.block);
        }
        debug_assert_eq!(blocks.len(), wanted, "the device pool gives out as many blocks as it counts");
        Ok(blocks)
    }

    /// Takes host blocks, all that are wanted or none.
    pub(crate) fn take_host(&mut self, wanted: usize) -> Result<Vec<BlockId>, CacheError> {
        let free = self.host.free();
        if wanted > free {
            return Err(CacheError::OutOfHostBlocks { wanted, free });
        }
        let taken = std::iter::from_fn(|| self.host.take());
        let blocks: Vec<BlockId> = taken.take(wanted).map(|taken| taken.block).collect();
        debug_assert_eq!(blocks.len(), wanted, "the host pool gives out as many blocks as it counts");
        Ok(blocks)
    }

    /// Adds a reference to what a table entry names.
    pub(crate) fn acquire_entry(&mut self, entry: BlockId) {
        match Entry::decode(entry) {
            Some(Entry::Device(block)) => self.device.acquire(block),
            Some(Entry::Host(block)) => self.host.acquire(block),
            None => {}
        }
    }

    /// Drops a reference to what a table entry names.
    pub(crate) fn release_entry(&mut self, entry: BlockId) {
        match Entry::decode(entry) {
            Some(Entry::Device(block)) => self.device.release(block),
            Some(Entry::Host(block)) => self.host.release(block),
            None => {}
        }
    }

    /// Adds a reference to a node, unless it is none.
    pub(crate) fn acquire_node(&mut self, node: NodeId) {
        if node != NO_NODE {
            self.tree.acquire(node);
        }
    }

    /// Drops a reference to a node, unless it is none.
    pub(crate) fn release_node(&mut self, node: NodeId) {
        if node != NO_NODE {
            self.tree.release(node);
        }
    }

    /// The device block's content cannot be found any longer (it is about to be overwritten, or unwanted).
    pub(crate) fn forget(&mut self, block: BlockId) {
        let node = self.device.node(block);
        if node != NO_NODE {
            self.device.clear_node(block);
            self.tree.clear_block(node, block);
        }
    }

    /// Orders a copy-on-write from `src` to `dst`.
    pub(crate) fn copy_on_write(&mut self, group: usize, src: BlockId, dst: BlockId) {
        let src = self.copies.copy(group, src, dst);
        // The source may already have lost its last reference, but it is pending then and stays so.
        self.device.begin_copy(src);
        self.device.begin_copy(dst);
        self.stats.copied_blocks += 1;
    }

    /// Orders a swap-out from device block `src` to host block `dst`.
    pub(crate) fn swap_out(&mut self, group: usize, src: BlockId, dst: BlockId) {
        self.copies.swap_out(BlockCopy { group, src, dst });
        self.device.begin_copy(src);
        self.host.begin_copy(dst);
        self.stats.swapped_out_blocks += 1;
    }

    /// Orders a swap-in from host block `src` to device block `dst`.
    pub(crate) fn swap_in(&mut self, group: usize, src: BlockId, dst: BlockId) {
        self.copies.swap_in(BlockCopy { group, src, dst });
        self.host.begin_copy(src);
        self.device.begin_copy(dst);
        self.stats.swapped_in_blocks += 1;
    }

    /// The list of copies taken longest ago is done. `false` if there is none.
    pub(crate) fn confirm(&mut self) -> bool {
        let Some(done) = self.copies.confirm() else { return false };
        self.end_copies(&done);
        true
    }

    /// The list of copies taken longest ago has failed: what its destinations hold is unknown. `false` if
    /// there is none.
    pub(crate) fn abandon(&mut self) -> bool {
        let Some(failed) = self.copies.confirm() else { return false };
        for copy in failed.swap_in.iter().chain(&failed.copy) {
            self.forget(copy.dst);
        }
        self.end_copies(&failed);
        true
    }

    fn end_copies(&mut self, ops: &BlockOps) {
        for copy in &ops.swap_out {
            self.device.end_copy(copy.src);
            self.host.end_copy(copy.dst);
        }
        for copy in &ops.swap_in {
            self.host.end_copy(copy.src);
            self.device.end_copy(copy.dst);
        }
        for copy in &ops.copy {
            self.device.end_copy(copy.src);
            self.device.end_copy(copy.dst);
        }
    }

    /// The block of a node's content that a sequence may use now, or `None`.
    pub(crate) fn usable_block(&self, node: NodeId, group: usize) -> Option<BlockId> {
        let block = self.tree.block(node, group);
        (block != NO_BLOCK && !self.device.is_pending(block)).then_some(block)
    }

    /// The longest cached prefix of `tokens`, of at most `max_blocks` blocks, that holds in every group:
    /// full-attention groups need all of its blocks, window groups those that a query right after it sees.
    pub(crate) fn look_up(&self, geometry: &Geometry, salt: u64, tokens: &[u32], max_blocks: usize) -> Hit {
        let mut hit = Hit::default();
        let Some(mut node) = self.tree.root(salt) else { return hit };
        // For each group, the first block of the unbroken run of usable blocks that ends here.
        let mut run_start = vec![0; geometry.groups()];
        let mut valid = 0;
        'blocks: for chunk in tokens.chunks_exact(geometry.block_size()).take(max_blocks) {
            let Some(child) = self.tree.child(node, chunk) else { break };
            node = child;
            hit.nodes.push(node);
            let blocks = hit.nodes.len();
            let mut holds = true;
            for (group, run_start) in run_start.iter_mut().enumerate() {
                if self.usable_block(node, group).is_none() {
                    if geometry.window(group).is_none() {
                        break 'blocks;
                    }
                    *run_start = blocks;
                }
                holds &= *run_start <= geometry.first_visible(group, geometry.tokens_in(blocks));
            }
            if holds {
                valid = blocks;
            }
        }
        hit.nodes.truncate(valid);
        hit
    }

    /// The device blocks that a sequence standing right after `hit` uses in one group, first to last; the
    /// first `geometry.first_visible(..)` blocks of the hit are behind its window.
    pub(crate) fn hit_blocks<'a>(
        &'a self,
        geometry: &Geometry,
        hit: &'a Hit,
        group: usize,
    ) -> impl ExactSizeIterator<Item = BlockId> + 'a {
        let first = geometry.first_visible(group, geometry.tokens_in(hit.blocks())).min(hit.blocks());
        hit.nodes[first..].iter().map(move |&node| self.tree.block(node, group))
    }

    /// A table entry whose block is now full and computed with a node's content: it becomes the
    /// prefix-cache entry, or, if there already is one, merges into it.
    ///
    /// A block that others hold too is not merged: that would free nothing, and part it from them.
    pub(crate) fn enter(&mut self, node: NodeId, group: usize, entry: &mut BlockId) {
        let own = *entry;
        let cached = self.tree.block(node, group);
        if own == cached || own == NO_BLOCK {
            return;
        }
        if cached == NO_BLOCK {
            self.adopt(node, group, own);
        } else if self.device.is_pending(cached) {
            // Not usable yet: both stay, and only one is known.
        } else if self.device.refs(own) == 1 {
            self.device.acquire(cached);
            self.device.release(own);
            *entry = cached;
        } else if self.device.refs(cached) == 0 && self.device.node(own) == NO_NODE {
            // Better that the block in use is the known one.
            self.forget(cached);
            self.adopt(node, group, own);
        }
    }

    /// Makes `block` the known place of a node's content, if neither has another yet.
    pub(crate) fn adopt(&mut self, node: NodeId, group: usize, block: BlockId) {
        if self.device.node(block) == NO_NODE && self.tree.block(node, group) == NO_BLOCK {
            self.tree.set_block(node, group, block);
            self.device.set_node(block, node);
        }
    }
}
