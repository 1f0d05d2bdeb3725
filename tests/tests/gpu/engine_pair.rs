//! A model on the CPU and on a GPU through wgpu, which compute the same steps; and engines on either.

use pagewise_attention::DType;
use pagewise_attention::wgpu as attention;
use pagewise_kvcache::{CacheConfig, KvCacheManager};
use pagewise_runtime::backend::cpu::CpuBackend;
use pagewise_runtime::backend::wgpu::{AdapterChoice, WgpuBackend, WgpuWeight};
use pagewise_runtime::backend::{AttentionSpec, Backend, StepBatch};
use pagewise_runtime::engine::{Engine, EngineConfig};
use pagewise_runtime::executor::{Executor, ModelExecutor, RowWanted, StepOutput};
use pagewise_runtime::model_dir::{ModelConfig, ModelDir, Weights};
use pagewise_runtime::models::{WeightSource, load_model};
use pagewise_runtime::plan::{BlockId, BlockOps, Chunk, LogitRows, SequenceId, StepPlan, TokenInput};
use pagewise_runtime::request::{EarlyStopping, Request, SamplingParams};
use pagewise_runtime::scheduler::Preemption;
use pagewise_tests::fixture;
use serde::Deserialize;
use serde_json::Value;
use std::io::Write as _;
use std::path::Path;

/// The adapter that the environment names, or all. Without any: a loud line, and a failure where software Vulkan must
/// be there.
pub fn adapters() -> Vec<WgpuBackend> {
    if let Some(choice) = AdapterChoice::named_by_environment() {
        return vec![WgpuBackend::new(&choice).unwrap()];
    }
    let reports = pollster::block_on(attention::adapters());
    if reports.is_empty() {
        let advice = "no Vulkan adapter; ./scripts/install-vulkan installs a software one";
        assert!(std::env::var("CI").as_deref() != Ok("true"), "{advice}");
        // Past the test harness, which keeps eprintln! of a passing test to itself.
        let _ = writeln!(std::io::stderr(), "SKIPPED: {advice}");
    }
    reports.iter().map(|report| WgpuBackend::open(report).unwrap()).collect()
}

/// The choice that finds a backend's adapter again.
pub fn choice(backend: &WgpuBackend) -> AdapterChoice {
    AdapterChoice::Named(backend.name().to_owned())
}

/// Block ids of the host that a pair can swap with.
const HOST_BLOCKS: usize = 64;

/// The same model twice, with caches whose blocks are handed out in the same scrambled order.
pub struct Pair {
    cpu: Box<dyn Executor>,
    wgpu: Box<dyn Executor>,
    config: ModelConfig,
    block_size: usize,
    pub free: Vec<BlockId>,
    steps: u64,
    /// Of the largest logit of a row.
    pub tolerance: f64,
    /// The largest difference so far, as a part of the tolerance.
    pub worst: f64,
    pub rows: usize,
    /// Rows whose likeliest token was beyond the margin.
    pub decided: usize,
}

/// A sequence in the making: tokens, how many of them are computed, and its block tables.
pub struct Sequence {
    id: SequenceId,
    pub tokens: Vec<u32>,
    pub computed: usize,
    pub tables: Vec<Vec<BlockId>>,
}

impl Pair {
    pub fn new(
        backend: &WgpuBackend,
        dir: &Path,
        kv_dtype: DType,
        dtype: Option<DType>,
        block_size: usize,
    ) -> Self {
        let ModelDir { config, .. } = ModelDir::open(dir).unwrap();
        let num_blocks = 1024usize.div_ceil(block_size) + 8;
        let mut spec = AttentionSpec::new(&config, kv_dtype, block_size, num_blocks);
        spec.host_blocks = HOST_BLOCKS;
        let cpu = executor(CpuBackend::new(Some(2)).unwrap(), &config, dir, dtype, &spec);
        let wgpu = executor(sibling(backend), &config, dir, dtype, &spec);
        // Odd numbers first: neighbours in a table are not neighbours in memory.
        let (even, odd) = (0..num_blocks as BlockId).partition::<Vec<_>, _>(|block| block % 2 == 0);
        let free = even.into_iter().chain(odd).collect();
        Self {
            cpu,
            wgpu,
            config,
            block_size,
            free,
            steps: 0,
            tolerance: 0.0,
            worst: 0.0,
            rows: 0,
            decided: 0,
        }
    }

