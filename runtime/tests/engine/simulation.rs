//! Random schedules: arrivals, lengths, samples, cancellations, budgets and cache sizes down to the smallest.
//! Every request gives the tokens that it gives alone, or is refused because it cannot fit.
//!
//! A failing case names its number; run it alone with
//! `PAGEWISE_CASE=<number> cargo test -p pagewise-runtime --test engine simulation`.

use crate::support::{Numbers, Streams, VOCAB, cache_config, engine, engine_config, text_of};
use pagewise_kvcache::{CacheConfig, KvGroup};
use pagewise_runtime::engine::EngineConfig;
use pagewise_runtime::plan::LogitRows;
use pagewise_runtime::request::{Event, Request, RequestId, RequestOutput, SamplingParams};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};

const CASES: u64 = 2500;

fn random_request(numbers: &mut Numbers, shared: &[u32]) -> Request {
    let mut prompt: Vec<u32> =
        if numbers.chance(50) { shared[..numbers.below(shared.len())].to_vec() } else { vec![] };
    let more = numbers.from(1, 20);
    prompt.extend((0..more).map(|_| numbers.below(VOCAB) as u32));
    let samples = if numbers.chance(70) { 1 } else { numbers.from(2, 4) };
    let n = if numbers.chance(70) { samples } else { numbers.from(1, samples) };
    let params = SamplingParams {
        max_tokens: numbers.from(1, 50),
        temperature: numbers.pick(&[0.0, 1.0, 1.0, 3.0]),
        top_p: numbers.pick(&[1.0, 0.8]),
        top_k: numbers.pick(&[0, 0, 5]),
        min_p: numbers.pick(&[0.0, 0.1]),
        seed: Some(numbers.below(1000) as u64),
        n,
        best_of: (n != samples).then_some(samples),
        ignore_eos: numbers.chance(70),
        stop: if numbers.chance(20) { vec!["ab".into(), "q".into(), "xyz".into()] } else { vec![] },
        logprobs: numbers.pick(&[None, None, Some(2)]),
        prompt_logprobs: numbers.pick(&[None, None, None, Some(1)]),
        repetition_penalty: numbers.pick(&[1.0, 1.3]),
        presence_penalty: numbers.pick(&[0.0, 0.5]),
        ..Default::default()
    };
    Request::new(prompt, params)
}

fn alone(request: &Request) -> RequestOutput {
    let (mut engine, _) = engine(engine_config(), cache_config(16, 200));
    engine.generate(vec![request.clone()]).unwrap().remove(0).unwrap()
}

/// Blocks that a request can need at most, all of its completions at their full length.
fn blocks_at_most(request: &Request, output: &RequestOutput, cache: &CacheConfig) -> usize {
    let samples = request.params.width();
    let shared = request.prompt.len() / cache.block_size;
    // `best_of` hides the others' lengths.
    let longest = if samples == output.outputs.len() {
        output.outputs.iter().map(|o| o.token_ids.len()).max().unwrap()
    } else {
        request.params.max_tokens
    };
    let own = (request.prompt.len() + longest + 1).div_ceil(cache.block_size) - shared;
    // A block that is being copied still counts.
    (shared + samples * (own + 1)) * cache.groups.len()
}

/// How often the interesting things happened, so that the cases cannot quietly become tame.
#[derive(Debug, Default)]
struct Coverage {
    finished: u64,
    refused: u64,
    cancelled: u64,
    preemptions: u64,
    copied_blocks: u64,
    cached_tokens: u64,
    chunked_prompts: u64,
    stop_strings: u64,
}

