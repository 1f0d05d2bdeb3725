//! Beam searches of the fixtures' models, as transformers made them, and the requests that repeat them.

use crate::fixture;
use pagewise_runtime::request::{EarlyStopping, Request, SamplingParams};
use serde::Deserialize;
use serde_json::Value;

/// A search and what comes out of it.
#[derive(Clone, Debug, Deserialize)]
pub struct GoldenBeam {
    /// Number of its prompt; 0 in the older file, where it hangs on its prompt.
    #[serde(default)]
    prompt: usize,
    /// Beams, all of which are answers.
    pub num_beams: usize,
    early_stopping: Value,
    /// Exponent of the length that scores are divided by.
    pub length_penalty: f32,
    /// The longest answer.
    pub max_new_tokens: usize,
    eos_token_id: Value,
    /// The answers, best first.
    pub sequences: Vec<Vec<u32>>,
    /// Their scores.
    pub scores: Vec<f64>,
}

#[derive(Deserialize)]
struct Golden {
    eos_token_id: u32,
    prompts: Vec<GoldenPrompt>,
}

#[derive(Deserialize)]
struct GoldenPrompt {
    prompt: Vec<u32>,
    beam: Vec<GoldenBeam>,
}

impl Golden {
    fn request(&self, beam: &GoldenBeam) -> Request {
        let id = |id: &Value| id.as_u64().and_then(|id| u32::try_from(id).ok());
        let ends: Vec<u32> = match &beam.eos_token_id {
            Value::Array(ids) => ids.iter().filter_map(id).collect(),
            one => id(one).into_iter().collect(),
        };
        let params = SamplingParams {
            max_tokens: beam.max_new_tokens,
            n: beam.num_beams,
            beam_width: Some(beam.num_beams),
            length_penalty: beam.length_penalty,
            early_stopping: match beam.early_stopping.as_bool() {
                Some(true) => EarlyStopping::True,
                Some(false) => EarlyStopping::False,
                None => EarlyStopping::Never,
            },
            ignore_eos: ends.is_empty(),
            stop_token_ids: ends.into_iter().filter(|&id| id != self.eos_token_id).collect(),
            // What only shapes sampling is of no effect.
            temperature: 0.3,
            top_k: 2,
            ..SamplingParams::default()
        };
        Request::new(self.prompts[beam.prompt].prompt.clone(), params)
    }
}

fn read<T: for<'a> Deserialize<'a>>(name: &str, file: &str) -> T {
    let path = fixture(name).join(file);
    let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn with_requests(golden: &Golden, more: Vec<GoldenBeam>) -> Vec<(GoldenBeam, Request)> {
    let old = golden.prompts.iter().enumerate().flat_map(|(prompt, golden)| {
        golden.beam.iter().map(move |beam| GoldenBeam { prompt, ..beam.clone() })
    });
    old.chain(more).map(|beam| (beam.clone(), golden.request(&beam))).collect()
}

/// The searches of a fixture's older file, `golden.json`, each with its request.
///
/// # Panics
/// When the file is not what the script makes.
pub fn older_beams(name: &str) -> Vec<(GoldenBeam, Request)> {
    with_requests(&read(name, "golden.json"), Vec::new())
}

/// Those and the searches of `beam_golden.json`.
///
/// # Panics
/// As [`older_beams`].
pub fn all_beams(name: &str) -> Vec<(GoldenBeam, Request)> {
    with_requests(&read(name, "golden.json"), read(name, "beam_golden.json"))
}
