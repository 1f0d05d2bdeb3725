//! Log-probabilities of the model's own distribution.

use super::{candidates, sampler};
use crate::request::{PositionLogprobs, TokenLogprob};

/// `log softmax` of one row of logits, evaluated where asked.
///
/// The normaliser is summed in f64. NaN counts as −∞; where there are logits of +∞ they share all of the
/// probability.
#[derive(Clone, Copy, Debug)]
pub struct LogSoftmax<'a> {
    row: &'a [f32],
    normaliser: Normaliser,
}

/// What makes log-probabilities of a row's logits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Normaliser {
    max: f32,
    /// ln Σ exp(logit − max).
    log_sum: f64,
}

impl Normaliser {
    /// `max` is the row's largest logit, `sum` that of exp(logit − max).
    pub(crate) fn new(max: f32, sum: f64) -> Self {
        Self { max, log_sum: sum.ln() }
    }

    /// The same from the sum's logarithm.
    #[cfg(feature = "cuda")]
    pub(crate) fn of_log_sum(max: f32, log_sum: f32) -> Self {
        Self { max, log_sum: f64::from(log_sum) }
    }

    /// ln p of a token with this logit.
    pub(crate) fn of_logit(self, logit: f32) -> f32 {
        if logit.is_nan() || logit == f32::NEG_INFINITY {
            f32::NEG_INFINITY
        } else if logit == self.max {
            (-self.log_sum) as f32
        } else {
            (f64::from(logit) - f64::from(self.max) - self.log_sum) as f32
        }
    }
}

impl<'a> LogSoftmax<'a> {
    /// Reads the row once for its maximum and once for its sum.
    pub fn new(row: &'a [f32]) -> Self {
        let max = sampler::max(row);
        let sum: f64 = row
            .iter()
            .map(|&logit| match logit {
                _ if logit == max => 1.0,
                _ if logit.is_nan() => 0.0,
                _ => (f64::from(logit) - f64::from(max)).exp(),
            })
            .sum();
        Self { row, normaliser: Normaliser::new(max, sum) }
    }

    /// ln p of a token; −∞ for one that the row does not hold.
    pub fn logprob(&self, token_id: u32) -> f32 {
        match self.row.get(token_id as usize) {
            Some(&logit) => self.of_logit(logit),
            None => f32::NEG_INFINITY,
        }
    }

    pub(super) fn of_logit(&self, logit: f32) -> f32 {
        self.normaliser.of_logit(logit)
    }

    /// The entry of a token with the `top` likeliest beside it, likeliest first, equal ones by lower id.
    /// Tokens of probability zero are not listed. `scratch` is overwritten.
    pub fn position(&self, token_id: u32, top: usize, scratch: &mut Vec<u64>) -> PositionLogprobs {
        candidates::top_k(self.row, top, scratch);
        scratch.sort_unstable_by(|a, b| b.cmp(a));
        let top = scratch
            .iter()
            .map(|&key| TokenLogprob {
                token_id: candidates::id(key),
                logprob: self.of_logit(candidates::logit(key)),
            })
            .collect();
        PositionLogprobs { token: TokenLogprob { token_id, logprob: self.logprob(token_id) }, top }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::random::Draw;

    #[test]
    fn agrees_with_the_plain_formula() {
        for case in 0..50u64 {
            let scale = [1.0, 30.0, 1e4][case as usize % 3];
            let row: Vec<f32> = (0..1000)
                .map(|position| ((Draw { seed: case, sample: 0, position }.uniform() - 0.5) * scale) as f32)
                .collect();
            let max = row.iter().map(|&l| f64::from(l)).fold(f64::MIN, f64::max);
            let lse = max + row.iter().map(|&l| (f64::from(l) - max).exp()).sum::<f64>().ln();
            let found = LogSoftmax::new(&row);
            for (id, &logit) in row.iter().enumerate() {
                let expected = f64::from(logit) - lse;
                let error = (f64::from(found.logprob(id as u32)) - expected).abs();
                // One rounding to f32, and the f64 noise of the sum.
                assert!(error <= expected.abs() * 6e-8 + 1e-12, "case {case}, token {id}: {error:e}");
            }
        }
    }

    #[test]
    fn lists_the_likeliest_with_ties_by_id() {
        let row = [1.0, f32::NAN, 3.0, 3.0, f32::NEG_INFINITY, 2.0];
        let entry = LogSoftmax::new(&row).position(0, 5, &mut Vec::new());
        let ids: Vec<u32> = entry.top.iter().map(|t| t.token_id).collect();
        assert_eq!(ids, [2, 3, 5, 0]);
        assert_eq!(entry.token, *entry.top.last().unwrap());
        assert!(LogSoftmax::new(&row).position(0, 0, &mut Vec::new()).top.is_empty());
        assert_eq!(LogSoftmax::new(&row).logprob(1), f32::NEG_INFINITY);
        assert_eq!(LogSoftmax::new(&row).logprob(99), f32::NEG_INFINITY);
    }

    #[test]
    fn infinite_logits_share_everything() {
        let row = [f32::INFINITY, 0.0, f32::INFINITY];
        let found = LogSoftmax::new(&row);
        assert!((found.logprob(0) - 0.5f32.ln()).abs() < 1e-7 && found.logprob(1) == f32::NEG_INFINITY);
        assert_eq!(LogSoftmax::new(&[f32::NAN; 3]).logprob(0), f32::NEG_INFINITY);
    }
}
