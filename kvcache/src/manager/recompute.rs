//! Preemption by recomputation (paper, section 4.5): what a dropped group gives back, and the steps that
//! bring it back later with the same sharing.
//!
//! The rebuilt group holds no more blocks than before: what was one block for several sequences is computed
//! once and forked again, at the point where the sequences parted. (With sliding windows this is so when
//! everything is computed; a window that has let go of a block no longer says with whom it was shared.)

use std::cmp::Reverse;

use rustc_hash::FxHashMap;

use super::KvCacheManager;
use super::admission::Demand;
use crate::sequence::{Entry, Sequence};
use crate::{Admission, CacheError, CacheManager, SequenceId};

/// One step of bringing a dropped group back. The caller knows the tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RebuildStep {
    /// Give the sequence slots for its first `len` tokens
    /// ([`allocate`](CacheManager::allocate) if it is not in the cache, else
    /// [`append`](CacheManager::append)) and compute the first `computed` of them. A KV group with a sliding
    /// window needs no more blocks than before if this is done in chunks.
    Grow {
        /// Which.
        sequence: SequenceId,
        /// Slots it has afterwards.
        len: usize,
        /// Tokens whose keys and values are in the cache afterwards (more, if more was found cached).
        computed: usize,
    },
    /// [`fork`](CacheManager::fork) the child from the parent as it stands.
    Fork {
        /// Already rebuilt up to the point where the two parted.
        parent: SequenceId,
        /// Takes all of the parent's blocks.
        child: SequenceId,
    },
    /// [`truncate`](CacheManager::truncate) the sequence, whose slots in a shared last block are fewer than
    /// those of another.
    Truncate {
        /// Which.
        sequence: SequenceId,
        /// Slots it has afterwards.
        len: usize,
    },
}

/// What became of a group that was dropped, and how it comes back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecomputePlan {
    /// Device blocks that became free by it. Blocks shared with outside sequences, pinned or being copied
    /// did not.
    pub freed_blocks: usize,
    /// Distinct blocks that the group held, on the device and on the host: what it needs at most to come
    /// back.
    pub held_blocks: usize,
    /// To be carried out in this order.
    pub steps: Vec<RebuildStep>,
}

/// How a sequence of the group hangs on the one that had its last shared block before it.
struct Branch {
    parent: usize,
    /// Index of that block.
    block: usize,
}

impl KvCacheManager {
    /// Drops a group of sequences, wherever they are, and says how to rebuild it.
    ///
    /// Each sequence comes back with the slots and computed tokens that it had. Content that the prefix cache
    /// keeps may make this cheaper still.
    ///
    /// # Errors
    /// [`CacheError::UnknownSequence`], [`CacheError::NamedTwice`].
    pub fn drop_for_recompute(&mut self, group: &[SequenceId]) -> Result<RecomputePlan, CacheError> {
        self.check_named_once(group)?;
        let mut members = Vec::with_capacity(group.len());
        for &id in group {
            members.push((id, self.get(id)?));
        }
        // Long ones first: then nobody has to be forked from a sequence that is shorter.
        members.sort_by_key(|(_, sequence)| Reverse(sequence.len));
        let (branches, held_blocks) = branches(&members);
        let steps = self.rebuild_steps(&members, &branches);
        let free_before = self.memory.device.free();
        for &id in group {
            self.free_sequence(id)?;
        }
        let freed_blocks = self.memory.device.free() - free_before;
        Ok(RecomputePlan { freed_blocks, held_blocks, steps })
    }

    /// Whether a dropped group can come back. Counts every block that it held and one more for the next
    /// token of each KV group; cached prefixes may make it need fewer.
    pub fn can_rebuild(&self, plan: &RecomputePlan) -> Admission {
        let blocks = plan.held_blocks + self.geometry.groups();
        let alone = if blocks > self.device_usage().total { plan.held_blocks } else { blocks };
        self.answer(&Demand { now: alone, alone })
    }

