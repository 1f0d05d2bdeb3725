//! Random schedules under a virtual clock: arrivals, lengths, samples, beams, priorities, deadlines, cancellations,
//! budgets, both kinds of preemption, and cache sizes down to the smallest. Every request gives the tokens that it
//! gives alone, or is refused because it cannot fit or its time is over; and none waits longer than the work before it
//! takes.
//!
//! A failing case names its number; run it alone with
//! `PAGEWISE_CASE=<number> cargo test -p pagewise-runtime --test engine simulation`.

use crate::support::{Numbers, Streams, VOCAB, cache_config, engine, engine_ahead, engine_config, text_of};
use pagewise_kvcache::{CacheConfig, KvGroup};
use pagewise_runtime::engine::{EngineConfig, Outcome, RequestMetrics};
use pagewise_runtime::plan::LogitRows;
use pagewise_runtime::request::{
    EarlyStopping, Event, Request, RequestId, RequestOutput, SamplingParams, Urgency,
};
use pagewise_runtime::scheduler::Preemption;
use std::collections::{BTreeMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Of each kind: the cases from here on run on an executor that chooses tokens itself, a step ahead.
const CASES: u64 = 4000;

fn random_request(numbers: &mut Numbers, shared: &[u32]) -> Request {
    let mut prompt: Vec<u32> =
        if numbers.chance(50) { shared[..numbers.below(shared.len())].to_vec() } else { vec![] };
    let more = numbers.from(1, 20);
    prompt.extend((0..more).map(|_| numbers.below(VOCAB) as u32));
    let samples = if numbers.chance(70) { 1 } else { numbers.from(2, 4) };
    let n = if numbers.chance(70) { samples } else { numbers.from(1, samples) };
    let beams = numbers.chance(25);
    let params = SamplingParams {
        max_tokens: numbers.from(1, 50),
        temperature: numbers.pick(&[0.0, 1.0, 1.0, 3.0]),
        top_p: numbers.pick(&[1.0, 0.8]),
        top_k: numbers.pick(&[0, 0, 5]),
        min_p: numbers.pick(&[0.0, 0.1]),
        seed: Some(numbers.below(1000) as u64),
        n,
        best_of: (n != samples && !beams).then_some(samples),
        beam_width: beams.then_some(samples),
        length_penalty: numbers.pick(&[1.0, 0.0, 2.0, -1.0]),
        early_stopping: numbers.pick(&[EarlyStopping::False, EarlyStopping::True, EarlyStopping::Never]),
        ignore_eos: numbers.chance(70),
        stop: if !beams && numbers.chance(20) { vec!["ab".into(), "q".into(), "xyz".into()] } else { vec![] },
        logprobs: numbers.pick(&[None, None, Some(2)]),
        prompt_logprobs: numbers.pick(&[None, None, None, Some(1)]),
        repetition_penalty: numbers.pick(&[1.0, 1.3]),
        presence_penalty: numbers.pick(&[0.0, 0.5]),
        logit_bias: if numbers.chance(20) {
            vec![(numbers.below(VOCAB - 1) as u32, 1.5), (VOCAB as u32 - 1, -2.0)]
        } else {
            vec![]
        },
        ..Default::default()
    };
    Request::new(prompt, params)
}

/// Without what must be known before the next token can be described.
fn can_run_ahead(params: SamplingParams) -> SamplingParams {
    SamplingParams { beam_width: None, repetition_penalty: 1.0, presence_penalty: 0.0, ..params }
}

fn alone(request: &Request) -> RequestOutput {
    let (mut engine, _) = engine(engine_config(), cache_config(16, 200));
    // This engine's clock is the system's: what it must say does not depend on time.
    let mut request = request.clone();
    request.urgency.deadline = None;
    engine.generate(vec![request]).unwrap().remove(0).unwrap()
}

/// Blocks that a request can need at most, all of its sequences at their full length.
fn blocks_at_most(request: &Request, output: &RequestOutput, cache: &CacheConfig) -> usize {
    let width = request.params.width();
    let shared = request.prompt.len() / cache.block_size;
    // `best_of` and beams hide the others' lengths.
    let longest = if width == output.outputs.len() && request.params.beam_width.is_none() {
        output.outputs.iter().map(|o| o.token_ids.len()).max().unwrap()
    } else {
        request.params.max_tokens
    };
    let own = (request.prompt.len() + longest + 1).div_ceil(cache.block_size) - shared;
    // A block that is being copied still counts.
    (shared + width * (own + 1)) * cache.groups.len()
}

/// Steps that a request takes at most when it is the first in the order: one for each of its tokens, and one more
/// where it waits for the blocks of somebody who is swapped out.
fn steps_at_most(request: &Request) -> usize {
    2 * (request.prompt.len() + request.params.width() * request.params.max_tokens) + 4
}

/// How often the interesting things happened, so that the cases cannot quietly become tame.
#[derive(Debug, Default)]
struct Coverage {
    finished: u64,
    refused: u64,
    cancelled: u64,
    expired: u64,
    beams: u64,
    preemptions: u64,
    swaps: u64,
    copied_blocks: u64,
    cached_tokens: u64,
    chunked_prompts: u64,
    stop_strings: u64,
    placeholders: u64,
    answered: [u64; 5],
}

fn run(case: u64, coverage: &mut Coverage) {
    let mut numbers = Numbers::new(case);
    let shared: Vec<u32> = (0..60).map(|_| numbers.below(VOCAB) as u32).collect();
    let block_size = numbers.pick(&[1, 2, 4, 16]);
    let windows = if case % 5 == 4 { vec![None, Some(numbers.from(1, 12))] } else { vec![None] };
    // Half of the caches are anything, half hold the largest requests but not many of them.
    let tight = windows.len() * (70 / block_size + numbers.below(40 / block_size + 1));
    let device_blocks = if numbers.chance(50) { numbers.from(1, 40) } else { tight };
    let cache = CacheConfig {
        watermark: numbers.pick(&[0.0, 0.0, 0.01, 0.2]),
        prefix_cache: numbers.chance(60),
        host_blocks: numbers.pick(&[0, 3, 40, 200]),
        groups: windows.into_iter().map(|window| KvGroup { window }).collect(),
        ..cache_config(block_size, device_blocks)
    };
    let config = EngineConfig {
        max_num_seqs: numbers.from(1, 10),
        max_batch_tokens: numbers.pick(&[1, 4, 8, 16, 64]),
        preemption: numbers.pick(&[
            Preemption::Auto,
            Preemption::Recompute,
            Preemption::Swap,
            Preemption::Swap,
        ]),
        ..engine_config()
    };
    let ahead = case >= CASES;
    let make = if ahead { engine_ahead } else { engine };
    let (mut engine, log) = make(config.clone(), cache.clone());
    // With one request whose penalties follow its tokens, or of beams, nothing runs ahead.
    let plain = ahead && numbers.chance(70);
    // A millisecond a step.
    let clock = Arc::new(AtomicU64::new(0));
    let read = clock.clone();
    engine.set_clock(Box::new(move || Duration::from_millis(read.load(Ordering::Relaxed))));
    let ordered = numbers.chance(60);
    let mut arrivals: Vec<(usize, Request)> = (0..numbers.from(1, 12))
        .map(|_| {
            let at = if numbers.chance(50) { 0 } else { numbers.below(60) };
            let mut request = random_request(&mut numbers, &shared);
            if plain {
                request.params = can_run_ahead(request.params);
            }
            if !ordered {
                request.urgency = Urgency {
                    priority: numbers.below(3) as i32 - 1,
                    deadline: numbers
                        .chance(20)
                        .then(|| Duration::from_millis((at + numbers.below(200)) as u64)),
                };
            }
            (at, request)
        })
        .collect();
    arrivals.sort_by_key(|(step, _)| *step);
    let mut arrivals = arrivals.into_iter().peekable();

    let mut requests: BTreeMap<RequestId, (usize, Request)> = BTreeMap::new();
    let mut cancelled = HashSet::new();
    let mut ended: BTreeMap<RequestId, RequestMetrics> = BTreeMap::new();
    let mut streams = Streams::new();
    let mut step = 0;
    while arrivals.peek().is_some() || engine.has_work() {
        while let Some((_, request)) = arrivals.next_if(|(at, _)| *at <= step) {
            match engine.add(request.clone()) {
                Ok(id) => _ = requests.insert(id, (step, request)),
                Err(error) if matches!(error.param, Some("n" | "best_of" | "beam_width")) => {
                    assert!(
                        request.params.width() > config.max_num_seqs.min(config.max_batch_tokens),
                        "{error}"
                    );
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
            && !ended.contains_key(&id)
        {
            assert!(engine.cancel(id));
            cancelled.insert(id);
        }
        for event in engine.step().unwrap() {
            match event {
                Event::Token { request, index, token_id, text } => {
                    let stream = streams.entry((request.0, index)).or_default();
                    stream.0.push(token_id);
                    stream.1.push_str(&text);
                }
                Event::Finished { request, output } => {
                    let (arrived, asked) = &requests[&request];
                    let mut expected = alone(asked);
                    // What was cached depends on the others.
                    expected.usage.cached_tokens = output.usage.cached_tokens;
                    assert_eq!(output, expected, "request {request:?}: {asked:?}");
                    let letters = text_of(&output.outputs[0].token_ids);
                    coverage.stop_strings +=
                        u64::from(asked.params.stop.iter().any(|stop| letters.contains(stop)));
                    coverage.beams += u64::from(asked.params.beam_width.is_some());
                    if asked.params.width() == asked.params.n && asked.params.beam_width.is_none() {
                        for (index, completion) in output.outputs.iter().enumerate() {
                            let stream = &streams[&(request.0, index)];
                            assert_eq!(stream.0, completion.token_ids);
                            assert_eq!(Some(&stream.1), completion.text.as_ref());
                        }
                    }
                    // Among equals only the earlier ones go before it; otherwise anybody may.
                    let before = requests.iter().filter(|&(&id, _)| !ordered || id <= request);
                    let most: usize = before.map(|(_, (_, request))| steps_at_most(request)).sum();
                    assert!(step - arrived <= most, "{} steps where {most} do", step - arrived);
                }
                Event::Failed { request, error } if error.param == Some("deadline") => {
                    let deadline = requests[&request].1.urgency.deadline.unwrap();
                    assert!(deadline.as_millis() <= step as u128);
                    coverage.expired += 1;
                }
                Event::Failed { request, error } => {
                    let asked = &requests[&request].1;
                    assert!(error.message.contains("--kv-blocks"), "{error}");
                    let demand = blocks_at_most(asked, &alone(asked), &cache);
                    assert!(demand > cache.device_blocks, "{error}: {demand} blocks would do; {asked:?}");
                    coverage.refused += 1;
                }
            }
        }
        for metrics in &engine.metrics().ended {
            assert_eq!(metrics.outcome == Outcome::Cancelled, cancelled.contains(&metrics.request));
            assert!(ended.insert(metrics.request, metrics.clone()).is_none());
        }
        step += 1;
        clock.store(step as u64, Ordering::Relaxed);
        assert!(step < 50_000, "no end: {:?}", engine.stats());
    }
    engine.step().unwrap();
    ended.extend(engine.metrics().ended.iter().map(|metrics| (metrics.request, metrics.clone())));

    assert!(ended.keys().eq(requests.keys()), "every request ends: {ended:?}");
    let stats = engine.stats();
    assert_eq!((stats.device_blocks.used, stats.device_blocks.pending), (0, 0));
    assert_eq!((stats.host_blocks.used, stats.host_blocks.pending), (0, 0));
    assert_eq!(stats.scheduler.running_sequences, 0);
    if ordered {
        let admitted: Vec<Duration> = ended.values().filter_map(|metrics| metrics.admitted).collect();
        assert!(admitted.is_sorted(), "first come, first served: {admitted:?}");
    }

    coverage.finished += stats.finished;
    coverage.cancelled += stats.cancelled;
    coverage.preemptions += stats.scheduler.preemptions;
    coverage.swaps += stats.scheduler.swaps;
    coverage.copied_blocks += stats.cache.copied_blocks;
    coverage.cached_tokens += stats.cached_tokens;
    coverage.placeholders += log.lock().unwrap().placeholders;
    for (sum, count) in coverage.answered.iter_mut().zip(log.lock().unwrap().answered) {
        *sum += count;
    }
    for (at, plan) in log.lock().unwrap().plans.iter().enumerate() {
        assert!(plan.num_tokens() <= config.max_batch_tokens && plan.chunks.len() <= config.max_num_seqs);
        assert_eq!(plan.id, at as u64);
        for chunk in &plan.chunks {
            coverage.chunked_prompts += u64::from(chunk.logits == LogitRows::None);
        }
    }
}

#[test]
fn random_schedules_give_every_request_its_own_tokens() {
    let only = std::env::var("PAGEWISE_CASE").ok().map(|case| case.parse().unwrap());
    let cases = only.map_or(0..2 * CASES, |case| case..case + 1);
    let mut coverage = Coverage::default();
    for case in cases {
        if catch_unwind(AssertUnwindSafe(|| run(case, &mut coverage))).is_err() {
            panic!("PAGEWISE_CASE={case} cargo test -p pagewise-runtime --test engine simulation");
        }
    }
    println!("{coverage:?}");
    if only.is_none() {
        let Coverage { finished, refused, cancelled, expired, beams, preemptions, swaps, .. } = coverage;
        let Coverage {
            copied_blocks,
            cached_tokens,
            chunked_prompts,
            stop_strings,
            placeholders,
            answered,
            ..
        } = coverage;
        let often = [
            finished,
            refused,
            beams,
            preemptions,
            swaps,
            copied_blocks,
            cached_tokens,
            chunked_prompts,
            placeholders,
        ];
        let seldom = [cancelled, expired, stop_strings];
        assert!(
            often.iter().chain(&answered).all(|&count| count > 500)
                && seldom.iter().all(|&count| count > 100),
            "{coverage:?}"
        );
    }
}
