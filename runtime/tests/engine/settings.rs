//! The settings of the simulation: caches, limits and arrivals, drawn for a case's number.

use crate::support::{Numbers, VOCAB, cache_config, engine_config};
use pagewise_kvcache::{CacheConfig, KvGroup};
use pagewise_runtime::engine::EngineConfig;
use pagewise_runtime::request::{EarlyStopping, Request, SamplingParams, Urgency};
use pagewise_runtime::scheduler::Preemption;
use std::time::Duration;

/// What is simulated.
pub(crate) struct Setting {
    /// For what is drawn on the way.
    pub(crate) numbers: Numbers,
    pub(crate) cache: CacheConfig,
    pub(crate) config: EngineConfig,
    /// The executor chooses tokens itself, a step ahead.
    pub(crate) ahead: bool,
    /// All requests are equally urgent.
    pub(crate) ordered: bool,
    /// The steps at which requests come, in this order.
    pub(crate) arrivals: Vec<(usize, Request)>,
    /// Percent of steps before which a request is cancelled.
    pub(crate) cancellations: usize,
}

impl Setting {
    /// Anything, the smallest caches and budgets included.
    pub(crate) fn any(case: u64, ahead: bool) -> Self {
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
        // With one request whose penalties follow its tokens, or of beams, nothing runs ahead.
        let plain = ahead && numbers.chance(70);
        let ordered = numbers.chance(60);
        let mut arrivals: Vec<(usize, Request)> = (0..numbers.from(1, 12))
            .map(|_| {
                let at = if numbers.chance(50) { 0 } else { numbers.below(60) };
                let mut request = random_request(&mut numbers, &shared);
                if plain {
                    request.params = can_run_ahead(request.params);
                }
                if !ordered {
                    request.urgency = urgency(&mut numbers, at);
                }
                (at, request)
            })
            .collect();
        arrivals.sort_by_key(|(step, _)| *step);
        Self { numbers, cache, config, ahead, ordered, arrivals, cancellations: 1 }
    }

    /// Many samples of short prompts in a cache that holds a few of them, run ahead, with a host that has room for some of
    /// what is preempted: groups are recomputed, swapped out while they are rebuilt, cancelled and expire on the way.
    pub(crate) fn crowded(case: u64) -> Self {
        let mut numbers = Numbers::new(case ^ 0x9e37_79b9_7f4a_7c15);
        let shared: Vec<u32> = (0..24).map(|_| numbers.below(VOCAB) as u32).collect();
        let block_size = numbers.pick(&[1, 1, 2, 4]);
        let windows = if numbers.chance(10) { vec![None, Some(numbers.from(1, 12))] } else { vec![None] };
        let device_blocks = windows.len() * (numbers.from(40, 110).div_ceil(block_size) + 2);
        let host_blocks = numbers.from(1, device_blocks);
        let cache = CacheConfig {
            watermark: numbers.pick(&[0.0, 0.0, 0.0, 0.05]),
            prefix_cache: numbers.chance(50),
            host_blocks,
            groups: windows.into_iter().map(|window| KvGroup { window }).collect(),
            ..cache_config(block_size, device_blocks)
        };
        let config = EngineConfig {
            max_num_seqs: numbers.from(4, 16),
            max_batch_tokens: numbers.pick(&[8, 16, 64, 256]),
            preemption: numbers.pick(&[
                Preemption::Swap,
                Preemption::Swap,
                Preemption::Swap,
                Preemption::Auto,
            ]),
            ..engine_config()
        };
        // Beams end the running ahead of all: few of them, and not everywhere.
        let beams = numbers.pick(&[0, 0, 20, 80]);
        let samples = numbers.pick(&[30, 60, 90]);
        let ordered = numbers.chance(60);
        let spread = numbers.pick(&[1, 10, 40]);
        let mut arrivals: Vec<(usize, Request)> = (0..numbers.from(3, 14))
            .map(|_| {
                let at = numbers.below(spread);
                let cut = if numbers.chance(50) { numbers.below(shared.len()) } else { 0 };
                let mut prompt = shared[..cut].to_vec();
                let more = numbers.from(1, 10);
                prompt.extend((0..more).map(|_| numbers.below(VOCAB) as u32));
                let width = if numbers.chance(samples) { numbers.from(2, 4) } else { 1 };
                let beam_width = numbers.chance(beams).then_some(width);
                let params = SamplingParams {
                    max_tokens: numbers.from(1, 24),
                    temperature: numbers.pick(&[0.0, 0.5, 1.0, 3.0]),
                    seed: Some(numbers.below(1000) as u64),
                    n: width,
                    beam_width,
                    ignore_eos: numbers.chance(70),
                    prompt_logprobs: numbers.chance(3).then_some(1),
                    ..SamplingParams::default()
                };
                let mut request = Request::new(prompt, params);
                if !ordered {
                    request.urgency = urgency(&mut numbers, at);
                }
                (at, request)
            })
            .collect();
        arrivals.sort_by_key(|(step, _)| *step);
        let cancellations = numbers.pick(&[0, 1, 4]);
        Self { numbers, cache, config, ahead: true, ordered, arrivals, cancellations }
    }
}

/// Of a request that comes at some step.
fn urgency(numbers: &mut Numbers, at: usize) -> Urgency {
    Urgency {
        priority: numbers.below(3) as i32 - 1,
        deadline: numbers.chance(20).then(|| Duration::from_millis((at + numbers.below(200)) as u64)),
    }
}

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
