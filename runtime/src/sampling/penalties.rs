//! Bias and penalties: changes to single logits, in time proportional to the tokens they touch.

use crate::executor::{LogitChanges, TokenChange};
use crate::request::SamplingParams;
use rustc_hash::FxHashMap;

/// Which tokens a sequence holds, as far as its penalties need to know.
#[derive(Clone, Debug, Default)]
pub struct TokenCounts {
    counts: FxHashMap<u32, Count>,
    active: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Count {
    in_completion: u32,
}

impl TokenCounts {
    /// Counts for a new completion of `prompt`. Empty, and kept so, where the parameters have no penalty.
    pub fn new(prompt: &[u32], params: &SamplingParams) -> Self {
        let mut counts = FxHashMap::default();
        let repetition = params.repetition_penalty != 1.0;
        if repetition {
            counts.extend(prompt.iter().map(|&id| (id, Count::default())));
        }
        let active = repetition || params.presence_penalty != 0.0 || params.frequency_penalty != 0.0;
        Self { counts, active }
    }

    /// A token joins the completion.
    pub fn push(&mut self, id: u32) {
        if self.active {
            self.counts.entry(id).or_default().in_completion += 1;
        }
    }

    /// Whether [`process`] would leave the logits as they are.
    pub(crate) fn is_noop(&self, params: &SamplingParams) -> bool {
        params.logit_bias.is_empty() && !self.active
    }

    /// What [`process`] does, as a list for a device.
    pub(crate) fn changes(&self, params: &SamplingParams) -> LogitChanges {
        let &SamplingParams { repetition_penalty, presence_penalty, frequency_penalty, .. } = params;
        let mut biases: FxHashMap<u32, f32> = FxHashMap::default();
        for &(id, bias) in &params.logit_bias {
            *biases.entry(id).or_default() += bias;
        }
        let held = self.counts.iter().map(|(&token_id, count)| {
            let bias = biases.remove(&token_id).unwrap_or(0.0);
            TokenChange { token_id, bias, held: Some(count.in_completion) }
        });
        let mut tokens: Vec<TokenChange> = held.collect();
        tokens.extend(biases.iter().map(|(&token_id, &bias)| TokenChange { token_id, bias, held: None }));
        LogitChanges { repetition_penalty, presence_penalty, frequency_penalty, tokens }
    }
}

/// Adds the bias, then applies the penalties, to a row of logits. Ids outside of the row are skipped.
pub(super) fn process(row: &mut [f32], params: &SamplingParams, counts: &TokenCounts) {
    for &(id, bias) in &params.logit_bias {
        if let Some(logit) = row.get_mut(id as usize) {
            *logit += bias;
        }
    }
    for (&id, count) in &counts.counts {
        let Some(logit) = row.get_mut(id as usize) else { continue };
        if params.repetition_penalty != 1.0 {
            if *logit > 0.0 {
                *logit /= params.repetition_penalty;
            } else {
                *logit *= params.repetition_penalty;
            }
        }
        if count.in_completion > 0 {
            *logit -= params.frequency_penalty * count.in_completion as f32 + params.presence_penalty;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn processed(params: &SamplingParams, prompt: &[u32], completion: &[u32], row: &[f32]) -> Vec<f32> {
        let mut counts = TokenCounts::new(prompt, params);
        completion.iter().for_each(|&id| counts.push(id));
        let mut row = row.to_vec();
        process(&mut row, params, &counts);
        row
    }

    #[test]
    fn repetition_covers_prompt_and_completion_once_each() {
        let params = SamplingParams { repetition_penalty: 2.0, ..Default::default() };
        let row = processed(&params, &[0, 1, 1], &[1, 2, 2], &[4.0, -4.0, 1.0, 3.0, 0.0]);
        assert_eq!(row, [2.0, -8.0, 0.5, 3.0, 0.0]);
    }

    #[test]
    fn presence_and_frequency_cover_the_completion_only() {
        let params = SamplingParams { presence_penalty: 0.5, frequency_penalty: 0.25, ..Default::default() };
        let row = processed(&params, &[0, 3], &[1, 2, 2], &[1.0; 4]);
        assert_eq!(row, [1.0, 0.25, 0.0, 1.0]);
    }

    #[test]
    fn bias_comes_before_the_penalties() {
        let params = SamplingParams {
            repetition_penalty: 2.0,
            logit_bias: vec![(0, 3.0), (9, 1.0)],
            ..Default::default()
        };
        assert_eq!(processed(&params, &[0], &[], &[-1.0]), [1.0]);
        assert!(!TokenCounts::new(&[0], &params).is_noop(&params));
        let plain = SamplingParams::default();
        assert!(TokenCounts::new(&[0], &plain).is_noop(&plain));
    }
}