    fn rebuild_steps(&self, members: &[Member<'_>], branches: &[Option<Branch>]) -> Vec<RebuildStep> {
        // Children of each sequence by the block that they share last: `(block, child)`, first blocks first.
        let mut children: Vec<Vec<(usize, usize)>> = members.iter().map(|_| Vec::new()).collect();
        let mut open = Vec::new();
        for (index, branch) in branches.iter().enumerate() {
            match branch {
                Some(branch) => children[branch.parent].push((branch.block, index)),
                None => open.push(index),
            }
        }
        open.reverse();
        let mut rebuild = Rebuild { members, stand: vec![(0, 0); members.len()], steps: Vec::new() };
        while let Some(index) = open.pop() {
            children[index].sort_unstable();
            for together in children[index].chunk_by(|a, b| a.0 == b.0) {
                let end = self.geometry.tokens_in(together[0].0 + 1);
                rebuild.fork(index, together, end);
            }
            let (_, sequence) = members[index];
            rebuild.grow(index, sequence.len, sequence.computed);
            open.extend(children[index].iter().rev().map(|&(_, child)| child));
        }
        rebuild.steps
    }
}

type Member<'a> = (SequenceId, &'a Sequence);

/// The steps so far, and how far each sequence of the group stands after them.
struct Rebuild<'a> {
    members: &'a [Member<'a>],
    /// Slots and computed tokens of each.
    stand: Vec<(usize, usize)>,
    steps: Vec<RebuildStep>,
}

impl Rebuild<'_> {
    /// Lets a sequence grow to `len` slots and `computed` tokens, if it is not there yet.
    fn grow(&mut self, index: usize, len: usize, computed: usize) {
        let (has_len, has_computed) = self.stand[index];
        if len > has_len || computed > has_computed {
            let (len, computed) = (len.max(has_len), computed.max(has_computed));
            self.stand[index] = (len, computed);
            self.steps.push(RebuildStep::Grow { sequence: self.members[index].0, len, computed });
        }
    }

    /// Forks all children that part from `parent` in the same block, which ends at token `end`. Where that
    /// block is partly filled, the parent has most slots of it; it computes what all of them have computed.
    fn fork(&mut self, parent: usize, together: &[(usize, usize)], end: usize) {
        let (parent_id, sequence) = self.members[parent];
        let computed = together.iter().map(|&(_, child)| self.members[child].1.computed);
        let computed = computed.fold(sequence.computed, usize::min).min(end);
        self.grow(parent, sequence.len.min(end), computed);
        for &(_, child) in together {
            let (child_id, sequence) = self.members[child];
            self.steps.push(RebuildStep::Fork { parent: parent_id, child: child_id });
            let (len, computed) = self.stand[parent];
            let shared = sequence.len.min(end).min(len);
            if shared < len {
                self.steps.push(RebuildStep::Truncate { sequence: child_id, len: shared });
            }
            self.stand[child] = (shared, computed.min(shared));
        }
    }
}

/// For each member, the earlier one that holds its last shared block; and how many distinct blocks there are
/// in all.
fn branches(members: &[Member<'_>]) -> (Vec<Option<Branch>>, usize) {
    let mut first_holder: FxHashMap<Entry, usize> = FxHashMap::default();
    let mut branches: Vec<Option<Branch>> = Vec::with_capacity(members.len());
    for (index, (_, sequence)) in members.iter().enumerate() {
        let mut last: Option<Branch> = None;
        for table in &sequence.tables {
            for (block, &entry) in table.entries.iter().enumerate().skip(table.released) {
                let Some(entry) = Entry::decode(entry) else { continue };
                let parent = *first_holder.entry(entry).or_insert(index);
                if parent != index && last.as_ref().is_none_or(|last| block > last.block) {
                    last = Some(Branch { parent, block });
                }
            }
        }
        // Who itself parts from another only later has this block from there.
        while let Some(branch) = &mut last {
            match &branches[branch.parent] {
                Some(earlier) if earlier.block >= branch.block => branch.parent = earlier.parent,
                _ => break,
            }
        }
        branches.push(last);
    }
    (branches, first_holder.len())
}
