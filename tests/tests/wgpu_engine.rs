//! The models through wgpu against the CPU: the same steps on both, on every adapter that is there, software Vulkan at
//! least (or on the one that `PAGEWISE_WGPU_ADAPTER` names).
//!
//! Logits of given tokens must agree within a tolerance throughout; greedy tokens must be equal wherever the CPU's
//! margin between the two likeliest is more than twice that tolerance, as one below it may go either way.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub, reason = "a test")]

#[path = "gpu/engine_ahead.rs"]
mod engine_ahead;
#[path = "gpu/engine_answers.rs"]
mod engine_answers;
#[path = "gpu/engine_pair.rs"]
mod engine_pair;
#[path = "gpu/random.rs"]
mod random;

use engine_pair::{Pair, adapters, engine};
use pagewise_attention::DType;
use pagewise_runtime::backend::wgpu::WgpuBackend;
use pagewise_runtime::backend::{AttentionSpec, Backend, BackendError};
use pagewise_runtime::executor::{Executor, ExecutorError, ModelExecutor};
use pagewise_runtime::model_dir::{ModelDir, Weights};
use pagewise_runtime::models::{WeightSource, load_model};
use pagewise_runtime::plan::{BlockCopy, BlockOps, Chunk, LogitRows, SequenceId, StepPlan, TokenInput};
use pagewise_runtime::request::{Request, RequestOutput, SamplingParams};
use pagewise_runtime::scheduler::SchedulerStats;
use pagewise_tests::{FIXTURES, Sequence, argmax, fixture, older_beams, smollm2_f32};
use random::Random;
use serde::Deserialize;
use std::time::Instant;

#[derive(Deserialize)]
struct Golden {
    prompts: Vec<GoldenPrompt>,
}

#[derive(Deserialize)]
struct GoldenPrompt {
    prompt: Vec<u32>,
    greedy: Vec<u32>,
}

fn golden(name: &str) -> Vec<GoldenPrompt> {
    let golden: Golden =
        serde_json::from_slice(&std::fs::read(fixture(name).join("golden.json")).unwrap()).unwrap();
    golden.prompts
}

/// f32 throughout, the same sums in another order: a few units of 2^-24 for each of some ten roundings in a row; the
/// reference itself is 1.6e-6 of the largest logit away from its f64 twin, and each side goes its own way.
const F32: f64 = 2e-5;

/// Keys and values rounded to 16 bits: where the two sides' f32 straddle a rounding boundary, an entry of the cache
/// differs by a unit of bf16, 2^-8 of it; one of many keys, so that logits differ by less.
const BF16_CACHE: f64 = 1e-2;

/// The seed of this run, on stderr, where a failing test shows it: `PAGEWISE_SEED=… cargo test …` runs the same case.
fn seed() -> u64 {
    let seed = random::run_seed();
    eprintln!("PAGEWISE_SEED={seed}");
    seed
}

/// Each prompt in chunks of random lengths beside the others, then greedy tokens, all in random batches.
#[test]
fn all_fixtures_agree_with_the_cpu_step_by_step() {
    for backend in adapters() {
        for name in FIXTURES {
            let started = Instant::now();
            let mut random = Random::new(seed());
            let block_size = random.pick(&[1, 4, 16, 64]);
            let mut pair = Pair::new(&backend, &fixture(name), DType::F32, None, block_size);
            pair.tolerance = F32;
            run_batches(&mut pair, &golden(name), &mut random);
            eprintln!(
                "{name} in blocks of {block_size}: {} rows agree, worst {:.2} of the tolerance; {} of {} tokens beyond the margin ({:.1} s)",
                pair.rows,
                pair.worst,
                pair.decided,
                pair.rows,
                started.elapsed().as_secs_f64()
            );
        }
    }
}

