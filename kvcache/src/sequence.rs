//! What the manager remembers of one sequence: lengths, block tables, and where in the prefix tree it
//! stands. Plain state; the rooms of the manager change it.

use crate::pool::NodeId;
use crate::{BlockId, NO_BLOCK};

/// Marks a table entry as a block of the host pool. Pools are smaller than this bit.
pub(crate) const HOST_BIT: BlockId = 1 << 31;

/// A table entry that is not [`NO_BLOCK`], taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Entry {
    Device(BlockId),
    Host(BlockId),
}

impl Entry {
    /// `None` for [`NO_BLOCK`].
    pub(crate) fn decode(entry: BlockId) -> Option<Self> {
        match entry {
            NO_BLOCK => None,
            entry if entry & HOST_BIT != 0 => Some(Self::Host(entry & !HOST_BIT)),
            entry => Some(Self::Device(entry)),
        }
    }
}

/// The block table of one KV group.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Table {
    /// Entry `i` holds tokens `i * block_size ..`.
    pub(crate) entries: Vec<BlockId>,
    /// The first so many entries are [`NO_BLOCK`], behind the window; no other is.
    pub(crate) released: usize,
}

impl Table {
    /// The entries that hold a block.
    pub(crate) fn live(&self) -> &[BlockId] {
        &self.entries[self.released..]
    }

    /// The same, to change.
    pub(crate) fn live_mut(&mut self) -> &mut [BlockId] {
        &mut self.entries[self.released..]
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Place {
    Device,
    /// Swapped out. Entries shared with outside sequences are still device blocks.
    Host,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Sequence {
    pub(crate) len: usize,
    pub(crate) computed: usize,
    /// The prefix-tree node of the last full computed block (the salt's root before the first);
    /// [`NO_NODE`](crate::pool::NO_NODE) if the cache keeps no prefixes.
    pub(crate) node: NodeId,
    /// Computed tokens after that block: fewer than a block. Empty if the cache keeps no prefixes.
    pub(crate) tail: Vec<u32>,
    /// One for each KV group, all of the same length.
    pub(crate) tables: Vec<Table>,
    pub(crate) place: Place,
}
