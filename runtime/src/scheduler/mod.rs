//! Decides what the next step computes. Owns the queue, the resident sequence groups with their tokens, the
//! token budget and preemption. Does not compute, sample or know text.
//!
//! The rules are the paper's (Kwon et al. 2023, sections 4.3 and 4.5):
//!
//! - **Iteration level.** Groups join and leave at every step. Decodes go first, then pieces of prompts in
//!   order of arrival, all in one batch of at most `max_batch_tokens`. No more sequences are resident than the
//!   budget has tokens, so every decode runs in every step and the first prompt in line always advances.
//! - **First come, first served.** A group's id is its place in the order. Nothing overtakes: where the
//!   head of the queue has to wait, all wait.
//! - **All or nothing.** The sequences of a group (its samples) are admitted and preempted together.
//! - **Preemption by recomputation.** Where a running sequence needs a block and none is free, the latest
//!   arrival gives all of its blocks back and returns to the queue; its tokens so far become part of its
//!   prompt. Residents arrived before everything that waits, so the preempted are at the head: nobody new
//!   comes in before they are back.
//! - **Progress.** The earliest arrival is never preempted for another; alone and still without a block, it
//!   cannot ever fit and is refused.
//!
//! A group's samples share its prompt: one of them computes it and is then forked. After a preemption it is
//! rebuilt the same way, and each sample then computes its own tokens.

mod admission;
mod group;
mod steps;

pub use group::{FinishedSample, NewGroup};

use crate::plan::StepPlan;
use crate::request::{RequestError, RequestId};
use group::Group;
use pagewise_kvcache::{CacheError, CacheManager, SequenceId};
use std::collections::BTreeMap;

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
    /// Which of its samples.
    pub sample: usize,
    /// From the chunk's last logit row comes the next token of …
    pub next_token: NextToken,
}

/// Whose next token a chunk's last logit row gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NextToken {
    /// Nobody's: the sequence has further tokens to compute.
    None,
    /// The chunk's sample's.
    Sample,
    /// That of every sample of the group: the prompt that they share is computed.
    Group,
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
}

/// See the [module](self).
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    /// Ids rise in order of arrival, so both maps are in that order.
    waiting: BTreeMap<RequestId, Group>,
    resident: BTreeMap<RequestId, Group>,
    /// Unfinished sequences of the resident groups.
    resident_sequences: usize,
    /// Cancelled while resident; their blocks come free at the next step.
    cancelled: Vec<Group>,
    next_sequence: u64,
    next_step: u64,
    salt: u64,
    preemptions: u64,
}

impl Scheduler {
    /// An empty scheduler.
    pub fn new(config: SchedulerConfig) -> Self {
        Self {
            config,
            waiting: BTreeMap::new(),
            resident: BTreeMap::new(),
            resident_sequences: 0,
            cancelled: Vec::new(),
            next_sequence: 0,
            next_step: 0,
            salt: 0,
            preemptions: 0,
        }
    }

    /// Puts a group at the end of the queue. Its id must be above all earlier ones.
    ///
    /// # Errors
    /// [`RequestError`] where it can never be served: no prompt, longer than model or cache, more samples than
    /// may run at a time.
    pub fn add(&mut self, new: NewGroup, cache: &dyn CacheManager) -> Result<(), RequestError> {
        self.check(&new, cache)?;
        let first = self.next_sequence;
        self.next_sequence += new.samples as u64;
        self.waiting.insert(new.id, Group::new(new, SequenceId(first)));
        Ok(())
    }

    /// Takes a group out; what it holds comes free at the next step. `false` if it is not here.
    pub fn cancel(&mut self, id: RequestId) -> bool {
        if let Some(group) = self.resident.remove(&id) {
            self.resident_sequences -= group.unfinished();
            self.cancelled.push(group);
            return true;
        }
        self.waiting.remove(&id).is_some()
    }

    /// Whether anything waits, runs or must still be freed.
    pub fn has_work(&self) -> bool {
        !(self.waiting.is_empty() && self.resident.is_empty() && self.cancelled.is_empty())
    }

    /// Appends a sampled token to a resident sequence; it is computed in the next step.
    pub fn push_token(&mut self, request: RequestId, sample: usize, token: u32) {
        if let Some(sequence) =
            self.resident.get_mut(&request).and_then(|group| group.sequences.get_mut(sample))
        {
            sequence.tokens.push(token);
        }
    }

    /// Ends one sample and frees its blocks; with the last one the group is gone. `None` if there is no such
    /// sample running.
    ///
    /// # Errors
    /// What the cache manager answers.
    pub fn finish_sample(
        &mut self,
        request: RequestId,
        sample: usize,
        cache: &mut dyn CacheManager,
    ) -> Result<Option<FinishedSample>, CacheError> {
        let Some(group) = self.resident.get_mut(&request) else { return Ok(None) };
        let prompt_len = group.prompt_len;
        let Some(sequence) = group.sequences.get_mut(sample).filter(|sequence| !sequence.finished) else {
            return Ok(None);
        };
        sequence.finished = true;
        self.resident_sequences -= 1;
        let completion = sequence.tokens.split_off(prompt_len.min(sequence.tokens.len()));
        let freed = sequence.release(cache);
        let group_done = group.unfinished() == 0;
        if group_done {
            self.resident.remove(&request);
        }
        freed.map(|()| Some(FinishedSample { completion, group_done }))
    }

    /// Takes a group out and frees what it holds at once.
    ///
    /// # Errors
    /// What the cache manager answers.
    pub fn remove(&mut self, request: RequestId, cache: &mut dyn CacheManager) -> Result<(), CacheError> {
        self.waiting.remove(&request);
        match self.resident.remove(&request) {
            Some(mut group) => {
                self.resident_sequences -= group.unfinished();
                group.release(cache)
            }
            None => Ok(()),
        }
    }

    /// The cache's content is lost: takes out all groups that have some, frees it, and never again looks for
    /// what was cached before. Those that wait stay.
    ///
    /// # Errors
    /// What the cache manager answers first; all groups are taken out nevertheless.
    pub fn drop_resident(
        &mut self,
        cache: &mut dyn CacheManager,
    ) -> (Vec<RequestId>, Result<(), CacheError>) {
        self.salt += 1;
        self.resident_sequences = 0;
        let resident = std::mem::take(&mut self.resident);
        let ids = resident.keys().copied().collect();
        let groups = resident.into_values().chain(std::mem::take(&mut self.cancelled));
        let result = groups.map(|mut group| group.release(cache)).fold(Ok(()), Result::and);
        (ids, result)
    }

    /// What it holds and has done.
    pub fn stats(&self) -> SchedulerStats {
        SchedulerStats {
            waiting: self.waiting.len(),
            running: self.resident.len(),
            running_sequences: self.resident_sequences,
            preemptions: self.preemptions,
        }
    }
}
