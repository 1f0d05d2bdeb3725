//! What a device answers of its logits, and steps that run ahead: the host's sampler and the engine that computes one step
//! after the other say what must come out.

use super::engine_pair::{adapters, engine, engine_over, on_device};
use super::random::Random;
use super::{golden, seed};
use pagewise_attention::{DType, HostTensor};
use pagewise_runtime::backend::wgpu::WgpuBackend;
use pagewise_runtime::backend::{AttentionSpec, Backend, BackendError};
use pagewise_runtime::executor::{
    CandidatesWanted, Executor, ExecutorError, LogitChanges, Row, RowWanted, Sampling, StepOutput,
    TokenChange, TokenWanted,
};
use pagewise_runtime::model_dir::{MadeUp, ModelDir, WeightTensor};
use pagewise_runtime::plan::{StepPlan, TokenInput};
use pagewise_runtime::request::{PositionLogprobs, Request, RequestOutput, SamplingParams, TokenLogprob};
use pagewise_runtime::sampling::{Draw, Sampler, TokenCounts};
use pagewise_tests::fixture;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Logits that the device cannot know better than f32 lets it: its weights are a few units of 2^-24 off, and so are
/// penalties; logits here are up to 30.
const LOGPROB: f64 = 2e-5;

fn assert_near(label: &str, got: f32, want: f32) {
    // Penalties multiply, and round, numbers of up to a hundred.
    let allowed = LOGPROB + 4.0 * f64::from(f32::EPSILON) * f64::from(want.abs());
    let same = got == want || (f64::from(got) - f64::from(want)).abs() <= allowed;
    assert!(same, "{label}: {got}, not {want}");
}

fn assert_logprobs(label: &str, got: &PositionLogprobs, want: &PositionLogprobs) {
    let ids = |entries: &[TokenLogprob]| entries.iter().map(|entry| entry.token_id).collect::<Vec<_>>();
    assert_eq!(got.token.token_id, want.token.token_id, "{label}");
    assert_eq!(ids(&got.top), ids(&want.top), "{label}");
    assert_near(label, got.token.logprob, want.token.logprob);
    for (got, want) in got.top.iter().zip(&want.top) {
        assert_near(label, got.logprob, want.logprob);
    }
}

/// Ways to choose, with what they do to logits as the host and as a device are told.
fn random_params(random: &mut Random, width: usize) -> (SamplingParams, TokenCounts, LogitChanges) {
    let token = |random: &mut Random| random.below(width) as u32;
    let mut params = SamplingParams {
        temperature: random.pick(&[0.0, 1.0, 0.7]),
        top_k: random.pick(&[0, 0, 1, 7]),
        top_p: random.pick(&[1.0, 0.9]),
        min_p: random.pick(&[0.0, 0.05]),
        ..SamplingParams::default()
    };
    if random.one_in(2) {
        params.repetition_penalty = random.pick(&[1.0, 1.29]);
        params.presence_penalty = random.pick(&[0.0, 0.5]);
        params.frequency_penalty = random.pick(&[0.0, 0.25]);
        params.logit_bias =
            (0..random.below(3)).map(|i| (i as u32 * 7 % width as u32, random.pick(&[2.0, -3.0]))).collect();
        params.logit_bias.sort_by_key(|&(id, _)| id);
        params.logit_bias.dedup_by_key(|&mut (id, _)| id);
    }
    let prompt: Vec<u32> = (0..9).map(|_| token(random)).collect();
    let completion: Vec<u32> = (0..9).map(|_| token(random)).collect();
    let mut counts = TokenCounts::new(&prompt, &params);
    completion.iter().for_each(|&id| counts.push(id));
    let repeats = params.repetition_penalty != 1.0;
    let penalised = repeats || params.presence_penalty != 0.0 || params.frequency_penalty != 0.0;
    let mut held: Vec<u32> = if penalised { completion.clone() } else { Vec::new() };
    held.extend(prompt.iter().filter(|_| repeats));
    held.extend(params.logit_bias.iter().map(|&(id, _)| id));
    held.sort_unstable();
    held.dedup();
    let change = |token_id: u32| {
        let times = completion.iter().filter(|&&id| id == token_id).count() as u32;
        let is_held = penalised && (times > 0 || (repeats && prompt.contains(&token_id)));
        let bias = params.logit_bias.iter().find(|&&(id, _)| id == token_id).map_or(0.0, |&(_, bias)| bias);
        TokenChange { token_id, bias, held: is_held.then_some(times) }
    };
    let changes = LogitChanges {
        repetition_penalty: params.repetition_penalty,
        presence_penalty: params.presence_penalty,
        frequency_penalty: params.frequency_penalty,
        tokens: held.into_iter().map(change).collect(),
    };
    (params, counts, changes)
}

