//! What a step costs beside the model: 256 running sequences that each decode one token, in caches of 1,000 to
//! 1,000,000 blocks. The goal is 100 µs a step, whatever the size of the cache.
//!
//! `cargo bench -p pagewise-runtime --bench scheduler`. Three figures for each cache: the scheduler with the cache
//! manager (plan, block ops, report, tokens, the plan's memory taken back); the plan as the flat arrays that a device
//! takes; and the whole engine around a model that answers at once with rows of 64 logits (both of these, greedy choice,
//! stop conditions, events, figures). The cache is used before it is timed, so that taking a block evicts another.

#![allow(missing_docs, clippy::unwrap_used, reason = "a bench")]

use pagewise_kvcache::{CacheConfig, CacheManager, KvCacheManager, KvGroup, Prompt, SequenceId};
use pagewise_runtime::backend::{BatchLimits, StepBatch};
use pagewise_runtime::engine::{Engine, EngineConfig};
use pagewise_runtime::executor::{Executor, ExecutorError, RowWanted, StepOutput};
use pagewise_runtime::plan::StepPlan;
use pagewise_runtime::request::{Request, RequestId, SamplingParams, Urgency};
use pagewise_runtime::scheduler::{NewGroup, Preemption, Scheduler, SchedulerConfig};
use std::time::{Duration, Instant};

const SEQUENCES: usize = 256;
const BLOCK_SIZE: usize = 16;
const VOCAB: usize = 64;
/// Every sequence begins a block once in so many steps.
const STEPS: usize = BLOCK_SIZE;
const LIMITS: BatchLimits =
    BatchLimits { block_size: BLOCK_SIZE, num_groups: 1, vocab_size: VOCAB, earlier_step: None };

/// A cache full of what earlier requests left in it.
fn used_cache(blocks: usize) -> KvCacheManager {
    let mut cache = KvCacheManager::new(CacheConfig {
        block_size: BLOCK_SIZE,
        device_blocks: blocks,
        host_blocks: 0,
        groups: vec![KvGroup { window: None }],
        watermark: 0.0,
        prefix_cache: true,
    })
    .unwrap();
    for index in 0..blocks as u32 / 8 {
        let tokens: Vec<u32> = (0..8 * BLOCK_SIZE as u32).map(|at| 1_000_000 + index * 1000 + at).collect();
        let id = SequenceId(u64::MAX);
        cache.allocate(id, Prompt { tokens: &tokens, salt: 0, use_prefix_cache: true }).unwrap();
        cache.mark_computed(id, &tokens).unwrap();
        cache.free(id).unwrap();
    }
    cache
}

/// Prompts that reach their next block at different steps.
fn prompt(round: usize, index: usize, tokens: usize) -> Vec<u32> {
    let length = tokens - STEPS - index % BLOCK_SIZE;
    (0..length).map(|at| ((round * 31 + index * 17 + at * 7) % VOCAB) as u32).collect()
}

fn limits() -> SchedulerConfig {
    SchedulerConfig {
        max_num_seqs: SEQUENCES,
        max_batch_tokens: 1 << 20,
        max_model_len: 1 << 20,
        max_prompt_logit_rows: 1,
        preemption: Preemption::Auto,
    }
}