/// Weights of 16 bits, and caches of 16 bits.
#[test]
fn narrow_weights_and_caches_agree_with_the_cpu() {
    for backend in adapters() {
        for (name, dtype, kv_dtype, tolerance) in [
            ("llama_gqa", DType::Bf16, DType::F32, F32),
            ("gpt2", DType::F16, DType::F32, F32),
            ("qwen3", DType::F32, DType::Bf16, BF16_CACHE),
        ] {
            let mut random = Random::new(seed());
            let mut pair = Pair::new(&backend, &fixture(name), kv_dtype, Some(dtype), 16);
            pair.tolerance = tolerance;
            run_batches(&mut pair, &golden(name), &mut random);
            eprintln!("{name}, {dtype} over {kv_dtype}: worst {:.2} of the tolerance", pair.worst);
        }
    }
}

fn run_batches(pair: &mut Pair, golden: &[GoldenPrompt], random: &mut Random) {
    let mut sequences: Vec<Sequence> =
        golden.iter().enumerate().map(|(i, golden)| pair.sequence(i as u64, &golden.prompt)).collect();
    let goal = |i: usize| golden[i].prompt.len() + golden[i].greedy.len().min(8) - 1;
    while (0..sequences.len()).any(|i| sequences[i].computed < goal(i)) {
        let mut work = Vec::new();
        for (i, sequence) in sequences.iter_mut().enumerate() {
            let waiting = (sequence.tokens.len() - sequence.computed).min(goal(i) - sequence.computed);
            if waiting > 0 && !random.one_in(4) {
                let count = if random.one_in(2) { waiting } else { 1 + random.below(waiting) };
                work.push((sequence, count));
            }
        }
        if work.is_empty() {
            continue;
        }
        let rows = pair.step(&mut work);
        for ((sequence, _), rows) in work.into_iter().zip(rows) {
            if sequence.computed == sequence.tokens.len() {
                // What the CPU would say: both go on with the same token.
                sequence.tokens.push(argmax(rows.last().unwrap()));
            }
        }
    }
}

/// Weights in many small buffers are the same weights.
#[test]
fn weights_in_parts_are_the_same_weights() {
    for backend in adapters() {
        let name = "opt_preln";
        let small = backend.sibling().unwrap().with_largest_weight(4096);
        let mut pair = Pair::new(&small, &fixture(name), DType::F32, None, 16);
        pair.tolerance = F32;
        let mut random = Random::new(seed());
        run_batches(&mut pair, &golden(name), &mut random);
    }
}

/// Greedy requests with two log-probabilities, so that margins are known.
fn greedy(prompt: &[u32], max_tokens: usize) -> Request {
    let params = SamplingParams {
        max_tokens,
        temperature: 0.0,
        logprobs: Some(2),
        ignore_eos: true,
        ..SamplingParams::default()
    };
    Request::new(prompt.to_vec(), params)
}

/// The tokens of the first completion are equal until one's margin is below the bound.
fn assert_same_until_undecided(label: &str, cpu: &RequestOutput, wgpu: &RequestOutput, bound: f32) -> usize {
    let (cpu, wgpu) = (&cpu.outputs[0], &wgpu.outputs[0]);
    for (i, (want, got)) in cpu.token_ids.iter().zip(&wgpu.token_ids).enumerate() {
        let top = &cpu.logprobs.as_ref().unwrap()[i].top;
        if top[0].logprob - top[1].logprob < bound {
            return i;
        }
        assert_eq!(want, got, "{label}: token {i} with a margin of {}", top[0].logprob - top[1].logprob);
    }
    assert_eq!(cpu.token_ids.len(), wgpu.token_ids.len(), "{label}");
    cpu.token_ids.len()
}