/// Rows of random logits, of each of which something else is wanted: the answers are the host sampler's, and nothing else
/// leaves the device.
#[test]
fn answers_are_those_of_the_host() {
    for backend in adapters() {
        let mut random = Random::new(seed());
        for _ in 0..10 {
            answers_of_one_step(&backend, &mut random);
        }
    }
}

fn answers_of_one_step(backend: &WgpuBackend, random: &mut Random) {
    let (rows, width) = (1 + random.below(7), 1 + random.below(3000));
    let levels = random.pick(&[20.0, 1e6]);
    let mut logits: Vec<f32> =
        (0..rows * width).map(|_| ((random.unit() * levels).round() * 30.0 / levels) as f32).collect();
    for row in logits.chunks_mut(width) {
        match random.below(8) {
            0 => row.fill(f32::NAN),
            1 => row.fill(f32::NEG_INFINITY),
            2 => row.iter_mut().step_by(2).for_each(|x| *x = f32::NAN),
            3 => row.iter_mut().enumerate().for_each(|(i, x)| *x = if i % 2 == 0 { -0.0 } else { 0.0 }),
            _ => {}
        }
    }
    let table = backend.upload(WeightTensor::from_f32(logits.clone(), &[rows, width])).unwrap();
    // Sometimes all rows are greedy, which is another kernel.
    let all_greedy = random.one_in(4);
    let mut asked = Vec::new();
    let mut of_host = Vec::new();
    for _ in 0..rows {
        let (mut params, mut counts, mut changes) = random_params(random, width);
        let mut logprobs = random.pick(&[None, None, Some(0), Some(1), Some(5)]);
        let mut kind = random.below(8);
        if all_greedy {
            (params, changes, logprobs) = (SamplingParams::default(), LogitChanges::default(), None);
            params.temperature = 0.0;
            counts = TokenCounts::new(&[], &params);
            kind = random.pick(&[0, 3]);
        }
        let draw =
            Draw { seed: random.next(), sample: random.below(9) as u32, position: random.next() >> 33 };
        let top = random.pick(&[0, 1, 5]).min(width);
        asked.push(match kind {
            0 => RowWanted::Logits,
            1 => RowWanted::Nothing,
            2 => RowWanted::Logprobs { token_id: random.below(width) as u32, top },
            3..6 => {
                let SamplingParams { temperature, top_k, top_p, min_p, .. } = params;
                let sampling = Sampling { temperature, top_k, top_p, min_p, draw };
                RowWanted::Token(TokenWanted { sampling, changes, logprobs })
            }
            _ => {
                let count = random.pick(&[1, 8, 33]);
                RowWanted::Candidates(CandidatesWanted { count, changes, logprobs })
            }
        });
        of_host.push((params, counts, draw));
    }
    let output = on_device(backend, &table, [rows, width], &asked);
    let whole = asked.iter().filter(|asked| matches!(asked, RowWanted::Logits)).count();
    assert_eq!(output.logits.len(), whole * width, "only rows that were asked for leave the device");
    let mut sampler = Sampler::default();
    for (index, ((asked, row), (params, counts, draw))) in
        asked.iter().zip(logits.chunks(width)).zip(&of_host).enumerate()
    {
        let label = format!("row {index} of {rows}, {width} wide: {asked:?}");
        match (asked, output.row(index).unwrap()) {
            (RowWanted::Logits, Row::Logits(got)) => {
                let same = |(a, b): (&f32, &f32)| a == b || (a.is_nan() && b.is_nan());
                assert!(got.len() == width && got.iter().zip(row).all(same), "{label}");
            }
            (RowWanted::Nothing, Row::Nothing) => {}
            (&RowWanted::Logprobs { token_id, top }, Row::Logprobs(got)) => {
                assert_logprobs(&label, got, &sampler.logprobs(row, token_id, top));
            }
            (RowWanted::Token(wanted), Row::Token(got)) => {
                let want = sampler.sample(row, params, counts, *draw).ok();
                assert_eq!(got.map(|got| got.token_id), want, "{label}");
                if let (Some(got), Some(want)) = (got, want) {
                    assert_eq!(got.logprobs.is_some(), wanted.logprobs.is_some(), "{label}");
                    if let (Some(got), Some(top)) = (&got.logprobs, wanted.logprobs) {
                        assert_logprobs(&label, got, &sampler.logprobs(row, want, top));
                    }
                }
            }
            (RowWanted::Candidates(wanted), Row::Candidates(got)) => {
                let want = sampler.candidates(row, params, counts, wanted.count).ok();
                assert_eq!(got.is_some(), want.is_some(), "{label}");
                let (Some(got), Some(want)) = (got, want) else { continue };
                assert_eq!(got.candidates.len(), want.len(), "{label}");
                for (at, (found, want)) in got.candidates.iter().zip(&want).enumerate() {
                    // Log-probabilities that are equal to f32 may change places.
                    assert_near(&label, found.logprob as f32, want.logprob as f32);
                    if wanted.changes.is_empty() {
                        assert_eq!(found.token_id, want.token_id, "{label}");
                    }
                    if wanted.logprobs.is_some() {
                        let own = sampler.logprobs(row, found.token_id, 0).token.logprob;
                        assert_near(&label, got.own[at], own);
                    }
                }
                let top = sampler.logprobs(row, 0, wanted.logprobs.unwrap_or(0)).top;
                let ids = |top: &[TokenLogprob]| top.iter().map(|entry| entry.token_id).collect::<Vec<_>>();
                assert_eq!(ids(&got.top), ids(&top), "{label}");
            }
            (_, got) => panic!("{label}: {got:?} was not asked for"),
        }
    }
}

