//! From a model directory to a running engine: the one place where files, cache, device and engine meet.

use crate::backend::cpu::CpuBackend;
#[cfg(feature = "wgpu")]
use crate::backend::wgpu::{AdapterChoice, WgpuBackend};
use crate::backend::{AttentionSpec, Backend, BackendError};
use crate::engine::{Engine, EngineConfig};
use crate::executor::{Executor, ModelExecutor};
use crate::model_dir::{GenerationConfig, ModelConfig, ModelDir, ModelError, Weights, resolve_model};
use crate::models::{LoadModelError, WeightSource, load_model, weight_dtype};
use crate::scheduler::Preemption;
use crate::text::{ChatTemplate, Tokenizer};
use pagewise_attention::{DType, MAX_BLOCK_SIZE};
use pagewise_kvcache::{CacheConfig, CacheError, KvCacheManager};
use std::fmt;

/// Which device computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BackendChoice {
    /// The best that is there.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// A GPU through Vulkan, Metal or DX12.
    Wgpu,
    /// An NVIDIA GPU.
    Cuda,
}

/// How much memory the KV cache gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheSize {
    /// What the running sequences can need at most, but no more than a quarter of the machine's memory.
    #[default]
    Auto,
    /// This many blocks.
    Blocks(usize),
    /// As many blocks as fit into this many bytes.
    Bytes(u64),
}

/// Where weights come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LoadFormat {
    /// From the directory's safetensors files.
    #[default]
    Auto,
    /// Made up from a fixed seed, in bf16 unless another type is asked for: only `config.json` is needed.
    Dummy,
}

/// What to load and how.
#[derive(Clone, Debug, PartialEq)]
pub struct LoadOptions {
    /// A directory, or a hub id.
    pub model: String,
    /// Which device computes.
    pub backend: BackendChoice,
    /// Type of the weights; `None` keeps what is stored.
    pub dtype: Option<DType>,
    /// Type of the cache; `None` is the type of the weights.
    pub kv_dtype: Option<DType>,
    /// Tokens a block.
    pub block_size: usize,
    /// Size of the cache.
    pub cache_size: CacheSize,
    /// Bytes of host memory to swap blocks to.
    pub swap_space: u64,
    /// How requests make room for others when the cache is full.
    pub preemption: Preemption,
    /// Most sequences in one step.
    pub max_num_seqs: usize,
    /// Most tokens in one step.
    pub max_batch_tokens: usize,
    /// Longest sequence; `None` is the model's own limit.
    pub max_model_len: Option<usize>,
    /// Whether computed prefixes are kept and found again.
    pub prefix_cache: bool,
    /// CPU threads; `None` is one for each core.
    pub threads: Option<usize>,
    /// Where weights come from.
    pub load_format: LoadFormat,
}

impl LoadOptions {
    /// The defaults of the command line.
    pub fn new(model: impl Into<String>) -> Self {
        Self {
            model: model.into(),
            backend: BackendChoice::Auto,
            dtype: None,
            kv_dtype: None,
            block_size: 16,
            cache_size: CacheSize::Auto,
            swap_space: 0,
            preemption: Preemption::Auto,
            max_num_seqs: 256,
            max_batch_tokens: 512,
            max_model_len: None,
            prefix_cache: true,
            threads: None,
            load_format: LoadFormat::Auto,
        }
    }
}

/// How far loading has come.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum LoadProgress<'a> {
    /// Bytes of a file of the hub have arrived.
    Download {
        /// Which file.
        file: &'a str,
        /// Bytes so far.
        done: u64,
        /// Bytes in all.
        total: u64,
    },
    /// A stage begins.
    Stage(&'static str),
}

/// A model that is ready to answer.
pub struct LoadedModel {
    /// Takes requests.
    pub engine: Engine,
    /// Between text and token ids, where the directory has one.
    pub tokenizer: Option<Tokenizer>,
    /// Between messages and text, where the directory has one.
    pub chat_template: Option<ChatTemplate>,
    /// The model's own defaults.
    pub generation: GenerationConfig,
    /// Its shape.
    pub config: ModelConfig,
    /// Longest sequence that is served.
    pub max_model_len: usize,
    /// What computes, and why: one line for logs and `pagewise doctor`.
    pub backend: String,
    /// Blocks of the cache.
    pub num_blocks: usize,
}

