//! Beam searches of the fixtures' models, as transformers made them (`tests/fixtures/make_fixtures.py`,
//! `make_beam_goldens.py`): the same sequences in the same order, and the same scores, through the engine, all cases
//! of a fixture in one batch.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use pagewise_attention::DType;
use pagewise_runtime::engine::Engine;
use pagewise_runtime::load::{CacheSize, LoadOptions, load};
use pagewise_runtime::model_dir::ModelDir;
use pagewise_runtime::request::{FinishReason, Request, RequestOutput, SamplingParams};
use pagewise_runtime::scheduler::Preemption;
use pagewise_tests::{FIXTURES, GoldenBeam, all_beams, fixture};

fn engine(name: &str, change: impl FnOnce(&mut LoadOptions)) -> Engine {
    let mut options = LoadOptions::new(fixture(name).to_str().unwrap());
    // That of the goldens, whatever type the weights are stored in.
    options.kv_dtype = Some(DType::F32);
    change(&mut options);
    load(&options, &mut |_| {}).unwrap().engine
}

fn check(label: &str, golden: &GoldenBeam, output: &RequestOutput) {
    let found: Vec<&[u32]> = output.outputs.iter().map(|o| o.token_ids.as_slice()).collect();
    assert_eq!(found, golden.sequences, "{label}");
    for (completion, &score) in output.outputs.iter().zip(&golden.scores) {
        // f32 sums of two dozen log-probabilities. A negative length penalty multiplies them, and their error.
        let scale = (golden.max_new_tokens as f64).powf(-f64::from(golden.length_penalty)).max(1.0);
        let error = (f64::from(completion.score.unwrap()) - score).abs();
        assert!(error <= 1e-4 * scale, "{label}: score {:?}, golden {score}", completion.score);
        let ended = completion.token_ids.len() < golden.max_new_tokens;
        assert!(!ended || completion.finish_reason == FinishReason::Stop, "{label}");
    }
}

fn run(name: &str, engine: &mut Engine) {
    let (golden, requests): (Vec<_>, Vec<_>) = all_beams(name).into_iter().unzip();
    let results = engine.generate(requests).unwrap();
    for (index, (golden, result)) in golden.iter().zip(results).enumerate() {
        check(&format!("{name}, case {index}"), golden, &result.unwrap());
    }
    let stats = engine.stats();
    assert_eq!((stats.device_blocks.used, stats.host_blocks.used), (0, 0), "{name}");
}

#[test]
fn all_searches_of_a_fixture_in_one_batch() {
    for name in FIXTURES {
        for block_size in [1, 16] {
            run(name, &mut engine(name, |options| options.block_size = block_size));
        }
    }
}

/// Little more room than the widest of them needs alone: beams are swapped out and recomputed, with the sharing of their trees.
#[test]
fn preempted_searches_end_the_same() {
    for name in FIXTURES {
        let groups = ModelDir::open(&fixture(name)).unwrap().config.kv_groups().0.len();
        for preemption in [Preemption::Recompute, Preemption::Swap] {
            let mut engine = engine(name, |options| {
                options.block_size = 4;
                options.cache_size = CacheSize::Blocks(56 * groups);
                options.swap_space = 4 << 20;
                options.preemption = preemption;
                options.max_batch_tokens = Some(40);
            });
            run(name, &mut engine);
            let stats = engine.stats().scheduler;
            assert!(stats.preemptions > 0, "{name}, {preemption:?}: {stats:?}");
            assert!(
                (stats.swaps > 0) == (preemption == Preemption::Swap),
                "{name}, {preemption:?}: {stats:?}"
            );
        }
    }
}

/// The best `n` of a search with their log-probabilities. In blocks of one token, all of which are full, no beam costs a
/// copy.
#[test]
fn fewer_hypotheses_with_log_probabilities_and_no_full_block_copied() {
    let mut engine = engine("llama_gqa", |options| options.block_size = 1);
    for (golden, request) in all_beams("llama_gqa").into_iter().filter(|(golden, _)| golden.num_beams == 4) {
        let params = SamplingParams { n: 2, logprobs: Some(1), ..request.params };
        let output = engine.generate(vec![Request::new(request.prompt, params)]).unwrap().remove(0).unwrap();
        let found: Vec<&[u32]> = output.outputs.iter().map(|o| o.token_ids.as_slice()).collect();
        assert_eq!(found, golden.sequences[..2]);
        for completion in &output.outputs {
            let entries = completion.logprobs.as_ref().unwrap();
            let ids: Vec<u32> = entries.iter().map(|entry| entry.token.token_id).collect();
            assert_eq!(ids, completion.token_ids);
            let sum: f64 = entries.iter().map(|entry| f64::from(entry.token.logprob)).sum();
            let score = sum / (ids.len() as f64).powf(f64::from(golden.length_penalty));
            // Rounded once to f32.
            assert!((score - f64::from(completion.score.unwrap())).abs() <= 1e-6 * score.abs());
        }
        let tokens: usize = output.outputs.iter().map(|o| o.token_ids.len()).sum();
        assert_eq!(output.usage.completion_tokens, tokens);
    }
    assert_eq!(engine.stats().cache.copied_blocks, 0);
}
