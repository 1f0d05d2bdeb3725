//! The making of one step, and what follows when it has been computed.

use super::admission::Admitted;
use super::group::Group;
use super::preemption::{Reserved, append_missing};
use super::{Schedule, ScheduledChunk, Scheduler, rebuild};
use crate::plan::{Chunk, LogitRows, TokenInput, TokenPlace};
use pagewise_kvcache::{BlockId, CacheError, CacheManager, SequenceId};

/// What is left of a step.
struct Budget {
    tokens: usize,
    prompt_logit_rows: usize,
    buffers: Vec<Buffers>,
}

/// Memory of an earlier step's chunk, used again: asking for it anew was a fifth of what a step costs.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    tokens: Vec<TokenInput>,
    block_tables: Vec<Vec<BlockId>>,
}

impl Scheduler {
    /// Plans the next step: frees the cancelled, gives every resident sequence slots for its tokens (preempting
    /// the last in the order where blocks run out), then fills the budget with decodes, prompts under way, and new
    /// arrivals, in this order.
    ///
    /// The plan is computed and reported through [`commit`](Self::commit). Between the two, one further step may be
    /// planned: see [`run_ahead`](Self::run_ahead).
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
            buffers: std::mem::take(&mut self.buffers),
        };
        schedule.plan.chunks.reserve(self.resident_sequences);
        schedule.chunks.reserve(self.resident_sequences);
        let mut with_prompts = Vec::new();
        for rank in &self.resident {
            let Some(group) = self.groups.get_mut(&rank.id()) else { continue };
            if add_chunks(group, true, &mut budget, &mut schedule, cache) == Others::Remain {
                with_prompts.push(rank.id());
            }
        }
        for id in with_prompts {
            let Some(group) = self.groups.get_mut(&id) else { continue };
            add_chunks(group, false, &mut budget, &mut schedule, cache);
        }
        // In the step of a preemption blocks are short; whoever came in now would be the next to go.
        if reserved == Reserved::All {
            while budget.tokens > 0 {
                match self.admit_head(&mut schedule, cache)? {
                    Admitted::Yes(id) => {
                        let Some(group) = self.resident_mut(id) else { continue };
                        // What was swapped in may have tokens without slots; those that find none wait.
                        append_missing(group, cache)?;
                        add_chunks(group, true, &mut budget, &mut schedule, cache);
                        add_chunks(group, false, &mut budget, &mut schedule, cache);
                    }
                    Admitted::AskAgain => {}
                    Admitted::No => break,
                }
            }
        }

        schedule.plan.block_ops = cache.take_block_ops();
        schedule.plan.id = self.next_step;
        if !schedule.is_idle() {
            self.next_step += 1;
        }
        Ok(schedule)
    }

    /// Takes back a schedule that is done with: the next ones are made in its memory. Nothing is lost where a schedule
    /// is dropped instead.
    pub fn recycle(&mut self, schedule: Schedule) {
        // Only that of decodes, of which there are as many in the next step; a prompt's would hold memory for long.
        let decodes = schedule.plan.chunks.into_iter().filter(|chunk| chunk.tokens.len() == 1);
        self.buffers.clear();
        self.buffers
            .extend(decodes.map(|Chunk { tokens, block_tables, .. }| Buffers { tokens, block_tables }));
    }

    /// Lets the next step be planned before this one is computed: every sequence whose next token this step
    /// samples goes on with a placeholder for it. Groups whose next tokens may change their sequences (a prompt with
    /// several samples, beams) wait a step instead, and so does what `goes_on` denies: sequences that end with this
    /// token, for example.
    ///
    /// Steps are still computed and [`commit`](Self::commit)ted in order, and a step's tokens pushed before the next
    /// one is committed.
    pub fn run_ahead(&mut self, schedule: &Schedule, goes_on: impl Fn(&ScheduledChunk) -> bool) {
        let mut row = 0;
        for (chunk, of) in schedule.plan.chunks.iter().zip(&schedule.chunks) {
            row += chunk.logit_rows();
            let Some(group) = self.resident_mut(of.request) else { continue };
            let settled = !group.beams && group.seats == group.unfinished().count();
            let Some(sequence) = group.sequences.get_mut(of.index) else { continue };
            if of.next_token && settled && sequence.id == chunk.sequence && goes_on(of) {
                sequence.placeholder = Some(TokenPlace { step: schedule.plan.id, row: row - 1 });
            }
        }
    }

    /// The step has been computed: reports it to the cache, and forks those that waited for it.
    ///
    /// # Errors
    /// What the cache manager answers; see [`schedule`](Self::schedule).
    pub fn commit(&mut self, schedule: &Schedule, cache: &mut dyn CacheManager) -> Result<(), CacheError> {
        let salt = self.salt;
        for (chunk, of) in schedule.plan.chunks.iter().zip(&schedule.chunks) {
            // Whoever was preempted since a step was planned ahead has nothing to report.
            let Some(group) = self.resident_mut(of.request) else { continue };
            let Some(sequence) = group.sequences.get(of.index) else { continue };
            if sequence.id != chunk.sequence || sequence.slots == 0 {
                continue;
            }
            let end = chunk.start + chunk.tokens.len();
            let known = cache.computed(sequence.id).unwrap_or(end);
            cache.mark_computed(sequence.id, sequence.tokens.get(known..end).unwrap_or_default())?;
            if chunk.logits == LogitRows::All {
                group.prompt_rows_done = group.prompt_rows_done.max(end.min(group.prompt_rows_wanted));
            }
            if group.rebuilding() {
                rebuild::fork_waiting(group, of.index, salt, cache)?;
            }
        }
        Ok(())
    }
}