/// What went through an executor.
#[derive(Debug, Default)]
struct Seen {
    /// Steps that were begun while another was under way.
    ahead: AtomicUsize,
    placeholders: AtomicUsize,
    /// Logits that left the device.
    logits: AtomicUsize,
}

/// An executor that says what goes through it, may refuse to run ahead, and may have no memory left at some step.
struct Watched {
    inner: Box<dyn Executor>,
    seen: Arc<Seen>,
    runs_ahead: bool,
    under_way: usize,
    /// The step that finds no memory, and what is done before it is said.
    fails_at: Option<u64>,
    at_failure: Option<Box<dyn FnMut() -> Option<BackendError> + Send>>,
}

impl Watched {
    fn new(inner: Box<dyn Executor>, runs_ahead: bool) -> (Box<Self>, Arc<Seen>) {
        let seen = Arc::new(Seen::default());
        let kept = Arc::clone(&seen);
        (Box::new(Self { inner, seen, runs_ahead, under_way: 0, fails_at: None, at_failure: None }), kept)
    }
}

impl Executor for Watched {
    fn begin(&mut self, plan: &StepPlan, wanted: &[RowWanted]) -> Result<(), ExecutorError> {
        if self.fails_at == Some(plan.id)
            && let Some(error) = self.at_failure.as_mut().and_then(|failure| failure())
        {
            // As an executor whose step failed: nothing is under way any longer.
            for _ in 0..std::mem::take(&mut self.under_way) {
                self.inner.finish()?;
            }
            return Err(error.into());
        }
        let inputs = plan.chunks.iter().flat_map(|chunk| &chunk.tokens);
        let placeholders = inputs.filter(|input| matches!(input, TokenInput::Placeholder(_))).count();
        self.seen.placeholders.fetch_add(placeholders, Relaxed);
        self.seen.ahead.fetch_add(usize::from(self.under_way > 0), Relaxed);
        let begun = self.inner.begin(plan, wanted);
        self.under_way = if begun.is_ok() { self.under_way + 1 } else { 0 };
        begun
    }