/// Why a model could not be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// An option's value cannot be had.
    #[error("{option}: {problem}")]
    Option {
        /// Which, as it is written on the command line.
        option: &'static str,
        /// What is wrong and what can be had.
        problem: String,
    },
    /// The model's files.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The device.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The cache.
    #[error(transparent)]
    Cache(#[from] CacheError),
}

impl From<LoadModelError> for LoadError {
    fn from(error: LoadModelError) -> Self {
        match error {
            LoadModelError::Files(error) => Self::Model(error),
            LoadModelError::Backend(error) => Self::Backend(error),
        }
    }
}

/// Loads a model and makes it ready to answer.
///
/// # Errors
/// [`LoadError`] in one sentence that names the file or option at fault. Nothing is left behind.
pub fn load(
    options: &LoadOptions,
    progress: &mut dyn FnMut(LoadProgress<'_>),
) -> Result<LoadedModel, LoadError> {
    let chosen = choose_backend(options.backend)?;
    let path = resolve_model(&options.model, &mut |fetched| {
        progress(LoadProgress::Download { file: &fetched.file, done: fetched.bytes, total: fetched.total });
    })?;
    progress(LoadProgress::Stage("reading the configuration"));
    let ModelDir { config, generation, notes, .. } = ModelDir::open(&path)?;
    notes.iter().for_each(|note| tracing::warn!("{note}"));
    let max_model_len = max_model_len(options, &config)?;

    let weights = match options.load_format {
        LoadFormat::Auto => {
            let weights = Weights::open(&path)?;
            // Weights that fill the memory would push out their own first pages.
            if machine_memory().is_none_or(|memory| weights.file_bytes() <= memory / 2) {
                weights.page_in();
            }
            WeightSource::Files { weights, dtype: options.dtype }
        }
        LoadFormat::Dummy => dummy_weights(&config, options.dtype.unwrap_or(DType::Bf16))?,
    };
    progress(LoadProgress::Stage("reading the tokenizer"));
    let tokenizer = Tokenizer::open(&path)?;
    let chat_template = ChatTemplate::open(&path)?;

    let weight_dtype = weight_dtype(&config, &weights)?;
    let kv_dtype = options.kv_dtype.unwrap_or(weight_dtype);
    let loading = Loading { options, config: &config, weights: &weights, kv_dtype, max_model_len };
    let (executor, spec, backend_line) = match &chosen.device {
        Device::Cpu => {
            let backend = CpuBackend::new(options.threads)?;
            let line = format!("{chosen}, {} threads", backend.threads());
            let (executor, spec) = loading.executor(backend, CacheRoom::of_the_machine(), progress)?;
            (executor, spec, line)
        }
        #[cfg(feature = "wgpu")]
        Device::Wgpu(adapter) => {
            let backend = WgpuBackend::open(adapter)?;
            let room = CacheRoom::of_a_gpu(backend.largest_binding());
            let (executor, spec) = loading.executor(backend, room, progress)?;
            (executor, spec, chosen.to_string())
        }
    };
    let (kv_groups, _) = config.kv_groups();
    let manager = KvCacheManager::new(CacheConfig {
        block_size: spec.block_size,
        device_blocks: spec.num_blocks,
        host_blocks: spec.host_blocks,
        groups: kv_groups,
        watermark: 0.01,
        prefix_cache: options.prefix_cache,
    })?;
    let num_blocks = spec.num_blocks;
    tracing::info!(
        backend = %backend_line, weights = %weight_dtype, num_blocks, block_size = spec.block_size, max_model_len,
        "model loaded"
    );
    let engine_config = EngineConfig {
        max_num_seqs: options.max_num_seqs,
        max_batch_tokens: options.max_batch_tokens,
        max_model_len,
        vocab_size: config.vocab_size,
        eos_token_ids: generation.eos_token_ids.clone(),
        preemption: options.preemption,
    };
    let engine = Engine::new(engine_config, Box::new(manager), executor, tokenizer.clone());
    Ok(LoadedModel {
        engine,
        tokenizer,
        chat_template,
        generation,
        config,
        max_model_len,
        backend: backend_line,
        num_blocks,
    })
}

/// A model on its way to a device.
struct Loading<'a> {
    options: &'a LoadOptions,
    config: &'a ModelConfig,
    weights: &'a WeightSource,
    kv_dtype: DType,
    max_model_len: usize,
}

