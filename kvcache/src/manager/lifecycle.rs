//! The life of a sequence: allocate, append (with copy-on-write), fork, truncate, free.

use super::KvCacheManager;
use crate::memory::Hit;
use crate::pool::NO_NODE;
use crate::sequence::{Place, Sequence, Table};
use crate::{Allocation, BlockId, CacheError, NO_BLOCK, Prompt, SequenceId};

impl KvCacheManager {
    /// The cached prefix that a prompt may use: never its last token, whose logits are wanted.
    pub(super) fn find_prefix(&self, prompt: &Prompt<'_>) -> Hit {
        if !self.config.prefix_cache || !prompt.use_prefix_cache {
            return Hit::default();
        }
        let max_blocks = self.geometry.block_of(prompt.tokens.len().saturating_sub(1));
        self.memory.look_up(&self.geometry, prompt.salt, prompt.tokens, max_blocks)
    }

    pub(super) fn allocate_sequence(
        &mut self,
        id: SequenceId,
        prompt: Prompt<'_>,
    ) -> Result<Allocation, CacheError> {
        if self.sequences.contains_key(&id) {
            return Err(CacheError::SequenceExists(id));
        }
        let len = prompt.tokens.len();
        if len == 0 {
            return Err(CacheError::EmptyPrompt(id));
        }
        let hit = self.find_prefix(&prompt);
        let groups = self.geometry.groups();
        let blocks = self.geometry.blocks_for(len);
        let wanted = (blocks - hit.blocks()) * groups;
        let found: Vec<BlockId> =
            (0..groups).flat_map(|group| self.memory.hit_blocks(&self.geometry, &hit, group)).collect();
        // The node is held too before a block is taken, which may evict: with a small window no block holds it.
        let hit_node = hit.nodes.last().copied().unwrap_or(NO_NODE);
        self.memory.acquire_node(hit_node);
        let mut new = match self.memory.keep_and_take_device(&found, wanted) {
            Ok(new) => new.into_iter(),
            Err(error) => {
                self.memory.release_node(hit_node);
                return Err(error);
            }
        };
        let node = match hit_node {
            NO_NODE if self.config.prefix_cache => self.memory.tree.acquire_root(prompt.salt),
            node => node,
        };
        let tables = (0..groups)
            .map(|group| {
                let mut entries = Vec::with_capacity(blocks);
                let found = self.memory.hit_blocks(&self.geometry, &hit, group);
                let released = hit.blocks() - found.len();
                entries.resize(released, NO_BLOCK);
                entries.extend(found);
                entries.extend(new.by_ref().take(blocks - hit.blocks()));
                Table { entries, released }
            })
            .collect();
        let cached_tokens = self.geometry.tokens_in(hit.blocks());
        if self.config.prefix_cache && prompt.use_prefix_cache {
            self.memory.stats.lookup_tokens += len as u64;
            self.memory.stats.hit_tokens += cached_tokens as u64;
        }
        let sequence =
            Sequence { len, computed: cached_tokens, node, tail: Vec::new(), tables, place: Place::Device };
        self.sequences.insert(id, sequence);
        Ok(Allocation { cached_tokens })
    }

    /// The blocks that an append takes: the new ones, and a copy of each last one that others hold too.
    pub(super) fn check_append(&self, id: SequenceId, tokens: usize) -> Result<usize, CacheError> {
        let sequence = self.get_on_device(id)?;
        let free = self.memory.device.free();
        let len =
            sequence.len.checked_add(tokens).ok_or(CacheError::OutOfBlocks { wanted: usize::MAX, free })?;
        let new = self.geometry.blocks_for(len) - self.geometry.blocks_for(sequence.len);
        let mut wanted = new.saturating_mul(self.geometry.groups());
        if tokens > 0 && self.geometry.offset(sequence.len) != 0 {
            let shared =
                |table: &Table| table.entries.last().is_some_and(|&last| self.memory.device.refs(last) > 1);
            wanted = wanted.saturating_add(sequence.tables.iter().filter(|table| shared(table)).count());
        }
        if wanted > free { Err(CacheError::OutOfBlocks { wanted, free }) } else { Ok(wanted) }
    }

