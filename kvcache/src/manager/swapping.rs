//! Groups of sequences to the host and back (paper, section 4.5): which blocks move, which stay because
//! somebody else holds them, and which need no copy on return because the prefix cache still has them.
//!
//! The sharing inside a group survives: a block that several of its sequences hold is copied once and held
//! by as many on the other side.

use rustc_hash::{FxHashMap, FxHashSet};

use super::KvCacheManager;
use super::admission::Demand;
use crate::pool::{NO_NODE, NodeId};
use crate::sequence::{Entry, HOST_BIT, Place, Sequence};
use crate::{Admission, BlockId, CacheError, SequenceId};

/// A block of a group, seen from one pool.
struct Held {
    group: usize,
    block: BlockId,
    /// Table entries of the group's sequences that hold it.
    holders: u32,
    /// The node whose content it holds, as far as the holder that was looked at first knows.
    node: NodeId,
}

/// Where a host block's content comes from on return.
enum Source {
    /// The prefix cache still has it in this device block.
    Cached(BlockId),
    Copy,
}

struct SwapIn {
    blocks: Vec<(Held, Source)>,
    demand: Demand,
    /// A sequence whose host block is still being written, if there is one.
    pending: Option<SequenceId>,
}

impl KvCacheManager {
    pub(super) fn swap_group_out(&mut self, group: &[SequenceId]) -> Result<(), CacheError> {
        self.check_named_once(group)?;
        let mut held: Vec<Held> = Vec::new();
        let mut index: FxHashMap<BlockId, usize> = FxHashMap::default();
        for &id in group {
            for (kv_group, table) in self.get_on_device(id)?.tables.iter().enumerate() {
                for &block in table.live() {
                    let at = *index.entry(block).or_insert_with(|| {
                        held.push(Held { group: kv_group, block, holders: 0, node: NO_NODE });
                        held.len() - 1
                    });
                    held[at].holders += 1;
                }
            }
        }
        let device = &self.memory.device;
        held.retain(|held| device.refs(held.block) == held.holders);
        if held.iter().any(|held| device.is_pending(held.block)) {
            return Err(CacheError::Pending(self.first_pending(group)));
        }
        let copies = self.memory.take_host(held.len())?;

        let mut moved: FxHashMap<BlockId, BlockId> = FxHashMap::default();
        for (Held { group, block, holders, .. }, copy) in held.iter().rev().zip(copies) {
            for _ in 1..*holders {
                self.memory.host.acquire(copy);
            }
            self.memory.swap_out(*group, *block, copy);
            for _ in 0..*holders {
                self.memory.device.release(*block);
            }
            moved.insert(*block, copy | HOST_BIT);
        }
        for id in group {
            if let Some(sequence) = self.sequences.get_mut(id) {
                relocate(sequence, &moved, Place::Host);
            }
        }
        Ok(())
    }

    pub(super) fn swap_group_in(&mut self, group: &[SequenceId]) -> Result<(), CacheError> {
        let SwapIn { blocks, pending, .. } = self.plan_swap_in(group)?;
        if let Some(id) = pending {
            return Err(CacheError::Pending(id));
        }
        let mut kept = Vec::new();
        for (held, source) in &blocks {
            if let Source::Cached(block) = *source {
                kept.extend((0..held.holders).map(|_| block));
            }
        }
        let wanted = blocks.iter().filter(|(_, source)| matches!(source, Source::Copy)).count();
        let mut new = self.memory.keep_and_take_device(&kept, wanted)?.into_iter();

        let mut moved: FxHashMap<BlockId, BlockId> = FxHashMap::default();
        for (held, source) in &blocks {
            let block = match *source {
                Source::Cached(block) => block,
                Source::Copy => {
                    let Some(block) = new.next() else { continue };
                    for _ in 1..held.holders {
                        self.memory.device.acquire(block);
                    }
                    self.memory.swap_in(held.group, held.block, block);
                    if held.node != NO_NODE {
                        self.memory.adopt(held.node, held.group, block);
                    }
                    block
                }
            };
            for _ in 0..held.holders {
                self.memory.host.release(held.block);
            }
            moved.insert(held.block | HOST_BIT, block);
        }
        for id in group {
            if let Some(sequence) = self.sequences.get_mut(id) {
                relocate(sequence, &moved, Place::Device);
            }
        }
        Ok(())
    }

