//! The copies that a backend has to make: the list of the step being put together, and the lists taken but
//! not yet confirmed. It knows block ids only; the pools know that these blocks are pending.

use std::collections::VecDeque;

use rustc_hash::FxHashMap;

use crate::{BlockCopy, BlockId, BlockOps};

#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct CopyQueue {
    current: BlockOps,
    /// For each destination of `current.copy`, its source.
    sources: FxHashMap<BlockId, BlockId>,
    taken: VecDeque<BlockOps>,
}

impl CopyQueue {
    pub(crate) fn swap_out(&mut self, copy: BlockCopy) {
        self.current.swap_out.push(copy);
    }

    pub(crate) fn swap_in(&mut self, copy: BlockCopy) {
        self.current.swap_in.push(copy);
    }

    /// Adds a device copy and returns the source that it reads.
    ///
    /// A backend may make all copies of a list at once, so none may read what another one writes: a copy of
    /// a block that is itself a destination of this list reads that block's source instead.
    pub(crate) fn copy(&mut self, group: usize, src: BlockId, dst: BlockId) -> BlockId {
        let src = self.sources.get(&src).copied().unwrap_or(src);
        self.sources.insert(dst, src);
        self.current.copy.push(BlockCopy { group, src, dst });
        src
    }

    pub(crate) fn take(&mut self) -> BlockOps {
        self.sources.clear();
        let ops = std::mem::take(&mut self.current);
        self.taken.push_back(ops.clone());
        ops
    }

    /// The list taken longest ago.
    pub(crate) fn confirm(&mut self) -> Option<BlockOps> {
        self.taken.pop_front()
    }

    /// Every list that is not confirmed, the one being put together last.
    pub(crate) fn unconfirmed(&self) -> impl Iterator<Item = &BlockOps> {
        self.taken.iter().chain(std::iter::once(&self.current))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_copy_of_a_list_reads_what_another_one_writes() {
        let mut queue = CopyQueue::default();
        assert_eq!(queue.copy(0, 1, 2), 1);
        assert_eq!(queue.copy(0, 2, 3), 1);
        assert_eq!(queue.copy(0, 3, 4), 1);
        assert!(queue.take().copy.iter().all(|copy| copy.src == 1));
        assert_eq!(queue.copy(0, 3, 5), 3, "the next list comes after the first");
    }

    #[test]
    fn lists_are_confirmed_in_the_order_taken() {
        let mut queue = CopyQueue::default();
        queue.copy(0, 1, 2);
        let first = queue.take();
        let second = queue.take();
        assert!(second.is_empty());
        assert_eq!(queue.confirm(), Some(first));
        assert_eq!(queue.confirm(), Some(second));
        assert_eq!(queue.confirm(), None);
    }
}
