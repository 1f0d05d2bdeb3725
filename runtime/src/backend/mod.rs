//! The seam between models and devices: one method per dense operation and one for attention. A model is
//! written once against [`Backend`] and runs on every device that implements it.

mod batch;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod error;
mod rope;
mod spec;
#[cfg(feature = "wgpu")]
pub mod wgpu;

pub use batch::{BatchLimits, EarlierToken, GroupBatch, StepBatch};
pub use error::BackendError;
pub use rope::Rope;
pub use spec::{AttentionSpec, LayerPlace, StepLimits};

use crate::executor::{RowWanted, StepOutput};
use crate::model_dir::{Activation, WeightTensor};
use pagewise_kvcache::BlockOps;

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

/// A norm over the rows of a tensor. A row may hold several rows of the norm, each as long as the weight: heads, for
/// example.
#[derive(Debug)]
pub enum Norm<W> {
    /// `x / sqrt(mean(x²) + eps) · weight` (Zhang & Sennrich 2019).
    Rms {
        /// `[width]`
        weight: W,
        /// Keeps a row of zeros finite.
        eps: f32,
    },
    /// `(x - mean(x)) / sqrt(variance(x) + eps) · weight + bias` (Ba et al. 2016).
    Layer {
        /// `[width]`
        weight: W,
        /// `[width]`
        bias: W,
        /// Keeps a row of equal elements finite.
        eps: f32,
    },
}

/// The rows that go into a product.
#[derive(Debug)]
pub enum Input<'a, W, T> {
    /// As they are.
    Rows(&'a T),
    /// Normed on the way; a device that cannot do that norms into `room` first.
    Normed {
        /// What is normed.
        x: &'a T,
        /// How.
        norm: &'a Norm<W>,
        /// As wide as `x`; undefined afterwards.
        room: &'a mut T,
    },
}

/// The first half of an MLP: products and what is done with them, element by element.
#[derive(Clone, Copy, Debug)]
pub enum Activated<'a, W> {
    /// `f(gate(x)) · up(x)` (Shazeer 2020)
    Gated {
        /// f
        activation: Activation,
        /// What f is applied to.
        gate: &'a Linear<W>,
        /// Its factor.
        up: &'a Linear<W>,
    },
    /// `f(up(x))`
    Plain {
        /// f
        activation: Activation,
        /// What f is applied to.
        up: &'a Linear<W>,
    },
}

/// A step's queries, keys and values in one layer, `[rows, heads · head_dim]` each.
#[derive(Debug)]
pub struct Heads<'a, T> {
    /// Queries.
    pub q: &'a mut T,
    /// Keys.
    pub k: &'a mut T,
    /// Values.
    pub v: &'a T,
}

