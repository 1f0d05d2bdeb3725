//! The engine on CUDA against the engine on the CPU: all fixtures and SmolLM2, in every type of weights.
//!
//! Logits of given tokens must agree within a bound that follows from the type and, in 16 bits, from how much roundings
//! move the logits of this model on the CPU; greedy tokens must be the same until the CPU's own choice is closer than
//! twice that bound, after which both are right and go separate ways.
//!
//! `PAGEWISE_LOAD_SECONDS` says how long the random load runs (5).

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    unreachable_pub,
    reason = "a test fails by panicking, its helpers too"
)]

#[path = "gpu/cuda.rs"]
#[allow(dead_code, reason = "shared with the kernels' tests")]
mod cuda;
#[path = "gpu/engine_beams.rs"]
mod engine_beams;
#[path = "gpu/engine_load.rs"]
mod engine_load;
#[path = "gpu/engine_machine.rs"]
mod engine_machine;
#[path = "gpu/engine_oracle.rs"]
mod engine_oracle;
#[path = "gpu/engine_sampling.rs"]
mod engine_sampling;

use engine_load::serve_loads;
use engine_machine::{
    Machine, Types, bound, calmed, config, difference, rows_alone, rows_decoded, rows_mixed, texts,
};
use engine_oracle::{Oracle, Way, crowded, empty, engine, generate, requests, tokens, way};
use pagewise_attention::DType;
use pagewise_runtime::load::BackendChoice;
use pagewise_runtime::scheduler::Preemption;
use pagewise_tests::{FIXTURES, fixture, smollm2_f32};
use std::path::Path;

/// Weights, and caches of their type.
const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];

/// Caches of fp8, and the fixtures whose calmer copies they are tried with: plain, with biases, with a window.
const FP8: [Types; 3] = [
    Types::new(DType::F16, DType::F8E4M3),
    Types::new(DType::F16, DType::F8E5M2),
    Types::new(DType::Bf16, DType::F8E4M3),
];
const FP8_FIXTURES: [&str; 3] = ["llama_gqa", "qwen2", "mistral_swa"];

/// Logits of given tokens, in every way to compute them.
fn logits_agree(name: &str, dir: &Path, types: Types, count: usize, longest: usize) {
    let texts = texts(config(dir).vocab_size, count, longest, 17);
    let bound = bound(dir, types, &texts);
    let expected = rows_alone(&mut Machine::cpu(dir, types), &texts);
    let check = |way: &str, found: &[Vec<Vec<f32>>], of: usize| {
        let label = format!("{name} {types} {way}");
        let worst = difference(&label, found, &expected[..of]);
        println!("{label}: {worst:.2e} apart, {bound:.2e} allowed");
        assert!(worst <= bound, "{label}: {worst:.3e} of the largest logit apart, {bound:.3e} allowed");
    };
    check("alone", &rows_alone(&mut Machine::cuda(dir, types, true), &texts), count);
    check("mixed", &rows_mixed(&mut Machine::cuda(dir, types, true), &texts, 5), count);
    for of in [1, 3, 8, count] {
        let replayed = rows_decoded(&mut Machine::cuda(dir, types, true), &texts[..of]);
        check(&format!("decoded by {of}"), &replayed, of);
        let launched = rows_decoded(&mut Machine::cuda(dir, types, false), &texts[..of]);
        assert!(replayed == launched, "{name} {types}: graphs change bits in a batch of {of}");
    }
}

#[test]
fn logits_of_given_tokens_agree() {
    if cuda::context().is_none() {
        return;
    }
    let mut failures = Vec::new();
    for name in FIXTURES {
        for types in DTYPES.map(Types::from) {
            // Every fixture is tried, so that one run says all.
            let run = || logits_agree(name, &fixture(name), types, 19, 40);
            if std::panic::catch_unwind(run).is_err() {
                failures.push(format!("{name} {types}"));
            }
        }
    }
    assert!(failures.is_empty(), "{failures:?}");
}

#[test]
fn smollm2_logits_of_given_tokens_agree() {
    if cuda::context().is_none() {
        return;
    }
    let Some(dir) = smollm2_f32() else { return };
    for types in DTYPES.map(Types::from) {
        logits_agree("SmolLM2", &dir, types, 9, 30);
    }
}

/// Requests through the whole engine: few and many at once, crowded with both preemptions, with graphs and without.
fn answers_agree(name: &str, dir: &Path, types: Types, count: usize) {
    let config = config(dir);
    let mut oracle = Oracle::new(dir, types);
    let requests = requests(config.vocab_size, count, 23);
    let roomy = way(BackendChoice::Cuda, types);
    let crowded = crowded(dir, roomy);
    let ways = [
        ("roomy", roomy),
        ("recomputed", crowded),
        ("swapped", Way { preemption: Preemption::Swap, ..crowded }),
    ];
    let mut same = 0;
    for (what, way) in ways {
        let label = format!("{name} {types} {what}");
        let mut with_graphs = engine(dir, way);
        let found = generate(&mut with_graphs, &requests);
        for (index, (request, found)) in requests.iter().zip(&found).enumerate() {
            same += usize::from(oracle.check(&format!("{label}, request {index}"), request, found));
        }
        empty(&label, &with_graphs);
        let stats = with_graphs.stats().scheduler;
        println!("{label}: {} preemptions, {} of them swaps", stats.preemptions, stats.swaps);
        match what {
            "recomputed" => assert!(stats.preemptions > 0, "{label}: nobody made room"),
            "swapped" => assert!(stats.swaps > 0, "{label}: nobody was swapped"),
            _ => {}
        }
        drop(with_graphs);
        let mut without = engine(dir, Way { graphs: false, ..way });
        assert_eq!(
            tokens(&generate(&mut without, &requests)),
            tokens(&found),
            "{label}: graphs change tokens"
        );
    }
    println!("{name} {types}: {same} of {} answers are the CPU's to the token", 3 * count);
}

