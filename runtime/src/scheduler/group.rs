//! A request's sequences as the scheduler sees them.

use crate::request::RequestId;
use pagewise_kvcache::{CacheError, CacheManager, SequenceId};

/// What [`Scheduler::add`](super::Scheduler::add) takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewGroup {
    /// Its id, above all earlier ones: the order of arrival.
    pub id: RequestId,
    /// Token ids, at least one.
    pub prompt: Vec<u32>,
    /// Continuations to sample, at least one.
    pub samples: usize,
    /// Whether logits are wanted for every prompt token.
    pub prompt_logits: bool,
}

/// A sample that has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FinishedSample {
    /// Its tokens after the prompt.
    pub completion: Vec<u32>,
    /// It was the last of its group.
    pub group_done: bool,
}

/// A prompt with its continuations.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) id: RequestId,
    pub(super) prompt_len: usize,
    pub(super) sequences: Vec<Sequence>,
    /// Every unfinished sequence has its own block table. Before that, only the leader is in the cache and
    /// computes the prompt for all.
    pub(super) forked: bool,
    pub(super) admitted_before: bool,
    /// The logit rows of this many leading prompt tokens are wanted …
    pub(super) prompt_rows_wanted: usize,
    /// … and of this many have been computed.
    pub(super) prompt_rows_done: usize,
}

/// One continuation.
#[derive(Debug)]
pub(super) struct Sequence {
    pub(super) id: SequenceId,
    /// Prompt and completion.
    pub(super) tokens: Vec<u32>,
    /// Tokens that the cache has slots for; 0 is not in the cache.
    pub(super) slots: usize,
    /// Tokens whose keys and values are in the cache.
    pub(super) computed: usize,
    pub(super) finished: bool,
}

impl Group {
    /// A group outside of the cache; its sequences are numbered from `first`.
    pub(super) fn new(new: NewGroup, first: SequenceId) -> Self {
        let prompt_len = new.prompt.len();
        let sequence = |offset: usize| Sequence {
            id: SequenceId(first.0 + offset as u64),
            tokens: new.prompt.clone(),
            slots: 0,
            computed: 0,
            finished: false,
        };
        Self {
            id: new.id,
            prompt_len,
            sequences: (0..new.samples).map(sequence).collect(),
            forked: false,
            admitted_before: false,
            // The last row predicts the completion's first token.
            prompt_rows_wanted: if new.prompt_logits { prompt_len.saturating_sub(1) } else { 0 },
            prompt_rows_done: 0,
        }
    }

    pub(super) fn unfinished(&self) -> usize {
        self.sequences.iter().filter(|sequence| !sequence.finished).count()
    }

    /// Tokens of a sequence that are to be computed before its group goes on.
    pub(super) fn goal(&self, sequence: &Sequence) -> usize {
        if self.forked { sequence.tokens.len() } else { self.prompt_len }
    }

    /// Tokens of a sequence that can be computed now.
    pub(super) fn remaining(&self, sequence: &Sequence) -> usize {
        self.goal(sequence).min(sequence.slots).saturating_sub(sequence.computed)
    }

    /// Frees all blocks. On an error the rest is freed nevertheless.
    pub(super) fn release(&mut self, cache: &mut dyn CacheManager) -> Result<(), CacheError> {
        self.forked = false;
        self.sequences.iter_mut().map(|sequence| sequence.release(cache)).fold(Ok(()), Result::and)
    }
}

impl Sequence {
    /// Frees its blocks, if it has any.
    pub(super) fn release(&mut self, cache: &mut dyn CacheManager) -> Result<(), CacheError> {
        let held = std::mem::take(&mut self.slots);
        self.computed = 0;
        if held > 0 { cache.free(self.id) } else { Ok(()) }
    }
}