    pub fn sequence(&self, id: u64, prompt: &[u32]) -> Sequence {
        let groups = self.config.kv_groups().0.len();
        Sequence {
            id: SequenceId(id),
            tokens: prompt.to_vec(),
            computed: 0,
            tables: vec![Vec::new(); groups],
        }
    }

    /// A block that nobody has.
    pub fn block(&mut self) -> BlockId {
        self.free.pop().unwrap()
    }

    /// Moves blocks on both sides.
    pub fn blocks(&mut self, ops: &BlockOps) {
        let plan = StepPlan { id: self.steps, block_ops: ops.clone(), chunks: Vec::new() };
        self.steps += 1;
        self.cpu.execute(&plan).unwrap();
        self.wgpu.execute(&plan).unwrap();
    }

    /// Computes the next tokens of each sequence in one step on both sides, compares the logits of all their
    /// positions, and returns the CPU's.
    pub fn step(&mut self, work: &mut [(&mut Sequence, usize)]) -> Vec<Vec<Vec<f32>>> {
        let mut plan = StepPlan { id: self.steps, ..StepPlan::default() };
        self.steps += 1;
        for (sequence, count) in work.iter_mut() {
            let end = sequence.computed + *count;
            for table in &mut sequence.tables {
                while table.len() * self.block_size < end {
                    table.push(self.free.pop().unwrap());
                }
            }
            let tokens =
                sequence.tokens[sequence.computed..end].iter().map(|&t| TokenInput::Known(t)).collect();
            plan.chunks.push(Chunk {
                sequence: sequence.id,
                tokens,
                start: sequence.computed,
                block_tables: sequence.tables.clone(),
                logits: LogitRows::All,
            });
            sequence.computed = end;
        }
        let cpu = self.cpu.execute(&plan).unwrap();
        let wgpu = self.wgpu.execute(&plan).unwrap();
        assert_eq!(cpu.logits.len(), wgpu.logits.len());
        let width = cpu.vocab_size;
        for (row, (cpu, wgpu)) in cpu.logits.chunks(width).zip(wgpu.logits.chunks(width)).enumerate() {
            self.compare(&format!("step {}, row {row} of {}", plan.id, plan.num_tokens()), cpu, wgpu);
        }
        let mut rows = cpu.logits.chunks(width).map(<[f32]>::to_vec);
        work.iter().map(|&(_, count)| rows.by_ref().take(count).collect()).collect()
    }

    fn compare(&mut self, label: &str, cpu: &[f32], wgpu: &[f32]) {
        let largest = cpu.iter().fold(0.0f64, |most, x| most.max(f64::from(x.abs())));
        let allowed = self.tolerance * largest;
        for (i, (&want, &got)) in cpu.iter().zip(wgpu).enumerate() {
            let error = (f64::from(got) - f64::from(want)).abs();
            assert!(error <= allowed, "{label}: logit {i} is {got}, the CPU's {want} (largest {largest})");
            self.worst = self.worst.max(error / allowed);
        }
        let mut sorted = cpu.to_vec();
        sorted.sort_by(|a, b| b.total_cmp(a));
        self.rows += 1;
        if f64::from(sorted[0] - sorted[1]) > 2.0 * allowed {
            self.decided += 1;
            assert_eq!(argmax(cpu), argmax(wgpu), "{label}");
        }
    }
}

pub fn argmax(row: &[f32]) -> u32 {
    let best = row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1).then(b.0.cmp(&a.0)));
    best.unwrap().0 as u32
}

/// A backend on the same device, which keeps how weights are laid out.
fn sibling(backend: &WgpuBackend) -> WgpuBackend {
    backend.sibling().unwrap()
}

fn executor<B: Backend>(
    backend: B,
    config: &ModelConfig,
    dir: &Path,
    dtype: Option<DType>,
    spec: &AttentionSpec,
) -> Box<dyn Executor>
where
    ModelExecutor<B>: Executor + 'static,
{
    let weights = WeightSource::Files { weights: Weights::open(dir).unwrap(), dtype };
    let model = load_model(config, &weights, &backend).unwrap();
    Box::new(ModelExecutor::new(backend, model, spec.clone(), config.vocab_size).unwrap())
}

/// An engine on a GPU, or on the CPU, with so many blocks there and on the host; it swaps where there are any.
pub fn engine(
    backend: Option<&WgpuBackend>,
    dir: &Path,
    dtype: Option<DType>,
    block_size: usize,
    blocks: [usize; 2],
) -> Engine {
    engine_over(backend, dir, dtype, block_size, blocks, |executor| executor)
}

