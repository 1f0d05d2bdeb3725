//! Chooses one token from one row of logits.

use super::beam::Candidate;
use super::weights::{self, BINS, Softmax};
use super::{candidates, penalties};
use crate::request::{PositionLogprobs, SamplingParams};
use crate::sampling::{LogSoftmax, TokenCounts};

pub use super::random::Draw;

/// Every logit of the row is NaN or −∞.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the model gave no usable logit (every one is NaN or −∞); check the weights and the logit bias")]
pub struct NoUsableLogit;

/// Working memory that is used again for every token.
#[derive(Clone, Debug, Default)]
pub struct Sampler {
    /// The row after bias and penalties.
    processed: Vec<f32>,
    /// Candidates of the filters.
    keys: Vec<u64>,
    /// Weights relative to the likeliest token, of the candidates or of the whole row.
    weights: Vec<f32>,
    /// Sums of weights.
    sums: Vec<f64>,
}

impl Sampler {
    /// Chooses the next token: steps 2 to 9 of the [module's order](super). The row is only read.
    ///
    /// # Errors
    /// [`NoUsableLogit`].
    pub fn sample(
        &mut self,
        row: &[f32],
        params: &SamplingParams,
        counts: &TokenCounts,
        draw: Draw,
    ) -> Result<u32, NoUsableLogit> {
        let mut processed = std::mem::take(&mut self.processed);
        let chosen = if counts.is_noop(params) {
            self.choose(row, params, draw)
        } else {
            processed.clear();
            processed.extend_from_slice(row);
            penalties::process(&mut processed, params, counts);
            self.choose(&processed, params, draw)
        };
        self.processed = processed;
        chosen
    }

    /// The log-probabilities of a row: the token's own and those of the `top` likeliest.
    pub fn logprobs(&mut self, row: &[f32], token_id: u32, top: usize) -> PositionLogprobs {
        LogSoftmax::new(row).position(token_id, top, &mut self.keys)
    }

    /// The likeliest continuations of a beam, the likeliest first, lower ids first among equals. Bias and penalties
    /// change log-probabilities here, not logits.
    ///
    /// # Errors
    /// [`NoUsableLogit`].
    pub fn candidates(
        &mut self,
        row: &[f32],
        params: &SamplingParams,
        counts: &TokenCounts,
        count: usize,
    ) -> Result<Vec<Candidate>, NoUsableLogit> {
        let softmax = LogSoftmax::new(row);
        let plain = counts.is_noop(params);
        if plain {
            candidates::top_k(row, count, &mut self.keys);
        } else {
            self.processed.clear();
            self.processed.extend(row.iter().map(|&logit| softmax.of_logit(logit)));
            penalties::process(&mut self.processed, params, counts);
            candidates::top_k(&self.processed, count, &mut self.keys);
        }
        self.keys.sort_unstable_by(|a, b| b.cmp(a));
        let candidate = |&key: &u64| {
            let value = candidates::logit(key);
            let logprob = f64::from(if plain { softmax.of_logit(value) } else { value });
            Candidate { token_id: candidates::id(key), logprob }
        };
        let found: Vec<Candidate> = self.keys.iter().map(candidate).collect();
        if found.is_empty() { Err(NoUsableLogit) } else { Ok(found) }
    }

    fn choose(&mut self, row: &[f32], params: &SamplingParams, draw: Draw) -> Result<u32, NoUsableLogit> {
        let (best, max) = argmax(row).ok_or(NoUsableLogit)?;
        if params.temperature == 0.0 || params.top_k == 1 {
            return Ok(best);
        }
        let softmax = Softmax::new(max, params.temperature);
        let chosen = if params.top_k > 0 && params.top_k < row.len() {
            self.among_top_k(row, params, softmax, draw)
        } else {
            self.among_all(row, params, softmax, draw)
        };
        // The likeliest token passes every filter and weighs 1, so something is always chosen.
        Ok(chosen.unwrap_or(best))
    }

