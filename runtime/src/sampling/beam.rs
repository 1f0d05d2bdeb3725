//! Beam search: which continuations run on and which are finished, from log-probabilities alone. Does not know
//! logits, caches or text.
//!
//! The rules are those of transformers 5:
//!
//! 1. Each step ranks the best `max(2, 1 + end tokens) · width` continuations over all running beams by their summed
//!    log-probability.
//! 2. One that ends in an end token is finished only if its rank is below `width`. The first `width` that do not end
//!    run on.
//! 3. The pool keeps the `width` best finished hypotheses by score: the sum over the number of new tokens, end token
//!    included, to the power of the length penalty.
//! 4. The search is done when the pool is full and the best running beam, scored as [`EarlyStopping`] says, is not
//!    better than the worst of it; or, with [`EarlyStopping::True`], as soon as the pool is full.
//! 5. At the most tokens that are allowed the running beams enter the pool too.

use crate::request::{EarlyStopping, FinishReason};

/// What a search is for.
#[derive(Clone, Debug, PartialEq)]
pub struct BeamRules {
    /// Beams that run at a time.
    pub width: usize,
    /// Exponent of the length by which a sum is divided.
    pub length_penalty: f64,
    /// When it ends.
    pub early_stopping: EarlyStopping,
    /// Tokens that end a hypothesis, each once.
    pub end_tokens: Vec<u32>,
    /// Most new tokens, at least 1.
    pub max_tokens: usize,
}

impl BeamRules {
    /// Continuations that are ranked in a step; no more of one beam can matter.
    pub fn candidates(&self) -> usize {
        self.width.saturating_mul(2.max(1 + self.end_tokens.len()))
    }

    fn score(&self, sum: f64, tokens: usize) -> f64 {
        sum / (tokens as f64).powf(self.length_penalty)
    }
}

/// A token that may continue a beam.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// Which.
    pub token_id: u32,
    /// Its log-probability after the beam.
    pub logprob: f64,
}

/// A beam that runs on: which one it continues, and with what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Continuation {
    /// Index of the running beam before this step.
    pub parent: usize,
    /// Its new token.
    pub token_id: u32,
}

/// What a step made of the search.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BeamStep {
    /// These run on, in this order, the likeliest first.
    Continue(Vec<Continuation>),
    /// The pool is the result.
    Done,
}

/// A hypothesis of the pool.
#[derive(Clone, Debug, PartialEq)]
pub struct Hypothesis<T> {
    /// What was kept of its beam, the last token included.
    pub path: T,
    /// Its score.
    pub score: f64,
    /// Whether it ended in an end token.
    pub finish_reason: FinishReason,
}

/// A search under way; `T` is what its owner keeps of a beam.
#[derive(Clone, Debug)]
pub struct BeamSearch<T> {
    rules: BeamRules,
    running: Vec<(T, f64)>,
    pool: Vec<Hypothesis<T>>,
    tokens: usize,
}

impl<T> BeamSearch<T> {
    /// A search that begins with one beam of no tokens.
    pub fn new(rules: BeamRules, start: T) -> Self {
        Self { rules, running: vec![(start, 0.0)], pool: Vec::new(), tokens: 0 }
    }

    /// Its rules.
    pub fn rules(&self) -> &BeamRules {
        &self.rules
    }

    /// A running beam.
    pub fn beam(&self, index: usize) -> Option<&T> {
        self.running.get(index).map(|(path, _)| path)
    }

    /// How many run.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// One step: `candidates[i]` are the likeliest continuations of beam `i`, at least
    /// [`BeamRules::candidates`] of them where there are as many; `extend` makes of a beam the one that continues it.
    pub fn step(
        &mut self,
        candidates: &[Vec<Candidate>],
        extend: impl Fn(&T, Continuation) -> T,
    ) -> BeamStep {
        let width = self.rules.width;
        let mut ranked: Vec<(f64, Continuation)> = Vec::new();
        for (parent, ((_, sum), candidates)) in self.running.iter().zip(candidates).enumerate() {
            let continued = |c: &Candidate| (sum + c.logprob, Continuation { parent, token_id: c.token_id });
            ranked.extend(candidates.iter().map(continued));
        }
        // Equal sums: the earlier beam, then the lower token.
        ranked.sort_by(|(a, x), (b, y)| {
            b.total_cmp(a).then(x.parent.cmp(&y.parent)).then(x.token_id.cmp(&y.token_id))
        });
        ranked.truncate(self.rules.candidates());

        self.tokens += 1;
        let last = self.tokens >= self.rules.max_tokens;
        let mut kept: Vec<Continuation> = Vec::with_capacity(width);
        let mut running = Vec::with_capacity(width);
        for (rank, &(sum, token)) in ranked.iter().enumerate() {
            let ends = self.rules.end_tokens.contains(&token.token_id);
            let runs_on = !ends && kept.len() < width;
            let finishes = ends && rank < width;
            if !(runs_on || finishes) {
                continue;
            }
            let Some((path, _)) = self.running.get(token.parent) else { continue };
            let path = extend(path, token);
            if runs_on {
                kept.push(token);
            }
            if ends || last {
                let finish_reason = if ends { FinishReason::Stop } else { FinishReason::Length };
                let score = self.rules.score(sum, self.tokens);
                self.pool.push(Hypothesis { path, score, finish_reason });
            } else {
                running.push((path, sum));
            }
        }
        self.running = running;
        // Stable: of equal scores the earlier hypothesis.
        self.pool.sort_by(|a, b| b.score.total_cmp(&a.score));
        self.pool.truncate(width);
        if last || self.settled() { BeamStep::Done } else { BeamStep::Continue(kept) }
    }

    fn settled(&self) -> bool {
        let Some((_, best)) = self.running.first() else { return true };
        let Some(worst) = self.pool.get(self.rules.width.saturating_sub(1)) else { return false };
        let length = match self.rules.early_stopping {
            EarlyStopping::True => return true,
            EarlyStopping::Never if self.rules.length_penalty > 0.0 => self.rules.max_tokens,
            EarlyStopping::Never | EarlyStopping::False => self.tokens,
        };
        self.rules.score(*best, length) <= worst.score
    }

    /// The finished hypotheses, best first.
    pub fn into_pool(self) -> Vec<Hypothesis<T>> {
        self.pool
    }
}
