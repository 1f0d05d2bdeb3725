//! Chooses one token from one row of logits.

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
    /// What the filters kept, ids rising, with weights relative to the likeliest.
    kept: Vec<(u32, f32)>,
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

    fn choose(&mut self, row: &[f32], params: &SamplingParams, draw: Draw) -> Result<u32, NoUsableLogit> {
        let (best, max) = argmax(row).ok_or(NoUsableLogit)?;
        if params.temperature == 0.0 || params.top_k == 1 {
            return Ok(best);
        }
        self.filter(row, params, max);
        let total: f64 = self.kept.iter().map(|&(_, weight)| f64::from(weight)).sum();
        let target = draw.uniform() * total;
        let mut sum = 0.0;
        for &(id, weight) in &self.kept {
            sum += f64::from(weight);
            if sum > target {
                return Ok(id);
            }
        }
        // `target < total`, summed in the same order: the loop has returned.
        Ok(best)
    }

    /// Fills `kept` with the tokens that pass top-k, top-p and min-p.
    fn filter(&mut self, row: &[f32], params: &SamplingParams, max: f32) {
        let temperature = params.temperature;
        // The likeliest token weighs 1 even where `max` is infinite; subtracting first keeps a tiny
        // temperature from overflowing.
        let weight = |logit: f32| if logit == max { 1.0 } else { ((logit - max) / temperature).exp() };
        let limits_k = params.top_k > 0 && params.top_k < row.len();
        let limits_p = params.top_p < 1.0;

        let mut worst = 0;
        if limits_k {
            candidates::top_k(row, params.top_k, &mut self.keys);
            worst = self.keys.iter().copied().min().unwrap_or(0);
        }
        if limits_p {
            let total: f64 = if limits_k {
                self.keys.iter().map(|&key| f64::from(weight(candidates::logit(key)))).sum()
            } else {
                row.iter().filter(|logit| !logit.is_nan()).map(|&logit| f64::from(weight(logit))).sum()
            };
            let p = f64::from(params.top_p);
            if !limits_k {
                // Tokens lighter than this weigh less than 1 − p all together, so the nucleus has none of
                // them; the factor makes up for rounding.
                let bar = ((1.0 - p) * total / row.len() as f64 * 0.999) as f32;
                self.keys.clear();
                let heavy = (0u32..).zip(row).filter(|&(_, &logit)| !logit.is_nan() && weight(logit) >= bar);
                self.keys.extend(heavy.map(|(id, &logit)| candidates::key(logit, id)));
            }
            if !self.keys.is_empty() {
                worst = candidates::nucleus(&mut self.keys, p * total, weight);
            }
        }

        self.kept.clear();
        let bar = if worst == 0 { f32::NEG_INFINITY } else { candidates::logit(worst) };
        for (id, &logit) in (0u32..).zip(row) {
            // Also false for NaN.
            let passes = logit >= bar && (logit > bar || candidates::key(logit, id) >= worst);
            if passes {
                let weight = weight(logit);
                if weight > 0.0 && weight >= params.min_p {
                    self.kept.push((id, weight));
                }
            }
        }
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
