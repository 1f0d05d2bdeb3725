//! Random schedules under a virtual clock: arrivals, lengths, samples, beams, priorities, deadlines, cancellations,
//! budgets, both kinds of preemption, and cache sizes down to the smallest. Every request gives the tokens that it
//! gives alone, or is refused because it cannot fit or its time is over; and none waits longer than the work before it
//! takes.
//!
//! A failing case names its number; run it alone with
//! `PAGEWISE_CASE=<number> cargo test -p pagewise-runtime --test engine <test>`, or more of them with
//! `PAGEWISE_CASES=<first>..<end>`.

use crate::settings::Setting;
use crate::support::{Streams, cache_config, engine, engine_ahead, engine_config, text_of};
use pagewise_kvcache::CacheConfig;
use pagewise_runtime::engine::{Outcome, RequestMetrics};
use pagewise_runtime::plan::LogitRows;
use pagewise_runtime::request::{Event, Request, RequestId, RequestOutput};
use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Of each kind: the cases from here on run on an executor that chooses tokens itself, a step ahead.
const CASES: u64 = 4000;

/// Cases of crowded caches.
const CROWDED: u64 = 1000;

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
    cases: u64,
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

/// Runs a setting to its end.
fn run(setting: Setting, coverage: &mut Coverage) {
    let Setting { mut numbers, cache, config, ahead, ordered, arrivals, cancellations } = setting;
    let make = if ahead { engine_ahead } else { engine };
    let (mut engine, log) = make(config.clone(), cache.clone());
    // A millisecond a step.
    let clock = Arc::new(AtomicU64::new(0));
    let read = clock.clone();
    engine.set_clock(Box::new(move || Duration::from_millis(read.load(Ordering::Relaxed))));
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
        if numbers.chance(cancellations)
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

/// Runs these cases of a kind, or those that the environment names.
fn run_cases(test: &str, cases: Range<u64>, make: fn(u64) -> Setting) -> Coverage {
    let named = |name: &str| std::env::var(name).ok();
    let cases = match (named("PAGEWISE_CASE"), named("PAGEWISE_CASES")) {
        (Some(case), _) => case.parse().map(|case| case..case + 1).unwrap(),
        (None, Some(range)) => {
            let (first, end) = range.split_once("..").unwrap();
            first.parse().unwrap()..end.parse().unwrap()
        }
        (None, None) => cases,
    };
    let mut coverage = Coverage { cases: cases.end - cases.start, ..Coverage::default() };
    for case in cases {
        if catch_unwind(AssertUnwindSafe(|| run(make(case), &mut coverage))).is_err() {
            panic!("PAGEWISE_CASE={case} cargo test -p pagewise-runtime --test engine {test}");
        }
    }
    println!("{coverage:?}");
    coverage
}

#[test]
fn random_schedules_give_every_request_its_own_tokens() {
    let cases = 2 * CASES;
    let make = |case| Setting::any(case, case >= CASES);
    let coverage = run_cases("random_schedules", 0..cases, make);
    if coverage.cases < cases {
        return;
    }
    let Coverage { finished, refused, cancelled, expired, beams, preemptions, swaps, .. } = coverage;
    let Coverage { copied_blocks, cached_tokens, chunked_prompts, stop_strings, placeholders, .. } = coverage;
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
        often.iter().chain(&coverage.answered).all(|&count| count > 500)
            && seldom.iter().all(|&count| count > 100),
        "{coverage:?}"
    );
}

/// Where an engine could be left with requests that nothing can be done for: see [`Setting::crowded`].
#[test]
fn crowded_caches_are_drained() {
    let coverage = run_cases("crowded_caches", 0..CROWDED, Setting::crowded);
    if coverage.cases < CROWDED {
        return;
    }
    let Coverage { finished, cancelled, expired, preemptions, swaps, placeholders, .. } = coverage;
    let often = [finished, preemptions, swaps, preemptions - swaps, placeholders, cancelled];
    assert!(often.iter().all(|&count| count > CROWDED / 4) && expired > 50, "{coverage:?}");
}
