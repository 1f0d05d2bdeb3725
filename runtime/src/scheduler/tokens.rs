//! What sampling makes of the sequences: they get tokens, branch, end or go.

use super::group::Group;
use super::{FinishedSequence, Scheduler, rebuild};
use crate::request::RequestId;
use pagewise_kvcache::{CacheError, CacheManager, SequenceId};

impl Scheduler {
    /// Appends a sampled token to a sequence; it is computed in the next step. Where a step was planned ahead, this
    /// is the token that its placeholder stands for.
    pub fn push_token(&mut self, request: RequestId, index: usize, token: u32) {
        let Some(group) = self.group_mut(request) else { return };
        if let Some(sequence) = group.sequences.get_mut(index) {
            sequence.placeholder = None;
            sequence.tokens.push(token);
        }
        rebuild_if_out(group);
    }

    /// Puts others in the place of a group's sequences: the new one at index `i` continues the old one at index
    /// `parents[i]`. An old sequence that nobody continues is freed, and one that several continue is forked: they
    /// share all of its blocks. Each is then given its own next token.
    ///
    /// # Errors
    /// What the cache manager answers; see [`schedule`](Self::schedule).
    pub fn branch(
        &mut self,
        request: RequestId,
        parents: &[usize],
        cache: &mut dyn CacheManager,
    ) -> Result<(), CacheError> {
        let mut next_sequence = self.next_sequence;
        let Some(group) = self.group_mut(request) else { return Ok(()) };
        // What is swapped out cannot be forked. It can be preempted between its step and this only where steps are
        // planned ahead.
        if group
            .sequences
            .iter()
            .any(|sequence| sequence.slots > 0 && cache.block_table(sequence.id, 0).is_none())
        {
            group.release(cache)?;
        }
        let old = std::mem::take(&mut group.sequences);
        let mut taken = vec![false; old.len()];
        for &parent in parents {
            let Some((sequence, taken)) = old.get(parent).zip(taken.get_mut(parent)) else { continue };
            let mut child = sequence.clone();
            child.origin = None;
            if std::mem::replace(taken, true) {
                child.id = SequenceId(next_sequence);
                next_sequence += 1;
                if child.slots > 0 {
                    cache.fork(sequence.id, child.id)?;
                }
            }
            group.sequences.push(child);
        }
        let mut freed = Ok(());
        for (mut sequence, taken) in old.into_iter().zip(taken) {
            if !taken {
                freed = freed.and(sequence.release(cache));
            }
        }
        rebuild_if_out(group);
        self.next_sequence = next_sequence;
        freed
    }

    /// Ends one sequence and frees its blocks; with the last one the group is gone. `None` if there is no such
    /// sequence running.
    ///
    /// # Errors
    /// What the cache manager answers.
    pub fn finish_sequence(
        &mut self,
        request: RequestId,
        index: usize,
        cache: &mut dyn CacheManager,
    ) -> Result<Option<FinishedSequence>, CacheError> {
        let resident = self.resident_mut(request).is_some();
        let Some(group) = self.group_mut(request) else { return Ok(None) };
        let prompt_len = group.prompt_len;
        let Some(sequence) = group.sequences.get_mut(index).filter(|sequence| !sequence.finished) else {
            return Ok(None);
        };
        sequence.finished = true;
        let completion = sequence.tokens.split_off(prompt_len.min(sequence.tokens.len()));
        let freed = sequence.release(cache);
        group.seats = group.seats.saturating_sub(1);
        rebuild_if_out(group);
        let group_done = group.unfinished().next().is_none();
        self.resident_sequences -= usize::from(resident);
        if group_done {
            self.take(request);
        }
        freed.map(|()| Some(FinishedSequence { completion, group_done }))
    }

    /// Takes a group out and frees what it holds at once.
    ///
    /// # Errors
    /// What the cache manager answers.
    pub fn remove(&mut self, request: RequestId, cache: &mut dyn CacheManager) -> Result<(), CacheError> {
        self.take(request).map_or(Ok(()), |mut group| group.release(cache))
    }
}

/// Whoever loses or gains sequences or tokens outside of the cache (where steps are planned ahead) comes back by another
/// plan.
fn rebuild_if_out(group: &mut Group) {
    if group.held().is_empty() {
        rebuild::plan(group);
    }
}
