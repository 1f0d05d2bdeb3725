//! The engine on CUDA against the engine on the CPU: all fixtures and SmolLM2, in every type of weights.
//!
//! Logits of given tokens must agree within a bound that follows from the type and, in 16 bits, from how much roundings
//! move the logits of this model on the CPU; greedy tokens must be the same until the CPU's own choice is closer than
//! twice that bound, after which both are right and go separate ways.
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
#[path = "gpu/engine_beams.rs"]
mod engine_beams;
#[path = "gpu/engine_machine.rs"]
mod engine_machine;
#[path = "gpu/engine_sampling.rs"]
mod engine_sampling;

use engine_machine::{
    Machine, Numbers, bound, config, difference, rows_alone, rows_decoded, rows_mixed, texts,
};
use pagewise_attention::DType;
use pagewise_attention::cuda::cudarc::driver::result::mem_get_info;
use pagewise_runtime::engine::Engine;
use pagewise_runtime::load::{BackendChoice, CacheSize, LoadOptions, load};
use pagewise_runtime::request::{Event, Request, RequestOutput, SamplingParams};
use pagewise_runtime::scheduler::Preemption;
use pagewise_tests::{FIXTURES, fixture, smollm2_f32};
use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];

/// Logits of given tokens, in every way to compute them.
fn logits_agree(name: &str, dir: &Path, dtype: DType, count: usize, longest: usize) {
    let texts = texts(config(dir).vocab_size, count, longest, 17);
    let bound = bound(dir, dtype, &texts);
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
    options.max_num_seqs = way.budget.min(64);
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
            logprobs: (index % 2 == 0).then_some(2),
            ..SamplingParams::default()
        };
        Request::new(prompt, params)
    };
    texts.into_iter().enumerate().map(request).collect()
}

/// The largest logit that a model gives.
fn scale(dir: &Path, texts: &[Vec<u32>]) -> f64 {
    let rows = rows_alone(&mut Machine::cpu(dir, DType::F32), texts);
    rows.iter().flatten().flatten().fold(0.0, |largest, x| f64::from(x.abs()).max(largest))
}

/// What the CPU gives for requests, with the log-probabilities that show how sure it was.
struct Oracle {
    engine: Engine,
    machine: Machine,
    /// How close two logits may be for either to be right.
    margin: f64,
}

