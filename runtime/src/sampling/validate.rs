//! Refuses sampling parameters that make no sense, naming the field.

use crate::request::{RequestError, SamplingParams};

impl SamplingParams {
    /// Sequences that run at a time: `beam_width`, or `best_of`, or `n`.
    pub fn width(&self) -> usize {
        self.beam_width.or(self.best_of).unwrap_or(self.n)
    }

    /// The field that asks for [`width`](Self::width) sequences.
    pub fn width_param(&self) -> &'static str {
        match (self.beam_width, self.best_of) {
            (Some(_), _) => "beam_width",
            (None, Some(_)) => "best_of",
            (None, None) => "n",
        }
    }

    /// Checks every field against its range, for a model of `vocab_size` tokens.
    ///
    /// # Errors
    /// [`RequestError`] with the first field at fault in `param`.
    pub fn validate(&self, vocab_size: usize) -> Result<(), RequestError> {
        let refuse = |param: &'static str, message: String| Err(RequestError { param: Some(param), message });
        if self.max_tokens == 0 {
            return refuse("max_tokens", "max_tokens must be at least 1".into());
        }
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            let message =
                format!("temperature must be 0 (greedy) or a positive number, not {}", self.temperature);
            return refuse("temperature", message);
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return refuse("top_p", format!("top_p must be above 0 and at most 1, not {}", self.top_p));
        }
        if !(self.min_p >= 0.0 && self.min_p <= 1.0) {
            return refuse("min_p", format!("min_p must be between 0 and 1, not {}", self.min_p));
        }
        if self.n == 0 {
            return refuse("n", "n must be at least 1".into());
        }
        if let Some(best_of) = self.best_of.filter(|&best_of| best_of < self.n) {
            return refuse("best_of", format!("best_of must be at least n = {}, not {best_of}", self.n));
        }
        if self.stop.iter().any(String::is_empty) {
            return refuse("stop", "a stop string must not be empty".into());
        }
        if let Some(id) = self.stop_token_ids.iter().find(|&&id| id as usize >= vocab_size) {
            let message = format!("stop token {id} is not in the vocabulary of {vocab_size} tokens");
            return refuse("stop_token_ids", message);
        }
        for (param, count) in [("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)] {
            if let Some(count) = count.filter(|&count| count > vocab_size) {
                let message =
                    format!("{param} must be at most the vocabulary's {vocab_size} tokens, not {count}");
                return refuse(param, message);
            }
        }
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite()) {
            let message =
                format!("repetition_penalty must be a positive number, not {}", self.repetition_penalty);
            return refuse("repetition_penalty", message);
        }
        let additive =
            [("presence_penalty", self.presence_penalty), ("frequency_penalty", self.frequency_penalty)];
        for (param, penalty) in additive {
            if !(-2.0..=2.0).contains(&penalty) {
                return refuse(param, format!("{param} must be between -2 and 2, not {penalty}"));
            }
        }
        for &(id, bias) in &self.logit_bias {
            if id as usize >= vocab_size {
                let message = format!(
                    "logit_bias names token {id}, which is not in the vocabulary of {vocab_size} tokens"
                );
                return refuse("logit_bias", message);
            }
            if !bias.is_finite() {
                return refuse(
                    "logit_bias",
                    format!("logit_bias of token {id} must be a finite number, not {bias}"),
                );
            }
        }
        if !self.length_penalty.is_finite() {
            let message = format!("length_penalty must be a finite number, not {}", self.length_penalty);
            return refuse("length_penalty", message);
        }
        match self.beam_width {
            Some(width) => self.validate_beams(width),
            None => Ok(()),
        }
    }

    fn validate_beams(&self, width: usize) -> Result<(), RequestError> {
        let refuse = |param: &'static str, message: String| Err(RequestError { param: Some(param), message });
        if width == 0 {
            return refuse("beam_width", "beam_width must be at least 1; leave it out to sample".into());
        }
        if self.n > width {
            return refuse("n", format!("n must be at most beam_width = {width}, not {}", self.n));
        }
        if self.best_of.is_some() {
            let message = "a beam search returns the n best of its beam_width beams; leave best_of out";
            return refuse("best_of", message.into());
        }
        if !self.stop.is_empty() {
            let message =
                "a beam search cannot end at stop strings; use stop_token_ids or leave beam_width out";
            return refuse("stop", message.into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bad_value_is_refused_by_name() {
        let base = SamplingParams::default;
        let nan = f32::NAN;
        let inf = f32::INFINITY;
        let bad: Vec<(&str, SamplingParams)> = vec![
            ("max_tokens", SamplingParams { max_tokens: 0, ..base() }),
            ("temperature", SamplingParams { temperature: -0.1, ..base() }),
            ("temperature", SamplingParams { temperature: nan, ..base() }),
            ("temperature", SamplingParams { temperature: inf, ..base() }),
            ("top_p", SamplingParams { top_p: 0.0, ..base() }),
            ("top_p", SamplingParams { top_p: 1.1, ..base() }),
            ("top_p", SamplingParams { top_p: nan, ..base() }),
            ("min_p", SamplingParams { min_p: -0.1, ..base() }),
            ("min_p", SamplingParams { min_p: 1.5, ..base() }),
            ("min_p", SamplingParams { min_p: nan, ..base() }),
            ("n", SamplingParams { n: 0, ..base() }),
            ("best_of", SamplingParams { n: 3, best_of: Some(2), ..base() }),
            ("stop", SamplingParams { stop: vec!["a".into(), String::new()], ..base() }),
            ("stop_token_ids", SamplingParams { stop_token_ids: vec![1, 10], ..base() }),
            ("logprobs", SamplingParams { logprobs: Some(11), ..base() }),
            ("prompt_logprobs", SamplingParams { prompt_logprobs: Some(usize::MAX), ..base() }),
            ("repetition_penalty", SamplingParams { repetition_penalty: 0.0, ..base() }),
            ("repetition_penalty", SamplingParams { repetition_penalty: inf, ..base() }),
            ("presence_penalty", SamplingParams { presence_penalty: 2.5, ..base() }),
            ("presence_penalty", SamplingParams { presence_penalty: nan, ..base() }),
            ("frequency_penalty", SamplingParams { frequency_penalty: -2.5, ..base() }),
            ("logit_bias", SamplingParams { logit_bias: vec![(10, 1.0)], ..base() }),
            ("logit_bias", SamplingParams { logit_bias: vec![(1, nan)], ..base() }),
            ("length_penalty", SamplingParams { length_penalty: nan, ..base() }),
            ("beam_width", SamplingParams { beam_width: Some(0), ..base() }),
            ("n", SamplingParams { beam_width: Some(2), n: 3, ..base() }),
            ("best_of", SamplingParams { beam_width: Some(2), best_of: Some(2), ..base() }),
            ("stop", SamplingParams { beam_width: Some(2), stop: vec!["a".into()], ..base() }),
        ];
        for (param, params) in bad {
            let error = params.validate(10).unwrap_err();
            assert_eq!(error.param, Some(param), "{params:?}");
            assert!(!error.message.is_empty());
        }
        base().validate(10).unwrap();
        SamplingParams { beam_width: Some(4), n: 4, ..base() }.validate(10).unwrap();
    }
}
