//! A model on the CPU and on a GPU through wgpu, which compute the same steps; and engines on either.

use pagewise_attention::DType;
use pagewise_attention::wgpu as attention;
use pagewise_kvcache::{CacheConfig, KvCacheManager};
use pagewise_runtime::backend::cpu::CpuBackend;
use pagewise_runtime::backend::wgpu::{AdapterChoice, WgpuBackend, WgpuWeight};
use pagewise_runtime::backend::{AttentionSpec, Backend, StepBatch};
use pagewise_runtime::engine::{Engine, EngineConfig};
use pagewise_runtime::executor::{Executor, RowWanted, StepOutput};
use pagewise_runtime::model_dir::ModelDir;
use pagewise_runtime::plan::{BlockOps, LogitRows};
use pagewise_runtime::scheduler::Preemption;
use pagewise_tests::{Planner, Sequence, argmax, executor, fixture, rows_by_sequence};
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

/// The same model twice, with caches in which the same blocks hold the same.
pub struct Pair {
    cpu: Box<dyn Executor>,
    wgpu: Box<dyn Executor>,
    pub planner: Planner,
    /// Of the largest logit of a row.
    pub tolerance: f64,
    /// The largest difference so far, as a part of the tolerance.
    pub worst: f64,
    pub rows: usize,
    /// Rows whose likeliest token was beyond the margin.
    pub decided: usize,
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
        let cpu = Box::new(executor(CpuBackend::new(Some(2)).unwrap(), dir, dtype, spec.clone()));
        let wgpu = Box::new(executor(sibling(backend), dir, dtype, spec));
        let planner = Planner::new(&config, block_size, num_blocks);
        Self { cpu, wgpu, planner, tolerance: 0.0, worst: 0.0, rows: 0, decided: 0 }
    }

    pub fn sequence(&self, id: u64, prompt: &[u32]) -> Sequence {
        self.planner.sequence(id, prompt)
    }

    /// Moves blocks on both sides.
    pub fn blocks(&mut self, ops: BlockOps) {
        let plan = self.planner.moves(ops);
        self.cpu.execute(&plan).unwrap();
        self.wgpu.execute(&plan).unwrap();
    }

    /// Computes the next tokens of each sequence in one step on both sides, compares the logits of all their
    /// positions, and returns the CPU's.
    pub fn step(&mut self, work: &mut [(&mut Sequence, usize)]) -> Vec<Vec<Vec<f32>>> {
        let plan = self.planner.step(work, LogitRows::All);
        let cpu = self.cpu.execute(&plan).unwrap();
        let wgpu = self.wgpu.execute(&plan).unwrap();
        assert_eq!(cpu.logits.len(), wgpu.logits.len());
        let width = cpu.vocab_size;
        for (row, (cpu, wgpu)) in cpu.logits.chunks(width).zip(wgpu.logits.chunks(width)).enumerate() {
            self.compare(&format!("step {}, row {row} of {}", plan.id, plan.num_tokens()), cpu, wgpu);
        }
        rows_by_sequence(&plan, &cpu)
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

/// A backend on the same device, which keeps how weights are laid out.
fn sibling(backend: &WgpuBackend) -> WgpuBackend {
    backend.sibling().unwrap()
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
    let executor: Box<dyn Executor> = match backend {
        Some(backend) => Box::new(executor(sibling(backend), dir, dtype, spec)),
        None => Box::new(executor(CpuBackend::new(Some(2)).unwrap(), dir, dtype, spec)),
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
