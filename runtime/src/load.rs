//! From a model directory to a running engine: the one place where files, cache, device and engine meet.

mod devices;

pub use devices::{Choice, Chosen, choose_backend};

use crate::backend::BackendError;
use crate::engine::{Engine, EngineConfig};
use crate::model_dir::{GenerationConfig, ModelConfig, ModelDir, ModelError, Weights, resolve_model};
use crate::models::{LoadModelError, WeightSource, weight_dtype};
use crate::scheduler::Preemption;
use crate::text::{ChatTemplate, Tokenizer};
use devices::{Ready, Wanted, machine_memory};
use pagewise_attention::DType;
use pagewise_kvcache::{CacheConfig, CacheError, KvCacheManager};

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
    /// What the running sequences can need at most, but no more than a quarter of the machine's memory, or on a GPU than
    /// [`LoadOptions::gpu_memory_utilization`] leaves.
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
    /// Most tokens in one step; `None` is 512 on the CPU and 8192 on GPUs.
    pub max_batch_tokens: Option<usize>,
    /// Longest sequence; `None` is the model's own limit.
    pub max_model_len: Option<usize>,
    /// Whether computed prefixes are kept and found again.
    pub prefix_cache: bool,
    /// CPU threads; `None` is one for each core.
    pub threads: Option<usize>,
    /// Where weights come from.
    pub load_format: LoadFormat,
    /// Share of a GPU's memory that may be used in all, weights and cache included.
    pub gpu_memory_utilization: f64,
    /// Whether decodes on CUDA are captured as graphs and replayed.
    pub cuda_graphs: bool,
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
            max_batch_tokens: None,
            gpu_memory_utilization: 0.9,
            cuda_graphs: true,
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
    let choice = choose_backend(options.backend)?;
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
        LoadFormat::Dummy => {
            let dtype = options.dtype.unwrap_or(DType::Bf16);
            // On a GPU they are made there, and it says itself whether they fit.
            if !choice.makes_weights() {
                check_dummy_weights(&config, dtype)?;
            }
            WeightSource::Dummy { dtype }
        }
    };
    progress(LoadProgress::Stage("reading the tokenizer"));
    let tokenizer = Tokenizer::open(&path)?;
    let chat_template = ChatTemplate::open(&path)?;

    let weight_dtype = weight_dtype(&config, &weights)?;
    let wanted = Wanted { options, config: &config, weights: &weights, weight_dtype, max_model_len };
    let Ready { executor, spec, line, max_batch_tokens } = choice.make_ready(&wanted, progress)?;
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
        backend = %line, weights = %weight_dtype, num_blocks, block_size = spec.block_size, max_model_len,
        "model loaded"
    );
    let engine_config = EngineConfig {
        max_num_seqs: options.max_num_seqs,
        max_batch_tokens,
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
        backend: line,
        num_blocks,
    })
}

/// Whether the machine has room for weights made up for a configuration.
fn check_dummy_weights(config: &ModelConfig, dtype: DType) -> Result<(), LoadError> {
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
        _ => Ok(()),
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
