//! The seam between models and devices: one method per dense operation and one for attention. A model is
//! written once against [`Backend`] and runs on every device that implements it.

mod batch;
pub mod cpu;
mod rope;

pub use batch::{BatchLimits, GroupBatch, StepBatch};
pub use rope::Rope;

use crate::model_dir::{Activation, ModelConfig, WeightTensor};
use pagewise_attention::{AttentionConfig, DType, Mask, ProblemError};
use pagewise_kvcache::BlockOps;

/// What a device must be told once about the attention layers of a model and the cache they share.
///
/// Every KV group uses the same cache buffers: block ids are unique over all groups, so the n-th layer of each
/// group can live in the n-th buffer. A model with two groups of equal size needs half the buffers that it
/// has layers.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionSpec {
    /// One entry a layer: its KV group.
    pub layer_groups: Vec<usize>,
    /// One entry a KV group: what its layers compute. They differ in their masks only.
    pub groups: Vec<AttentionConfig>,
    /// Rotary embedding of queries and keys; `None` where positions are learned.
    pub rope: Option<Rope>,
    /// Tokens a block.
    pub block_size: usize,
    /// Blocks on the device.
    pub num_blocks: usize,
    /// Blocks on the host to swap with.
    pub host_blocks: usize,
}

impl AttentionSpec {
    /// The attention layers of a model over a cache of this shape; queries and outputs are f32.
    pub fn new(config: &ModelConfig, kv_dtype: DType, block_size: usize, num_blocks: usize) -> Self {
        let (kv_groups, layer_groups) = config.kv_groups();
        let attention = |window: Option<usize>| AttentionConfig {
            kv_dtype,
            mask: window.map_or(Mask::Causal, |size| Mask::Window { size }),
            scale: config.attention_scale,
            softcap: config.attention_softcap,
            ..AttentionConfig::new(config.q_heads, config.kv_heads, config.head_dim, DType::F32)
        };
        let groups = kv_groups.iter().map(|group| attention(group.window)).collect();
        let rope = config.rope.as_ref().map(|rope| Rope::new(rope, config.head_dim));
        Self { layer_groups, groups, rope, block_size, num_blocks, host_blocks: 0 }
    }

    /// The group and the cache buffer of a layer: the buffer's number is the layer's rank within its group.
    pub fn place(&self, layer: usize) -> Option<LayerPlace> {
        let group = *self.layer_groups.get(layer)?;
        let buffer = self.layer_groups.iter().take(layer).filter(|&&other| other == group).count();
        Some(LayerPlace { group, buffer })
    }

    /// Cache buffers of keys (and as many of values).
    pub fn num_buffers(&self) -> usize {
        let layers_of = |group| self.layer_groups.iter().filter(|&&other| other == group).count();
        (0..self.groups.len()).map(layers_of).max().unwrap_or(0)
    }

    /// Bytes that one block takes in all buffers, keys and values.
    pub fn block_bytes(&self) -> usize {
        let token_bytes = self.groups.first().map_or(0, |config| {
            config.kv_heads * (config.head_dim_qk + config.head_dim_v) * config.kv_dtype.size()
        });
        self.num_buffers() * self.block_size * token_bytes
    }
}

/// Where a layer's keys and values are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerPlace {
    /// Its KV group.
    pub group: usize,
    /// Its cache buffer.
    pub buffer: usize,
}

/// One matrix product of a layer: `out = x · weightᵀ + bias`.
#[derive(Debug)]
pub struct Linear<W> {
    /// `[out_features, in_features]`
    pub weight: W,
    /// `[out_features]`
    pub bias: Option<W>,
    /// Width of the output.
    pub out_features: usize,
}

