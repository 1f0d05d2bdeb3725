//! The request files that figures are made with: `scripts/trace-requests` and the lengths in `traces/`.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::Command;

use serde::Deserialize;

/// A line for `pagewise generate --prompts`, with no other field than these.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    prompt_token_ids: Vec<u64>,
    max_tokens: usize,
    ignore_eos: bool,
    temperature: f32,
}

fn requests(vocabulary: u64) -> Vec<Request> {
    let benches = Path::new(env!("CARGO_MANIFEST_DIR"));
    let output = Command::new("python3")
        .arg(benches.join("../scripts/trace-requests"))
        .arg(benches.join("traces/sharegpt_like.jsonl"))
        .arg(vocabulary.to_string())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let lines = String::from_utf8(output.stdout).unwrap();
    lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// What `RESULTS.md` says of its 1,000 requests.
#[test]
fn chats_have_the_lengths_that_the_figures_name() {
    for vocabulary in [128_256, 50_272, 7] {
        let requests = requests(vocabulary);
        assert_eq!(requests.len(), 1000);
        assert_eq!(requests.iter().map(|request| request.prompt_token_ids.len()).sum::<usize>(), 161_310);
        assert_eq!(requests.iter().map(|request| request.max_tokens).sum::<usize>(), 337_990);
        assert!(requests.iter().all(|request| request.ignore_eos && request.temperature == 0.0));
        assert!(requests.iter().all(|request| request.prompt_token_ids.len() + request.max_tokens <= 2048));
        let mut state = 0u64;
        for id in requests.iter().flat_map(|request| &request.prompt_token_ids) {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            assert_eq!(*id, (state >> 33) % vocabulary);
        }
    }
}
