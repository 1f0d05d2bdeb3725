//! Engines whose steps run ahead on a device: requests of every kind against the CPU's, the same bits as without running
//! ahead, and what becomes of requests in flight when the device fails.

use super::engine_pair::{adapters, choice, engine, engine_over, on_device};
use super::{GoldenPrompt, golden};
use pagewise_attention::DType;
use pagewise_runtime::backend::wgpu::WgpuBackend;
use pagewise_runtime::backend::{AttentionSpec, Backend, BackendError};
use pagewise_runtime::executor::{Executor, ExecutorError, RowWanted, StepOutput};
use pagewise_runtime::model_dir::{ModelDir, WeightTensor};
use pagewise_runtime::plan::{StepPlan, TokenInput};
use pagewise_runtime::request::{Request, RequestOutput, SamplingParams};
use pagewise_tests::fixture;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

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
    let request = |(index, prompt): (usize, &GoldenPrompt)| {
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
        let own = WgpuBackend::new(&choice(&backend)).unwrap();
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