impl Oracle {
    fn new(dir: &Path, dtype: DType) -> Self {
        let texts = texts(config(dir).vocab_size, 7, 30, 3);
        let margin = 2.0 * bound(dir, dtype, &texts) * scale(dir, &texts);
        Self {
            engine: engine(dir, way(BackendChoice::Cpu, dtype)),
            machine: Machine::cpu(dir, dtype),
            margin,
        }
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
                // Beams: other ones are as good, or nearly; or a search had to choose between two that were, and what
                // came of the one is better than what came of the other. The beam's own score is right in any case.
                let own = engine_beams::score(&mut self.machine, &request.prompt, &found.token_ids);
                let off = (f64::from(x) - own).abs();
                assert!(off <= margin, "{label}: a beam scores {x}, on the CPU its tokens score {own}");
                if f64::from((x - y).abs()) > margin {
                    let gap = engine_beams::least_gap(&mut self.machine, request);
                    println!(
                        "{label}: a beam scores {x}, on the CPU {y}: two were {gap:.2e} apart on the way"
                    );
                    assert!(
                        gap <= margin,
                        "{label}: a beam scores {x}, on the CPU {y}; none was near, {gap:.3e}"
                    );
                }
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

/// The same with a cache that holds the largest request, but not many: sequences keep few blocks behind a window.
fn crowded(dir: &Path, way: Way) -> Way {
    let blocks =
        config(dir).kv_groups().0.iter().map(|group| if group.window.is_some() { 12 } else { 40 }).sum();
    Way { blocks: Some(blocks), budget: 64, ..way }
}

/// Requests through the whole engine: few and many at once, crowded with both preemptions, with graphs and without.
fn answers_agree(name: &str, dir: &Path, dtype: DType, count: usize) {
    let config = config(dir);
    let mut oracle = Oracle::new(dir, dtype);
    let requests = requests(config.vocab_size, count, 23);
    let roomy = way(BackendChoice::Cuda, dtype);
    let crowded = crowded(dir, roomy);
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
        let stats = with_graphs.stats().scheduler;
        println!("{label}: {} preemptions, {} of them swaps", stats.preemptions, stats.swaps);
        match what {
            "recomputed" => assert!(stats.preemptions > 0, "{label}: nobody made room"),
            "swapped" => assert!(stats.swaps > 0, "{label}: nobody was swapped"),
            _ => {}
        }
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

/// Steps so small that all products are our own kernels': what a sanitizer can judge. The library's kernels store through
/// the copy engine, which initcheck does not see, so that it calls what they wrote uninitialised.
#[test]
fn answers_of_small_steps_agree_with_the_cpu() {
    if cuda::context().is_none() {
        return;
    }
    let dir = fixture("llama_gqa");
    for dtype in DTYPES {
        let mut oracle = Oracle::new(&dir, dtype);
        let requests = requests(config(&dir).vocab_size, 4, 31);
        let mut engine = engine(&dir, Way { budget: 8, ..way(BackendChoice::Cuda, dtype) });
        for (index, (request, found)) in requests.iter().zip(&generate(&mut engine, &requests)).enumerate() {
            oracle.check(&format!("{dtype}, request {index}"), request, found);
        }
        empty("small steps", &engine);
    }
}

#[test]
fn smollm2_answers_agree_with_the_cpu() {
    if cuda::context().is_none() {
        return;
    }
    let Some(dir) = smollm2_f32() else { return };
    for dtype in DTYPES {
        answers_agree("SmolLM2", &dir, dtype, 21);
    }
}

/// A cache that a few of the load's requests fill: the largest alone takes 36 of these blocks of four tokens (a prompt of
/// 40 tokens and three beams of 30), and 24 are there at a time.
const LOAD_BLOCKS: usize = 64;

/// What became of a load.
#[derive(Debug, Default)]
struct Served {
    done: usize,
    same: usize,
    cancelled: usize,
    preemptions: u64,
    swaps: u64,
    /// Free device memory after 200 requests and at the end, where there is a device.
    free_memory: Option<(usize, usize)>,
}

/// Arrivals, cancellations, samples and beams in a cache that is far too small for them, for some time; every answer is
/// compared with the oracle's, and nothing may be left behind.
fn serve_load(dir: &Path, way: Way, oracle: &mut Oracle, time: Duration) -> Served {
    let vocab_size = config(dir).vocab_size;
    let mut engine = engine(dir, way);
    let mut numbers = Numbers(99);
    let mut served = Served::default();
    let mut open: HashMap<_, (String, Request)> = HashMap::new();
    let free = || match way.backend {
        BackendChoice::Cuda => mem_get_info().ok().map(|(free, _)| free),
        _ => None,
    };
    let mut free_before = None;
    let until = Instant::now() + time;
    let mut round = 0u64;
    while Instant::now() < until || engine.has_work() {
        round += 1;
        if Instant::now() < until && open.len() < 24 {
            let mut pick = requests(vocab_size, 29, round);
            let index = numbers.below(pick.len());
            let request = pick.swap_remove(index);
            let label = format!("{:?}, seed {round}, request {index}", way.preemption);
            open.insert(engine.add(request.clone()).unwrap(), (label, request));
        }
        if numbers.below(40) == 0
            && let Some(&id) = open.keys().next()
        {
            assert!(engine.cancel(id));
            open.remove(&id);
            served.cancelled += 1;
        }
        for event in engine.step().unwrap() {
            match event {
                Event::Token { .. } => {}
                Event::Finished { request, output } => {
                    let Some((label, asked)) = open.remove(&request) else { continue };
                    served.same += usize::from(oracle.check(&label, &asked, &output));
                    served.done += 1;
                    if served.done == 200 {
                        free_before = free();
                    }
                }
                Event::Failed { error, .. } => panic!("{error:?}"),
            }
        }
    }
    assert!(open.is_empty(), "{} requests were never answered", open.len());
    empty(&format!("{:?}", way.preemption), &engine);
    let stats = engine.stats();
    (served.preemptions, served.swaps) = (stats.scheduler.preemptions, stats.scheduler.swaps);
    served.free_memory = free_before.zip(free());
    served
}

/// Both kinds of preemption, half of the time each.
fn serve_loads(backend: BackendChoice, seconds: f64) {
    let dir = fixture("llama_gqa");
    let dtype = DType::F32;
    let mut oracle = Oracle::new(&dir, dtype);
    for preemption in [Preemption::Recompute, Preemption::Swap] {
        let way = Way { preemption, blocks: Some(LOAD_BLOCKS), budget: 96, ..way(backend, dtype) };
        let served = serve_load(&dir, way, &mut oracle, Duration::from_secs_f64(seconds / 2.0));
        println!("{preemption:?}: {served:?}");
        assert!(served.done > 0, "{served:?}");
        // The load must press as it is meant to: every tenth request has to make room once.
        let made_room = if preemption == Preemption::Swap { served.swaps } else { served.preemptions };
        assert!(made_room as usize * 10 >= served.done, "{preemption:?}: {served:?}");
        if let Some((before, now)) = served.free_memory {
            // Graphs of shapes that had not been met yet; nothing that grows with the requests.
            assert!(before.saturating_sub(now) < 64 << 20, "{before} bytes were free, {now} are");
        }
    }
}

#[test]
fn a_random_load_is_served_right() {
    if cuda::context().is_none() {
        return;
    }
    let seconds =
        std::env::var("PAGEWISE_LOAD_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(5.0);
    serve_loads(BackendChoice::Cuda, seconds);
}

/// That the load preempts does not depend on the device: here it can be seen without one.
#[test]
fn the_random_load_preempts_on_the_cpu_too() {
    serve_loads(BackendChoice::Cpu, 2.0);
}

/// A crowded cache preempts on any device. How often depends on when steps are planned, so that it must be more than once.
#[test]
fn a_crowded_cache_preempts_on_the_cpu_too() {
    for name in FIXTURES {
        let dir = fixture(name);
        let mut engine = engine(&dir, crowded(&dir, way(BackendChoice::Cpu, DType::F32)));
        generate(&mut engine, &requests(config(&dir).vocab_size, 21, 23));
        let preemptions = engine.stats().scheduler.preemptions;
        println!("{name}: {preemptions} preemptions");
        assert!(preemptions >= 3, "{name}: {preemptions} preemptions");
    }
}

/// A bound must not allow everything: a model that takes one token for another is far beyond it.
#[test]
fn bounds_catch_a_wrong_token() {
    for name in FIXTURES {
        let dir = fixture(name);
        let vocab_size = config(&dir).vocab_size;
        let right = texts(vocab_size, 19, 40, 17);
        let mut wrong = right.clone();
        wrong.iter_mut().for_each(|text| text[0] = (text[0] + 1) % vocab_size as u32);
        for dtype in DTYPES {
            let bound = bound(&dir, dtype, &right);
            let mut machine = Machine::cpu(&dir, dtype);
            // The last rows, which see the wrong token through attention alone.
            let mut last = |texts: &[Vec<u32>]| -> Vec<Vec<Vec<f32>>> {
                let rows = rows_alone(&mut machine, texts);
                rows.into_iter().map(|mut rows| rows.split_off(rows.len() - 1)).collect()
            };
            let expected = last(&right);
            let fault = difference(name, &last(&wrong), &expected);
            println!("{name} {dtype}: {bound:.2e} allowed, {fault:.2e} with a wrong token");
            assert!(
                fault > 2.0 * bound,
                "{name} {dtype}: {bound:.2e} would allow a wrong token's {fault:.2e}"
            );
        }
    }
}
