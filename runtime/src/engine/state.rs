//! What the engine remembers of a request: its completions' text, log-probabilities and ends.

use super::beams::{BeamState, Offer};
use super::config::EngineConfig;
use super::detokenize::{Detokenize, DetokenizerFactory};
use super::logits::Rows;
use super::metrics::RequestMetrics;
use super::stop::StopMatcher;
use crate::executor::{Row, RowWanted, Sampling, TokenOutput, TokenWanted};
use crate::plan::{Chunk, LogitRows};
use crate::request::{
    Completion, FinishReason, PositionLogprobs, Request, RequestOutput, SamplingParams, Usage,
};
use crate::sampling::{Draw, LogSoftmax, NoUsableLogit, Sampler, TokenCounts};
use rayon::prelude::*;
use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

/// A request that is not finished.
pub(super) struct RequestState {
    pub(super) params: SamplingParams,
    pub(super) seed: u64,
    pub(super) prompt_tokens: usize,
    /// Most tokens that a completion may have.
    pub(super) limit: usize,
    pub(super) metrics: RequestMetrics,
    /// When it fails if it is not done.
    pub(super) deadline: Option<Duration>,
    /// The registered prefix that it begins with.
    pub(super) prefix: Option<String>,
    /// The prompt, kept only where its log-probabilities are wanted.
    prompt: Vec<u32>,
    pub(super) prompt_logprobs: Option<Vec<Option<PositionLogprobs>>>,
    /// Completions that are sampled; none for a beam search.
    pub(super) samples: Vec<SampleState>,
    pub(super) beams: Option<BeamState>,
}

/// One completion.
pub(super) struct SampleState {
    counts: TokenCounts,
    text: Option<Text>,
    generated: usize,
    logprobs: Option<Vec<PositionLogprobs>>,
    /// Sum over the completion; kept where completions are ranked.
    logprob_sum: f64,
    finished: Option<(Vec<u32>, FinishReason)>,
}

struct Text {
    detokenizer: Box<dyn Detokenize>,
    stop: StopMatcher,
    shown: String,
}

/// What a row of logits was read as.
pub(super) enum Choice {
    /// The next token of a sample.
    Token(ChosenToken),
    /// Continuations of a beam.
    Beam(Offer),
}

/// A token that was chosen, and not yet added.
pub(super) struct ChosenToken {
    token_id: u32,
    /// Where they are asked for, or needed to rank completions.
    logprobs: Option<PositionLogprobs>,
}

/// What one more token means.
pub(super) struct Step {
    pub(super) token_id: u32,
    /// What can be shown now.
    pub(super) text: String,
    pub(super) finish_reason: Option<FinishReason>,
}

impl RequestState {
    pub(super) fn new(
        request: Request,
        config: &EngineConfig,
        detokenizer: Option<&DetokenizerFactory>,
        metrics: RequestMetrics,
    ) -> Self {
        let Request { prompt, params, prefix, urgency } = request;
        let limit = params.max_tokens.min(config.max_model_len.saturating_sub(prompt.len()));
        let seed = params.seed.unwrap_or_else(|| RandomState::new().hash_one(prompt.len()));
        let beams = params.beam_width.map(|_| BeamState::new(&prompt, &params, &config.eos_token_ids, limit));
        let sample = |_| SampleState {
            counts: TokenCounts::new(&prompt, &params),
            text: detokenizer.map(|make| Text {
                detokenizer: make(),
                stop: StopMatcher::new(&params.stop),
                shown: String::new(),
            }),
            generated: 0,
            logprobs: params.logprobs.map(|_| Vec::new()),
            logprob_sum: 0.0,
            finished: None,
        };
        let samples = if beams.is_some() { 0 } else { params.width() };
        Self {
            samples: (0..samples).map(sample).collect(),
            beams,
            prompt_logprobs: params.prompt_logprobs.map(|_| vec![None]),
            seed,
            limit,
            metrics,
            deadline: urgency.deadline,
            prefix,
            prompt_tokens: prompt.len(),
            prompt: if params.prompt_logprobs.is_some() { prompt } else { Vec::new() },
            params,
        }
    }

