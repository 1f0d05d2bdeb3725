//! What the cross-crate tests share: where the reference models lie, their goldens of beam searches, and models driven step
//! by step.

#![allow(clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

mod beams;
mod numbers;
mod steps;

pub use beams::{GoldenBeam, all_beams, older_beams};
pub use numbers::Numbers;
pub use steps::{Planner, Sequence, argmax, executor, executor_after, rows_by_sequence};

use std::path::{Path, PathBuf};

/// The small random models of `tests/fixtures`, each with golden values of transformers.
pub const FIXTURES: [&str; 12] = [
    "llama_gqa",
    "llama_rope3",
    "qwen2",
    "mistral_swa",
    "qwen3",
    "phi3",
    "gemma2",
    "opt_preln",
    "opt_postln_proj",
    "opt_heads80",
    "opt_heads128",
    "gpt2",
];

/// The directory of a fixture: in `PAGEWISE_FIXTURES`, for a binary that has left its machine, or else in the sources.
pub fn fixture(name: &str) -> PathBuf {
    let sources = || Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    std::env::var_os("PAGEWISE_FIXTURES").map_or_else(sources, PathBuf::from).join(name)
}

/// SmolLM2-135M-Instruct in f32, as `scripts/fetch-smollm2` leaves it, or in the directory that
/// `PAGEWISE_SMOLLM2` names. `None` after saying on stderr that the test is skipped.
///
/// # Panics
/// With `CI=true` a missing model is a failure, not a skip.
pub fn smollm2_f32() -> Option<PathBuf> {
    let cache = || {
        let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
        let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(home)?;
        Some(cache.join("pagewise/models/SmolLM2-135M-Instruct-f32"))
    };
    let dir = std::env::var_os("PAGEWISE_SMOLLM2").map(PathBuf::from).or_else(cache);
    if let Some(dir) = dir.filter(|dir| dir.join("model.safetensors").is_file()) {
        return Some(dir);
    }
    let missing = "SmolLM2-135M-Instruct in f32 is not there; run scripts/fetch-smollm2 --dtype f32";
    assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "{missing}");
    eprintln!("SKIPPED: {missing}");
    None
}

/// The README, so that its example is compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
pub struct Readme;
