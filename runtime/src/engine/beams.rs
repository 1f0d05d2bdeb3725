//! A request's beam search: rows of logits become candidates, candidates of all beams a step of the search, and its
//! pool the request's completions.

use super::detokenize::DetokenizerFactory;
use crate::executor::{CandidatesOutput, CandidatesWanted};
use crate::request::{Completion, PositionLogprobs, SamplingParams, TokenLogprob};
use crate::sampling::beam::{BeamRules, BeamSearch, BeamStep, Candidate, Continuation, Hypothesis};
use crate::sampling::{LogSoftmax, NoUsableLogit, Sampler, TokenCounts};
use std::sync::Arc;

/// The search, and the candidates of those beams whose logits have come. They may come in different steps, and where the
/// request was recomputed in between the logits of some come again: those are not asked for, and not read.
pub(super) struct BeamState {
    search: BeamSearch<Beam>,
    offers: Vec<Option<Offer>>,
}

#[derive(Clone, Default)]
struct Beam {
    tokens: Vec<u32>,
    counts: TokenCounts,
    /// Empty where they are not asked for.
    logprobs: Vec<Arc<PositionLogprobs>>,
}

/// How a beam may continue.
pub(super) struct Offer {
    candidates: Vec<Candidate>,
    /// What the model itself thinks of each, where asked for.
    logprobs: Vec<Arc<PositionLogprobs>>,
}

impl Offer {
    /// What a device found in a beam's logits.
    pub(super) fn found(found: &CandidatesOutput) -> Self {
        let CandidatesOutput { candidates, own, top } = found;
        let logprobs = candidates.iter().zip(own).map(|(candidate, &logprob)| {
            let token = TokenLogprob { token_id: candidate.token_id, logprob };
            Arc::new(PositionLogprobs { token, top: top.clone() })
        });
        Self { candidates: candidates.clone(), logprobs: logprobs.collect() }
    }
}

impl BeamState {
    /// `limit` is the most tokens that a hypothesis may have.
    pub(super) fn new(prompt: &[u32], params: &SamplingParams, eos_token_ids: &[u32], limit: usize) -> Self {
        let eos = if params.ignore_eos { &[] } else { eos_token_ids };
        let mut end_tokens: Vec<u32> = eos.iter().chain(&params.stop_token_ids).copied().collect();
        end_tokens.sort_unstable();
        end_tokens.dedup();
        let rules = BeamRules {
            width: params.width(),
            length_penalty: f64::from(params.length_penalty),
            early_stopping: params.early_stopping,
            end_tokens,
            max_tokens: limit,
        };
        let start = Beam { counts: TokenCounts::new(prompt, params), ..Beam::default() };
        Self { search: BeamSearch::new(rules, start), offers: vec![None] }
    }

    /// What a beam's logits offer.
    pub(super) fn read(
        &self,
        index: usize,
        row: &[f32],
        params: &SamplingParams,
        sampler: &mut Sampler,
    ) -> Result<Option<Offer>, NoUsableLogit> {
        let Some(beam) = self.search.beam(index) else { return Ok(None) };
        let candidates = sampler.candidates(row, params, &beam.counts, self.search.rules().candidates())?;
        let logprobs = params.logprobs.map_or_else(Vec::new, |count| {
            let softmax = LogSoftmax::new(row);
            let top = sampler.logprobs(row, 0, count).top;
            let own = candidates.iter().map(|&Candidate { token_id, .. }| {
                let token = TokenLogprob { token_id, logprob: softmax.logprob(token_id) };
                Arc::new(PositionLogprobs { token, top: top.clone() })
            });
            own.collect()
        });
        Ok(Some(Offer { candidates, logprobs }))
    }

    /// Whether a beam's candidates have come already.
    pub(super) fn has_offered(&self, index: usize) -> bool {
        self.offers.get(index).is_some_and(Option::is_some)
    }

    /// What is wanted of a beam's logits.
    pub(super) fn wanted(&self, index: usize, params: &SamplingParams) -> Option<CandidatesWanted> {
        let beam = self.search.beam(index).filter(|_| !self.has_offered(index))?;
        Some(CandidatesWanted {
            count: self.search.rules().candidates(),
            changes: beam.counts.changes(params),
            logprobs: params.logprobs,
        })
    }

    /// Takes what a beam offers; a step of the search once all have offered.
    pub(super) fn offer(&mut self, index: usize, offer: Offer) -> Option<BeamStep> {
        *self.offers.get_mut(index)? = Some(offer);
        if self.offers.iter().any(Option::is_none) {
            return None;
        }
        let offers = std::mem::take(&mut self.offers).into_iter().flatten();
        let (candidates, logprobs): (Vec<_>, Vec<_>) =
            offers.map(|offer| (offer.candidates, offer.logprobs)).unzip();
        let step = self.search.step(&candidates, |beam, Continuation { parent, token_id }| {
            let mut beam = beam.clone();
            beam.tokens.push(token_id);
            beam.counts.push(token_id);
            let mut entries = logprobs.get(parent).into_iter().flatten();
            beam.logprobs.extend(entries.find(|entry| entry.token.token_id == token_id).cloned());
            beam
        });
        self.offers.resize_with(self.search.running(), || None);
        Some(step)
    }

    /// The best hypotheses, with their texts.
    pub(super) fn into_completions(
        self,
        params: &SamplingParams,
        detokenizer: Option<&DetokenizerFactory>,
    ) -> Vec<Completion> {
        let end_tokens = self.search.rules().end_tokens.clone();
        let text = |tokens: &[u32]| {
            let mut detokenizer = detokenizer?();
            let shown = tokens.iter().filter(|token| !end_tokens.contains(token));
            let mut text: String = shown.map(|&token| detokenizer.push(token)).collect();
            text.push_str(&detokenizer.finish());
            Some(text)
        };
        let completion = |hypothesis: Hypothesis<Beam>| {
            let Beam { tokens, logprobs, .. } = hypothesis.path;
            Completion {
                text: text(&tokens),
                token_ids: tokens,
                finish_reason: hypothesis.finish_reason,
                logprobs: params.logprobs.map(|_| logprobs.into_iter().map(Arc::unwrap_or_clone).collect()),
                score: Some(hypothesis.score as f32),
            }
        };
        self.search.into_pool().into_iter().take(params.n).map(completion).collect()
    }
}