impl Loading<'_> {
    /// Brings the weights to a device and makes its cache.
    fn executor<B: Backend>(
        &self,
        backend: B,
        room: CacheRoom,
        progress: &mut dyn FnMut(LoadProgress<'_>),
    ) -> Result<(Box<dyn Executor>, AttentionSpec), LoadError>
    where
        B::Weight: 'static,
    {
        let Self { options, config, weights, kv_dtype, max_model_len } = *self;
        progress(LoadProgress::Stage("mapping the weights"));
        let model = load_model(config, weights, &backend)?;
        progress(LoadProgress::Stage("making the KV cache"));
        let spec = attention_spec(options, config, kv_dtype, max_model_len, room)?;
        let executor = ModelExecutor::new(backend, model, spec.clone(), config.vocab_size)?;
        Ok((Box::new(executor), spec))
    }
}

/// A backend that can be had, and why it was chosen.
#[derive(Debug)]
pub struct ChosenBackend {
    device: Device,
    reason: String,
}

#[derive(Debug)]
enum Device {
    Cpu,
    #[cfg(feature = "wgpu")]
    Wgpu(Box<pagewise_attention::wgpu::AdapterReport>),
}

/// One line: `cpu (asked for)`.
impl fmt::Display for ChosenBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let reason = &self.reason;
        match &self.device {
            Device::Cpu => write!(f, "cpu ({reason})"),
            #[cfg(feature = "wgpu")]
            Device::Wgpu(adapter) => write!(f, "wgpu ({reason}): {adapter}"),
        }
    }
}

/// Which backend `choice` means, and why. `auto` takes a real GPU through wgpu, then the CPU, and a software adapter
/// only where the environment names it; asking for wgpu is enough to get a software adapter where there is no other.
///
/// # Errors
/// [`LoadError::Option`] if it cannot be had.
pub fn choose_backend(choice: BackendChoice) -> Result<ChosenBackend, LoadError> {
    let cpu = |reason: String| Ok(ChosenBackend { device: Device::Cpu, reason });
    match choice {
        BackendChoice::Cpu => cpu("asked for".to_owned()),
        BackendChoice::Wgpu => wgpu_device(false)
            .map(|device| ChosenBackend { device, reason: "asked for".to_owned() })
            .map_err(|problem| LoadError::Option { option: "--backend wgpu", problem }),
        BackendChoice::Cuda => {
            let problem = "the engine of this version computes on the CPU and through wgpu, not on cuda; use auto, cpu or wgpu";
            Err(LoadError::Option { option: "--backend", problem: problem.to_owned() })
        }
        BackendChoice::Auto => match wgpu_device(true) {
            Ok(device) => {
                Ok(ChosenBackend { device, reason: "auto: a GPU, and the engine has no CUDA yet".to_owned() })
            }
            Err(problem) => cpu(format!("auto: no wgpu, {problem}")),
        },
    }
}

/// The adapter that the environment names, or the best; with `only_hardware`, no software is chosen by itself.
#[cfg(feature = "wgpu")]
fn wgpu_device(only_hardware: bool) -> Result<Device, String> {
    let best = if only_hardware { AdapterChoice::Hardware } else { AdapterChoice::Best };
    let choice = AdapterChoice::named_by_environment().unwrap_or(best);
    choice.find().map(|report| Device::Wgpu(Box::new(report))).map_err(|error| error.to_string())
}

#[cfg(not(feature = "wgpu"))]
fn wgpu_device(_: bool) -> Result<Device, String> {
    Err("this binary was built without the feature wgpu".to_owned())
}

/// Memory that a cache can be made in.
#[derive(Clone, Copy, Debug)]
struct CacheRoom {
    /// Bytes that a cache takes at most where no size is asked for.
    by_default: u64,
    /// Bytes of the largest buffer, which holds one layer's keys or values.
    largest_buffer: u64,
    /// Bytes that there are, where that is known.
    memory: Option<u64>,
}

impl CacheRoom {
    /// A quarter of the machine's memory by default.
    fn of_the_machine() -> Self {
        let memory = machine_memory();
        let by_default = memory.map_or(1 << 30, |bytes| bytes / 4);
        Self { by_default, largest_buffer: u64::MAX, memory }
    }

    /// Little by default: WebGPU does not say how much memory a GPU has.
    #[cfg(feature = "wgpu")]
    fn of_a_gpu(largest_buffer: u64) -> Self {
        Self { by_default: 2 << 30, largest_buffer, memory: None }
    }
}

