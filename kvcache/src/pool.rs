//! One pool of physical blocks: who is free, how often each is referenced, which are being copied, and in
//! which order free ones are given out. It knows neither sequences nor tokens.
//!
//! A block is in exactly one state:
//!
//! ```text
//!              acquire                       begin_copy
//!   free  ───────────────►  used (refs > 0) ───────────►  pending (copies > 0)
//!    ▲  ◄───────────────                    ◄───────────        │
//!    │         release                        end_copy          │ end_copy, refs == 0
//!    └──────────────────────────────────────────────────────────┘
//! ```
//!
//! Free blocks are in one of two intrusive doubly linked lists, so that every step is O(1) whatever the size
//! of the pool: `empty`, a stack (a block freed last is taken first, while it is warm), and `cached`, blocks
//! whose content the prefix tree can still find, least recently used first. Empty blocks are taken first.

use crate::{BlockId, PoolUsage};

/// A node of the prefix tree, or [`NO_NODE`].
pub(crate) type NodeId = u32;

/// No node: the block's content cannot be found again.
pub(crate) const NO_NODE: NodeId = NodeId::MAX;

/// End of a list.
const NIL: u32 = u32::MAX;

#[derive(Clone, Debug, PartialEq)]
struct Block {
    /// Table entries and pins that hold it.
    refs: u32,
    /// Copies under way that read or write it.
    copies: u32,
    /// Prefix-tree node whose content it holds.
    node: NodeId,
    prev: u32,
    next: u32,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct List {
    head: u32,
    tail: u32,
}

impl List {
    const EMPTY: Self = Self { head: NIL, tail: NIL };

    fn push_front(&mut self, blocks: &mut [Block], id: u32) {
        blocks[id as usize].prev = NIL;
        blocks[id as usize].next = self.head;
        match self.head {
            NIL => self.tail = id,
            head => blocks[head as usize].prev = id,
        }
        self.head = id;
    }

    fn push_back(&mut self, blocks: &mut [Block], id: u32) {
        blocks[id as usize].prev = self.tail;
        blocks[id as usize].next = NIL;
        match self.tail {
            NIL => self.head = id,
            tail => blocks[tail as usize].next = id,
        }
        self.tail = id;
    }

    fn remove(&mut self, blocks: &mut [Block], id: u32) {
        let Block { prev, next, .. } = blocks[id as usize];
        match prev {
            NIL => self.head = next,
            prev => blocks[prev as usize].next = next,
        }
        match next {
            NIL => self.tail = prev,
            next => blocks[next as usize].prev = prev,
        }
    }

    /// Ids from head to tail.
    fn iter<'a>(&self, blocks: &'a [Block]) -> impl Iterator<Item = BlockId> + 'a {
        let known = |id: u32| (id != NIL).then_some(id);
        std::iter::successors(known(self.head), move |&id| known(blocks[id as usize].next))
    }
}

/// A block taken from the pool.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Taken {
    pub(crate) block: BlockId,
    /// The node that loses its content because of it, or [`NO_NODE`].
    pub(crate) evicted: NodeId,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct BlockPool {
    blocks: Vec<Block>,
    empty: List,
    cached: List,
    free: usize,
    pending: usize,
}

impl BlockPool {
    /// A pool of free blocks, given out in ascending order at first. `None` if the memory for it (20 bytes a
    /// block) cannot be had.
    pub(crate) fn new(total: usize) -> Option<Self> {
        let mut blocks = Vec::new();
        blocks.try_reserve_exact(total).ok()?;
        let mut empty = List::EMPTY;
        blocks.resize(total, Block { refs: 0, copies: 0, node: NO_NODE, prev: NIL, next: NIL });
        for id in 0..total {
            empty.push_back(&mut blocks, id as u32);
        }
        Some(Self { blocks, empty, cached: List::EMPTY, free: total, pending: 0 })
    }

    pub(crate) fn usage(&self) -> PoolUsage {
        let total = self.blocks.len();
        PoolUsage { free: self.free, used: total - self.free - self.pending, pending: self.pending, total }
    }