    fn finish(&mut self) -> Result<StepOutput, ExecutorError> {
        let output = self.inner.finish();
        self.under_way = if output.is_ok() { self.under_way - 1 } else { 0 };
        if let Ok(output) = &output {
            self.seen.logits.fetch_add(output.logits.len(), Relaxed);
        }
        output
    }

    fn answers(&self, wanted: &RowWanted) -> bool {
        self.inner.answers(wanted)
    }

    fn runs_ahead(&self) -> bool {
        self.runs_ahead && self.inner.runs_ahead()
    }
}

const NAME: &str = "llama_gqa";

/// Requests of every kind: greedy, sampled, with log-probabilities, penalties and biases, several samples, beams.
fn requests() -> Vec<Request> {
    let golden = golden(NAME);
    let prompts = golden.iter().chain(&golden).chain(&golden).take(14);
    let request = |(index, prompt): (usize, &super::GoldenPrompt)| {
        let mut params = SamplingParams {
            max_tokens: 6 + index % 7,
            temperature: [0.0, 0.8, 1.0, 1.5][index % 4],
            top_k: [0, 20, 0][index % 3],
            top_p: [1.0, 0.9][index % 2],
            min_p: [0.0, 0.0, 0.05][index % 3],
            seed: Some(index as u64 * 77),
            logprobs: [None, None, Some(0), Some(3)][index / 2 % 4],
            ignore_eos: true,
            ..SamplingParams::default()
        };
        match index {
            5 => params.repetition_penalty = 1.2,
            6 => (params.presence_penalty, params.frequency_penalty) = (0.5, 0.3),
            7 => params.logit_bias = vec![(3, 4.0), (9, -4.0)],
            8 => params.prompt_logprobs = Some(2),
            9 => params.n = 2,
            10 => (params.temperature, params.beam_width, params.n) = (1.0, Some(3), 2),
            11 => {
                (params.temperature, params.beam_width, params.n) = (1.0, Some(2), 2);
                params.repetition_penalty = 1.3;
            }
            _ => {}
        }
        Request::new(prompt.prompt.clone(), params)
    };
    prompts.enumerate().map(request).collect()
}

fn tokens(output: &RequestOutput) -> Vec<Vec<u32>> {
    output.outputs.iter().map(|output| output.token_ids.clone()).collect()
}

