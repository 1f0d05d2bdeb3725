//! The engine on CUDA against the engine on the CPU: all fixtures and SmolLM2, in every type of weights.
//!
//! Logits of given tokens must agree within a bound that follows from the type; greedy tokens must be the same until
//! the CPU's own choice is closer than twice that bound, after which both are right and go separate ways.
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

use pagewise_attention::DType;
use pagewise_attention::cuda::cudarc::driver::result::mem_get_info;
use pagewise_runtime::backend::cpu::CpuBackend;
use pagewise_runtime::backend::cuda::{CudaBackend, CudaOptions};
use pagewise_runtime::backend::{AttentionSpec, Backend};
use pagewise_runtime::engine::Engine;
use pagewise_runtime::executor::{Executor, ModelExecutor};
use pagewise_runtime::load::{BackendChoice, CacheSize, LoadOptions, load};
use pagewise_runtime::model_dir::{ModelConfig, ModelDir, Weights};
use pagewise_runtime::models::{WeightSource, load_model};
use pagewise_runtime::plan::{BlockId, Chunk, LogitRows, SequenceId, StepPlan, TokenInput};
use pagewise_runtime::request::{Event, Request, RequestOutput, SamplingParams};
use pagewise_runtime::scheduler::Preemption;
use pagewise_tests::{FIXTURES, fixture, smollm2_f32};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];

/// How far logits may be apart, as a share of the largest. Both round every activation (the CPU none) to the type, with
/// an error of half a unit in its last place; about eight roundings a layer, which add up like a random walk, each
/// passed on by the layers behind it: three times their root for the largest of many logits. In f32 both only sum in
/// another order, over at most some thousand elements each.
fn bound(dtype: DType, layers: usize) -> f64 {
    let half_unit = match dtype {
        DType::F16 => 2f64.powi(-11),
        DType::Bf16 => 2f64.powi(-8),
        _ => 2f64.powi(-21),
    };
    3.0 * half_unit * (8.0 * (layers + 1) as f64).sqrt()
}

struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound.max(1)
    }
}

fn config(dir: &Path) -> ModelConfig {
    ModelDir::open(dir).unwrap().config
}

/// A model on a device with a cache whose blocks are handed out in a scrambled order.
struct Machine {
    executor: Box<dyn Executor>,
    groups: usize,
    free: Vec<BlockId>,
    steps: u64,
}

const BLOCK_SIZE: usize = 16;

impl Machine {
    fn new<B: Backend>(dir: &Path, backend: B, dtype: DType, compute: DType) -> Self {
        let config = config(dir);
        let weights = WeightSource::Files { weights: Weights::open(dir).unwrap(), dtype: Some(dtype) };
        let model = load_model(&config, &weights, &backend).unwrap();
        let num_blocks = 509;
        let mut spec = AttentionSpec::new(&config, dtype, BLOCK_SIZE, num_blocks).with_compute_dtype(compute);
        spec.limits.max_seq_len = spec.limits.max_seq_len.min(2048);
        let executor = Box::new(ModelExecutor::new(backend, model, spec, config.vocab_size).unwrap());
        // A prime, so that the order is a permutation.
        let free = (0..num_blocks).map(|i| (i * 7919 % num_blocks) as BlockId).collect();
        Self { executor, groups: config.kv_groups().0.len(), free, steps: 0 }
    }

    fn cpu(dir: &Path, dtype: DType) -> Self {
        Self::new(dir, CpuBackend::new(None).unwrap(), dtype, DType::F32)
    }

    fn cuda(dir: &Path, dtype: DType, graphs: bool) -> Self {
        let backend = CudaBackend::new(CudaOptions { ordinal: 0, dtype, graphs }).unwrap();
        Self::new(dir, backend, dtype, dtype)
    }

    /// The logits of the next tokens of some sequences: number, tokens so far, how many of them are new, tables.
    fn step(&mut self, work: &mut [(&mut Sequence, usize)], logits: LogitRows) -> Vec<Vec<f32>> {
        let mut plan = StepPlan { id: self.steps, ..StepPlan::default() };
        self.steps += 1;
        for (sequence, count) in work.iter_mut() {
            let end = sequence.computed + *count;
            for table in &mut sequence.tables {
                while table.len() * BLOCK_SIZE < end {
                    table.push(self.free.pop().unwrap());
                }
            }
            let tokens = &sequence.tokens[sequence.computed..end];
            plan.chunks.push(Chunk {
                sequence: SequenceId(sequence.id),
                tokens: tokens.iter().map(|&token| TokenInput::Known(token)).collect(),
                start: sequence.computed,
                block_tables: sequence.tables.clone(),
                logits,
            });
            sequence.computed = end;
        }
        let output = self.executor.execute(&plan).unwrap();
        output.logits.chunks(output.vocab_size).map(<[f32]>::to_vec).collect()
    }