/// The operations of a transformer on one device. Tensors are `[rows, width]`, rows being the tokens of a step, and of
/// two types: the residual stream and the logits are f32 ([`stream`](Self::stream)), all else is of the device's
/// compute type ([`tensor`](Self::tensor)). An operation is as large as what devices fuse; one that fuses less does its
/// parts one after the other.
///
/// A row of any result depends on the same row of the inputs alone; on the CPU that holds to the bit.
///
/// # Errors
/// Everything here fails with [`BackendError`]: if shapes or types do not fit each other, if the device fails, or if
/// it has no memory left.
pub trait Backend: Send + Sync + Sized + 'static {
    /// Weights on the device; a clone is another handle to the same memory.
    type Weight: Clone + Send + Sync;
    /// Activations on the device.
    type Tensor: Send;
    /// The blocks of all layers on the device, and those on the host to swap with.
    type Cache: Send;
    /// A step's lengths, tables, positions and attention plan, made ready once and used by every layer.
    type Step<'a>;
    /// What a step gives, on its way to the host.
    type Output: Send;

    /// Moves a weight to the device (or keeps it mapped where the device is the host).
    fn upload(&self, weight: WeightTensor) -> Result<Self::Weight, BackendError>;

    /// Moves weights to the device that are multiplied with the same rows: it may lay one behind the other, so that
    /// their products are one.
    fn upload_together(&self, weights: Vec<WeightTensor>) -> Result<Vec<Self::Weight>, BackendError> {
        weights.into_iter().map(|weight| self.upload(weight)).collect()
    }

    /// Makes an empty cache.
    fn cache(&self, spec: &AttentionSpec) -> Result<Self::Cache, BackendError>;

    /// Makes a step ready.
    fn prepare<'a>(
        &'a self,
        spec: &'a AttentionSpec,
        batch: &'a StepBatch,
    ) -> Result<Self::Step<'a>, BackendError>;

    /// Moves blocks as the cache manager says, in its order.
    fn block_ops(&self, cache: &mut Self::Cache, ops: &BlockOps) -> Result<(), BackendError>;

    /// Computes a step by `forward`, which calls the operations below. A device may keep what they were, and later do
    /// the same again for a step of the same shape without calling it; it calls it once more where keeping them failed.
    fn record(
        &self,
        step: &Self::Step<'_>,
        mut forward: impl FnMut() -> Result<Self::Tensor, BackendError>,
    ) -> Result<Self::Tensor, BackendError> {
        let _ = step;
        forward()
    }

    /// Rows of the step: its tokens.
    fn rows(&self, step: &Self::Step<'_>) -> usize;

    /// Rows whose logits the step asks for.
    fn logit_rows(&self, step: &Self::Step<'_>) -> usize;

    /// A tensor of the compute type with undefined content.
    fn tensor(&self, rows: usize, width: usize) -> Result<Self::Tensor, BackendError>;

    /// A tensor of f32 with undefined content.
    fn stream(&self, rows: usize, width: usize) -> Result<Self::Tensor, BackendError>;

    /// Tensors of the same rows that one [`linear`](Self::linear) fills: the device may lay them side by side.
    fn beside<const N: usize>(
        &self,
        rows: usize,
        widths: [usize; N],
    ) -> Result<[Self::Tensor; N], BackendError>;

    /// `out[t] = table[token t]`; `out` is a stream.
    fn embed(
        &self,
        step: &Self::Step<'_>,
        table: &Self::Weight,
        out: &mut Self::Tensor,
    ) -> Result<(), BackendError>;

    /// `x[t] += table[offset + position of token t]`: learned positions; `x` is a stream.
    fn add_positions(
        &self,
        step: &Self::Step<'_>,
        table: &Self::Weight,
        offset: usize,
        x: &mut Self::Tensor,
    ) -> Result<(), BackendError>;

    /// `out = norm(x)`
    fn norm(
        &self,
        x: &Self::Tensor,
        norm: &Norm<Self::Weight>,
        out: &mut Self::Tensor,
    ) -> Result<(), BackendError>;

    /// `x = norm(x)`
    fn norm_in_place(&self, x: &mut Self::Tensor, norm: &Norm<Self::Weight>) -> Result<(), BackendError>;

    /// Products of the same rows with several matrices.
    fn linear(
        &self,
        input: Input<'_, Self::Weight, Self::Tensor>,
        outputs: &mut [(&Linear<Self::Weight>, &mut Self::Tensor)],
    ) -> Result<(), BackendError>;

    /// `sum += linear(x)`. `room` is as wide as `sum`, a stream, and undefined afterwards.
    fn linear_add(
        &self,
        x: &Self::Tensor,
        linear: &Linear<Self::Weight>,
        room: &mut Self::Tensor,
        sum: &mut Self::Tensor,
    ) -> Result<(), BackendError> {
        self.linear(Input::Rows(x), &mut [(linear, room)])?;
        self.add(sum, room)
    }

    /// `out` = the activated products. The room is for gate and up, undefined afterwards.
    fn activated_linear(
        &self,
        input: Input<'_, Self::Weight, Self::Tensor>,
        activated: Activated<'_, Self::Weight>,
        room: &mut [Self::Tensor; 2],
        out: &mut Self::Tensor,
    ) -> Result<(), BackendError>;

    /// Rotates queries and keys by their positions, pairing element `i` of a head with `i + rotary_dim / 2` (where the
    /// model has a rotary embedding), and writes keys and values into the layer's blocks.
    fn write_kv(
        &self,
        step: &Self::Step<'_>,
        cache: &mut Self::Cache,
        layer: usize,
        heads: Heads<'_, Self::Tensor>,
    ) -> Result<(), BackendError>;

    /// Paged attention of the step's queries over the layer's blocks.
    fn attention(
        &self,
        step: &Self::Step<'_>,
        cache: &Self::Cache,
        layer: usize,
        q: &Self::Tensor,
        out: &mut Self::Tensor,
    ) -> Result<(), BackendError>;

    /// `x *= factor`; `x` is a stream.
    fn scale(&self, factor: f32, x: &mut Self::Tensor) -> Result<(), BackendError>;

    /// `x = cap · tanh(x / cap)`; `x` is a stream.
    fn softcap(&self, cap: f32, x: &mut Self::Tensor) -> Result<(), BackendError>;

    /// `x += y`; `x` is a stream.
    fn add(&self, x: &mut Self::Tensor, y: &Self::Tensor) -> Result<(), BackendError>;

    /// The rows of a stream whose logits the step asks for, in order.
    fn gather_logit_rows(
        &self,
        step: &Self::Step<'_>,
        x: &Self::Tensor,
    ) -> Result<Self::Tensor, BackendError>;

    /// Whether the device can answer this itself. What it cannot it answers with logits.
    fn answers(&self, wanted: &RowWanted) -> bool {
        matches!(wanted, RowWanted::Logits)
    }

    /// Whether a step may be begun while the one before it is under way: see
    /// [`Executor::runs_ahead`](crate::executor::Executor::runs_ahead).
    fn runs_ahead(&self) -> bool {
        false
    }

    /// Ends a step: makes of its logits, a stream, what is wanted of each row (the row itself where `wanted` has no
    /// entry, or asks for what the device [does not know](Self::answers)), and starts its way to the host. A step without
    /// logits comes here too.
    fn output(
        &self,
        logits: Option<Self::Tensor>,
        wanted: &[RowWanted],
    ) -> Result<Self::Output, BackendError>;

    /// Waits until the step is done and its output is on the host. The output's `vocab_size` need not be set.
    fn wait(&self, output: Self::Output) -> Result<StepOutput, BackendError>;

    /// Waits until the device has done all that it was asked for.
    fn synchronize(&self) -> Result<(), BackendError> {
        Ok(())
    }

    /// Runs a whole step, where the device wants to be told (a thread pool).
    fn scope<T: Send>(&self, step: impl FnOnce() -> T + Send) -> T {
        step()
    }
}
