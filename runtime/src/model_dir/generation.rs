//! `generation_config.json`: end tokens and the sampling that a model's makers recommend.

use super::{ModelConfig, ModelError, json};
use std::path::Path;

/// What a model's makers recommend for sampling, and the tokens that end a text.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    /// Tokens that end a text: those of `generation_config.json`, else those of `config.json`.
    pub eos_token_ids: Vec<u32>,
    /// Divides the logits; not negative.
    pub temperature: Option<f32>,
    /// In (0, 1].
    pub top_p: Option<f32>,
    /// 0 keeps all.
    pub top_k: Option<usize>,
    /// In [0, 1].
    pub min_p: Option<f32>,
    /// Above 0.
    pub repetition_penalty: Option<f32>,
}

/// Reads `generation_config.json`, which may be absent.
pub(super) fn parse_generation(
    directory: &Path,
    config: &ModelConfig,
) -> Result<GenerationConfig, ModelError> {
    let Some(file) = json::read_object(&directory.join("generation_config.json"))? else {
        return Ok(GenerationConfig { eos_token_ids: config.eos_token_ids.clone(), ..Default::default() });
    };
    let number = |name: &str, rule: &str, accept: &dyn Fn(f64) -> bool| {
        Ok::<_, ModelError>(file.number(name, rule, accept)?.map(|number| number as f32))
    };
    Ok(GenerationConfig {
        eos_token_ids: file
            .token_ids("eos_token_id", config.vocab_size)?
            .unwrap_or_else(|| config.eos_token_ids.clone()),
        temperature: number("temperature", "a number from 0 to 100", &|x| (0.0..=100.0).contains(&x))?,
        top_p: number("top_p", "a number above 0 and at most 1", &|x| x as f32 > 0.0 && x <= 1.0)?,
        top_k: file.integer("top_k", 0, u64::from(u32::MAX))?.map(|k| k as usize),
        min_p: number("min_p", "a number from 0 to 1", &|x| (0.0..=1.0).contains(&x))?,
        repetition_penalty: number("repetition_penalty", "a number above 0 and at most 100", &|x| {
            x as f32 > 0.0 && x <= 100.0
        })?,
    })
}
