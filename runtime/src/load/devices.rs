//! Which device computes, and a model made ready on it. Owns the choice and its reasons, and how large the cache of each
//! device may be; files and engine are `load.rs`'s.

use super::{BackendChoice, CacheSize, LoadError, LoadOptions, LoadProgress};
use crate::backend::cpu::CpuBackend;
use crate::backend::{AttentionSpec, StepLimits};
use crate::executor::{Executor, ModelExecutor};
use crate::model_dir::ModelConfig;
use crate::models::{WeightSource, load_model};
use crate::scheduler::Preemption;
use pagewise_attention::{DType, MAX_BLOCK_SIZE};

#[cfg(feature = "cuda")]
use crate::backend::cuda::{self, CudaBackend, CudaOptions};
#[cfg(feature = "wgpu")]
use crate::backend::wgpu::{AdapterChoice, WgpuBackend};
#[cfg(feature = "wgpu")]
use pagewise_attention::wgpu::AdapterReport;

/// Most tokens of a step on the CPU, which more makes no faster.
const CPU_BATCH_TOKENS: usize = 512;

/// Most tokens of a step on an NVIDIA GPU: enough to keep it busy, few enough that nobody waits for long.
#[cfg(feature = "cuda")]
const GPU_BATCH_TOKENS: usize = 8192;

/// Most tokens of a step through wgpu: GPUs of every size, and logits that must fit a binding.
#[cfg(feature = "wgpu")]
const WGPU_BATCH_TOKENS: usize = 512;

/// Bytes of the cache on a GPU through wgpu where no size is asked for: WebGPU does not say how much memory there is.
#[cfg(feature = "wgpu")]
const WGPU_CACHE_BYTES: u64 = 2 << 30;

/// What computes.
#[derive(Clone, Debug)]
pub enum Chosen {
    /// The CPU.
    Cpu,
    /// The NVIDIA GPU of this number.
    #[cfg(feature = "cuda")]
    Cuda(usize),
    /// An adapter.
    #[cfg(feature = "wgpu")]
    Wgpu(Box<AdapterReport>),
}

/// What computes, and why.
#[derive(Clone, Debug)]
pub struct Choice {
    /// What.
    pub device: Chosen,
    /// Both in one line.
    pub line: String,
}

/// Which device `choice` means, and why: nothing is made on it. `auto` is CUDA, then a real GPU through wgpu, then the
/// CPU, and a software adapter only where the environment names it; asking for wgpu is enough to get a software
/// adapter where there is no other.
///
/// # Errors
/// [`LoadError::Option`] if it cannot be had.
pub fn choose_backend(choice: BackendChoice) -> Result<Choice, LoadError> {
    let refuse = |problem: String| LoadError::Option { option: "--backend", problem };
    match choice {
        BackendChoice::Cpu => Ok(Choice { device: Chosen::Cpu, line: "cpu (asked for)".to_owned() }),
        BackendChoice::Cuda => {
            probe_cuda("asked for").map_err(|problem| refuse(format!("cuda cannot be had: {problem}")))
        }
        BackendChoice::Wgpu => {
            probe_wgpu(false, "asked for").map_err(|problem| refuse(format!("wgpu cannot be had: {problem}")))
        }
        BackendChoice::Auto => Ok(probe_cuda("auto").unwrap_or_else(|no_cuda| {
            probe_wgpu(true, &format!("auto; cuda cannot be had: {no_cuda}")).unwrap_or_else(|no_wgpu| {
                let line = format!("cpu (auto; cuda cannot be had: {no_cuda}; wgpu neither: {no_wgpu})");
                Choice { device: Chosen::Cpu, line }
            })
        })),
    }
}

/// The first NVIDIA GPU, or why it cannot be had.
#[cfg(feature = "cuda")]
fn probe_cuda(reason: &str) -> Result<Choice, String> {
    let device = cuda::probe(0).map_err(|error| error.to_string())?;
    Ok(Choice { device: Chosen::Cuda(0), line: format!("cuda ({reason}): {device}") })
}

