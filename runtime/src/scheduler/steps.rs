//! The making of one step, and what follows when it has been computed.

use super::admission::{Admitted, exceeds_cache};
use super::group::Group;
use super::{NextToken, Schedule, ScheduledChunk, Scheduler};
use crate::plan::{Chunk, LogitRows, TokenInput};
use crate::request::RequestId;
use pagewise_kvcache::{CacheError, CacheManager};

/// What is left of a step.
struct Budget {
    tokens: usize,
    prompt_logit_rows: usize,
}

/// How reserving slots ended.
enum Reserved {
    All,
    /// Somebody was preempted or refused.
    Preempted,
}

impl Scheduler {
    /// Plans the next step: frees the cancelled, gives every resident sequence slots for its tokens
    /// (preempting the latest arrivals where blocks run out), then fills the budget with decodes, prompts
    /// under way, and new arrivals, in this order.
    ///
    /// The caller computes the plan, reports it through [`commit`](Self::commit), and only then schedules
    /// again.
    ///
    /// # Errors
    /// What the cache manager answers, beyond being out of blocks. Scheduler and cache may then disagree:
    /// call [`drop_resident`](Self::drop_resident).
    pub fn schedule(&mut self, cache: &mut dyn CacheManager) -> Result<Schedule, CacheError> {
        let mut schedule = Schedule::default();
        for mut group in std::mem::take(&mut self.cancelled) {
            group.release(cache)?;
        }
        let reserved = self.reserve(&mut schedule, cache)?;

        let mut budget = Budget {
            tokens: self.config.max_batch_tokens,
            prompt_logit_rows: self.config.max_prompt_logit_rows.max(1),
        };
        for decodes in [true, false] {
            for group in self.resident.values_mut() {
                add_chunks(group, decodes, &mut budget, &mut schedule, cache);
            }
        }
        // In the step of a preemption blocks are short; whoever came in now would be the next to go.
        if matches!(reserved, Reserved::All) {
            while budget.tokens > 0 {
                match self.admit_head(&mut schedule, cache)? {
                    Some(Admitted::Resident) => {
                        if let Some((_, group)) = self.resident.last_key_value() {
                            add_chunks(group, true, &mut budget, &mut schedule, cache);
                            add_chunks(group, false, &mut budget, &mut schedule, cache);
                        }
                    }
                    Some(Admitted::Refused) => {}
                    None => break,
                }
            }
        }

        schedule.plan.block_ops = cache.take_block_ops();
        if !schedule.is_idle() {
            schedule.plan.id = self.next_step;
            self.next_step += 1;
        }
        Ok(schedule)
    }

    /// Gives every resident sequence slots for all of its tokens, in order of arrival.
    fn reserve(
        &mut self,
        schedule: &mut Schedule,
        cache: &mut dyn CacheManager,
    ) -> Result<Reserved, CacheError> {
        let mut outcome = Reserved::All;
        let mut next = RequestId(0);
        'groups: while let Some((&id, group)) = self.resident.range_mut(next..).next() {
            next = RequestId(id.0 + 1);
            if append_missing(group, cache)? {
                continue;
            }
            outcome = Reserved::Preempted;
            // The latest arrival goes until this one has its slots; it may itself be the latest.
            loop {
                if self.resident.len() == 1 {
                    // Blocks whose copies are under way are free in the next step.
                    if cache.device_usage().pending == 0 {
                        self.refuse(id, schedule, cache)?;
                    }
                    break 'groups;
                }
                let victim = self.preempt_latest(cache)?;
                if victim == Some(id) {
                    break 'groups;
                }
                let Some(group) = self.resident.get_mut(&id) else { break };
                if append_missing(group, cache)? {
                    break;
                }
            }
        }
        Ok(outcome)
    }

    fn preempt_latest(&mut self, cache: &mut dyn CacheManager) -> Result<Option<RequestId>, CacheError> {
        let Some((id, mut group)) = self.resident.pop_last() else { return Ok(None) };
        tracing::debug!(request = id.0, "preempted by recomputation: the cache is full");
        self.preemptions += 1;
        self.resident_sequences -= group.unfinished();
        let released = group.release(cache);
        self.waiting.insert(id, group);
        released.map(|()| Some(id))
    }

    fn refuse(
        &mut self,
        id: RequestId,
        schedule: &mut Schedule,
        cache: &mut dyn CacheManager,
    ) -> Result<(), CacheError> {
        let Some(mut group) = self.resident.remove(&id) else { return Ok(()) };
        self.resident_sequences -= group.unfinished();
        schedule.refused.push((id, exceeds_cache(&group, cache)));
        group.release(cache)
    }

    /// The step has been computed: reports it to the cache, and forks the groups whose prompt is complete.
    ///
    /// # Errors
    /// What the cache manager answers; see [`schedule`](Self::schedule).
    pub fn commit(&mut self, schedule: &Schedule, cache: &mut dyn CacheManager) -> Result<(), CacheError> {
        for (chunk, of) in schedule.plan.chunks.iter().zip(&schedule.chunks) {
            let Some(group) = self.resident.get_mut(&of.request) else { continue };
            let Some(sequence) = group.sequences.get_mut(of.sample) else { continue };
            let end = chunk.start + chunk.tokens.len();
            cache.mark_computed(sequence.id, sequence.tokens.get(chunk.start..end).unwrap_or_default())?;
            sequence.computed = end;
            if chunk.logits == LogitRows::All {
                group.prompt_rows_done = group.prompt_rows_done.max(end.min(group.prompt_rows_wanted));
            }
            if !group.forked && end == group.prompt_len {
                fork(group, of.sample, cache)?;
            }
        }
        Ok(())
    }
}