#[test]
fn answers_agree_with_the_cpu() {
    if cuda::context().is_none() {
        return;
    }
    let mut failures = Vec::new();
    for name in FIXTURES {
        for types in DTYPES.map(Types::from) {
            if std::panic::catch_unwind(|| answers_agree(name, &fixture(name), types, 21)).is_err() {
                failures.push(format!("{name} {types}"));
            }
        }
    }
    assert!(failures.is_empty(), "{failures:?}");
}

/// Steps so small that all products are our own kernels': what a sanitizer can judge. The library's kernels store through
/// the copy engine, which initcheck does not see, so that it calls what they wrote uninitialised.
#[test]
fn answers_of_small_steps_agree_with_the_cpu() {
    if cuda::context().is_none() {
        return;
    }
    let dir = fixture("llama_gqa");
    for types in DTYPES.map(Types::from) {
        let mut oracle = Oracle::new(&dir, types);
        let requests = requests(config(&dir).vocab_size, 4, 31);
        let mut engine = engine(&dir, Way { budget: 8, ..way(BackendChoice::Cuda, types) });
        for (index, (request, found)) in requests.iter().zip(&generate(&mut engine, &requests)).enumerate() {
            oracle.check(&format!("{types}, request {index}"), request, found);
        }
        empty("small steps", &engine);
    }
}

#[test]
fn smollm2_answers_agree_with_the_cpu() {
    if cuda::context().is_none() {
        return;
    }
    let Some(dir) = smollm2_f32() else { return };
    for types in DTYPES.map(Types::from) {
        answers_agree("SmolLM2", &dir, types, 21);
    }
}

/// Caches of fp8: logits of given tokens, and requests through the whole engine.
#[test]
fn fp8_caches_agree_with_the_cpu() {
    let Some(context) = cuda::context() else { return };
    if !context.device().converts_fp8() {
        println!("SKIPPED: {} does not convert fp8", context.device());
        return;
    }
    let mut failures = Vec::new();
    for name in FP8_FIXTURES {
        let copy = calmed(&fixture(name));
        for types in FP8 {
            let run = || {
                logits_agree(name, copy.path(), types, 19, 40);
                answers_agree(name, copy.path(), types, 21);
            };
            if std::panic::catch_unwind(run).is_err() {
                failures.push(format!("{name} {types}"));
            }
        }
    }
    assert!(failures.is_empty(), "{failures:?}");
}

#[test]
fn a_random_load_is_served_right() {
    if cuda::context().is_none() {
        return;
    }
    let seconds =
        std::env::var("PAGEWISE_LOAD_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(5.0);
    serve_loads(BackendChoice::Cuda, seconds);
}

/// That the load preempts does not depend on the device: here it can be seen without one.
#[test]
fn the_random_load_preempts_on_the_cpu_too() {
    serve_loads(BackendChoice::Cpu, 2.0);
}

/// A crowded cache preempts on any device. How often depends on when steps are planned, so that it must be more than once.
#[test]
fn a_crowded_cache_preempts_on_the_cpu_too() {
    for name in FIXTURES {
        let dir = fixture(name);
        let mut engine = engine(&dir, crowded(&dir, way(BackendChoice::Cpu, DType::F32)));
        generate(&mut engine, &requests(config(&dir).vocab_size, 21, 23));
        let preemptions = engine.stats().scheduler.preemptions;
        println!("{name}: {preemptions} preemptions");
        assert!(preemptions >= 3, "{name}: {preemptions} preemptions");
    }
}

/// That a bound does not allow everything: a model that takes one token for another is far beyond it.
fn catches_a_wrong_token(name: &str, dir: &Path, types: Types) {
    let vocab_size = config(dir).vocab_size;
    let right = texts(vocab_size, 19, 40, 17);
    let mut wrong = right.clone();
    wrong.iter_mut().for_each(|text| text[0] = (text[0] + 1) % vocab_size as u32);
    let bound = bound(dir, types, &right);
    let mut machine = Machine::cpu(dir, types);
    // The last rows, which see the wrong token through attention alone.
    let mut last = |texts: &[Vec<u32>]| -> Vec<Vec<Vec<f32>>> {
        let rows = rows_alone(&mut machine, texts);
        rows.into_iter().map(|mut rows| rows.split_off(rows.len() - 1)).collect()
    };
    let expected = last(&right);
    let fault = difference(name, &last(&wrong), &expected);
    println!("{name} {types}: {bound:.2e} allowed, {fault:.2e} with a wrong token");
    assert!(fault > 2.0 * bound, "{name} {types}: {bound:.2e} would allow a wrong token's {fault:.2e}");
}

#[test]
fn bounds_catch_a_wrong_token() {
    for name in FIXTURES {
        for dtype in DTYPES {
            catches_a_wrong_token(name, &fixture(name), dtype.into());
        }
    }
}

#[test]
fn bounds_over_fp8_caches_catch_a_wrong_token() {
    for name in FP8_FIXTURES {
        let copy = calmed(&fixture(name));
        for types in FP8 {
            catches_a_wrong_token(name, copy.path(), types);
        }
    }
}