fn run(case: u64, coverage: &mut Coverage) {
    let mut numbers = Numbers::new(case);
    let shared: Vec<u32> = (0..60).map(|_| numbers.below(VOCAB) as u32).collect();
    let windows = case % 5 == 4;
    let cache = CacheConfig {
        watermark: numbers.pick(&[0.0, 0.01, 0.2]),
        prefix_cache: numbers.chance(60),
        groups: if windows {
            vec![KvGroup { window: None }, KvGroup { window: Some(numbers.from(1, 12)) }]
        } else {
            vec![KvGroup { window: None }]
        },
        ..cache_config(numbers.pick(&[1, 2, 4, 16]), numbers.from(1, 40))
    };
    let config = EngineConfig {
        max_num_seqs: numbers.from(1, 10),
        max_batch_tokens: numbers.pick(&[1, 4, 8, 16, 64]),
        ..engine_config()
    };
    let (mut engine, log) = engine(config.clone(), cache.clone());
    let mut arrivals: Vec<(usize, Request)> = (0..numbers.from(1, 12))
        .map(|_| {
            (if numbers.chance(50) { 0 } else { numbers.below(60) }, random_request(&mut numbers, &shared))
        })
        .collect();
    arrivals.sort_by_key(|(step, _)| *step);
    let mut arrivals = arrivals.into_iter().peekable();

    let mut requests: BTreeMap<RequestId, Request> = BTreeMap::new();
    let mut ended = HashSet::new();
    let mut streams = Streams::new();
    let mut step = 0;
    let mut leaders = Vec::new();
    let mut next_sequence = 0;
    while arrivals.peek().is_some() || engine.has_work() {
        while let Some((_, request)) = arrivals.next_if(|(at, _)| *at <= step) {
            let samples = request.params.width();
            match engine.add(request.clone()) {
                Ok(id) => {
                    leaders.push(next_sequence);
                    next_sequence += samples as u64;
                    requests.insert(id, request);
                }
                Err(error) if matches!(error.param, Some("n" | "best_of")) => {
                    assert!(samples > config.max_num_seqs.min(config.max_batch_tokens), "{error}");
                }
                Err(error) => {
                    assert_eq!(error.param, Some("prompt"), "{error}");
                    let demand = (request.prompt.len() + 1).div_ceil(cache.block_size);
                    assert!(demand * cache.groups.len() > cache.device_blocks, "{error}");
                }
            }
        }
        if numbers.chance(1)
            && let Some(&id) = requests.keys().nth(numbers.below(requests.len().max(1)))
            && !ended.contains(&id)
        {
            assert!(engine.cancel(id));
            requests.remove(&id);
        }
        for event in engine.step().unwrap() {
            match event {
                Event::Token { request, index, token_id, text } => {
                    let stream = streams.entry((request.0, index)).or_default();
                    stream.0.push(token_id);
                    stream.1.push_str(&text);
                }
                Event::Finished { request, output } => {
                    assert!(ended.insert(request));
                    let asked = &requests[&request];
                    let mut expected = alone(asked);
                    // What was cached depends on the others.
                    expected.usage.cached_tokens = output.usage.cached_tokens;
                    assert_eq!(output, expected, "request {request:?}: {asked:?}");
                    let letters = text_of(&output.outputs[0].token_ids);
                    coverage.stop_strings +=
                        u64::from(asked.params.stop.iter().any(|stop| letters.contains(stop)));
                    if asked.params.width() == asked.params.n {
                        for (index, completion) in output.outputs.iter().enumerate() {
                            let stream = &streams[&(request.0, index)];
                            assert_eq!(stream.0, completion.token_ids);
                            assert_eq!(Some(&stream.1), completion.text.as_ref());
                        }
                    }
                }
                Event::Failed { request, error } => {
                    assert!(ended.insert(request));
                    let asked = &requests[&request];
                    assert!(error.message.contains("--kv-blocks"), "{error}");
                    let demand = blocks_at_most(asked, &alone(asked), &cache);
                    assert!(demand > cache.device_blocks, "{error}: {demand} blocks would do; {asked:?}");
                }
            }
        }
        step += 1;
        assert!(step < 50_000, "no end: {:?}", engine.stats());
    }

    assert_eq!(ended, requests.keys().copied().collect(), "every request ends");
    let stats = engine.stats();
    assert_eq!((stats.device_blocks.used, stats.device_blocks.pending), (0, 0));
    assert_eq!(stats.scheduler.running_sequences, 0);

    coverage.finished += stats.finished;
    coverage.refused += stats.failed;
    coverage.cancelled += stats.cancelled;
    coverage.preemptions += stats.scheduler.preemptions;
    coverage.copied_blocks += stats.cache.copied_blocks;
    coverage.cached_tokens += stats.cached_tokens;
    let log = log.lock().unwrap();
    let mut first_seen: HashMap<u64, usize> = HashMap::new();
    for (at, plan) in log.plans.iter().enumerate() {
        assert!(plan.num_tokens() <= config.max_batch_tokens && plan.chunks.len() <= config.max_num_seqs);
        assert_eq!(plan.id, at as u64);
        for chunk in &plan.chunks {
            coverage.chunked_prompts += u64::from(chunk.logits == LogitRows::None);
            let next = first_seen.len();
            first_seen.entry(chunk.sequence.0).or_insert(next);
        }
    }
    let admitted: Vec<usize> = leaders.iter().filter_map(|leader| first_seen.get(leader).copied()).collect();
    assert!(admitted.is_sorted(), "first come, first served: {admitted:?}");
}

#[test]
fn random_schedules_give_every_request_its_own_tokens() {
    let only = std::env::var("PAGEWISE_CASE").ok().map(|case| case.parse().unwrap());
    let cases = only.map_or(0..CASES, |case| case..case + 1);
    let mut coverage = Coverage::default();
    for case in cases {
        if catch_unwind(AssertUnwindSafe(|| run(case, &mut coverage))).is_err() {
            panic!("PAGEWISE_CASE={case} cargo test -p pagewise-runtime --test engine simulation");
        }
    }
    println!("{coverage:?}");
    if only.is_none() {
        let Coverage { finished, refused, cancelled, preemptions, .. } = coverage;
        let Coverage { copied_blocks, cached_tokens, chunked_prompts, stop_strings, .. } = coverage;
        let enough =
            [finished, refused, cancelled, preemptions, copied_blocks, cached_tokens, chunked_prompts];
        assert!(enough.iter().all(|&count| count > 500) && stop_strings > 200, "{coverage:?}");
    }
}
