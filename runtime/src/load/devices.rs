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

/// Most tokens of a step on the CPU, which more makes no faster.
const CPU_BATCH_TOKENS: usize = 512;

/// Most tokens of a step on a GPU: enough to keep it busy, few enough that nobody waits for long.
const GPU_BATCH_TOKENS: usize = 8192;

/// What computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chosen {
    /// The CPU.
    Cpu,
    /// The NVIDIA GPU of this number.
    Cuda(usize),
}

/// What computes, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// What.
    pub device: Chosen,
    /// Both in one line.
    pub line: String,
}

/// Which device `choice` means, and why: nothing is made on it.
///
/// # Errors
/// [`LoadError::Option`] if it cannot be had.
pub fn choose_backend(choice: BackendChoice) -> Result<Choice, LoadError> {
    let refuse = |problem: String| Err(LoadError::Option { option: "--backend", problem });
    match choice {
        BackendChoice::Cpu => Ok(Choice { device: Chosen::Cpu, line: "cpu (asked for)".to_owned() }),
        BackendChoice::Cuda => match probe_cuda() {
            Ok(device) => Ok(Choice { device: Chosen::Cuda(0), line: format!("cuda (asked for): {device}") }),
            Err(problem) => refuse(format!("cuda cannot be had: {problem}")),
        },
        BackendChoice::Wgpu => {
            refuse("the engine of this version does not compute on wgpu; use auto, cuda or cpu".to_owned())
        }
        BackendChoice::Auto => Ok(match probe_cuda() {
            Ok(device) => Choice { device: Chosen::Cuda(0), line: format!("cuda (auto): {device}") },
            Err(problem) => {
                Choice { device: Chosen::Cpu, line: format!("cpu (auto; cuda cannot be had: {problem})") }
            }
        }),
    }
}

/// The GPU's name and shape, or why there is none.
#[cfg(feature = "cuda")]
fn probe_cuda() -> Result<String, String> {
    cuda::probe(0).map(|device| device.to_string()).map_err(|error| error.to_string())
}

#[cfg(not(feature = "cuda"))]
fn probe_cuda() -> Result<String, String> {
    Err("it is not in this binary (the feature cuda is off)".to_owned())
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
            #[cfg(not(feature = "cuda"))]
            Chosen::Cuda(_) => Err(LoadError::Option {
                option: "--backend",
                problem: probe_cuda().err().unwrap_or_default(),
            }),
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
