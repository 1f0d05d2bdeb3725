//! Decides what the next step computes. Owns the queue, the resident sequence groups with their tokens, the
//! token budget and preemption. Does not compute, sample or know text and time.
//!
//! The rules are the paper's (Kwon et al. 2023, sections 4.3 to 4.5):
//!
//! - **Iteration level.** Groups join and leave at every step. Decodes go first, then pieces of prompts in
//!   order, all in one batch of at most `max_batch_tokens`. No more sequences are resident than the budget has
//!   tokens, so every decode runs in every step and the first prompt in line always advances.
//! - **First come, first served,** among requests of one [`Urgency`](crate::request::Urgency). Nothing overtakes: where the head of the queue
//!   has to wait, all wait.
//! - **All or nothing.** The sequences of a group (its samples, its beams) are admitted and preempted together, and
//!   room is kept for those that it will become.
//! - **Preemption.** Where a running sequence needs a block and none is free, the last in the order gives all of
//!   its blocks back and returns to the queue. By *recomputation* its tokens so far become part of its prompt; by
//!   *swapping* its blocks are copied to the host and later back. Nobody new of the same priority comes in before
//!   the preempted are back.
//! - **Progress.** The first in the order is never preempted for another; alone and still without a block, it
//!   cannot ever fit and is refused.
//!
//! | room | what is in it |
//! |---|---|
//! | `order` | who goes before whom |
//! | `group` | a request's sequences |
//! | `admission` | who comes in, who never can |
//! | `preemption` | slots for everybody, and who goes where they run out |
//! | `rebuild` | the sharing inside a group, made again after recomputation |
//! | `steps` | one step: its chunks, and what follows when it is computed |
//! | `tokens` | what sampling makes of the sequences |
//! | `report` | where every group stands, in words |

mod admission;
mod group;
mod order;
mod preemption;
mod rebuild;
mod report;
mod steps;
mod tokens;

pub use group::NewGroup;
pub use preemption::{Preemption, PreemptionCosts};

use crate::plan::StepPlan;
use crate::request::{RequestError, RequestId};
use group::Group;
use order::Rank;
use pagewise_kvcache::{CacheError, CacheManager, SequenceId};
use rustc_hash::FxHashMap;
use std::collections::BTreeSet;
use steps::Buffers;

/// Limits of a step and of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// Most sequences in the cache at a time.
    pub max_num_seqs: usize,
    /// Most tokens a step computes.
    pub max_batch_tokens: usize,
    /// Most tokens of a sequence, prompt and completion together.
    pub max_model_len: usize,
    /// Most logit rows a step spends on prompt log-probabilities: they bound the size of its output.
    pub max_prompt_logit_rows: usize,
    /// How groups make room.
    pub preemption: Preemption,
}

/// One step, and what its logits are for.
#[derive(Clone, Debug, Default)]
pub struct Schedule {
    /// For the executor.
    pub plan: StepPlan,
    /// One entry a chunk of the plan, in its order.
    pub chunks: Vec<ScheduledChunk>,
    /// Groups that came into the cache for the first time, with the prompt tokens that were there already.
    pub admitted: Vec<(RequestId, usize)>,
    /// Groups that came back after they had made room. Where they find no slots for their next tokens the next step
    /// decides what becomes of them.
    pub returned: Vec<RequestId>,
    /// Groups that had to make room and wait again.
    pub preempted: Vec<RequestId>,
    /// Groups that can never fit. They are out of the scheduler.
    pub refused: Vec<(RequestId, RequestError)>,
}

impl Schedule {
    /// Nothing for the executor to do?
    pub fn is_idle(&self) -> bool {
        self.plan.chunks.is_empty() && self.plan.block_ops.is_empty()
    }
}

/// Whose a chunk is and what follows from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScheduledChunk {
    /// Which request.
    pub request: RequestId,
    /// Which of its sequences.
    pub index: usize,
    /// Whether the chunk's last logit row gives the sequence's next token.
    pub next_token: bool,
}

/// A sequence that has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FinishedSequence {
    /// Its tokens after the prompt.
    pub completion: Vec<u32>,
    /// It was the last of its group.
    pub group_done: bool,
}

/// What the scheduler holds and has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SchedulerStats {
    /// Requests that wait, the preempted included.
    pub waiting: usize,
    /// Requests in the cache.
    pub running: usize,
    /// Sequences in the cache, or that will be once their group's prompt is computed.
    pub running_sequences: usize,
    /// Preemptions so far.
    pub preemptions: u64,
    /// Of those, by swapping.
    pub swaps: u64,
}