    fn sequence(&self, id: u64, tokens: &[u32]) -> Sequence {
        Sequence { id, tokens: tokens.to_vec(), computed: 0, tables: vec![Vec::new(); self.groups] }
    }
}

struct Sequence {
    id: u64,
    tokens: Vec<u32>,
    computed: usize,
    tables: Vec<Vec<BlockId>>,
}

/// Token sequences of different lengths.
fn texts(vocab_size: usize, count: usize, longest: usize, seed: u64) -> Vec<Vec<u32>> {
    let mut numbers = Numbers(seed);
    (0..count)
        .map(|_| {
            let len = 2 + numbers.below(longest - 1);
            (0..len).map(|_| numbers.below(vocab_size) as u32).collect()
        })
        .collect()
}

/// Every row of each text alone, whole.
fn rows_alone(machine: &mut Machine, texts: &[Vec<u32>]) -> Vec<Vec<Vec<f32>>> {
    let free = machine.free.clone();
    let rows = |(id, text): (usize, &Vec<u32>)| {
        machine.free.clone_from(&free);
        let mut sequence = machine.sequence(id as u64, text);
        machine.step(&mut [(&mut sequence, text.len())], LogitRows::All)
    };
    texts.iter().enumerate().map(rows).collect()
}

/// The same through chunks of random lengths in mixed batches, the last tokens of each one by one.
fn rows_mixed(machine: &mut Machine, texts: &[Vec<u32>], seed: u64) -> Vec<Vec<Vec<f32>>> {
    let mut numbers = Numbers(seed);
    let mut sequences: Vec<Sequence> =
        texts.iter().enumerate().map(|(id, text)| machine.sequence(id as u64, text)).collect();
    let mut rows: Vec<Vec<Vec<f32>>> = vec![Vec::new(); texts.len()];
    loop {
        let mut chosen = Vec::new();
        for (index, sequence) in sequences.iter_mut().enumerate() {
            let left = sequence.tokens.len() - sequence.computed;
            if left > 0 && numbers.below(5) > 0 {
                let count = if left <= 8 { 1 } else { 1 + numbers.below(left - 8) };
                chosen.push((index, count, sequence));
            }
        }
        if chosen.is_empty() {
            if sequences.iter().all(|sequence| sequence.computed == sequence.tokens.len()) {
                return rows;
            }
            continue;
        }
        let counts: Vec<(usize, usize)> = chosen.iter().map(|(index, count, _)| (*index, *count)).collect();
        let mut work: Vec<_> = chosen.into_iter().map(|(_, count, sequence)| (sequence, count)).collect();
        let mut output = machine.step(&mut work, LogitRows::All).into_iter();
        for (index, count) in counts {
            rows[index].extend(output.by_ref().take(count));
        }
    }
}

/// Decodes of a fixed batch, token by token: what graphs are for.
fn rows_decoded(machine: &mut Machine, texts: &[Vec<u32>]) -> Vec<Vec<Vec<f32>>> {
    let mut sequences: Vec<Sequence> =
        texts.iter().enumerate().map(|(id, text)| machine.sequence(id as u64, text)).collect();
    let mut rows: Vec<Vec<Vec<f32>>> = vec![Vec::new(); texts.len()];
    loop {
        let mut indices = Vec::new();
        let mut work = Vec::new();
        for (index, sequence) in sequences.iter_mut().enumerate() {
            if sequence.computed < sequence.tokens.len() {
                indices.push(index);
                work.push((sequence, 1));
            }
        }
        if work.is_empty() {
            return rows;
        }
        let output = machine.step(&mut work, LogitRows::Last);
        for (index, row) in indices.into_iter().zip(output) {
            rows[index].push(row);
        }
    }
}

