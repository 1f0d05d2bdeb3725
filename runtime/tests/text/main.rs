//! Text to tokens and back: the reference tokenizer, streams of random tokens, chat templates.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking, its helpers too")]

mod chat_template;
mod stream;
mod tiny;
mod tokenizer;

use pagewise_runtime::text::Tokenizer;
use std::path::{Path, PathBuf};

/// SmolLM2's directory, which is too large for the repository: `PAGEWISE_SMOLLM2`, or else where `scripts/demo`
/// and `scripts/test` put it. Skips loudly where there is none; in CI that is a failure.
fn smollm2(test: &str) -> Option<PathBuf> {
    let cache = || {
        let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache"));
        let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(home)?;
        Some(cache.join("pagewise/models/SmolLM2-135M-Instruct-f32"))
    };
    let directory = std::env::var_os("PAGEWISE_SMOLLM2").map(PathBuf::from).or_else(cache);
    if let Some(directory) = directory.filter(|directory| directory.join("tokenizer.json").exists()) {
        return Some(directory);
    }
    assert!(std::env::var("CI").as_deref() != Ok("true"), "{test} needs SmolLM2; scripts/test fetches it");
    eprintln!(
        "SKIPPED: {test}: there is no SmolLM2; scripts/test fetches it, or name its directory in PAGEWISE_SMOLLM2"
    );
    None
}

fn smollm2_tokenizer(test: &str) -> Option<Tokenizer> {
    Some(Tokenizer::open(&smollm2(test)?).unwrap().unwrap())
}

/// A file of `tests/fixtures`.
fn fixture(name: &str) -> serde_json::Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}
