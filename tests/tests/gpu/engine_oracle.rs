//! Engines on CUDA and on the CPU, the requests that they are given, and what the CPU answers.

use pagewise_attention::DType;
use pagewise_runtime::engine::Engine;
use pagewise_runtime::load::{BackendChoice, CacheSize, LoadOptions, load};
use pagewise_runtime::request::{Request, RequestOutput, SamplingParams};
use pagewise_runtime::scheduler::Preemption;
use std::path::Path;

use super::engine_beams;
use super::engine_machine::{Machine, Types, bound, config, rows_alone, texts};

/// How an engine is set up.
#[derive(Clone, Copy)]
pub struct Way {
    pub backend: BackendChoice,
    pub types: Types,
    pub graphs: bool,
    pub preemption: Preemption,
    /// Blocks; `None` for plenty.
    pub blocks: Option<usize>,
    pub budget: usize,
}

pub fn way(backend: BackendChoice, types: impl Into<Types>) -> Way {
    let types = types.into();
    Way { backend, types, graphs: true, preemption: Preemption::Recompute, blocks: None, budget: 512 }
}

pub fn engine(dir: &Path, way: Way) -> Engine {
    let mut options = LoadOptions::new(dir.to_str().unwrap());
    options.backend = way.backend;
    options.dtype = Some(way.types.weights);
    options.kv_dtype = Some(way.types.cache);
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
pub fn requests(vocab_size: usize, count: usize, seed: u64) -> Vec<Request> {
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
pub fn scale(dir: &Path, texts: &[Vec<u32>]) -> f64 {
    let rows = rows_alone(&mut Machine::cpu(dir, DType::F32), texts);
    rows.iter().flatten().flatten().fold(0.0, |largest, x| f64::from(x.abs()).max(largest))
}

/// What the CPU gives for requests, with the log-probabilities that show how sure it was.
pub struct Oracle {
    engine: Engine,
    machine: Machine,
    /// How close two logits may be for either to be right.
    margin: f64,
}

impl Oracle {
    pub fn new(dir: &Path, types: impl Into<Types>) -> Self {
        let types = types.into();
        let texts = texts(config(dir).vocab_size, 7, 30, 3);
        let margin = 2.0 * bound(dir, types, &texts) * scale(dir, &texts);
        Self {
            engine: engine(dir, way(BackendChoice::Cpu, types)),
            machine: Machine::cpu(dir, types),
            margin,
        }
    }

    pub fn answer(&mut self, request: &Request) -> RequestOutput {
        let params = SamplingParams { logprobs: Some(2), ..request.params.clone() };
        let asked = Request::new(request.prompt.clone(), params);
        self.engine.generate(vec![asked]).unwrap().remove(0).unwrap()
    }

    /// Compares by the margin rule; `true` if all tokens were the same.
    pub fn check(&mut self, label: &str, request: &Request, found: &RequestOutput) -> bool {
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

pub fn empty(label: &str, engine: &Engine) {
    let stats = engine.stats();
    assert_eq!((stats.device_blocks.used, stats.device_blocks.pending), (0, 0), "{label}");
    assert_eq!((stats.host_blocks.used, stats.host_blocks.pending), (0, 0), "{label}");
}

pub fn tokens(outputs: &[RequestOutput]) -> Vec<Vec<&[u32]>> {
    outputs.iter().map(|output| output.outputs.iter().map(|one| one.token_ids.as_slice()).collect()).collect()
}

pub fn generate(engine: &mut Engine, requests: &[Request]) -> Vec<RequestOutput> {
    engine.generate(requests.to_vec()).unwrap().into_iter().map(Result::unwrap).collect()
}

/// The same with a cache that holds the largest request, but not many: sequences keep few blocks behind a window.
pub fn crowded(dir: &Path, way: Way) -> Way {
    let blocks =
        config(dir).kv_groups().0.iter().map(|group| if group.window.is_some() { 12 } else { 40 }).sum();
    Way { blocks: Some(blocks), budget: 64, ..way }
}