    pub(crate) fn total(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that [`take`](Self::take) can give out.
    pub(crate) fn free(&self) -> usize {
        self.free
    }

    pub(crate) fn refs(&self, block: BlockId) -> u32 {
        self.blocks[block as usize].refs
    }

    pub(crate) fn is_pending(&self, block: BlockId) -> bool {
        self.blocks[block as usize].copies > 0
    }

    pub(crate) fn node(&self, block: BlockId) -> NodeId {
        self.blocks[block as usize].node
    }

    pub(crate) fn is_free(&self, block: BlockId) -> bool {
        let block = &self.blocks[block as usize];
        block.refs == 0 && block.copies == 0
    }

    /// Gives out a free block with one reference: an empty one, or the least recently used cached one.
    pub(crate) fn take(&mut self) -> Option<Taken> {
        let block = if self.empty.head != NIL { self.empty.head } else { self.cached.head };
        if block == NIL {
            return None;
        }
        self.unlink(block);
        let slot = &mut self.blocks[block as usize];
        slot.refs = 1;
        Some(Taken { block, evicted: std::mem::replace(&mut slot.node, NO_NODE) })
    }

    /// Adds a reference; a free cached block becomes used.
    pub(crate) fn acquire(&mut self, block: BlockId) {
        if self.is_free(block) {
            self.unlink(block);
        }
        self.blocks[block as usize].refs += 1;
    }

    /// Drops a reference; with the last one the block becomes free, unless it is being copied.
    pub(crate) fn release(&mut self, block: BlockId) {
        debug_assert!(
            self.blocks[block as usize].refs > 0,
            "block {block} released more often than acquired"
        );
        self.blocks[block as usize].refs -= 1;
        if self.is_free(block) {
            self.link(block);
        }
    }

    /// A copy from or to a referenced block is ordered.
    pub(crate) fn begin_copy(&mut self, block: BlockId) {
        debug_assert!(!self.is_free(block), "free block {block} cannot be copied");
        let slot = &mut self.blocks[block as usize];
        slot.copies += 1;
        self.pending += usize::from(slot.copies == 1);
    }

    /// A copy from or to the block is done.
    pub(crate) fn end_copy(&mut self, block: BlockId) {
        let slot = &mut self.blocks[block as usize];
        slot.copies -= 1;
        if slot.copies == 0 {
            self.pending -= 1;
            if slot.refs == 0 {
                self.link(block);
            }
        }
    }

    /// Says that the (not free) block now holds a node's content.
    pub(crate) fn set_node(&mut self, block: BlockId, node: NodeId) {
        debug_assert!(!self.is_free(block), "free block {block} cannot get content");
        self.blocks[block as usize].node = node;
    }

    /// The block's content is no longer known by its node.
    pub(crate) fn clear_node(&mut self, block: BlockId) {
        let free = self.is_free(block);
        if free {
            self.unlink(block);
        }
        self.blocks[block as usize].node = NO_NODE;
        if free {
            self.link(block);
        }
    }

    /// The block that would be evicted first.
    pub(crate) fn least_recently_used(&self) -> Option<BlockId> {
        (self.cached.head != NIL).then_some(self.cached.head)
    }

    fn list(&mut self, block: BlockId) -> &mut List {
        if self.blocks[block as usize].node == NO_NODE { &mut self.empty } else { &mut self.cached }
    }

    fn link(&mut self, block: BlockId) {
        self.free += 1;
        if self.blocks[block as usize].node == NO_NODE {
            self.empty.push_front(&mut self.blocks, block);
        } else {
            self.cached.push_back(&mut self.blocks, block);
        }
    }

    fn unlink(&mut self, block: BlockId) {
        self.free -= 1;
        let mut list = *self.list(block);
        list.remove(&mut self.blocks, block);
        *self.list(block) = list;
    }

    /// Recounts everything from the blocks themselves; for [`audit`](crate::KvCacheManager::audit).
    pub(crate) fn audit(&self, name: &str) -> Result<(), String> {
        let (mut free, mut pending) = (0, 0);
        for block in &self.blocks {
            pending += usize::from(block.copies > 0);
            free += usize::from(block.refs == 0 && block.copies == 0);
        }
        if (free, pending) != (self.free, self.pending) {
            return Err(format!(
                "{name} pool counts {} free and {} pending blocks, but {free} and {pending} are",
                self.free, self.pending
            ));
        }
        let mut listed = 0;
        for (list, cached) in [(&self.empty, false), (&self.cached, true)] {
            for id in list.iter(&self.blocks).take(free + 1) {
                listed += 1;
                if !self.is_free(id) || (self.node(id) != NO_NODE) != cached {
                    return Err(format!("{name} block {id} is in the wrong list (cached: {cached})"));
                }
            }
        }
        if listed != free {
            return Err(format!("{name} lists hold {listed} blocks, but {free} are free"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(pool: &mut BlockPool) -> BlockId {
        pool.take().unwrap().block
    }

    #[test]
    fn blocks_come_in_order_and_freed_ids_are_reused_first() {
        let mut pool = BlockPool::new(4).unwrap();
        assert_eq!([take(&mut pool), take(&mut pool), take(&mut pool)], [0, 1, 2]);
        pool.release(1);
        assert_eq!(take(&mut pool), 1);
        assert_eq!(take(&mut pool), 3);
        assert_eq!(pool.take(), None);
        pool.audit("test").unwrap();
    }

    #[test]
    fn cached_blocks_are_taken_last_and_least_recently_used_first() {
        let mut pool = BlockPool::new(3).unwrap();
        for node in [10, 11] {
            let block = take(&mut pool);
            pool.set_node(block, node);
        }
        pool.release(1);
        pool.release(0);
        assert_eq!(pool.least_recently_used(), Some(1));
        assert_eq!(pool.take(), Some(Taken { block: 2, evicted: NO_NODE }));
        assert_eq!(pool.take(), Some(Taken { block: 1, evicted: 11 }));
        pool.acquire(0);
        assert_eq!(pool.take(), None);
        assert_eq!(pool.node(0), 10);
        pool.audit("test").unwrap();
    }

    #[test]
    fn a_block_being_copied_is_neither_free_nor_used() {
        let mut pool = BlockPool::new(1).unwrap();
        let block = take(&mut pool);
        pool.begin_copy(block);
        pool.begin_copy(block);
        assert_eq!(pool.usage(), PoolUsage { free: 0, used: 0, pending: 1, total: 1 });
        pool.release(block);
        pool.end_copy(block);
        assert_eq!(pool.take(), None);
        pool.end_copy(block);
        assert_eq!(pool.usage(), PoolUsage { free: 1, used: 0, pending: 0, total: 1 });
        pool.audit("test").unwrap();
    }

    #[test]
    fn a_free_block_that_loses_its_content_becomes_empty() {
        let mut pool = BlockPool::new(2).unwrap();
        let block = take(&mut pool);
        pool.set_node(block, 7);
        pool.release(block);
        pool.clear_node(block);
        assert_eq!(pool.least_recently_used(), None);
        assert_eq!(pool.free(), 2);
        pool.audit("test").unwrap();
    }

    #[test]
    fn a_pool_that_does_not_fit_in_memory_is_refused() {
        assert_eq!(BlockPool::new(usize::MAX / 64), None);
    }
}