/// The largest difference as a share of the largest logit.
fn difference(label: &str, found: &[Vec<Vec<f32>>], expected: &[Vec<Vec<f32>>]) -> f64 {
    let mut worst = 0.0f64;
    for (text, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert_eq!(found.len(), expected.len(), "{label}, text {text}");
        for (row, (found, expected)) in found.iter().zip(expected).enumerate() {
            let largest = expected.iter().fold(0f32, |largest, x| largest.max(x.abs()));
            for (token, (x, y)) in found.iter().zip(expected).enumerate() {
                let error = f64::from((x - y).abs()) / f64::from(largest);
                assert!(
                    !error.is_nan(),
                    "{label}, text {text}, row {row}, logit {token}: {x}, on the CPU {y}"
                );
                worst = worst.max(error);
            }
        }
    }
    worst
}

/// Logits of given tokens, in every way to compute them.
fn logits_agree(name: &str, dir: &Path, dtype: DType, count: usize, longest: usize) {
    let config = config(dir);
    let bound = bound(dtype, config.num_layers());
    let texts = texts(config.vocab_size, count, longest, 17);
    let expected = rows_alone(&mut Machine::cpu(dir, dtype), &texts);
    let check = |way: &str, found: &[Vec<Vec<f32>>], of: usize| {
        let label = format!("{name} {dtype} {way}");
        let worst = difference(&label, found, &expected[..of]);
        println!("{label}: {worst:.2e} apart, {bound:.2e} allowed");
        assert!(worst <= bound, "{label}: {worst:.3e} of the largest logit apart, {bound:.3e} allowed");
    };
    check("alone", &rows_alone(&mut Machine::cuda(dir, dtype, true), &texts), count);
    check("mixed", &rows_mixed(&mut Machine::cuda(dir, dtype, true), &texts, 5), count);
    for of in [1, 3, 8, count] {
        let replayed = rows_decoded(&mut Machine::cuda(dir, dtype, true), &texts[..of]);
        check(&format!("decoded by {of}"), &replayed, of);
        let launched = rows_decoded(&mut Machine::cuda(dir, dtype, false), &texts[..of]);
        assert!(replayed == launched, "{name} {dtype}: graphs change bits in a batch of {of}");
    }
}