#[cfg(not(feature = "cuda"))]
fn probe_cuda(_: &str) -> Result<Choice, String> {
    Err("it is not in this binary (the feature cuda is off)".to_owned())
}

/// The adapter that the environment names, or the best; with `only_hardware`, no software is chosen by itself.
#[cfg(feature = "wgpu")]
fn probe_wgpu(only_hardware: bool, reason: &str) -> Result<Choice, String> {
    let best = if only_hardware { AdapterChoice::Hardware } else { AdapterChoice::Best };
    let choice = AdapterChoice::named_by_environment().unwrap_or(best);
    let adapter = choice.find().map_err(|error| error.to_string())?;
    let line = format!("wgpu ({reason}): {adapter}");
    Ok(Choice { device: Chosen::Wgpu(Box::new(adapter)), line })
}

#[cfg(not(feature = "wgpu"))]
fn probe_wgpu(_: bool, _: &str) -> Result<Choice, String> {
    Err("it is not in this binary (the feature wgpu is off)".to_owned())
}

/// A model on its device, with its cache.
pub(super) struct Ready {
    pub(super) executor: Box<dyn Executor>,
    pub(super) spec: AttentionSpec,
    /// What computes, and why.
    pub(super) line: String,
    pub(super) max_batch_tokens: usize,
}

/// What is to be made ready.
pub(super) struct Wanted<'a> {
    pub(super) options: &'a LoadOptions,
    pub(super) config: &'a ModelConfig,
    pub(super) weights: &'a WeightSource,
    pub(super) weight_dtype: DType,
    pub(super) max_model_len: usize,
}

impl Choice {
    /// Whether the device makes weights up itself, so that the host needs no memory for them.
    pub(super) fn makes_weights(&self) -> bool {
        match self.device {
            #[cfg(feature = "cuda")]
            Chosen::Cuda(_) => true,
            #[cfg(feature = "wgpu")]
            Chosen::Wgpu(_) => true,
            Chosen::Cpu => false,
        }
    }