    /// Whether tokens are shown as they come: not where the best of several completions are chosen at the end.
    pub(super) fn streams(&self) -> bool {
        self.beams.is_none() && self.params.width() == self.params.n
    }

    /// Sequences whose next tokens the row of the prompt's last token gives.
    pub(super) fn first_rows(&self) -> usize {
        self.samples.len().max(1)
    }

    /// Whether nothing was generated yet.
    pub(super) fn is_new(&self) -> bool {
        self.samples.iter().all(|sample| sample.generated == 0)
    }

    /// Tokens of one sequence, the prompt counted.
    pub(super) fn len(&self, index: usize) -> usize {
        self.prompt_tokens + self.samples.get(index).map_or(0, |sample| sample.generated)
    }

    /// Notes the log-probabilities of prompt tokens that a chunk's rows predict.
    pub(super) fn read_prompt_rows(&mut self, chunk: &Chunk, rows: &Rows<'_>) {
        let (Some(entries), Some(top)) = (&mut self.prompt_logprobs, self.params.prompt_logprobs) else {
            return;
        };
        if chunk.logits != LogitRows::All {
            return;
        }
        // The row of position p predicts position p + 1. After a preemption some are known already.
        let end = self.prompt.len().min(chunk.start + chunk.tokens.len() + 1);
        let known = entries.len();
        let new: Vec<_> = (known..end)
            .into_par_iter()
            .map_init(Vec::new, |scratch, position| {
                let token = *self.prompt.get(position)?;
                match rows.get((position - 1).checked_sub(chunk.start)?)? {
                    Row::Logits(row) => Some(LogSoftmax::new(row).position(token, top, scratch)),
                    Row::Logprobs(logprobs) => Some(logprobs.clone()),
                    Row::Nothing | Row::Token(_) | Row::Candidates(_) => None,
                }
            })
            .collect();
        entries.extend(new);
    }

    /// Whether one more token is within the limit behind the one that is being chosen.
    pub(super) fn goes_on(&self, index: usize) -> bool {
        self.samples.get(index).is_some_and(|sample| sample.generated + 1 < self.limit)
    }

    /// What is wanted of the row that gives a completion its token at a position, or a beam its continuations.
    pub(super) fn wanted(&self, index: usize, position: usize) -> RowWanted {
        let params = &self.params;
        // One row gives the first token of every sample.
        if self.first_rows() > 1 && self.is_new() {
            return RowWanted::Logits;
        }
        if let Some(beams) = &self.beams {
            return beams.wanted(index, params).map_or(RowWanted::Nothing, RowWanted::Candidates);
        }
        let Some(sample) = self.samples.get(index) else { return RowWanted::Nothing };
        let sampling = Sampling {
            temperature: params.temperature,
            top_k: params.top_k,
            top_p: params.top_p,
            min_p: params.min_p,
            draw: self.draw(index, position),
        };
        let logprobs = params.logprobs.or_else(|| (!self.streams()).then_some(0));
        RowWanted::Token(TokenWanted { sampling, changes: sample.counts.changes(params), logprobs })
    }

    /// What is wanted of the row that predicts the prompt's token at a position.
    pub(super) fn prompt_row_wanted(&self, position: usize) -> RowWanted {
        let is_new = self.prompt_logprobs.as_ref().is_some_and(|entries| position >= entries.len());
        match (self.prompt.get(position), self.params.prompt_logprobs) {
            (Some(&token_id), Some(top)) if is_new => RowWanted::Logprobs { token_id, top },
            _ => RowWanted::Nothing,
        }
    }

    fn draw(&self, index: usize, position: usize) -> Draw {
        Draw { seed: self.seed, sample: index as u32, position: position as u64 }
    }