/// Times of the scheduler with the cache, and of making a plan flat.
fn scheduler(blocks: usize, tokens: usize, rounds: usize) -> [Vec<Duration>; 2] {
    let mut cache = used_cache(blocks);
    let mut scheduler = Scheduler::new(limits());
    let (mut times, mut flat) = (vec![], vec![]);
    for round in 0..rounds {
        let id = |index: usize| RequestId((round * SEQUENCES + index) as u64);
        for index in 0..SEQUENCES {
            let urgency = Urgency::default();
            let prompt = prompt(round, index, tokens);
            let new =
                NewGroup { id: id(index), prompt, width: 1, beams: false, prompt_logits: false, urgency };
            scheduler.add(new, &cache).unwrap();
        }
        for step in 0..=STEPS {
            let started = Instant::now();
            let schedule = scheduler.schedule(&mut cache).unwrap();
            cache.confirm_block_ops().unwrap();
            scheduler.commit(&schedule, &mut cache).unwrap();
            for of in &schedule.chunks {
                scheduler.push_token(of.request, of.index, (step % VOCAB) as u32);
            }
            let mut taken = started.elapsed();
            assert_eq!(schedule.chunks.len(), SEQUENCES, "round {round}, step {step}");
            // The first step is the prompts'.
            if step > 0 {
                let started = Instant::now();
                assert_eq!(StepBatch::new(&schedule.plan, LIMITS).unwrap().rows(), SEQUENCES);
                flat.push(started.elapsed());
            }
            let started = Instant::now();
            scheduler.recycle(schedule);
            taken += started.elapsed();
            if step > 0 {
                times.push(taken);
            }
        }
        for index in 0..SEQUENCES {
            scheduler.remove(id(index), &mut cache).unwrap();
        }
    }
    [times, flat]
}

/// A model that takes no time.
#[derive(Default)]
struct Blank(Option<StepOutput>);

impl Executor for Blank {
    fn begin(&mut self, plan: &StepPlan, _: &[RowWanted]) -> Result<(), ExecutorError> {
        let rows = StepBatch::new(plan, LIMITS)?.logit_rows.len();
        self.0 = Some(StepOutput::of_logits(vec![0.0; rows * VOCAB], VOCAB));
        Ok(())
    }

    fn finish(&mut self) -> Result<StepOutput, ExecutorError> {
        self.0.take().ok_or(ExecutorError::NothingBegun)
    }
}

fn engine(blocks: usize, tokens: usize, rounds: usize) -> Vec<Duration> {
    let limits = limits();
    let config = EngineConfig {
        max_num_seqs: limits.max_num_seqs,
        max_batch_tokens: limits.max_batch_tokens,
        max_model_len: limits.max_model_len,
        vocab_size: VOCAB,
        eos_token_ids: vec![],
        preemption: limits.preemption,
    };
    let mut engine = Engine::new(config, Box::new(used_cache(blocks)), Box::new(Blank::default()), None);
    let mut times = vec![];
    for round in 0..rounds {
        for index in 0..SEQUENCES {
            let params =
                SamplingParams { max_tokens: STEPS + 2, temperature: 0.0, ..SamplingParams::default() };
            engine.add(Request::new(prompt(round, index, tokens), params)).unwrap();
        }
        engine.step().unwrap();
        for _ in 0..STEPS {
            let started = Instant::now();
            let events = engine.step().unwrap();
            times.push(started.elapsed());
            assert_eq!(events.len(), SEQUENCES);
        }
        while engine.has_work() {
            engine.step().unwrap();
        }
    }
    times
}

/// `median (99th percentile)` in microseconds.
fn figures(mut times: Vec<Duration>) -> String {
    times.sort_unstable();
    let at = |share: f64| times[((times.len() - 1) as f64 * share).round() as usize].as_secs_f64() * 1e6;
    format!("{:5.1} ({:5.1})", at(0.5), at(0.99))
}

fn main() {
    // Without the flag this is `cargo test`, which wants to know only that it runs.
    let rounds = if std::env::args().any(|arg| arg == "--bench") { 60 } else { 1 };
    println!("{SEQUENCES} sequences, microseconds a step: median (99th percentile)");
    for (blocks, tokens) in [(1_000, 48), (10_000, 48), (100_000, 48), (1_000_000, 48), (1_000_000, 2048)] {
        let [times, flat] = scheduler(blocks, tokens, rounds);
        println!(
            "{blocks:9} blocks, up to {tokens:4} tokens each: scheduler and cache {}, flat arrays {}, whole engine {}",
            figures(times),
            figures(flat),
            figures(engine(blocks, tokens, rounds)),
        );
    }
}