/// A cache that is too small for all: requests make room by swapping and by recomputation, and share prefixes.
#[test]
fn swapped_and_recomputed_requests_agree_with_the_cpu() {
    for backend in adapters() {
        let name = "llama_gqa";
        let golden = golden(name);
        for swap in [true, false] {
            let longest = golden.iter().map(|golden| golden.prompt.len()).max().unwrap() + 24;
            let blocks = longest.div_ceil(4) + 6;
            let requests = || -> Vec<Request> {
                golden.iter().chain(&golden).map(|golden| greedy(&golden.prompt, 24)).collect()
            };
            let blocks = [blocks, if swap { 64 } else { 0 }];
            let mut cpu = engine(None, &fixture(name), None, 4, blocks);
            let mut wgpu = engine(Some(&backend), &fixture(name), None, 4, blocks);
            let (cpu_outputs, wgpu_outputs) =
                (cpu.generate(requests()).unwrap(), wgpu.generate(requests()).unwrap());
            for (i, (cpu, wgpu)) in cpu_outputs.into_iter().zip(wgpu_outputs).enumerate() {
                let label = format!("request {i}, swap {swap}");
                assert_same_until_undecided(&label, &cpu.unwrap(), &wgpu.unwrap(), 1e-3);
            }
            let SchedulerStats { preemptions, swaps, .. } = wgpu.stats().scheduler;
            let wanted = if swap { swaps } else { preemptions - swaps };
            assert!(wanted > 0, "nobody had to make room: the test tests nothing");
        }
    }
}

/// Beams fork, copy blocks on write and end: the golden searches of transformers, on the device.
#[test]
fn beam_searches_are_those_of_transformers() {
    for backend in adapters() {
        for name in ["llama_gqa", "gemma2"] {
            let cases = older_beams(name);
            let mut engine = engine(Some(&backend), &fixture(name), None, 4, [4096, 0]);
            let requests = cases.iter().map(|(_, request)| request.clone()).collect();
            for ((golden, request), output) in cases.iter().zip(engine.generate(requests).unwrap()) {
                let output = output.unwrap();
                let tokens: Vec<_> = output.outputs.iter().map(|output| output.token_ids.clone()).collect();
                assert_eq!(tokens, golden.sequences, "{name}: {:?}", request.params);
                for (output, want) in output.outputs.iter().zip(&golden.scores) {
                    let got = f64::from(output.score.unwrap());
                    assert!((got - want).abs() < 1e-3, "{name}: score {got}, golden {want}");
                }
            }
        }
    }
}

/// Blocks go out to the host and come back elsewhere; what lay in their places meanwhile is overwritten.
#[test]
fn blocks_survive_a_swap() {
    for backend in adapters() {
        let name = "qwen2";
        let mut pair = Pair::new(&backend, &fixture(name), DType::F32, None, 4);
        pair.tolerance = F32;
        let golden = golden(name);
        let [.., other, prompt] = golden.as_slice() else { panic!("the fixture has two prompts at least") };
        let (prompt, other) = (&prompt.prompt, &other.prompt);
        let mut sequence = pair.sequence(0, prompt);
        let count = prompt.len() - 1;
        pair.step(&mut [(&mut sequence, count)]);
        let old: Vec<_> = sequence.tables.iter().flatten().copied().collect();
        let (mut other, count) = (pair.sequence(1, other), other.len());
        pair.step(&mut [(&mut other, count)]);
        let swap = |src: u32, dst: u32| BlockCopy { group: 0, src, dst };
        let out: Vec<_> = old.iter().enumerate().map(|(i, &block)| swap(block, i as u32)).collect();
        let places: Vec<u32> = old.iter().map(|_| pair.planner.free.pop().unwrap()).collect();
        let back: Vec<_> = places.iter().enumerate().map(|(i, &block)| swap(i as u32, block)).collect();
        pair.blocks(BlockOps { swap_out: out, ..BlockOps::default() });
        // The old blocks become another sequence's.
        pair.planner.free.extend(old);
        let (mut third, count) = (pair.sequence(2, &golden[1].prompt), golden[1].prompt.len());
        pair.step(&mut [(&mut third, count)]);
        pair.blocks(BlockOps { swap_in: back, ..BlockOps::default() });
        for (block, place) in sequence.tables.iter_mut().flatten().zip(&places) {
            *block = *place;
        }
        pair.step(&mut [(&mut sequence, 1)]);
    }
}