    /// Chooses the next token of a completion from its logits, or reads what a beam offers. `None` if the completion
    /// has ended.
    pub(super) fn choose(
        &self,
        index: usize,
        row: Row<'_>,
        sampler: &mut Sampler,
    ) -> Result<Option<Choice>, NoUsableLogit> {
        if let Some(beams) = &self.beams {
            // Its row would be read after the beams that are still missing have made the next step of the search, in
            // which another beam may stand in its place.
            if beams.has_offered(index) {
                return Ok(None);
            }
            let offer = match row {
                Row::Logits(row) => beams.read(index, row, &self.params, sampler)?,
                Row::Candidates(found) => Some(Offer::found(found.ok_or(NoUsableLogit)?)),
                Row::Nothing | Row::Token(_) | Row::Logprobs(_) => None,
            };
            return Ok(offer.map(Choice::Beam));
        }
        let Some(sample) = self.samples.get(index).filter(|sample| sample.finished.is_none()) else {
            return Ok(None);
        };
        let row = match row {
            Row::Logits(row) => row,
            Row::Token(token) => {
                let TokenOutput { token_id, logprobs } = token.cloned().ok_or(NoUsableLogit)?;
                return Ok(Some(Choice::Token(ChosenToken { token_id, logprobs })));
            }
            Row::Nothing | Row::Logprobs(_) | Row::Candidates(_) => return Ok(None),
        };
        let draw = self.draw(index, self.len(index));
        let token_id = sampler.sample(row, &self.params, &sample.counts, draw)?;
        let logprobs = (self.params.logprobs.is_some() || !self.streams())
            .then(|| sampler.logprobs(row, token_id, self.params.logprobs.unwrap_or(0)));
        Ok(Some(Choice::Token(ChosenToken { token_id, logprobs })))
    }

    /// Adds a token to a completion.
    pub(super) fn advance(
        &mut self,
        index: usize,
        chosen: ChosenToken,
        eos_token_ids: &[u32],
    ) -> Option<Step> {
        let params = &self.params;
        let sample = self.samples.get_mut(index)?;
        let ChosenToken { token_id, logprobs } = chosen;
        if let Some(entry) = logprobs {
            sample.logprob_sum += f64::from(entry.token.logprob);
            if let Some(entries) = &mut sample.logprobs {
                entries.push(entry);
            }
        }
        sample.counts.push(token_id);
        sample.generated += 1;

        let ends = (eos_token_ids.contains(&token_id) && !params.ignore_eos)
            || params.stop_token_ids.contains(&token_id);
        let mut finish_reason = if ends {
            Some(FinishReason::Stop)
        } else if sample.generated >= self.limit {
            Some(FinishReason::Length)
        } else {
            None
        };
        let mut text = String::new();
        if let Some(state) = &mut sample.text {
            let (shown, stopped) = state.push((!ends).then_some(token_id), finish_reason.is_some());
            text = shown;
            if stopped {
                finish_reason = Some(FinishReason::Stop);
            }
        }
        Some(Step { token_id, text, finish_reason })
    }

    /// Keeps a completion that has ended.
    pub(super) fn finish(&mut self, index: usize, token_ids: Vec<u32>, reason: FinishReason) {
        if let Some(sample) = self.samples.get_mut(index) {
            sample.finished = Some((token_ids, reason));
        }
    }