    pub(super) fn admit_swapped_group(&self, group: &[SequenceId]) -> Admission {
        match self.plan_swap_in(group) {
            Err(_) => Admission::Never,
            Ok(SwapIn { pending: Some(_), .. }) => Admission::Later,
            Ok(SwapIn { demand, .. }) => self.answer(&demand),
        }
    }

    fn plan_swap_in(&self, group: &[SequenceId]) -> Result<SwapIn, CacheError> {
        self.check_named_once(group)?;
        let mut plan = SwapIn { blocks: Vec::new(), demand: Demand { now: 0, alone: 0 }, pending: None };
        let mut index: FxHashMap<BlockId, usize> = FxHashMap::default();
        let mut stayed = FxHashSet::default();
        let mut found_free = FxHashSet::default();
        for &id in group {
            let sequence = self.get(id)?;
            if sequence.place != Place::Host {
                return Err(CacheError::NotOnHost(id));
            }
            let nodes = self.nodes_of(sequence);
            for (kv_group, table) in sequence.tables.iter().enumerate() {
                for (position, &entry) in table.entries.iter().enumerate().skip(table.released) {
                    let block = match Entry::decode(entry) {
                        Some(Entry::Host(block)) => block,
                        Some(Entry::Device(block)) => {
                            stayed.insert(block);
                            continue;
                        }
                        None => continue,
                    };
                    if self.memory.host.is_pending(block) {
                        plan.pending.get_or_insert(id);
                    }
                    let at = *index.entry(block).or_insert_with(|| {
                        let node = nodes.get(position).copied().unwrap_or(NO_NODE);
                        let source = self.source(node, kv_group);
                        match source {
                            Source::Copy => plan.demand.now += 1,
                            Source::Cached(found) if self.memory.device.refs(found) == 0 => {
                                found_free.insert(found);
                            }
                            Source::Cached(_) => {}
                        }
                        plan.blocks.push((Held { group: kv_group, block, holders: 0, node }, source));
                        plan.blocks.len() - 1
                    });
                    plan.blocks[at].0.holders += 1;
                }
            }
        }
        plan.demand.now += found_free.len();
        plan.demand.alone = plan.blocks.len() + stayed.len();
        Ok(plan)
    }

    fn source(&self, node: NodeId, group: usize) -> Source {
        if node == NO_NODE {
            return Source::Copy;
        }
        self.memory.usable_block(node, group).map_or(Source::Copy, Source::Cached)
    }

    /// The prefix-tree nodes of the sequence's full computed blocks, first to last; none if the cache keeps
    /// no prefixes.
    pub(super) fn nodes_of(&self, sequence: &Sequence) -> Vec<NodeId> {
        if sequence.node == NO_NODE {
            return Vec::new();
        }
        let tree = &self.memory.tree;
        let mut nodes: Vec<NodeId> =
            std::iter::successors(Some(sequence.node), |&node| Some(tree.parent(node)))
                .take(self.geometry.block_of(sequence.computed))
                .collect();
        nodes.reverse();
        nodes
    }

    pub(super) fn check_named_once(&self, group: &[SequenceId]) -> Result<(), CacheError> {
        let mut seen = FxHashSet::default();
        match group.iter().find(|&&id| !seen.insert(id)) {
            Some(&id) => Err(CacheError::NamedTwice(id)),
            None => Ok(()),
        }
    }

    /// A sequence of the group, which has one, that holds a pending device block.
    fn first_pending(&self, group: &[SequenceId]) -> SequenceId {
        let holds_pending = |id: &&SequenceId| {
            self.sequences.get(id).is_some_and(|sequence| {
                let mut live = sequence.tables.iter().flat_map(|table| table.live());
                live.any(|&block| self.memory.device.is_pending(block))
            })
        };
        group.iter().find(holds_pending).or(group.first()).copied().unwrap_or(SequenceId(0))
    }
}

/// Replaces the table entries that have moved.
fn relocate(sequence: &mut Sequence, moved: &FxHashMap<BlockId, BlockId>, place: Place) {
    for entry in sequence.tables.iter_mut().flat_map(|table| table.live_mut()) {
        if let Some(&to) = moved.get(entry) {
            *entry = to;
        }
    }
    sequence.place = place;
}
