//! Small models on the CPU, whose rows do not depend on their batch: whatever the budget, the
//! size of the cache and the preemptions, every request gives the tokens and log-probabilities that it gives
//! alone, to the bit.

use crate::support::Numbers;
use pagewise_runtime::engine::Engine;
use pagewise_runtime::load::{CacheSize, LoadFormat, LoadOptions, load};
use pagewise_runtime::request::{Request, RequestOutput, SamplingParams};
use pagewise_runtime::scheduler::{Preemption, SchedulerStats};

pub(crate) fn fixture(name: &str) -> String {
    format!("{}/../tests/fixtures/{name}", env!("CARGO_MANIFEST_DIR"))
}

pub(crate) fn engine(name: &str, change: impl FnOnce(&mut LoadOptions)) -> Engine {
    let mut options = LoadOptions::new(fixture(name));
    options.block_size = 4;
    change(&mut options);
    load(&options, &mut |_| {}).unwrap().engine
}

fn requests() -> Vec<Request> {
    let mut numbers = Numbers::new(2024);
    let shared: Vec<u32> = (0..20).map(|_| numbers.below(256) as u32).collect();
    (0..10)
        .map(|index| {
            let mut prompt = if index % 2 == 0 { shared.clone() } else { vec![] };
            let more = numbers.from(1, 20);
            prompt.extend((0..more).map(|_| numbers.below(256) as u32));
            let params = SamplingParams {
                max_tokens: 24,
                ignore_eos: true,
                temperature: if index % 3 == 0 { 0.0 } else { 1.0 },
                seed: Some(index),
                n: if index == 4 { 3 } else { 1 },
                best_of: (index == 2).then_some(3),
                beam_width: matches!(index, 5 | 8).then_some(3),
                logprobs: Some(1),
                prompt_logprobs: (index == 7).then_some(1),
                ..Default::default()
            };
            Request::new(prompt, params)
        })
        .collect()
}

fn run(engine: &mut Engine, requests: Vec<Request>) -> Vec<RequestOutput> {
    let results = engine.generate(requests).unwrap();
    results
        .into_iter()
        .map(|result| {
            let mut output = result.unwrap();
            // What was cached depends on the others.
            output.usage.cached_tokens = 0;
            output
        })
        .collect()
}

/// A way to run: how room is made, tokens a step, blocks, and whether prefixes are kept.
type Setting = (Preemption, usize, usize, bool);

fn set(options: &mut LoadOptions, (preemption, budget, blocks, prefix_cache): Setting) {
    options.preemption = preemption;
    options.max_batch_tokens = Some(budget);
    options.cache_size = CacheSize::Blocks(blocks);
    options.prefix_cache = prefix_cache;
    options.swap_space = if preemption == Preemption::Recompute { 0 } else { 8 << 20 };
}

/// Runs the requests in each way and compares with what each gives alone.
fn same_in_every_way(
    name: &str,
    settings: &[Setting],
    requests: &[Request],
    engine: impl Fn(&dyn Fn(&mut LoadOptions)) -> Engine,
) {
    let mut roomy = engine(&|_| {});
    let alone: Vec<RequestOutput> =
        requests.iter().map(|request| run(&mut roomy, vec![request.clone()]).remove(0)).collect();
    let (mut recomputed, mut swapped) = (0, 0);
    for &setting in settings {
        let mut crowded = engine(&|options| set(options, setting));
        let together = run(&mut crowded, requests.to_vec());
        for (index, (found, expected)) in together.iter().zip(&alone).enumerate() {
            assert_eq!(found, expected, "{name}, {setting:?}, request {index}");
        }
        let stats = crowded.stats();
        assert_eq!((stats.device_blocks.used, stats.device_blocks.pending), (0, 0));
        assert_eq!((stats.host_blocks.used, stats.host_blocks.pending), (0, 0));
        let SchedulerStats { preemptions, swaps, .. } = stats.scheduler;
        if setting.0 == Preemption::Recompute {
            recomputed += preemptions;
            assert_eq!(swaps, 0);
        }
        swapped += swaps;
    }
    assert!(recomputed > 0 && swapped > 0, "{name} never ran out of blocks");
}

#[test]
fn preemption_and_chunking_change_no_bit() {
    // Blocks behind a sliding window come free again, so fewer are few; Gemma 2's layers without one have a table of
    // their own, which takes as many blocks as another model's.
    for (fixture, few) in [("llama_gqa", 40), ("mistral_swa", 22), ("gemma2", 62), ("opt_postln_proj", 40)] {
        let settings = [
            (Preemption::Recompute, 8, few, true),
            (Preemption::Recompute, 64, few, false),
            (Preemption::Recompute, 2048, few, true),
            (Preemption::Swap, 8, few, true),
            (Preemption::Swap, 64, few, false),
            (Preemption::Swap, 2048, few, true),
            (Preemption::Auto, 64, few, true),
            (Preemption::Auto, 64, 400, true),
        ];
        same_in_every_way(fixture, &settings, &requests(), |change| engine(fixture, change));
    }
}

/// Ten sequences that together need twice the cache.
#[test]
fn long_sequences_are_swapped_and_recomputed_to_the_same_tokens() {
    let config = std::fs::read_to_string(format!("{}/config.json", fixture("llama_gqa"))).unwrap();
    let longer = config.replace("\"max_position_embeddings\": 128", "\"max_position_embeddings\": 2048");
    assert_ne!(config, longer);
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), longer).unwrap();

    let mut numbers = Numbers::new(7);
    let requests: Vec<Request> = (0..10)
        .map(|_| {
            let prompt = (0..numbers.from(1, 30)).map(|_| numbers.below(256) as u32).collect();
            let greedy = SamplingParams {
                max_tokens: 1024,
                temperature: 0.0,
                ignore_eos: true,
                ..SamplingParams::default()
            };
            Request::new(prompt, greedy)
        })
        .collect();
    let settings: Vec<Setting> = [Preemption::Recompute, Preemption::Swap]
        .into_iter()
        .flat_map(|by| [(by, 8, 325, true), (by, 64, 325, false), (by, 2048, 325, true)])
        .collect();
    same_in_every_way("2,048 positions", &settings, &requests, |change| {
        let mut options = LoadOptions::new(dir.path().to_str().unwrap());
        options.load_format = LoadFormat::Dummy;
        change(&mut options);
        load(&options, &mut |_| {}).unwrap().engine
    });
}