    /// With top-k, only its tokens are ever weighed.
    fn among_top_k(
        &mut self,
        row: &[f32],
        params: &SamplingParams,
        softmax: Softmax,
        draw: Draw,
    ) -> Option<u32> {
        let weight = |key| softmax.weight(candidates::logit(key));
        candidates::top_k(row, params.top_k, &mut self.keys);
        if params.top_p < 1.0 {
            let total: f64 = self.keys.iter().map(|&key| f64::from(weight(key))).sum();
            let worst = candidates::nucleus(&mut self.keys, f64::from(params.top_p) * total, weight);
            self.keys.retain(|&key| key >= worst);
        }
        self.keys.sort_unstable_by_key(|&key| candidates::id(key));
        self.weights.clear();
        let above_min_p = |weight: f32| if weight >= params.min_p { weight } else { 0.0 };
        self.weights.extend(self.keys.iter().map(|&key| above_min_p(weight(key))));
        let index = weights::pick(&self.weights, draw.uniform(), &mut self.sums)?;
        self.keys.get(index).map(|&key| candidates::id(key))
    }

    /// Without, the whole row is weighed, and what the filters drop weighs nothing.
    fn among_all(
        &mut self,
        row: &[f32],
        params: &SamplingParams,
        softmax: Softmax,
        draw: Draw,
    ) -> Option<u32> {
        softmax.weigh(row, &mut self.weights);
        if params.top_p < 1.0 {
            let worst = self.nucleus(row, f64::from(params.top_p), softmax);
            let (bar, last) = (candidates::logit(worst), candidates::id(worst));
            for ((id, &logit), weight) in (0u32..).zip(row).zip(&mut self.weights) {
                let passes = logit > bar || (logit == bar && id <= last);
                *weight = if passes { *weight } else { 0.0 };
            }
        }
        if params.min_p > 0.0 {
            for weight in &mut self.weights {
                *weight = if *weight >= params.min_p { *weight } else { 0.0 };
            }
        }
        weights::pick(&self.weights, draw.uniform(), &mut self.sums).map(|id| id as u32)
    }

    /// The worst token, as a key, of the smallest set of the likeliest that holds the share `p` of the weights.
    /// Finds first, by sums over bins of similar logits, in which bin it is.
    fn nucleus(&mut self, row: &[f32], p: f64, softmax: Softmax) -> u64 {
        self.sums.clear();
        self.sums.resize(BINS, 0.0);
        for (&logit, &weight) in row.iter().zip(&self.weights) {
            if weight > 0.0
                && let Some(sum) = self.sums.get_mut(softmax.bin(logit))
            {
                *sum += f64::from(weight);
            }
        }
        let target = p * self.sums.iter().sum::<f64>();
        let (mut before, mut bin) = (0.0, 0);
        for (index, &sum) in self.sums.iter().enumerate() {
            if sum > 0.0 {
                bin = index;
                if before + sum >= target {
                    break;
                }
                before += sum;
            }
        }
        self.keys.clear();
        for ((id, &logit), &weight) in (0u32..).zip(row).zip(&self.weights) {
            if weight > 0.0 && softmax.bin(logit) == bin {
                self.keys.push(candidates::key(logit, id));
            }
        }
        let weight = |key| softmax.weight(candidates::logit(key));
        candidates::nucleus(&mut self.keys, target - before, weight)
    }
}

/// The largest logit above −∞ and the lowest id that has it.
fn argmax(row: &[f32]) -> Option<(u32, f32)> {
    let max = max(row);
    if max == f32::NEG_INFINITY {
        return None;
    }
    let id = row.iter().position(|&logit| logit == max)?;
    Some((id as u32, max))
}

/// The largest logit that is a number, −∞ if there is none.
pub(super) fn max(row: &[f32]) -> f32 {
    // Several running maxima, so that the compiler can use vector instructions; false for NaN.
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; 32];
    let chunks = row.chunks_exact(lanes.len());
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, &logit) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, logit);
        }
    }
    lanes.into_iter().chain(rest.iter().copied()).fold(f32::NEG_INFINITY, larger)
}