/// Gives a group's sequences slots for all of their tokens; `false` if blocks ran out on the way.
fn append_missing(group: &mut Group, cache: &mut dyn CacheManager) -> Result<bool, CacheError> {
    if !group.forked {
        return Ok(true);
    }
    for sequence in group.sequences.iter_mut().filter(|sequence| !sequence.finished) {
        let missing = sequence.tokens.len().saturating_sub(sequence.slots);
        if missing > 0 {
            match cache.append(sequence.id, missing) {
                Ok(()) => sequence.slots += missing,
                Err(CacheError::OutOfBlocks { .. }) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
    }
    Ok(true)
}

/// Makes every other unfinished sample an owner of the leader's blocks.
fn fork(group: &mut Group, leader: usize, cache: &mut dyn CacheManager) -> Result<(), CacheError> {
    let Some(parent) = group.sequences.get(leader).map(|sequence| sequence.id) else { return Ok(()) };
    group.forked = true;
    let prompt_len = group.prompt_len;
    for child in group.sequences.iter_mut().filter(|child| child.id != parent && !child.finished) {
        cache.fork(parent, child.id)?;
        child.slots = prompt_len;
        child.computed = prompt_len;
    }
    Ok(())
}

/// Adds chunks of a group's sequences: those with one token to compute (decodes), or the others.
fn add_chunks(
    group: &Group,
    decodes: bool,
    budget: &mut Budget,
    schedule: &mut Schedule,
    cache: &dyn CacheManager,
) {
    for (sample, sequence) in group.sequences.iter().enumerate() {
        let remaining = group.remaining(sequence);
        if remaining == 0 || (remaining == 1) != decodes {
            continue;
        }
        let start = sequence.computed;
        let mut count = remaining.min(budget.tokens);
        let wants_rows =
            |count: usize| start < group.prompt_rows_wanted && start + count > group.prompt_rows_done;
        if wants_rows(count) {
            count = count.min(budget.prompt_logit_rows);
        }
        if count == 0 {
            continue;
        }
        let end = start + count;
        let next_token = if end < sequence.tokens.len() {
            NextToken::None
        } else if group.forked {
            NextToken::Sample
        } else {
            NextToken::Group
        };
        let logits = if wants_rows(count) {
            budget.prompt_logit_rows -= count;
            LogitRows::All
        } else if next_token == NextToken::None {
            LogitRows::None
        } else {
            LogitRows::Last
        };
        budget.tokens -= count;
        let blocks = end.div_ceil(cache.config().block_size.max(1));
        let block_tables = (0..cache.config().groups.len())
            .filter_map(|kv_group| cache.block_table(sequence.id, kv_group))
            .map(|table| table.get(..blocks).unwrap_or(table).to_vec())
            .collect();
        let tokens = sequence.tokens.get(start..end).unwrap_or_default();
        schedule.plan.chunks.push(Chunk {
            sequence: sequence.id,
            tokens: tokens.iter().map(|&token| TokenInput::Known(token)).collect(),
            start,
            block_tables,
            logits,
        });
        schedule.chunks.push(ScheduledChunk { request: group.id, sample, next_token });
    }
}