#[test]
fn smollm2_says_what_it_says_on_the_cpu() {
    let Some(dir) = smollm2_f32() else { return };
    #[derive(Deserialize)]
    struct Smol {
        items: Vec<Item>,
    }
    #[derive(Deserialize)]
    struct Item {
        prompt: Vec<u32>,
    }
    let golden: Smol = serde_json::from_str(include_str!("../fixtures/smollm2_golden.json")).unwrap();
    for backend in adapters() {
        let started = Instant::now();
        // Software takes two seconds a token: the shortest prompt there.
        let mut items: Vec<&Item> = golden.items.iter().collect();
        items.sort_by_key(|item| item.prompt.len());
        if backend.name().contains("software") {
            items.truncate(1);
        }
        let requests = || -> Vec<Request> { items.iter().map(|item| greedy(&item.prompt, 16)).collect() };
        // bf16 on both sides halves what software has to read.
        let bf16 = Some(DType::Bf16);
        let cpu = engine(None, &dir, bf16, 16, [512, 0]).generate(requests()).unwrap();
        let wgpu = engine(Some(&backend), &dir, bf16, 16, [512, 0]).generate(requests()).unwrap();
        let mut decided = 0;
        for (i, (cpu, wgpu)) in cpu.into_iter().zip(wgpu).enumerate() {
            // Logits of about 25 in f32 through 30 layers.
            decided += assert_same_until_undecided(&format!("item {i}"), &cpu.unwrap(), &wgpu.unwrap(), 4e-3);
        }
        assert!(decided >= 8 * items.len(), "most tokens are decided");
        eprintln!(
            "{}: {decided} tokens of {} prompts in {:.1} s",
            backend.name(),
            items.len(),
            started.elapsed().as_secs_f64()
        );
    }
}

/// A lost device fails the step, and every later one, with a typed error; a cache that no binding holds is refused by
/// the limit's name; what failed leaves the backend as it was.
#[test]
fn what_the_device_cannot_do_is_a_typed_error() {
    for backend in adapters() {
        let dir = fixture("llama_gqa");
        let ModelDir { config, .. } = ModelDir::open(&dir).unwrap();
        let weights = WeightSource::Files { weights: Weights::open(&dir).unwrap(), dtype: None };
        let huge = (backend.largest_binding() / 64) as usize;
        let spec = AttentionSpec::new(&config, DType::F32, 16, huge);
        let error = backend.cache(&spec).unwrap_err().to_string();
        assert!(
            error.contains("max_storage_buffer_binding_size") || error.contains("max_buffer_size"),
            "{error}"
        );
        assert!(matches!(
            backend.cache(&AttentionSpec::new(&config, DType::F8E4M3, 16, 8)).unwrap_err(),
            BackendError::Attention(_)
        ));

        let own = WgpuBackend::new(&engine_pair::choice(&backend)).unwrap();
        let doomed = own.sibling().unwrap();
        let model = load_model(&config, &weights, &own).unwrap();
        let spec = AttentionSpec::new(&config, DType::F32, 16, 8);
        let mut executor = ModelExecutor::new(own, model, spec, config.vocab_size).unwrap();
        let plan = |id, start: usize| StepPlan {
            id,
            block_ops: BlockOps::default(),
            chunks: vec![Chunk {
                sequence: SequenceId(0),
                tokens: vec![TokenInput::Known(3); 4],
                start,
                block_tables: vec![vec![1, 2]; config.kv_groups().0.len()],
                logits: LogitRows::Last,
            }],
        };
        executor.execute(&plan(0, 0)).unwrap();
        let wrong = StepPlan {
            block_ops: BlockOps {
                swap_out: vec![BlockCopy { group: 0, src: 99, dst: 0 }],
                ..BlockOps::default()
            },
            ..plan(1, 4)
        };
        executor.execute(&wrong).unwrap_err();
        executor.execute(&plan(2, 4)).unwrap();
        doomed.destroy();
        for id in 3..5 {
            let error = executor.execute(&plan(id, 8)).unwrap_err();
            assert!(
                matches!(error, ExecutorError::Backend(BackendError::DeviceLost { .. })),
                "a lost device is said to be lost: {error}"
            );
        }
    }
}