#[test]
fn logits_of_given_tokens_agree() {
    if cuda::context().is_none() {
        return;
    }
    let mut failures = Vec::new();
    for name in FIXTURES {
        for dtype in DTYPES {
            // Every fixture is tried, so that one run says all.
            let run = || logits_agree(name, &fixture(name), dtype, 19, 40);
            if std::panic::catch_unwind(run).is_err() {
                failures.push(format!("{name} {dtype}"));
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
    for dtype in DTYPES {
        logits_agree("SmolLM2", &dir, dtype, 9, 30);
    }
}

/// How an engine is set up.
#[derive(Clone, Copy)]
struct Way {
    backend: BackendChoice,
    dtype: DType,
    graphs: bool,
    preemption: Preemption,
    /// Blocks; `None` for plenty.
    blocks: Option<usize>,
    budget: usize,
}

const fn way(backend: BackendChoice, dtype: DType) -> Way {
    Way { backend, dtype, graphs: true, preemption: Preemption::Recompute, blocks: None, budget: 512 }
}

fn engine(dir: &Path, way: Way) -> Engine {
    let mut options = LoadOptions::new(dir.to_str().unwrap());
    options.backend = way.backend;
    options.dtype = Some(way.dtype);
    options.block_size = 4;
    options.cuda_graphs = way.graphs;
    options.preemption = way.preemption;
    options.cache_size = CacheSize::Blocks(way.blocks.unwrap_or(4096));
    options.swap_space = if way.preemption == Preemption::Recompute { 0 } else { 64 << 20 };
    options.max_batch_tokens = Some(way.budget);
    options.max_num_seqs = 64;
    load(&options, &mut |_| {}).unwrap().engine
}

/// Greedy requests, some of several samples, some beam searches.
fn requests(vocab_size: usize, count: usize, seed: u64) -> Vec<Request> {
    let texts = texts(vocab_size, count, 40, seed);
    let request = |(index, prompt): (usize, Vec<u32>)| {
        let params = SamplingParams {
            max_tokens: 4 + index % 29,
            ignore_eos: true,
            temperature: 0.0,
            n: if index % 7 == 3 { 2 } else { 1 },
            beam_width: (index % 7 == 5).then_some(3),
            // Those without log-probabilities are chosen on the device.
            logprobs: (index % 2 == 0).then_some(2),
            ..SamplingParams::default()
        };
        Request::new(prompt, params)
    };
    texts.into_iter().enumerate().map(request).collect()
}

/// The largest logit that a model gives.
fn scale(dir: &Path) -> f64 {
    let texts = texts(config(dir).vocab_size, 3, 30, 3);
    let rows = rows_alone(&mut Machine::cpu(dir, DType::F32), &texts);
    rows.iter().flatten().flatten().fold(0.0, |largest, x| f64::from(x.abs()).max(largest))
}

/// What the CPU gives for requests, with the log-probabilities that show how sure it was.
struct Oracle {
    engine: Engine,
    /// How close two logits may be for either to be right.
    margin: f64,
}

impl Oracle {
    fn new(dir: &Path, dtype: DType) -> Self {
        let margin = 2.0 * bound(dtype, config(dir).num_layers()) * scale(dir);
        Self { engine: engine(dir, way(BackendChoice::Cpu, dtype)), margin }
    }

    fn answer(&mut self, request: &Request) -> RequestOutput {
        let params = SamplingParams { logprobs: Some(2), ..request.params.clone() };
        let asked = Request::new(request.prompt.clone(), params);
        self.engine.generate(vec![asked]).unwrap().remove(0).unwrap()
    }

    /// Compares by the margin rule; `true` if all tokens were the same.
    fn check(&mut self, label: &str, request: &Request, found: &RequestOutput) -> bool {
        let expected = self.answer(request);
        let margin = self.margin;
        assert_eq!(found.outputs.len(), expected.outputs.len(), "{label}");
        let mut same = true;
        for (found, expected) in found.outputs.iter().zip(&expected.outputs) {
            if let (Some(x), Some(y)) = (found.score, expected.score) {
                // Beams: other ones are as good, or nearly.
                let len = expected.token_ids.len() as f64;
                let apart = f64::from((x - y).abs()) * len;
                assert!(apart <= margin * len, "{label}: a beam scores {x}, on the CPU {y}");
                same &= found.token_ids == expected.token_ids;
                continue;
            }
            let parts = found.token_ids.iter().zip(&expected.token_ids).position(|(x, y)| x != y);
            let Some(at) = parts else {
                assert_eq!(found.token_ids.len(), expected.token_ids.len(), "{label}");
                continue;
            };
            same = false;
            let top = &expected.logprobs.as_ref().unwrap()[at].top;
            let apart = f64::from(top[0].logprob - top[1].logprob);
            assert!(
                apart <= margin,
                "{label}: token {at} is {}, on the CPU {}, which is {apart:.3e} likelier than the next ({margin:.3e} \
                 may be confused)",
                found.token_ids[at],
                expected.token_ids[at]
            );
        }
        same
    }
}

fn empty(label: &str, engine: &Engine) {
    let stats = engine.stats();
    assert_eq!((stats.device_blocks.used, stats.device_blocks.pending), (0, 0), "{label}");
    assert_eq!((stats.host_blocks.used, stats.host_blocks.pending), (0, 0), "{label}");
}

fn tokens(outputs: &[RequestOutput]) -> Vec<Vec<&[u32]>> {
    outputs.iter().map(|output| output.outputs.iter().map(|one| one.token_ids.as_slice()).collect()).collect()
}

fn generate(engine: &mut Engine, requests: &[Request]) -> Vec<RequestOutput> {
    engine.generate(requests.to_vec()).unwrap().into_iter().map(Result::unwrap).collect()
}

/// Requests through the whole engine: few and many at once, crowded with both preemptions, with graphs and without.
fn answers_agree(name: &str, dir: &Path, dtype: DType, count: usize) {
    let config = config(dir);
    let mut oracle = Oracle::new(dir, dtype);
    let requests = requests(config.vocab_size, count, 23);
    let roomy = way(BackendChoice::Cuda, dtype);
    let groups = config.kv_groups().0.len();
    let crowded = Way { blocks: Some(70 * groups), budget: 64, ..roomy };
    let ways = [
        ("roomy", roomy),
        ("recomputed", crowded),
        ("swapped", Way { preemption: Preemption::Swap, ..crowded }),
    ];
    let mut same = 0;
    for (what, way) in ways {
        let label = format!("{name} {dtype} {what}");
        let mut with_graphs = engine(dir, way);
        let found = generate(&mut with_graphs, &requests);
        for (index, (request, found)) in requests.iter().zip(&found).enumerate() {
            same += usize::from(oracle.check(&format!("{label}, request {index}"), request, found));
        }
        empty(&label, &with_graphs);
        drop(with_graphs);
        let mut without = engine(dir, Way { graphs: false, ..way });
        assert_eq!(
            tokens(&generate(&mut without, &requests)),
            tokens(&found),
            "{label}: graphs change tokens"
        );
    }
    println!("{name} {dtype}: {same} of {} answers are the CPU's to the token", 3 * count);
}

#[test]
fn answers_agree_with_the_cpu() {
    if cuda::context().is_none() {
        return;
    }
    let mut failures = Vec::new();
    for name in FIXTURES {
        for dtype in DTYPES {
            if std::panic::catch_unwind(|| answers_agree(name, &fixture(name), dtype, 21)).is_err() {
                failures.push(format!("{name} {dtype}"));
            }
        }
    }
    assert!(failures.is_empty(), "{failures:?}");
}

#[test]
fn smollm2_answers_agree_with_the_cpu() {
    if cuda::context().is_none() {
        return;
    }
    let Some(dir) = smollm2_f32() else { return };
    for dtype in DTYPES {
        answers_agree("SmolLM2", &dir, dtype, 7);
    }
}

/// Arrivals, cancellations, preemptions of both kinds, samples and beams for as long as is asked; every answer is
/// compared with the CPU's, nothing is left behind, and the device's memory stays as it is.
#[test]
fn a_random_load_is_served_right() {
    if cuda::context().is_none() {
        return;
    }
    let seconds = std::env::var("PAGEWISE_LOAD_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(5);
    let name = "llama_gqa";
    let dir: PathBuf = fixture(name);
    let dtype = DType::F32;
    let vocab_size = config(&dir).vocab_size;
    let mut oracle = Oracle::new(&dir, dtype);
    let mut numbers = Numbers(99);
    let (mut done, mut same, mut cancelled, mut preempted, mut swapped) = (0, 0, 0, 0, 0);
    for (part, preemption) in [Preemption::Recompute, Preemption::Swap].into_iter().enumerate() {
        let way = Way { preemption, blocks: Some(90), budget: 96, ..way(BackendChoice::Cuda, dtype) };
        let mut engine = engine(&dir, way);
        let until = Instant::now() + Duration::from_secs(seconds) / 2;
        let mut open: HashMap<_, Request> = HashMap::new();
        let mut free_memory = None;
        let mut round = 0u64;
        while Instant::now() < until || engine.has_work() {
            round += 1;
            if Instant::now() < until && open.len() < 40 && numbers.below(3) == 0 {
                let pick = requests(vocab_size, 7, round + 1_000_000 * part as u64);
                let request = pick[numbers.below(7)].clone();
                open.insert(engine.add(request.clone()).unwrap(), request);
            }
            if numbers.below(40) == 0
                && let Some(&id) = open.keys().next()
            {
                assert!(engine.cancel(id));
                open.remove(&id);
                cancelled += 1;
            }
            for event in engine.step().unwrap() {
                match event {
                    Event::Token { .. } => {}
                    Event::Finished { request, output } => {
                        let Some(asked) = open.remove(&request) else { continue };
                        let label = format!("{name}, {preemption:?}, seed {round}");
                        same += usize::from(oracle.check(&label, &asked, &output));
                        done += 1;
                        if done == 200 {
                            free_memory = mem_get_info().ok().map(|(free, _)| free);
                        }
                    }
                    Event::Failed { error, .. } => panic!("{error:?}"),
                }
            }
        }
        assert!(open.is_empty());
        empty(name, &engine);
        let stats = engine.stats();
        (preempted, swapped) = (preempted + stats.scheduler.preemptions, swapped + stats.scheduler.swaps);
        if let Some(before) = free_memory {
            let (now, _) = mem_get_info().unwrap();
            // Graphs of shapes that had not been met yet; nothing that grows with the requests.
            assert!(before.saturating_sub(now) < 64 << 20, "{before} bytes were free, {now} are");
            println!("free device memory: {before} bytes after 200 requests, {now} at the end");
        }
    }
    println!(
        "{done} requests, {same} to the token, {cancelled} cancelled, {preempted} preemptions, {swapped} swaps"
    );
    assert!(done > 0 && preempted > 0 && swapped > 0);
}