    /// The `n` best of the completions, all of them ended. In the order they were sampled where all are returned,
    /// else likeliest first.
    pub(super) fn into_output(self, detokenizer: Option<&DetokenizerFactory>) -> RequestOutput {
        let ranked = !self.streams();
        let (outputs, completion_tokens) = match self.beams {
            Some(beams) => {
                let outputs = beams.into_completions(&self.params, detokenizer);
                let tokens = outputs.iter().map(|output| output.token_ids.len()).sum();
                (outputs, tokens)
            }
            None => {
                let tokens = self.samples.iter().map(|sample| sample.generated).sum();
                let mut samples = self.samples;
                if ranked {
                    samples.sort_by(|a, b| b.logprob_sum.total_cmp(&a.logprob_sum));
                    samples.truncate(self.params.n);
                }
                (samples.into_iter().map(SampleState::into_completion).collect(), tokens)
            }
        };
        let cached_tokens = self.metrics.cached_tokens;
        let usage = Usage { prompt_tokens: self.prompt_tokens, completion_tokens, cached_tokens };
        RequestOutput { outputs, prompt_logprobs: self.prompt_logprobs, usage }
    }
}

impl SampleState {
    fn into_completion(self) -> Completion {
        let (token_ids, finish_reason) = self.finished.unwrap_or((Vec::new(), FinishReason::Length));
        Completion {
            text: self.text.map(|text| text.shown),
            token_ids,
            finish_reason,
            logprobs: self.logprobs,
            score: None,
        }
    }
}

impl Text {
    /// Adds a token, unless it is an end token, and at the end all that is held back. Returns what can be
    /// shown, and whether a stop string is complete.
    fn push(&mut self, token_id: Option<u32>, last: bool) -> (String, bool) {
        let mut piece = token_id.map_or_else(String::new, |id| self.detokenizer.push(id));
        if last {
            piece.push_str(&self.detokenizer.finish());
        }
        let released = self.stop.push(&piece);
        let mut text = released.text;
        if last && !released.stopped {
            text.push_str(&self.stop.finish());
        }
        self.shown.push_str(&text);
        (text, released.stopped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::Preemption;

    /// A row whose likeliest tokens are these, in this order.
    fn row(likeliest: &[usize]) -> Vec<f32> {
        let mut row = vec![0.0; 16];
        likeliest.iter().enumerate().for_each(|(rank, &token)| row[token] = 8.0 - rank as f32);
        row
    }

    fn choice(state: &RequestState, index: usize, row: &[f32]) -> Option<Offer> {
        match state.choose(index, Row::Logits(row), &mut Sampler::default()).ok().flatten() {
            Some(Choice::Beam(offer)) => Some(offer),
            _ => None,
        }
    }

    /// Where a beam has offered before its request was recomputed, its row comes again with those of the others. All rows
    /// of a step are read before the first of them counts.
    #[test]
    fn a_beam_that_comes_again_does_not_offer_for_its_successor() {
        let params = SamplingParams { beam_width: Some(2), n: 2, max_tokens: 5, ..Default::default() };
        let config = EngineConfig {
            max_num_seqs: 4,
            max_batch_tokens: 16,
            max_model_len: 64,
            vocab_size: 16,
            eos_token_ids: vec![],
            preemption: Preemption::Recompute,
        };
        let request = Request::new(vec![1, 2], params);
        let mut state = RequestState::new(request, &config, None, RequestMetrics::default());
        let first = choice(&state, 0, &row(&[3, 4]));
        let give = |state: &mut RequestState, index: usize, offer: Option<Offer>| {
            offer.and_then(|offer| state.beams.as_mut().and_then(|beams| beams.offer(index, offer))).is_some()
        };
        assert!(give(&mut state, 0, first), "one beam makes the first step");

        let early = choice(&state, 1, &row(&[5, 6]));
        assert!(early.is_some() && !give(&mut state, 1, early), "the other beam is missing");
        assert!(state.wanted(1, 3) == RowWanted::Nothing && state.wanted(0, 3) != RowWanted::Nothing);
        let both = [choice(&state, 0, &row(&[7, 8])), choice(&state, 1, &row(&[5, 6]))];
        let [missing, again] = both;
        assert!(again.is_none(), "it has offered");
        assert!(give(&mut state, 0, missing), "both have offered");
        let beams = state.beams.as_ref();
        assert!(beams.is_some_and(|beams| !beams.has_offered(0) && !beams.has_offered(1)));
    }
}