/// The dense operations of a transformer and its paged attention, on one device. Tensors are `[rows, width]`
/// in f32 (or the device's compute type), rows being the tokens of a step.
///
/// A row of any result depends on the same row of the inputs alone; on the CPU that holds to the bit.
pub trait Backend: Send + Sync + Sized + 'static {
    /// Weights on the device; a clone is another handle to the same memory.
    type Weight: Clone + Send + Sync;
    /// Activations on the device.
    type Tensor: Send;
    /// The blocks of all layers on the device, and those on the host to swap with.
    type Cache: Send;
    /// A step's lengths, tables, positions and attention plan, made ready once and used by every layer.
    type Step<'a>;

    /// Moves a weight to the device (or keeps it mapped where the device is the host).
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`].
    fn upload(&self, weight: WeightTensor) -> Result<Self::Weight, BackendError>;

    /// Makes an empty cache.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`], or [`BackendError::Attention`] if the shape is not one that attention takes.
    fn cache(&self, spec: &AttentionSpec) -> Result<Self::Cache, BackendError>;

    /// Makes a step ready.
    ///
    /// # Errors
    /// [`BackendError::Attention`] if the batch contradicts itself.
    fn prepare<'a>(
        &'a self,
        spec: &'a AttentionSpec,
        batch: &'a StepBatch,
    ) -> Result<Self::Step<'a>, BackendError>;

    /// Moves blocks as the cache manager says, in its order.
    ///
    /// # Errors
    /// [`BackendError::Attention`] if an op names a block that is not there.
    fn block_ops(&self, cache: &mut Self::Cache, ops: &BlockOps) -> Result<(), BackendError>;

    /// Rows of the step: its tokens.
    fn rows(&self, step: &Self::Step<'_>) -> usize;

    /// Rows whose logits the step asks for.
    fn logit_rows(&self, step: &Self::Step<'_>) -> usize;

    /// A tensor `[rows, width]` with undefined content.
    fn tensor(&self, rows: usize, width: usize) -> Self::Tensor;

    /// `out[t] = table[token t]`.
    ///
    /// # Errors
    /// As of [`linear`](Self::linear).
    fn embed(
        &self,
        step: &Self::Step<'_>,
        table: &Self::Weight,
        out: &mut Self::Tensor,
    ) -> Result<(), BackendError>;

    /// `x[t] += table[offset + position of token t]`: learned positions.
    ///
    /// # Errors
    /// As of [`linear`](Self::linear), and if the table has no such row.
    fn add_positions(
        &self,
        step: &Self::Step<'_>,
        table: &Self::Weight,
        offset: usize,
        x: &mut Self::Tensor,
    ) -> Result<(), BackendError>;

    /// `out = x / sqrt(mean(x²) + eps) · weight` over each row (Zhang & Sennrich 2019). A row of a tensor may hold
    /// several rows of the norm, each as long as the weight: heads, for example.
    ///
    /// # Errors
    /// As of [`linear`](Self::linear).
    fn rms_norm(
        &self,
        x: &Self::Tensor,
        weight: &Self::Weight,
        eps: f32,
        out: &mut Self::Tensor,
    ) -> Result<(), BackendError>;

    /// `out = (x - mean(x)) / sqrt(variance(x) + eps) · weight + bias` over each row (Ba et al. 2016).
    ///
    /// # Errors
    /// As of [`linear`](Self::linear).
    fn layer_norm(
        &self,
        x: &Self::Tensor,
        weight: &Self::Weight,
        bias: &Self::Weight,
        eps: f32,
        out: &mut Self::Tensor,
    ) -> Result<(), BackendError>;

    /// Products of the same rows with several matrices.
    ///
    /// # Errors
    /// [`BackendError`] if a shape or dtype does not fit, or the device fails.
    fn linear(
        &self,
        x: &Self::Tensor,
        outputs: &mut [(&Linear<Self::Weight>, &mut Self::Tensor)],
    ) -> Result<(), BackendError>;

    /// Rotates queries and keys by their positions, pairing element `i` of a head with `i + rotary_dim / 2`; without a
    /// rotary embedding, nothing.
    ///
    /// # Errors
    /// As of [`linear`](Self::linear).
    fn rotary(
        &self,
        step: &Self::Step<'_>,
        q: &mut Self::Tensor,
        k: &mut Self::Tensor,
    ) -> Result<(), BackendError>;

    /// Writes the step's keys and values into the layer's blocks.
    ///
    /// # Errors
    /// [`BackendError::Attention`] if a slot is not there.
    fn write_kv(
        &self,
        step: &Self::Step<'_>,
        cache: &mut Self::Cache,
        layer: usize,
        k: &Self::Tensor,
        v: &Self::Tensor,
    ) -> Result<(), BackendError>;

    /// Paged attention of the step's queries over the layer's blocks.
    ///
    /// # Errors
    /// [`BackendError::Attention`].
    fn attention(
        &self,
        step: &Self::Step<'_>,
        cache: &Self::Cache,
        layer: usize,
        q: &Self::Tensor,
        out: &mut Self::Tensor,
    ) -> Result<(), BackendError>;

    /// `out = f(x)`, element by element.
    ///
    /// # Errors
    /// As of [`linear`](Self::linear).
    fn activate(
        &self,
        activation: Activation,
        x: &Self::Tensor,
        out: &mut Self::Tensor,
    ) -> Result<(), BackendError>;

    /// `out = f(gate) · up`, element by element (Shazeer 2020).
    ///
    /// # Errors
    /// As of [`linear`](Self::linear).
    fn gated_activation(
        &self,
        activation: Activation,
        gate: &Self::Tensor,
        up: &Self::Tensor,
        out: &mut Self::Tensor,
    ) -> Result<(), BackendError>;

    /// `x *= factor`.
    ///
    /// # Errors
    /// The device fails.
    fn scale(&self, factor: f32, x: &mut Self::Tensor) -> Result<(), BackendError>;

    /// `x = cap · tanh(x / cap)`.
    ///
    /// # Errors
    /// The device fails.
    fn softcap(&self, cap: f32, x: &mut Self::Tensor) -> Result<(), BackendError>;

    /// `x += y`.
    ///
    /// # Errors
    /// As of [`linear`](Self::linear).
    fn add(&self, x: &mut Self::Tensor, y: &Self::Tensor) -> Result<(), BackendError>;

    /// The rows whose logits the step asks for, in order.
    fn gather_logit_rows(&self, step: &Self::Step<'_>, x: &Self::Tensor) -> Self::Tensor;

    /// Brings a tensor to the host, row after row.
    fn download(&self, x: Self::Tensor) -> Vec<f32>;

    /// Runs a whole step, where the device wants to be told (a thread pool, a graph).
    fn scope<T: Send>(&self, step: impl FnOnce() -> T + Send) -> T {
        step()
    }
}

/// What a device can fail with.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackendError {
    /// The attention problem was refused.
    #[error(transparent)]
    Attention(#[from] ProblemError),
    /// A dense layer was refused.
    #[error(transparent)]
    Dense(#[from] cpu::dense::DenseError),
    /// Memory for weights or cache could not be had.
    #[error("{wanted} bytes for {what} could not be allocated; ask for less with {hint}")]
    OutOfMemory {
        /// What it was for.
        what: &'static str,
        /// How much.
        wanted: usize,
        /// The option that asks for less.
        hint: &'static str,
    },
    /// The device's threads could not be started.
    #[error("--threads: the CPU's threads could not be started: {0}")]
    Threads(String),
}
