//! How much cache the sharing of blocks saves (paper, section 6.3 and figure 15): blocks saved over the blocks that
//! there would be without sharing, summed over the steps of a run.
//!
//! `PAGEWISE_MODEL=DIR cargo bench -p pagewise-runtime --bench sharing`, DIR being SmolLM2-135M-Instruct as
//! `scripts/fetch-smollm2` leaves it. The prompts are those of `sharing/prompts.jsonl`, taken as they are: 24 short
//! instructions, and 12 longer requests about texts of this project's documents. Each says how many tokens are
//! generated, so that the lengths have the means of the paper's two data sets (58 and 338 new tokens); end tokens are
//! ignored. Blocks of 16 tokens, prefix cache off: what is counted is the sharing inside a request. Sampling at
//! temperature 1.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, reason = "a bench")]

use pagewise_attention::DType;
use pagewise_kvcache::{CacheConfig, KvCacheManager, NO_BLOCK};
use pagewise_runtime::backend::AttentionSpec;
use pagewise_runtime::backend::cpu::CpuBackend;
use pagewise_runtime::engine::{Engine, EngineConfig};
use pagewise_runtime::executor::{Executor, ExecutorError, ModelExecutor, RowWanted, StepOutput};
use pagewise_runtime::model_dir::{ModelDir, Weights};
use pagewise_runtime::models::{WeightSource, load_model};
use pagewise_runtime::plan::StepPlan;
use pagewise_runtime::request::{Request, SamplingParams};
use pagewise_runtime::scheduler::Preemption;
use pagewise_runtime::text::Tokenizer;
use serde::Deserialize;
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

const BLOCK_SIZE: usize = 16;
const BLOCKS: usize = 20_000;

#[derive(Deserialize)]
struct Prompt {
    set: String,
    prompt: String,
    new_tokens: usize,
}

/// Blocks of all steps: entries of block tables, and distinct blocks among them.
#[derive(Clone, Copy, Default)]
struct Blocks {
    without_sharing: usize,
    held: usize,
}

/// Counts before it computes.
struct Counting(ModelExecutor<CpuBackend>, Arc<Mutex<Blocks>>);

impl Executor for Counting {
    fn begin(&mut self, plan: &StepPlan, wanted: &[RowWanted]) -> Result<(), ExecutorError> {
        let tables = plan.chunks.iter().flat_map(|chunk| &chunk.block_tables).flatten();
        let entries: Vec<u32> = tables.copied().filter(|&block| block != NO_BLOCK).collect();
        let mut blocks = self.1.lock().unwrap();
        blocks.without_sharing += entries.len();
        blocks.held += entries.iter().collect::<HashSet<_>>().len();
        self.0.begin(plan, wanted)
    }

    fn finish(&mut self) -> Result<StepOutput, ExecutorError> {
        self.0.finish()
    }
}

fn engine(dir: &Path, blocks: Arc<Mutex<Blocks>>) -> Engine {
    let ModelDir { config, .. } = ModelDir::open(dir).unwrap();
    let weights = WeightSource::Files { weights: Weights::open(dir).unwrap(), dtype: None };
    let backend = CpuBackend::new(None).unwrap();
    let model = load_model(&config, &weights, &backend).unwrap();
    let spec = AttentionSpec::new(&config, DType::Bf16, BLOCK_SIZE, BLOCKS);
    let executor = ModelExecutor::new(backend, model, spec, config.vocab_size).unwrap();
    let manager = KvCacheManager::new(CacheConfig {
        block_size: BLOCK_SIZE,
        device_blocks: BLOCKS,
        host_blocks: 0,
        groups: config.kv_groups().0,
        watermark: 0.0,
        prefix_cache: false,
    });
    let engine_config = EngineConfig {
        max_num_seqs: 64,
        max_batch_tokens: 512,
        max_model_len: config.max_positions,
        vocab_size: config.vocab_size,
        eos_token_ids: vec![],
        preemption: Preemption::Auto,
    };
    Engine::new(engine_config, Box::new(manager.unwrap()), Box::new(Counting(executor, blocks)), None)
}

/// Share of blocks saved in one run.
fn saved(dir: &Path, requests: Vec<Request>) -> f64 {
    let blocks = Arc::new(Mutex::new(Blocks::default()));
    for result in engine(dir, blocks.clone()).generate(requests).unwrap() {
        result.unwrap();
    }
    let Blocks { without_sharing, held } = *blocks.lock().unwrap();
    1.0 - held as f64 / without_sharing as f64
}

fn main() {
    let full = std::env::args().any(|arg| arg == "--bench");
    let Some(dir) = std::env::var_os("PAGEWISE_MODEL").map(PathBuf::from).filter(|_| full) else {
        return eprintln!("SKIPPED: cargo bench with PAGEWISE_MODEL=DIR measures with that model");
    };
    let tokenizer = Tokenizer::open(&dir).unwrap().expect("the model has a tokenizer");
    let prompts: Vec<Prompt> = include_str!("sharing/prompts.jsonl")
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    for set in ["instructions", "texts"] {
        let chosen: Vec<(Vec<u32>, usize)> = prompts
            .iter()
            .filter(|prompt| prompt.set == set)
            .map(|prompt| (tokenizer.encode(&prompt.prompt, false).unwrap(), prompt.new_tokens))
            .collect();
        let mean = |of: fn(&(Vec<u32>, usize)) -> usize| {
            chosen.iter().map(of).sum::<usize>() as f64 / chosen.len() as f64
        };
        let (prompt, new) = (mean(|(prompt, _)| prompt.len()), mean(|&(_, new)| new));
        println!("{set}: {} prompts of {prompt:.1} tokens, {new:.1} new tokens on average", chosen.len());
        for width in [2, 4, 6] {
            let request = |beams: bool| {
                move |(index, (prompt, max_tokens)): (usize, &(Vec<u32>, usize))| {
                    let params = SamplingParams {
                        max_tokens: *max_tokens,
                        seed: Some(index as u64),
                        n: width,
                        beam_width: beams.then_some(width),
                        ..SamplingParams::default()
                    };
                    Request::new(prompt.clone(), params)
                }
            };
            let share = |beams: bool| saved(&dir, chosen.iter().enumerate().map(request(beams)).collect());
            println!(
                "  width {width}: sampling {:.1} %, beams {:.1} %",
                100.0 * share(false),
                100.0 * share(true)
            );
        }
    }
}
