//! What can be wanted of a logit row, and what it gave: the words that engine and devices speak about sampling.
//!
//! Owns the types alone; the rules are [`sampling`](crate::sampling)'s, and a device that answers by itself keeps them.

use crate::request::{PositionLogprobs, TokenLogprob};
use crate::sampling::Draw;
use crate::sampling::beam::Candidate;

/// What is wanted of a logit row.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum RowWanted {
    /// All of it.
    #[default]
    Logits,
    /// Nothing: what it says is known.
    Nothing,
    /// The token that is chosen from it.
    Token(TokenWanted),
    /// Log-probabilities where the token is known: of a prompt.
    Logprobs {
        /// The token.
        token_id: u32,
        /// How many of the likeliest beside it.
        top: usize,
    },
    /// The likeliest continuations of a beam.
    Candidates(CandidatesWanted),
}

impl RowWanted {
    /// Whether the row gives its sequence one more token, whose successor can be described before it is known.
    pub fn can_run_ahead(&self) -> bool {
        matches!(self, Self::Token(wanted) if !wanted.changes.follow_tokens())
    }
}

/// A token that a device is to choose: steps 2 to 9 of the [order](crate::sampling#order).
#[derive(Clone, Debug, PartialEq)]
pub struct TokenWanted {
    /// How it is chosen.
    pub sampling: Sampling,
    /// What is done to the logits before.
    pub changes: LogitChanges,
    /// Whether log-probabilities are wanted: the chosen token's, and those of so many of the likeliest. They are of the
    /// logits as they were.
    pub logprobs: Option<usize>,
}

/// The continuations of a beam that a device is to find.
#[derive(Clone, Debug, PartialEq)]
pub struct CandidatesWanted {
    /// How many, where there are as many.
    pub count: usize,
    /// What is done to the log-probabilities before: to them, not to the logits.
    pub changes: LogitChanges,
    /// Whether log-probabilities of the logits as they were are wanted: each candidate's, and those of so many of the
    /// likeliest tokens.
    pub logprobs: Option<usize>,
}

/// How a token is chosen from logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// As in [`SamplingParams`](crate::request::SamplingParams::temperature).
    pub temperature: f32,
    /// As in [`SamplingParams`](crate::request::SamplingParams::top_k).
    pub top_k: usize,
    /// As in [`SamplingParams`](crate::request::SamplingParams::top_p).
    pub top_p: f32,
    /// As in [`SamplingParams`](crate::request::SamplingParams::min_p).
    pub min_p: f32,
    /// Its random number.
    pub draw: Draw,
}

impl Sampling {
    /// Whether the likeliest token is chosen, whatever the random number.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0 || self.top_k == 1
    }
}

/// Bias and penalties, as a list of the tokens that they touch.
#[derive(Clone, Debug, PartialEq)]
pub struct LogitChanges {
    /// As in [`SamplingParams`](crate::request::SamplingParams::repetition_penalty).
    pub repetition_penalty: f32,
    /// As in [`SamplingParams`](crate::request::SamplingParams::presence_penalty).
    pub presence_penalty: f32,
    /// As in [`SamplingParams`](crate::request::SamplingParams::frequency_penalty).
    pub frequency_penalty: f32,
    /// In no order; each token once, and all below the vocabulary's size.
    pub tokens: Vec<TokenChange>,
}

/// A token that bias or penalties touch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenChange {
    /// Which.
    pub token_id: u32,
    /// Added first; several of one token are added up.
    pub bias: f32,
    /// Where the prompt or the completion holds it, and a penalty is set: how often the completion does.
    pub held: Option<u32>,
}

impl Default for LogitChanges {
    fn default() -> Self {
        Self { repetition_penalty: 1.0, presence_penalty: 0.0, frequency_penalty: 0.0, tokens: Vec::new() }
    }
}

impl LogitChanges {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Whether they become others with each token that is chosen, so that those of the next one are not known before.
    pub fn follow_tokens(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }
}

/// What a step gave: one entry a logit row, the rows of the first chunk, then those of the second, and so on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepOutput {
    /// What each row gave.
    pub rows: Vec<RowOutput>,
    /// `[rows, vocab_size]`: those that are [`RowOutput::Logits`].
    pub logits: Vec<f32>,
    /// Length of a row.
    pub vocab_size: usize,
}

/// What a logit row gave.
#[derive(Clone, Debug, PartialEq)]
pub enum RowOutput {
    /// Itself: this row of the output's logits.
    Logits(usize),
    /// Nothing was wanted.
    Nothing,
    /// The chosen token; `None` where there is no usable logit.
    Token(Option<TokenOutput>),
    /// What was wanted of a known token.
    Logprobs(PositionLogprobs),
    /// Continuations of a beam; `None` where there is no usable logit.
    Candidates(Option<CandidatesOutput>),
}

/// A token that a device chose.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenOutput {
    /// Which.
    pub token_id: u32,
    /// Where they were wanted.
    pub logprobs: Option<PositionLogprobs>,
}

impl TokenOutput {
    /// A token alone.
    pub fn new(token_id: u32) -> Self {
        Self { token_id, logprobs: None }
    }
}

/// Continuations that a device found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CandidatesOutput {
    /// The likeliest first, lower ids first among equals; with bias and penalties. At least one.
    pub candidates: Vec<Candidate>,
    /// Each candidate's log-probability without them, where wanted; empty otherwise.
    pub own: Vec<f32>,
    /// The likeliest tokens without them, where wanted.
    pub top: Vec<TokenLogprob>,
}

/// A row of an output.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Row<'a> {
    /// `[vocab_size]`
    Logits(&'a [f32]),
    /// As in [`RowOutput`].
    Nothing,
    /// As in [`RowOutput`].
    Token(Option<&'a TokenOutput>),
    /// As in [`RowOutput`].
    Logprobs(&'a PositionLogprobs),
    /// As in [`RowOutput`].
    Candidates(Option<&'a CandidatesOutput>),
}

impl StepOutput {
    /// An output of logits alone, `[rows, vocab_size]`.
    pub fn of_logits(logits: Vec<f32>, vocab_size: usize) -> Self {
        let rows = logits.len().checked_div(vocab_size).unwrap_or(0);
        Self { rows: (0..rows).map(RowOutput::Logits).collect(), logits, vocab_size }
    }

    /// One row.
    pub fn row(&self, index: usize) -> Option<Row<'_>> {
        Some(match self.rows.get(index)? {
            RowOutput::Logits(row) => {
                let start = row.checked_mul(self.vocab_size)?;
                Row::Logits(self.logits.get(start..start.checked_add(self.vocab_size)?)?)
            }
            RowOutput::Nothing => Row::Nothing,
            RowOutput::Token(token) => Row::Token(token.as_ref()),
            RowOutput::Logprobs(logprobs) => Row::Logprobs(logprobs),
            RowOutput::Candidates(candidates) => Row::Candidates(candidates.as_ref()),
        })
    }
}