/// Whatever is asked for, the tokens are those of the CPU, whose logits differ by rounding alone: none of these requests
/// comes so close to a line that it would matter. Whole rows leave the device only where one row begins several samples.
#[test]
fn all_kinds_of_requests_agree_with_the_cpu() {
    for backend in adapters() {
        let dir = fixture(NAME);
        let cpu = engine(None, &dir, None, 4, [512, 0]).generate(requests()).unwrap();
        let mut seen = None;
        let mut wgpu = engine_over(Some(&backend), &dir, None, 4, [512, 0], |executor| {
            let (watched, kept) = Watched::new(executor, true);
            seen = Some(kept);
            watched
        });
        let outputs = wgpu.generate(requests()).unwrap();
        for (index, (cpu, wgpu)) in cpu.into_iter().zip(outputs).enumerate() {
            let (cpu, wgpu) = (cpu.unwrap(), wgpu.unwrap());
            assert_eq!(tokens(&wgpu), tokens(&cpu), "request {index}");
            for (got, want) in wgpu.outputs.iter().zip(&cpu.outputs) {
                let (got, want) = (got.logprobs.iter().flatten(), want.logprobs.iter().flatten());
                assert_eq!(got.clone().count(), want.clone().count(), "request {index}");
                for (got, want) in got.zip(want) {
                    assert_eq!(got.top.len(), want.top.len());
                    let near = (got.token.logprob - want.token.logprob).abs() <= 1e-3;
                    assert!(near, "request {index}: {got:?}, not {want:?}");
                }
            }
            let prompt = |output: &RequestOutput| output.prompt_logprobs.as_ref().map(Vec::len);
            assert_eq!(prompt(&wgpu), prompt(&cpu), "request {index}");
        }
        // One row of 256 logits for the request of two samples.
        let seen = seen.unwrap();
        assert_eq!(seen.logits.load(Relaxed), wgpu.config().vocab_size);
    }
}

/// Steps that are begun while the device computes the one before give the bits of those that wait for it.
#[test]
fn steps_ahead_give_the_same_answers() {
    for backend in adapters() {
        let dir = fixture(NAME);
        let run = |ahead: bool| {
            let mut seen = None;
            let mut engine = engine_over(Some(&backend), &dir, None, 4, [512, 0], |executor| {
                let (watched, kept) = Watched::new(executor, ahead);
                seen = Some(kept);
                watched
            });
            // Those whose next token follows from what the host knows, in two waves.
            let mut requests = requests();
            requests.retain(|request| {
                let params = &request.params;
                params.beam_width.is_none()
                    && params.n == 1
                    && params.repetition_penalty == 1.0
                    && params.presence_penalty == 0.0
            });
            let answers: Vec<_> =
                engine.generate(requests).unwrap().into_iter().map(Result::unwrap).collect();
            (answers, seen.unwrap())
        };
        let ((ahead, seen), (waiting, seen_waiting)) = (run(true), run(false));
        for (index, (ahead, waiting)) in ahead.iter().zip(&waiting).enumerate() {
            assert_eq!(tokens(ahead), tokens(waiting), "request {index}");
            assert_eq!(ahead.outputs[0].logprobs, waiting.outputs[0].logprobs, "request {index}");
        }
        assert!(seen.ahead.load(Relaxed) >= 6 && seen.placeholders.load(Relaxed) >= 20, "{seen:?}");
        assert_eq!(seen_waiting.ahead.load(Relaxed), 0);
    }
}

/// A device that has no memory left, or is lost, while two steps are under way: the requests in flight fail and say why.
/// After the former the engine goes on with new ones, which get the same answers.
#[test]
fn requests_in_flight_fail_with_the_device() {
    for backend in adapters() {
        let dir = fixture(NAME);
        let own = WgpuBackend::new(&super::engine_pair::choice(&backend)).unwrap();
        let doomed = own.sibling().unwrap();
        let greedy = || -> Vec<Request> {
            let params = SamplingParams {
                max_tokens: 12,
                temperature: 0.0,
                ignore_eos: true,
                ..SamplingParams::default()
            };
            golden(NAME).iter().map(|golden| Request::new(golden.prompt.clone(), params.clone())).collect()
        };
        let want = engine(Some(&own), &dir, None, 4, [512, 0]).generate(greedy()).unwrap();
        for lost in [false, true] {
            let doomed = doomed.sibling().unwrap();
            let mut failures = 0;
            let failure = move || {
                failures += 1;
                match lost {
                    // The next step finds out.
                    true => {
                        doomed.destroy();
                        None
                    }
                    false => (failures == 1).then_some(BackendError::OutOfMemory {
                        what: "a step's activations",
                        wanted: 1 << 40,
                        hint: "--max-batch-tokens",
                    }),
                }
            };
            let mut seen = None;
            let mut engine = engine_over(Some(&own), &dir, None, 4, [512, 0], |executor| {
                let (mut watched, kept) = Watched::new(executor, true);
                watched.fails_at = Some(4);
                watched.at_failure = Some(Box::new(failure));
                seen = Some(kept);
                watched
            });
            let failed = engine.generate(greedy()).unwrap();
            for error in failed.into_iter().map(Result::unwrap_err) {
                let says =
                    if lost { "the GPU is lost" } else { "1099511627776 bytes for a step's activations" };
                assert!(error.message.contains(says), "{error}");
            }
            assert!(seen.unwrap().ahead.load(Relaxed) > 0, "no step was ahead: the test tests nothing");
            let again = engine.generate(greedy()).unwrap();
            for (again, want) in again.into_iter().zip(&want) {
                match lost {
                    true => assert!(again.unwrap_err().message.contains("the GPU is lost")),
                    false => assert_eq!(tokens(&again.unwrap()), tokens(want.as_ref().unwrap())),
                }
            }
        }
    }
}

