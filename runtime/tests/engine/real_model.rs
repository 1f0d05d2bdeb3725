//! Small models of the LLaMA family on the CPU, whose rows do not depend on their batch: whatever the budget, the
//! size of the cache and the preemptions, every request gives the tokens and log-probabilities that it gives
//! alone, to the bit.

use crate::support::Numbers;
use pagewise_runtime::engine::Engine;
use pagewise_runtime::load::{CacheSize, LoadOptions, load};
use pagewise_runtime::request::{Request, RequestOutput, SamplingParams};

fn engine(fixture: &str, change: impl FnOnce(&mut LoadOptions)) -> Engine {
    let mut options = LoadOptions::new(format!("{}/../tests/fixtures/{fixture}", env!("CARGO_MANIFEST_DIR")));
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

#[test]
fn preemption_and_chunking_change_no_bit() {
    // Blocks behind a sliding window come free again, so fewer are few.
    for (fixture, few) in [("llama_gqa", 40), ("mistral_swa", 22)] {
        let mut roomy = engine(fixture, |_| {});
        let alone: Vec<RequestOutput> =
            requests().into_iter().map(|request| run(&mut roomy, vec![request]).remove(0)).collect();
        let mut preemptions = 0;
        for (budget, blocks, prefix_cache) in
            [(8, few, true), (64, few, false), (2048, few, true), (64, 400, true)]
        {
            let mut crowded = engine(fixture, |options| {
                options.max_batch_tokens = budget;
                options.cache_size = CacheSize::Blocks(blocks);
                options.prefix_cache = prefix_cache;
            });
            let together = run(&mut crowded, requests());
            for (index, (found, expected)) in together.iter().zip(&alone).enumerate() {
                assert_eq!(found, expected, "{fixture}, budget {budget}, {blocks} blocks, request {index}");
            }
            let stats = crowded.stats();
            preemptions += stats.scheduler.preemptions;
            assert_eq!((stats.device_blocks.used, stats.device_blocks.pending), (0, 0));
        }
        assert!(preemptions > 0, "{fixture} never ran out of blocks");
    }
}
