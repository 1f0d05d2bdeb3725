//! What changes once tokens are computed: full blocks become prefix-cache entries or merge into them, and
//! sliding windows let go of what they have left behind.

use super::KvCacheManager;
use crate::geometry::Geometry;
use crate::memory::Memory;
use crate::pool::NO_NODE;
use crate::sequence::Sequence;
use crate::{CacheError, NO_BLOCK, SequenceId};

impl KvCacheManager {
    pub(super) fn mark_tokens_computed(&mut self, id: SequenceId, tokens: &[u32]) -> Result<(), CacheError> {
        let &Sequence { len, computed, .. } = self.get_on_device(id)?;
        let wanted = computed.saturating_add(tokens.len());
        if wanted > len {
            return Err(CacheError::BeyondAllocated { sequence: id, len, wanted });
        }
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return Err(CacheError::UnknownSequence(id));
        };
        if sequence.node == NO_NODE {
            sequence.computed = wanted;
        } else {
            enter_blocks(&self.geometry, &mut self.memory, sequence, tokens);
        }
        release_behind_windows(&self.geometry, &mut self.memory, sequence);
        Ok(())
    }
}

/// Follows the tokens down the prefix tree, one node for each block that they fill.
fn enter_blocks(geometry: &Geometry, memory: &mut Memory, sequence: &mut Sequence, mut tokens: &[u32]) {
    let block_size = geometry.block_size();
    while !tokens.is_empty() {
        let (now, later) = tokens.split_at(tokens.len().min(block_size - sequence.tail.len()));
        tokens = later;
        let index = geometry.block_of(sequence.computed);
        sequence.computed += now.len();
        if sequence.tail.len() + now.len() < block_size {
            sequence.tail.extend_from_slice(now);
            return;
        }
        let full = if sequence.tail.is_empty() {
            now
        } else {
            sequence.tail.extend_from_slice(now);
            &sequence.tail
        };
        let node = memory.tree.acquire_child(sequence.node, full);
        memory.tree.release(sequence.node);
        sequence.node = node;
        sequence.tail.clear();
        for (group, table) in sequence.tables.iter_mut().enumerate() {
            memory.enter(node, group, &mut table.entries[index]);
        }
    }
}

/// Frees the blocks that no query from the first uncomputed position on can see.
fn release_behind_windows(geometry: &Geometry, memory: &mut Memory, sequence: &mut Sequence) {
    for (group, table) in sequence.tables.iter_mut().enumerate() {
        let first = geometry.first_visible(group, sequence.computed).min(table.entries.len());
        if first <= table.released {
            continue;
        }
        for entry in table.entries[table.released..first].iter_mut().rev() {
            memory.device.release(std::mem::replace(entry, NO_BLOCK));
        }
        table.released = first;
    }
}