    /// Brings a model to the device and makes its cache.
    pub(super) fn make_ready(
        self,
        wanted: &Wanted<'_>,
        progress: &mut dyn FnMut(LoadProgress<'_>),
    ) -> Result<Ready, LoadError> {
        match self.device {
            Chosen::Cpu => wanted.on_cpu(self.line, progress),
            #[cfg(feature = "cuda")]
            Chosen::Cuda(ordinal) => wanted.on_cuda(ordinal, self.line, progress),
            #[cfg(feature = "wgpu")]
            Chosen::Wgpu(adapter) => wanted.on_wgpu(&adapter, self.line, progress),
        }
    }
}

impl Wanted<'_> {
    fn on_cpu(&self, line: String, progress: &mut dyn FnMut(LoadProgress<'_>)) -> Result<Ready, LoadError> {
        progress(LoadProgress::Stage("mapping the weights"));
        let backend = CpuBackend::new(self.options.threads)?;
        let model = load_model(self.config, self.weights, &backend)?;
        progress(LoadProgress::Stage("making the KV cache"));
        let max_batch_tokens = self.options.max_batch_tokens.unwrap_or(CPU_BATCH_TOKENS);
        let mut spec = self.spec(max_batch_tokens)?;
        let memory = machine_memory();
        spec.num_blocks = self.num_blocks(&spec, memory, |needed| {
            needed.min(memory.map_or(1 << 30, |bytes| bytes / 4) / self.block_bytes(&spec))
        })?;
        spec.host_blocks = host_blocks(self.options, &spec)?;
        let line = format!("{line}, {} threads", backend.threads());
        let executor = ModelExecutor::new(backend, model, spec.clone(), self.config.vocab_size)?;
        Ok(Ready { executor: Box::new(executor), spec, line, max_batch_tokens })
    }

    #[cfg(feature = "cuda")]
    fn on_cuda(
        &self,
        ordinal: usize,
        line: String,
        progress: &mut dyn FnMut(LoadProgress<'_>),
    ) -> Result<Ready, LoadError> {
        let utilization = self.options.gpu_memory_utilization;
        if !(utilization > 0.0 && utilization <= 1.0) {
            let problem =
                format!("{utilization} is not a share of the memory; give more than 0 and at most 1");
            return Err(LoadError::Option { option: "--gpu-memory-utilization", problem });
        }
        let max_batch_tokens = self.options.max_batch_tokens.unwrap_or(GPU_BATCH_TOKENS);
        let mut spec = self.spec(max_batch_tokens)?.with_compute_dtype(self.weight_dtype);
        let options = CudaOptions { ordinal, dtype: self.weight_dtype, graphs: self.options.cuda_graphs };
        let backend = CudaBackend::new(options)?;
        backend.check_cache(&spec)?;
        progress(LoadProgress::Stage("bringing the weights to the GPU"));
        let model = load_model(self.config, self.weights, &backend)?;
        progress(LoadProgress::Stage("measuring the largest step"));
        backend.profile(&*model, &spec)?;
        progress(LoadProgress::Stage("making the KV cache"));
        spec.num_blocks = match self.options.cache_size {
            CacheSize::Auto => {
                let left = backend.cache_budget(utilization)?;
                self.num_blocks(&spec, Some(left), |_| left / spec.block_bytes().max(1) as u64)?
            }
            _ => self.num_blocks(&spec, None, |needed| needed)?,
        };
        spec.host_blocks = host_blocks(self.options, &spec)?;
        let line = format!("{line}, cuBLASLt {}", backend.library_version());
        let mut executor = ModelExecutor::new(backend, model, spec.clone(), self.config.vocab_size)?;
        if self.options.cuda_graphs {
            progress(LoadProgress::Stage("capturing CUDA graphs"));
            executor.capture_graphs()?;
        }
        Ok(Ready { executor: Box::new(executor), spec, line, max_batch_tokens })
    }

    #[cfg(feature = "wgpu")]
    fn on_wgpu(
        &self,
        adapter: &AdapterReport,
        line: String,
        progress: &mut dyn FnMut(LoadProgress<'_>),
    ) -> Result<Ready, LoadError> {
        let max_batch_tokens = self.options.max_batch_tokens.unwrap_or(WGPU_BATCH_TOKENS);
        let mut spec = self.spec(max_batch_tokens)?;
        if let Some(config) = spec.groups.iter().find(|config| config.kv_dtype.is_fp8()) {
            let problem = format!("WGSL has no {}; use f32, f16 or bf16", config.kv_dtype);
            return Err(LoadError::Option { option: "--kv-dtype", problem });
        }
        let backend = WgpuBackend::open(adapter)?;
        progress(LoadProgress::Stage("bringing the weights to the GPU"));
        let model = load_model(self.config, self.weights, &backend)?;
        progress(LoadProgress::Stage("making the KV cache"));
        // A layer's keys, or its values, lie in one buffer.
        let side = (spec.block_bytes() / (2 * spec.num_buffers().max(1))).max(1) as u64;
        let fitting = (WGPU_CACHE_BYTES / self.block_bytes(&spec)).min(backend.largest_binding() / side);
        spec.num_blocks = self.num_blocks(&spec, None, |needed| needed.min(fitting))?;
        spec.host_blocks = host_blocks(self.options, &spec)?;
        let executor = ModelExecutor::new(backend, model, spec.clone(), self.config.vocab_size)?;
        Ok(Ready { executor: Box::new(executor), spec, line, max_batch_tokens })
    }

    /// The attention of the model, without blocks yet.
    fn spec(&self, max_batch_tokens: usize) -> Result<AttentionSpec, LoadError> {
        let LoadOptions { block_size, kv_dtype, max_num_seqs, .. } = *self.options;
        if !block_size.is_power_of_two() || block_size > MAX_BLOCK_SIZE {
            let problem = format!("{block_size} is not a power of two from 1 to {MAX_BLOCK_SIZE}");
            return Err(LoadError::Option { option: "--block-size", problem });
        }
        let kv_dtype = kv_dtype.unwrap_or(self.weight_dtype);
        let limits = StepLimits {
            max_rows: max_batch_tokens,
            max_sequences: max_num_seqs,
            max_seq_len: self.max_model_len,
        };
        Ok(AttentionSpec { limits, ..AttentionSpec::new(self.config, kv_dtype, block_size, 0) })
    }

    /// Bytes that a block takes, with what the cache manager keeps for it.
    fn block_bytes(&self, spec: &AttentionSpec) -> u64 {
        (spec.block_bytes() + BOOKKEEPING_BYTES + size_of::<u32>() * spec.block_size) as u64
    }

    /// Blocks of the device's cache: as asked for, or what `auto` makes of those that all sequences can need at most.
    /// `memory` is what there is, where that is known.
    fn num_blocks(
        &self,
        spec: &AttentionSpec,
        memory: Option<u64>,
        auto: impl FnOnce(u64) -> u64,
    ) -> Result<usize, LoadError> {
        let block_bytes = self.block_bytes(spec);
        let (option, blocks) = match self.options.cache_size {
            CacheSize::Blocks(blocks) => ("--kv-blocks", blocks as u64),
            CacheSize::Bytes(bytes) => ("--kv-memory", bytes / block_bytes),
            CacheSize::Auto => {
                let sequence = self.max_model_len.div_ceil(spec.block_size) * spec.groups.len();
                let most = (sequence as u64).saturating_mul(self.options.max_num_seqs as u64);
                ("--kv-blocks", auto(most).clamp(1, MAX_BLOCKS))
            }
        };
        let refuse = |problem| Err(LoadError::Option { option, problem });
        if blocks == 0 {
            return refuse(format!("the cache would have no block; one block takes {block_bytes} bytes"));
        }
        let bytes = blocks.saturating_mul(spec.block_bytes() as u64);
        match memory {
            Some(memory) if bytes > memory => {
                refuse(format!("{blocks} blocks take {bytes} bytes; there are {memory}: ask for less"))
            }
            _ if blocks > MAX_BLOCKS => refuse(format!("{blocks} blocks are more than can be numbered")),
            _ => Ok(blocks as usize),
        }
    }
}

/// Blocks that can be numbered.
const MAX_BLOCKS: u64 = (u32::MAX / 2) as u64;

/// Bytes that the cache manager keeps for a block, at most: reference counts, links, and its place in the
/// prefix cache without the tokens themselves.
const BOOKKEEPING_BYTES: usize = 64;

fn host_blocks(options: &LoadOptions, spec: &AttentionSpec) -> Result<usize, LoadError> {
    let refuse = |option, problem| Err(LoadError::Option { option, problem });
    if options.swap_space == 0 {
        return match options.preemption {
            Preemption::Swap => refuse("--preemption swap", "there is no --swap-space to swap to".into()),
            Preemption::Auto | Preemption::Recompute => Ok(0),
        };
    }
    let block_bytes = (spec.block_bytes() + BOOKKEEPING_BYTES) as u64;
    let blocks = options.swap_space / block_bytes;
    match machine_memory() {
        _ if blocks == 0 => {
            refuse("--swap-space", format!("it holds no block; one block takes {block_bytes} bytes"))
        }
        Some(memory) if options.swap_space > memory => {
            let asked = options.swap_space;
            refuse("--swap-space", format!("{asked} bytes are asked for; the machine has {memory}"))
        }
        _ if blocks > u64::from(u32::MAX / 2) => {
            refuse("--swap-space", format!("{blocks} blocks are more than can be numbered"))
        }
        _ => Ok(blocks as usize),
    }
}

/// Bytes of memory, where the operating system says so in the way of Linux.
pub(super) fn machine_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}