    pub(super) fn append_slots(&mut self, id: SequenceId, tokens: usize) -> Result<(), CacheError> {
        let wanted = self.check_append(id, tokens)?;
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return Err(CacheError::UnknownSequence(id));
        };
        if tokens == 0 {
            return Ok(());
        }
        let mut new = self.memory.keep_and_take_device(&[], wanted)?.into_iter();
        if self.geometry.offset(sequence.len) != 0 {
            for (group, table) in sequence.tables.iter_mut().enumerate() {
                let Some(last) = table.entries.last_mut() else { continue };
                if self.memory.device.refs(*last) > 1 {
                    let Some(copy) = new.next() else { continue };
                    self.memory.copy_on_write(group, *last, copy);
                    self.memory.device.release(*last);
                    *last = copy;
                } else {
                    // Ours alone: written in place. Content known from before a truncation ends here.
                    self.memory.forget(*last);
                }
            }
        }
        sequence.len += tokens;
        let blocks = self.geometry.blocks_for(sequence.len);
        for table in &mut sequence.tables {
            let missing = blocks.saturating_sub(table.entries.len());
            table.entries.extend(new.by_ref().take(missing));
        }
        debug_assert!(new.next().is_none(), "an append takes the blocks that were counted");
        Ok(())
    }

    pub(super) fn fork_sequence(&mut self, parent: SequenceId, child: SequenceId) -> Result<(), CacheError> {
        let sequence = self.get_on_device(parent)?;
        if self.sequences.contains_key(&child) {
            return Err(CacheError::SequenceExists(child));
        }
        let sequence = sequence.clone();
        for &entry in sequence.tables.iter().flat_map(Table::live) {
            self.memory.acquire_entry(entry);
        }
        self.memory.acquire_node(sequence.node);
        self.sequences.insert(child, sequence);
        Ok(())
    }

    pub(super) fn truncate_sequence(&mut self, id: SequenceId, len: usize) -> Result<(), CacheError> {
        let geometry = &self.geometry;
        let sequence = self.sequences.get_mut(&id).ok_or(CacheError::UnknownSequence(id))?;
        if len > sequence.len {
            return Err(CacheError::BeyondAllocated { sequence: id, len: sequence.len, wanted: len });
        }
        let blocks = geometry.blocks_for(len);
        let gone = |(group, table): (usize, &Table)| {
            let first = geometry.first_visible(group, len);
            first < blocks && first < table.released
        };
        if sequence.tables.iter().enumerate().any(gone) {
            return Err(CacheError::BehindWindow { sequence: id, len });
        }

        sequence.len = len;
        for index in (blocks..sequence.tables.first().map_or(0, |table| table.entries.len())).rev() {
            for table in &mut sequence.tables {
                self.memory.release_entry(table.entries[index]);
            }
        }
        for table in &mut sequence.tables {
            table.entries.truncate(blocks);
            table.released = table.released.min(blocks);
        }
        if len >= sequence.computed {
            return Ok(());
        }
        let full_before = geometry.block_of(sequence.computed);
        sequence.computed = len;
        if sequence.node == NO_NODE {
            return Ok(());
        }
        let (full, offset) = (geometry.block_of(len), geometry.offset(len));
        if full == full_before {
            sequence.tail.truncate(offset);
            return Ok(());
        }
        // Walk back to the block that is cut; its node still knows the tokens that stay.
        let tree = &mut self.memory.tree;
        let mut cut = sequence.node;
        for _ in full + 1..full_before {
            cut = tree.parent(cut);
        }
        sequence.tail.clear();
        sequence.tail.extend_from_slice(&tree.tokens(cut)[..offset]);
        let node = tree.parent(cut);
        tree.acquire(node);
        tree.release(sequence.node);
        sequence.node = node;
        Ok(())
    }

    pub(super) fn free_sequence(&mut self, id: SequenceId) -> Result<(), CacheError> {
        let sequence = self.sequences.remove(&id).ok_or(CacheError::UnknownSequence(id))?;
        // Tail before head, so that the tail is evicted first: a tail without its head is of no use.
        let blocks = sequence.tables.first().map_or(0, |table| table.entries.len());
        let start = sequence.tables.iter().map(|table| table.released).min().unwrap_or(0);
        for index in (start..blocks).rev() {
            for table in &sequence.tables {
                self.memory.release_entry(table.entries[index]);
            }
        }
        self.memory.release_node(sequence.node);
        Ok(())
    }
}