/// Weights made up for a configuration, if the machine has room for them.
fn dummy_weights(config: &ModelConfig, dtype: DType) -> Result<WeightSource, LoadError> {
    let product = |sizes: &[usize]| sizes.iter().fold(1u64, |all, &size| all.saturating_mul(size as u64));
    let embedding = product(&[config.vocab_size, config.hidden_size]);
    let attention = product(&[config.hidden_size, config.head_dim, 2 * config.q_heads + 2 * config.kv_heads]);
    let mlp = product(&[3, config.hidden_size, config.intermediate_size]);
    let layers = attention.saturating_add(mlp).saturating_mul(config.num_layers() as u64);
    let elements = embedding.saturating_mul(2).saturating_add(layers);
    // Each is made in f32 before it is converted; the embedding or the MLP is the largest.
    let bytes =
        elements.saturating_mul(dtype.size() as u64).saturating_add(4 * embedding.max(mlp).min(1 << 60));
    match machine_memory() {
        Some(memory) if bytes > memory => {
            let problem =
                format!("made-up weights of this shape take {bytes} bytes; the machine has {memory}");
            Err(LoadError::Option { option: "--load-format dummy", problem })
        }
        _ => Ok(WeightSource::Dummy { dtype }),
    }
}

fn max_model_len(options: &LoadOptions, config: &ModelConfig) -> Result<usize, LoadError> {
    let refuse = |option, problem| Err(LoadError::Option { option, problem });
    match options.max_model_len {
        None => Ok(config.max_positions),
        Some(0) => refuse("--max-model-len", "0 tokens are not a sequence; give at least 1".into()),
        Some(len) if len > config.max_positions => refuse(
            "--max-model-len",
            format!("{len} is more than the model's {} positions; give at most that", config.max_positions),
        ),
        Some(len) => Ok(len),
    }
}

fn attention_spec(
    options: &LoadOptions,
    config: &ModelConfig,
    kv_dtype: DType,
    max_model_len: usize,
    room: CacheRoom,
) -> Result<AttentionSpec, LoadError> {
    let block_size = options.block_size;
    if !block_size.is_power_of_two() || block_size > MAX_BLOCK_SIZE {
        let problem = format!("{block_size} is not a power of two from 1 to {MAX_BLOCK_SIZE}");
        return Err(LoadError::Option { option: "--block-size", problem });
    }
    let mut spec = AttentionSpec::new(config, kv_dtype, block_size, 0);
    spec.num_blocks = num_blocks(options, &spec, max_model_len, room)?;
    spec.host_blocks = host_blocks(options, &spec)?;
    Ok(spec)
}

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

/// Bytes that the cache manager keeps for a block, at most: reference counts, links, and its place in the
/// prefix cache without the tokens themselves.
const BOOKKEEPING_BYTES: usize = 64;

fn num_blocks(
    options: &LoadOptions,
    spec: &AttentionSpec,
    max_model_len: usize,
    room: CacheRoom,
) -> Result<usize, LoadError> {
    let bookkeeping = BOOKKEEPING_BYTES + size_of::<u32>() * spec.block_size;
    let block_bytes = (spec.block_bytes() + bookkeeping) as u64;
    let memory = room.memory;
    let (option, blocks) = match options.cache_size {
        CacheSize::Blocks(blocks) => ("--kv-blocks", blocks as u64),
        CacheSize::Bytes(bytes) => ("--kv-memory", bytes / block_bytes),
        CacheSize::Auto => {
            let sequence = max_model_len.div_ceil(spec.block_size) * spec.groups.len();
            let most = (sequence as u64).saturating_mul(options.max_num_seqs as u64);
            let fitting = room.by_default / block_bytes;
            // A layer's keys, or its values, lie in one buffer.
            let sides = 2 * spec.num_buffers().max(1) as u64;
            let side = (spec.block_bytes() as u64 / sides).max(1);
            let most = most.min(fitting).min(room.largest_buffer / side);
            ("--kv-blocks", most.clamp(1, u64::from(u32::MAX / 2)))
        }
    };
    let refuse = |problem| Err(LoadError::Option { option, problem });
    if blocks == 0 {
        return refuse(format!("the cache would have no block; one block takes {block_bytes} bytes"));
    }
    let bytes = blocks.saturating_mul(block_bytes);
    match memory {
        Some(memory) if bytes > memory => {
            refuse(format!("{blocks} blocks take {bytes} bytes; the machine has {memory}: ask for less"))
        }
        _ if blocks > u64::from(u32::MAX / 2) => {
            refuse(format!("{blocks} blocks are more than can be numbered"))
        }
        _ => Ok(blocks as usize),
    }
}

/// Bytes of memory, where the operating system says so in the way of Linux.
fn machine_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}