/// See the [module](self).
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    costs: PreemptionCosts,
    groups: FxHashMap<RequestId, Group>,
    /// Each of the groups is in one of the two, in their order.
    waiting: BTreeSet<Rank>,
    resident: BTreeSet<Rank>,
    /// Seats of the resident groups.
    resident_sequences: usize,
    /// Cancelled while they held blocks, which come free at the next step.
    cancelled: Vec<Group>,
    /// For the next step's chunks.
    buffers: Vec<Buffers>,
    next_sequence: u64,
    next_step: u64,
    salt: u64,
    preemptions: u64,
    swaps: u64,
}

impl Scheduler {
    /// An empty scheduler.
    pub fn new(config: SchedulerConfig) -> Self {
        Self {
            config,
            costs: PreemptionCosts::default(),
            groups: FxHashMap::default(),
            waiting: BTreeSet::new(),
            resident: BTreeSet::new(),
            resident_sequences: 0,
            cancelled: Vec::new(),
            buffers: Vec::new(),
            next_sequence: 0,
            next_step: 0,
            salt: 0,
            preemptions: 0,
            swaps: 0,
        }
    }

    /// What preemption costs, for [`Preemption::Auto`].
    pub fn set_costs(&mut self, costs: PreemptionCosts) {
        self.costs = costs;
    }

    /// The salt under which prompts are now cached.
    pub fn salt(&self) -> u64 {
        self.salt
    }

    /// Puts a group into the queue. Its id must be above all earlier ones.
    ///
    /// # Errors
    /// [`RequestError`] where it can never be served: no prompt, longer than model or cache, more sequences than
    /// may run at a time.
    pub fn add(&mut self, new: NewGroup, cache: &dyn CacheManager) -> Result<(), RequestError> {
        self.check(&new, cache)?;
        let group = Group::new(new, SequenceId(self.next_sequence));
        self.next_sequence += 1;
        self.waiting.insert(group.rank);
        self.groups.insert(group.id(), group);
        Ok(())
    }

    /// Takes a group out; what it holds comes free at the next step. `false` if it is not here.
    pub fn cancel(&mut self, id: RequestId) -> bool {
        let group = self.take(id);
        let known = group.is_some();
        self.cancelled
            .extend(group.filter(|group| group.sequences.iter().any(|sequence| sequence.slots > 0)));
        known
    }

    /// Whether anything waits, runs or must still be freed.
    pub fn has_work(&self) -> bool {
        !(self.waiting.is_empty() && self.resident.is_empty() && self.cancelled.is_empty())
    }

    /// The cache's content is lost: takes out all groups that run in it, frees everything, and never again looks for
    /// what was cached before. Those that wait stay, and are computed afresh.
    ///
    /// # Errors
    /// What the cache manager answers first; all groups are taken out nevertheless.
    pub fn drop_resident(
        &mut self,
        cache: &mut dyn CacheManager,
    ) -> (Vec<RequestId>, Result<(), CacheError>) {
        self.salt += 1;
        self.resident_sequences = 0;
        let ids: Vec<RequestId> = std::mem::take(&mut self.resident).into_iter().map(Rank::id).collect();
        let gone: Vec<Group> = ids.iter().filter_map(|id| self.groups.remove(id)).collect();
        let mut result = Ok(());
        for mut group in gone.into_iter().chain(std::mem::take(&mut self.cancelled)) {
            result = result.and(group.release(cache));
        }
        for group in self.groups.values_mut().filter(|group| !group.held().is_empty()) {
            result = result.and(rebuild::give_up(group, cache));
        }
        (ids, result)
    }

    /// What it holds and has done.
    pub fn stats(&self) -> SchedulerStats {
        SchedulerStats {
            waiting: self.waiting.len(),
            running: self.resident.len(),
            running_sequences: self.resident_sequences,
            preemptions: self.preemptions,
            swaps: self.swaps,
        }
    }

    fn group_mut(&mut self, id: RequestId) -> Option<&mut Group> {
        self.groups.get_mut(&id)
    }

    fn resident_mut(&mut self, id: RequestId) -> Option<&mut Group> {
        self.group_mut(id).filter(|group| group.resident)
    }

    /// Takes a group out, wherever it is. It still holds its blocks.
    fn take(&mut self, id: RequestId) -> Option<Group> {
        let group = self.groups.remove(&id)?;
        if group.resident {
            self.resident.remove(&group.rank);
            self.resident_sequences -= group.seats;
        } else {
            self.waiting.remove(&group.rank);
        }
        Some(group)
    }
}
