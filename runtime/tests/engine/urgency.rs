//! Priorities, deadlines, and the figures that the engine keeps of requests and steps.

use crate::support::{Log, cache_config, engine, engine_config};
use pagewise_kvcache::CacheConfig;
use pagewise_runtime::engine::{Engine, EngineConfig, Outcome, RequestMetrics};
use pagewise_runtime::request::{Event, Request, RequestId, SamplingParams, Urgency};
use pagewise_runtime::scheduler::Preemption;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

fn request(prompt: u32, max_tokens: usize, urgency: Urgency) -> Request {
    let params =
        SamplingParams { max_tokens, temperature: 0.0, ignore_eos: true, ..SamplingParams::default() };
    Request { urgency, ..Request::new(vec![prompt; 5], params) }
}

/// An engine whose clock stands still until it is told to go on.
fn timed(config: EngineConfig, cache: CacheConfig) -> (Engine, Arc<Mutex<Log>>, Arc<AtomicU64>) {
    let (mut engine, log) = engine(config, cache);
    let clock = Arc::new(AtomicU64::new(0));
    let read = clock.clone();
    engine.set_clock(Box::new(move || Duration::from_secs(read.load(Ordering::Relaxed))));
    (engine, log, clock)
}

/// Runs to the end, a second a step. Ends and failures in the order in which they came, and everybody's figures.
fn run(engine: &mut Engine, clock: &AtomicU64) -> (Vec<RequestId>, Vec<RequestId>, Vec<RequestMetrics>) {
    let (mut finished, mut failed, mut ended) = (vec![], vec![], vec![]);
    while engine.has_work() {
        clock.fetch_add(1, Ordering::Relaxed);
        for event in engine.step().unwrap() {
            match event {
                Event::Finished { request, .. } => finished.push(request),
                Event::Failed { request, error } => {
                    assert_eq!(error.param, Some("deadline"), "{error}");
                    failed.push(request);
                }
                Event::Token { .. } => {}
            }
        }
        ended.extend(engine.metrics().ended.iter().cloned());
    }
    (finished, failed, ended)
}

#[test]
fn the_urgent_go_first_and_equals_in_order_of_arrival() {
    let (mut engine, _, clock) =
        timed(EngineConfig { max_num_seqs: 1, ..engine_config() }, cache_config(4, 50));
    let at =
        |priority, deadline: Option<u64>| Urgency { priority, deadline: deadline.map(Duration::from_secs) };
    let urgencies = [
        at(0, None),
        at(1, None),
        at(0, Some(900)),
        at(-1, None),
        at(0, Some(800)),
        at(-1, None),
        at(0, None),
    ];
    let ids: Vec<RequestId> =
        urgencies.iter().map(|&urgency| engine.add(request(1, 2, urgency)).unwrap()).collect();
    let (finished, failed, _) = run(&mut engine, &clock);
    assert_eq!(finished, [3, 5, 4, 2, 0, 6, 1].map(|at: usize| ids[at]));
    assert!(failed.is_empty());
}

#[test]
fn a_deadline_ends_a_request_wherever_it_is() {
    let (mut engine, _, clock) =
        timed(EngineConfig { max_num_seqs: 1, ..engine_config() }, cache_config(4, 50));
    let by = |seconds| Urgency { priority: 0, deadline: Some(Duration::from_secs(seconds)) };
    let running = engine.add(request(1, 100, by(10))).unwrap();
    let waiting = engine.add(request(2, 100, by(11))).unwrap();
    let patient = engine.add(request(3, 3, by(20))).unwrap();
    let (finished, failed, ended) = run(&mut engine, &clock);
    assert_eq!((finished, failed), (vec![patient], vec![running, waiting]));
    let outcomes: Vec<Outcome> = ended.iter().map(|metrics| metrics.outcome).collect();
    assert_eq!(outcomes, [Outcome::Failed, Outcome::Failed, Outcome::Finished]);
    assert_eq!(engine.stats().device_blocks.used, 0);
}

#[test]
fn times_and_counters_tell_what_happened() {
    let config = EngineConfig { preemption: Preemption::Swap, ..engine_config() };
    let cache = CacheConfig { host_blocks: 50, ..cache_config(4, 7) };
    let (mut engine, log, clock) = timed(config, cache);
    let first = engine.add(request(1, 12, Urgency::default())).unwrap();
    let second = engine.add(request(2, 12, Urgency::default())).unwrap();
    let (_, _, ended) = run(&mut engine, &clock);
    let [a, b] = ended.as_slice() else { panic!("{ended:?}") };
    assert_eq!((a.request, b.request), (first, second));
    for metrics in [a, b] {
        assert_eq!((metrics.prompt_tokens, metrics.generated_tokens), (5, 12));
        assert_eq!(metrics.queued(), Some(Duration::from_secs(1)));
        assert_eq!(metrics.time_to_first_token(), Some(Duration::from_secs(1)));
    }
    assert_eq!((a.preemptions, b.preemptions), (0, 1));
    assert!(a.latency() < b.latency());

    let metrics = engine.metrics();
    assert_eq!(metrics.stats, engine.stats());
    assert_eq!((metrics.stats.scheduler.preemptions, metrics.stats.scheduler.swaps), (1, 1));
    assert_eq!(metrics.step.id + 1, metrics.stats.steps);
    let log = log.lock().unwrap();
    let blocks = |count: fn(&pagewise_runtime::plan::BlockOps) -> usize| -> usize {
        log.plans.iter().map(|plan| count(&plan.block_ops)).sum()
    };
    assert_eq!(blocks(|ops| ops.swap_out.len()) as u64, metrics.stats.cache.swapped_out_blocks);
    assert_eq!(blocks(|ops| ops.swap_in.len()) as u64, metrics.stats.cache.swapped_in_blocks);
    assert!(metrics.stats.cache.swapped_out_blocks > 0);
    let tokens: usize = log.plans.iter().map(|plan| plan.num_tokens()).sum();
    assert_eq!(tokens, 2 * (5 + 11), "nothing was computed twice");
}
