//! A request's sequences as the scheduler sees them.

use super::order::Rank;
use crate::plan::TokenPlace;
use crate::request::{RequestId, Urgency};
use pagewise_kvcache::{CacheError, CacheManager, SequenceId};

/// What [`Scheduler::add`](super::Scheduler::add) takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewGroup {
    /// Its id, above all earlier ones: the order of arrival.
    pub id: RequestId,
    /// Token ids, at least one.
    pub prompt: Vec<u32>,
    /// Sequences it will run at a time, samples or beams; at least one.
    pub width: usize,
    /// Whether each step may put others in their place ([`Scheduler::branch`](super::Scheduler::branch)), as a beam
    /// search does. Otherwise they branch once, when the prompt is computed.
    pub beams: bool,
    /// Whether logits are wanted for every prompt token.
    pub prompt_logits: bool,
    /// Before whom it runs.
    pub urgency: Urgency,
}

/// A prompt with its continuations. It begins with one sequence, which computes the prompt; what follows says how
/// many it becomes ([`Scheduler::branch`](super::Scheduler::branch)).
#[derive(Debug)]
pub(super) struct Group {
    pub(super) rank: Rank,
    /// In the cache and running, or waiting.
    pub(super) resident: bool,
    pub(super) prompt_len: usize,
    pub(super) sequences: Vec<Sequence>,
    /// Sequences that it may yet run at a time: room is kept for them from the first step on.
    pub(super) seats: usize,
    pub(super) beams: bool,
    pub(super) admitted_before: bool,
    /// The logit rows of this many leading prompt tokens are wanted …
    pub(super) prompt_rows_wanted: usize,
    /// … and of this many have been computed.
    pub(super) prompt_rows_done: usize,
}

/// One continuation.
#[derive(Clone, Debug)]
pub(super) struct Sequence {
    pub(super) id: SequenceId,
    /// Prompt and completion.
    pub(super) tokens: Vec<u32>,
    /// Where the token after them comes from, while a step under way samples it.
    pub(super) placeholder: Option<TokenPlace>,
    /// Tokens that the cache has slots for; 0 is not in the cache.
    pub(super) slots: usize,
    /// Tokens whose keys and values are in the cache, or will be after the steps planned so far.
    pub(super) planned: usize,
    /// From whom it is forked when its group is rebuilt.
    pub(super) origin: Option<Origin>,
    pub(super) finished: bool,
}

/// A sequence shares its first `tokens` tokens with an earlier one of its group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Origin {
    /// Index of the earlier one.
    pub(super) parent: usize,
    pub(super) tokens: usize,
}

impl Group {
    /// A group outside of the cache with one sequence.
    pub(super) fn new(new: NewGroup, sequence: SequenceId) -> Self {
        let prompt_len = new.prompt.len();
        let sequence = Sequence {
            id: sequence,
            tokens: new.prompt,
            placeholder: None,
            slots: 0,
            planned: 0,
            origin: None,
            finished: false,
        };
        Self {
            rank: Rank::new(new.id, new.urgency),
            resident: false,
            prompt_len,
            sequences: vec![sequence],
            seats: new.width,
            beams: new.beams,
            admitted_before: false,
            // The last row predicts the completion's first token.
            prompt_rows_wanted: if new.prompt_logits { prompt_len.saturating_sub(1) } else { 0 },
            prompt_rows_done: 0,
        }
    }

    pub(super) fn id(&self) -> RequestId {
        self.rank.id()
    }

    pub(super) fn unfinished(&self) -> impl Iterator<Item = &Sequence> {
        self.sequences.iter().filter(|sequence| !sequence.finished)
    }

    /// Its sequences in the cache.
    pub(super) fn held(&self) -> Vec<SequenceId> {
        self.unfinished().filter(|sequence| sequence.slots > 0).map(|sequence| sequence.id).collect()
    }

    /// Whether some of its sequences wait to be forked from others.
    pub(super) fn rebuilding(&self) -> bool {
        self.unfinished().any(|sequence| sequence.slots == 0)
    }

    /// Tokens of a sequence that are to be computed before its group goes on: up to where the next one is forked
    /// from it, or all.
    pub(super) fn goal(&self, index: usize) -> usize {
        let forks = self.unfinished().filter(|sequence| sequence.slots == 0).filter_map(|s| s.origin);
        let next = forks.filter(|origin| origin.parent == index).map(|origin| origin.tokens).min();
        next.unwrap_or_else(|| self.sequences.get(index).map_or(0, Sequence::len))
    }

    /// Frees all blocks, wherever they are. On an error the rest is freed nevertheless.
    pub(super) fn release(&mut self, cache: &mut dyn CacheManager) -> Result<(), CacheError> {
        self.sequences.iter_mut().map(|sequence| sequence.release(cache)).fold(Ok(()), Result::and)
    }
}

impl Sequence {
    /// Tokens, the one that is being sampled included.
    pub(super) fn len(&self) -> usize {
        self.tokens.len() + usize::from(self.placeholder.is_some())
    }

    /// Frees its blocks, if it has any.
    pub(super) fn release(&mut self, cache: &mut dyn CacheManager) -> Result<(), CacheError> {
        let held = std::mem::take(&mut self.slots);
        self.planned = 0;
        if held > 0 { cache.free(self.id) } else { Ok(()) }
    }
}