impl Buffers {
    /// Puts a sequence's block tables, the first `blocks` of each, in the place of those that are here.
    fn set_block_tables(&mut self, sequence: SequenceId, blocks: usize, cache: &dyn CacheManager) {
        let groups = cache.config().groups.len();
        self.block_tables.resize_with(groups, Vec::new);
        let tables = (0..groups).filter_map(|group| cache.block_table(sequence, group));
        let mut filled = 0;
        for (buffer, table) in self.block_tables.iter_mut().zip(tables) {
            buffer.clear();
            buffer.extend_from_slice(table.get(..blocks).unwrap_or(table));
            filled += 1;
        }
        self.block_tables.truncate(filled);
    }
}

/// Whether a group has chunks of the other kind than the one that was asked for.
#[derive(PartialEq, Eq)]
enum Others {
    None,
    Remain,
}

/// Adds chunks of a group's sequences: those with one token to compute (decodes), or the others.
fn add_chunks(
    group: &mut Group,
    decodes: bool,
    budget: &mut Budget,
    schedule: &mut Schedule,
    cache: &dyn CacheManager,
) -> Others {
    let rebuilding = group.rebuilding();
    let request = group.id();
    let mut others = Others::None;
    for index in 0..group.sequences.len() {
        let goal = if rebuilding { Some(group.goal(index)) } else { None };
        let Some(sequence) = group.sequences.get_mut(index) else { break };
        let goal = goal.unwrap_or_else(|| sequence.len());
        let start = sequence.planned;
        let remaining = goal.min(sequence.slots).saturating_sub(start);
        if sequence.finished || remaining == 0 {
            continue;
        }
        if (remaining == 1) != decodes {
            others = Others::Remain;
            continue;
        }
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
        let next_token = end == sequence.len();
        let logits = if wants_rows(count) {
            budget.prompt_logit_rows -= count;
            LogitRows::All
        } else if next_token {
            LogitRows::Last
        } else {
            LogitRows::None
        };
        budget.tokens -= count;
        let blocks = end.div_ceil(cache.config().block_size.max(1));
        let mut buffers = budget.buffers.pop().unwrap_or_default();
        buffers.set_block_tables(sequence.id, blocks, cache);
        let Buffers { mut tokens, block_tables } = buffers;
        tokens.clear();
        let known = sequence.tokens.get(start..end.min(sequence.tokens.len())).unwrap_or_default();
        tokens.extend(known.iter().map(|&token| TokenInput::Known(token)));
        if next_token {
            tokens.extend(sequence.placeholder.map(TokenInput::Placeholder));
        }
        sequence.planned = end;
        schedule.plan.chunks.push(Chunk { sequence: sequence.id, tokens, start, block_tables, logits });
        schedule.chunks.push(ScheduledChunk { request, index, next_token });
    }
    others
}