/// The same, over what `wrap` makes of its executor.
pub fn engine_over(
    backend: Option<&WgpuBackend>,
    dir: &Path,
    dtype: Option<DType>,
    block_size: usize,
    [num_blocks, host_blocks]: [usize; 2],
    wrap: impl FnOnce(Box<dyn Executor>) -> Box<dyn Executor>,
) -> Engine {
    let ModelDir { config, generation, .. } = ModelDir::open(dir).unwrap();
    let mut spec = AttentionSpec::new(&config, DType::F32, block_size, num_blocks);
    spec.host_blocks = host_blocks;
    let (groups, _) = config.kv_groups();
    let manager = KvCacheManager::new(CacheConfig {
        block_size,
        device_blocks: num_blocks,
        host_blocks,
        groups,
        watermark: 0.01,
        prefix_cache: true,
    })
    .unwrap();
    let executor = match backend {
        Some(backend) => executor(sibling(backend), &config, dir, dtype, &spec),
        None => executor(CpuBackend::new(Some(2)).unwrap(), &config, dir, dtype, &spec),
    };
    let engine_config = EngineConfig {
        max_num_seqs: 64,
        max_batch_tokens: 128,
        max_model_len: config.max_positions,
        vocab_size: config.vocab_size,
        eos_token_ids: generation.eos_token_ids,
        preemption: if host_blocks > 0 { Preemption::Swap } else { Preemption::Recompute },
    };
    Engine::new(engine_config, Box::new(manager), wrap(executor), None)
}

/// A golden beam search and its request.
pub struct BeamCase {
    pub request: Request,
    pub sequences: Vec<Vec<u32>>,
    pub scores: Vec<f64>,
}

/// The searches of a fixture's older file.
pub fn beams(name: &str) -> Vec<BeamCase> {
    #[derive(Deserialize)]
    struct Golden {
        prompts: Vec<Prompt>,
    }
    #[derive(Deserialize)]
    struct Prompt {
        prompt: Vec<u32>,
        beam: Vec<Beam>,
    }
    #[derive(Deserialize)]
    struct Beam {
        num_beams: usize,
        early_stopping: Value,
        length_penalty: f32,
        max_new_tokens: usize,
        eos_token_id: Value,
        sequences: Vec<Vec<u32>>,
        scores: Vec<f64>,
    }
    let golden: Golden =
        serde_json::from_slice(&std::fs::read(fixture(name).join("golden.json")).unwrap()).unwrap();
    let case = |prompt: &[u32], beam: Beam| BeamCase {
        request: Request::new(
            prompt.to_vec(),
            SamplingParams {
                max_tokens: beam.max_new_tokens,
                n: beam.num_beams,
                beam_width: Some(beam.num_beams),
                length_penalty: beam.length_penalty,
                early_stopping: match beam.early_stopping.as_bool() {
                    Some(true) => EarlyStopping::True,
                    Some(false) => EarlyStopping::False,
                    None => EarlyStopping::Never,
                },
                ignore_eos: beam.eos_token_id.is_null(),
                ..SamplingParams::default()
            },
        ),
        sequences: beam.sequences,
        scores: beam.scores,
    };
    let cases = golden.prompts.into_iter().flat_map(|Prompt { prompt, beam }| {
        beam.into_iter().map(move |beam| case(&prompt, beam)).collect::<Vec<_>>()
    });
    cases.collect()
}

/// Brings rows of a matrix into a tensor, as the embedding does, and ends a step whose logits they are.
pub fn on_device(
    backend: &WgpuBackend,
    table: &WgpuWeight,
    [rows, width]: [usize; 2],
    wanted: &[RowWanted],
) -> StepOutput {
    let ModelDir { config, .. } = ModelDir::open(&fixture("opt_preln")).unwrap();
    let spec = AttentionSpec::new(&config, DType::F32, 16, 8);
    let batch = StepBatch {
        tokens: (0..rows as u32).collect(),
        positions: (0..rows as i32).collect(),
        ..StepBatch::default()
    };
    let step = backend.prepare(&spec, &batch).unwrap();
    let mut tensor = backend.tensor(rows, width).unwrap();
    backend.embed(&step, table, &mut tensor).unwrap();
    backend.wait(backend.output(Some(tensor), wanted).unwrap()).unwrap()
}