fn widened(host: HostTensor<'_>) -> Vec<f32> {
    match host {
        HostTensor::F32(x) => x.to_vec(),
        HostTensor::F16(x) => x.iter().map(|x| x.to_f32()).collect(),
        HostTensor::Bf16(x) => x.iter().map(|x| x.to_f32()).collect(),
        HostTensor::F8E4M3(_) | HostTensor::F8E5M2(_) => panic!("no weight has this type"),
    }
}

/// Weights that come from no file are made on the device: whole, in parts, and one behind the other, they are the host's
/// to the bit.
#[test]
fn made_up_weights_are_those_of_the_host() {
    for backend in adapters() {
        let small = backend.sibling().unwrap().with_largest_weight(4096);
        let mut random = Random::new(seed());
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            let [rows, width] = [40, random.pick(&[61, 64, 97])];
            let tensors: Vec<WeightTensor> = [(0.0, 0.0411), (1.0, 0.125)]
                .into_iter()
                .map(|(center, spread)| {
                    let made = MadeUp { seed: random.next(), first: random.next() >> 20, center, spread };
                    WeightTensor::of_made_up(made, dtype, &[rows, width])
                })
                .collect();
            for backend in [&backend, &small] {
                let mut tables = backend.upload_together(tensors.clone()).unwrap();
                tables.push(backend.upload(tensors[0].clone()).unwrap());
                for (table, tensor) in tables.iter().zip(tensors.iter().chain(&tensors)) {
                    let output = on_device(backend, table, [rows, width], &[]);
                    let wide = widened(tensor.host());
                    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                    assert_eq!(bits(&output.logits), bits(&wide), "{dtype}, {rows} rows of {width}");
                }
            }
        }
    }
}

/// More memory than the device has, in buffers each of which it could have: a typed error, and what was there works on.
/// Software takes from the machine's memory what it is asked for, so that only hardware is asked.
#[test]
fn memory_that_is_not_there_is_a_typed_error() {
    for backend in adapters() {
        if backend.name().contains("software") {
            continue;
        }
        let ModelDir { config, .. } = ModelDir::open(&fixture(NAME)).unwrap();
        let mut spec = AttentionSpec::new(&config, DType::F32, 16, 8);
        let side = spec.block_bytes() / (2 * spec.num_buffers());
        spec.num_blocks = (backend.largest_binding() as usize / side).min(1 << 24) - 1;
        spec.layer_groups = vec![0; 1 << 10];
        let error = backend.sibling().unwrap().cache(&spec).unwrap_err();
        assert!(matches!(error, BackendError::OutOfMemory { .. }), "{error}");
        let table = backend.upload(WeightTensor::from_f32(vec![1.0, 3.0, 2.0], &[1, 3])).unwrap();
        let output = on_device(&backend, &table, [1, 3], &[]);
        assert_eq!(output.logits, [1.0, 3.0, 2.0]);
    }
}
