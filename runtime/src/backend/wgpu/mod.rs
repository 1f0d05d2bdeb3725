//! Any GPU that speaks Vulkan, Metal or DX12 as a [`Backend`]: WGSL kernels through wgpu. Weights stay f32, f16 or bf16,
//! activations are f32. A step is one submission; only what is asked for comes back: ids of chosen tokens,
//! log-probabilities, or logits.
//!
//! Owns what a model calls; what is behind it has rooms of its own:
//!
//! | room | owns |
//! |---|---|
//! | `device` | the adapter, memory from it, its failures |
//! | `kernels`, `recorder`, `reading` | what is compiled; the commands of a step; bytes on their way to the host |
//! | `dense`, `step` | which kernel does what on which tensors; a step's numbers and attention |
//! | `tensor`, `growing`, `weight`, `cache` | activations, what grows with steps, weights, blocks |
//! | `logits`, `wanted` | tokens, log-probabilities and candidates on the device; what is asked for as jobs |

mod cache;
mod dense;
mod device;
mod growing;
mod kernels;
mod logits;
mod reading;
mod recorder;
mod step;
mod tensor;
mod wanted;
mod weight;

pub use cache::WgpuCache;
pub use device::AdapterChoice;
pub use logits::WgpuOutput;
pub use step::WgpuStep;
pub use tensor::WgpuTensor;
pub use weight::WgpuWeight;

use super::cpu::dense::DenseError;
use super::{Activated, AttentionSpec, Backend, BackendError, Heads, Input, Linear, Norm, StepBatch};
use crate::executor::{RowWanted, StepOutput};
use crate::model_dir::WeightTensor;
use dense::{Product, are_one, check_linear, function};
use device::{Gpu, lock};
use logits::Chooser;
use pagewise_attention::wgpu::AdapterReport;
use pagewise_attention::wgpu::wgpu::Buffer;
use pagewise_kvcache::BlockOps;
use pagewise_shaders::model::elementwise::Elementwise;
use recorder::Recorder;
use std::sync::{Arc, Mutex};
use step::StepMemory;
use tensor::Pool;
use weight::Uploader;

/// A GPU, and what is kept on it from step to step.
#[derive(Debug)]
pub struct WgpuBackend {
    gpu: Arc<Gpu>,
    name: String,
    pool: Arc<Pool>,
    uploader: Uploader,
    work: Mutex<Work>,
    /// Bound where a product has no bias.
    no_bias: Buffer,
}

/// What changes while a step is recorded.
#[derive(Debug, Default)]
struct Work {
    recorder: Recorder,
    memory: StepMemory,
    chooser: Chooser,
}

impl WgpuBackend {
    /// Opens an adapter.
    ///
    /// # Errors
    /// [`BackendError::Wgpu`] if there is no such adapter, or it gives no device.
    pub fn new(adapter: &AdapterChoice) -> Result<Self, BackendError> {
        Self::open(&adapter.find()?)
    }

    /// Opens an adapter that was found before.
    ///
    /// # Errors
    /// [`BackendError::Wgpu`] if it gives no device.
    pub fn open(report: &AdapterReport) -> Result<Self, BackendError> {
        let gpu = Arc::new(Gpu::open(report)?);
        let largest = gpu.largest_binding();
        Self::over(gpu, report.to_string(), largest)
    }

    /// Another one on the same device, for another model: what is compiled is shared, memory is not.
    ///
    /// # Errors
    /// [`BackendError`] if the device is lost or has no memory left.
    pub fn sibling(&self) -> Result<Self, BackendError> {
        Self::over(Arc::clone(&self.gpu), self.name.clone(), self.uploader.largest)
    }

    fn over(gpu: Arc<Gpu>, name: String, largest_weight: u64) -> Result<Self, BackendError> {
        let uploader = Uploader::new(largest_weight);
        let no_bias = gpu.storage(device::WEIGHTS, 16)?;
        Ok(Self { gpu, name, pool: Arc::default(), uploader, work: Mutex::default(), no_bias })
    }

    /// Lays weights in buffers of at most so many bytes, as on a device whose bindings hold no more. A row must fit.
    #[must_use]
    pub fn with_largest_weight(mut self, bytes: u64) -> Self {
        self.uploader.largest = self.uploader.largest.min(bytes);
        self
    }

    /// The adapter: name, graphics API, kind, driver.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes of the largest buffer that a kernel can bind.
    pub fn largest_binding(&self) -> u64 {
        self.gpu.largest_binding()
    }

    /// Gives the device up, as if its driver had: every later step fails with [`BackendError::DeviceLost`].
    pub fn destroy(&self) {
        self.gpu.context.device().destroy();
    }
}

impl Backend for WgpuBackend {
    type Weight = WgpuWeight;
    type Tensor = WgpuTensor;
    type Cache = WgpuCache;
    type Step<'a> = WgpuStep<'a>;
    type Output = WgpuOutput;

    fn upload(&self, weight: WeightTensor) -> Result<WgpuWeight, BackendError> {
        let uploaded = self.upload_together(vec![weight])?;
        let lost = BackendError::LostWeights { sent: 1, left: uploaded.len() };
        uploaded.into_iter().next().ok_or(lost)
    }

    fn upload_together(&self, weights: Vec<WeightTensor>) -> Result<Vec<WgpuWeight>, BackendError> {
        self.uploader.upload(&self.gpu, &mut lock(&self.work).recorder, weights)
    }

    fn cache(&self, spec: &AttentionSpec) -> Result<WgpuCache, BackendError> {
        WgpuCache::new(&self.gpu, spec)
    }

    fn prepare<'a>(
        &'a self,
        spec: &'a AttentionSpec,
        batch: &'a StepBatch,
    ) -> Result<WgpuStep<'a>, BackendError> {
        self.gpu.check()?;
        let step = WgpuStep::new(spec, batch);
        let mut work = lock(&self.work);
        let Work { recorder, memory, chooser } = &mut *work;
        recorder.restart();
        memory.begin(&self.gpu, &step)?;
        chooser.place(&self.gpu, recorder, &batch.earlier, memory.tokens()?)?;
        Ok(step)
    }

    fn block_ops(&self, cache: &mut WgpuCache, ops: &BlockOps) -> Result<(), BackendError> {
        cache.apply(&self.gpu, ops)
    }

    fn rows(&self, step: &WgpuStep<'_>) -> usize {
        step.batch.rows()
    }

    fn logit_rows(&self, step: &WgpuStep<'_>) -> usize {
        step.batch.logit_rows.len()
    }

    fn tensor(&self, rows: usize, width: usize) -> Result<WgpuTensor, BackendError> {
        let [tensor] = self.beside(rows, [width])?;
        Ok(tensor)
    }

    fn stream(&self, rows: usize, width: usize) -> Result<WgpuTensor, BackendError> {
        self.tensor(rows, width)
    }

    fn beside<const N: usize>(
        &self,
        rows: usize,
        widths: [usize; N],
    ) -> Result<[WgpuTensor; N], BackendError> {
        self.pool.beside(&self.gpu, rows, widths)
    }

    fn embed(
        &self,
        step: &WgpuStep<'_>,
        table: &WgpuWeight,
        out: &mut WgpuTensor,
    ) -> Result<(), BackendError> {
        let vocabulary = table.rows();
        if let Some(&id) = step.batch.tokens.iter().find(|id| **id as usize >= vocabulary) {
            return Err(DenseError::TokenId { id, vocabulary }.into());
        }
        let tokens = lock(&self.work).memory.tokens()?.clone();
        self.lookup((table, false), (&tokens, 0), out)
    }

    fn add_positions(
        &self,
        step: &WgpuStep<'_>,
        table: &WgpuWeight,
        offset: usize,
        x: &mut WgpuTensor,
    ) -> Result<(), BackendError> {
        let places = table.rows();
        let outside = |position: &&i32| {
            usize::try_from(**position).ok().and_then(|p| p.checked_add(offset)).is_none_or(|p| p >= places)
        };
        if let Some(&position) = step.batch.positions.iter().find(outside) {
            return Err(DenseError::Position { position, places, offset }.into());
        }
        let positions = lock(&self.work).memory.positions()?.clone();
        self.lookup((table, true), (&positions, offset), x)
    }

    fn norm(
        &self,
        x: &WgpuTensor,
        norm: &Norm<WgpuWeight>,
        out: &mut WgpuTensor,
    ) -> Result<(), BackendError> {
        self.norm_rows(Some(x), norm, out)
    }

    fn norm_in_place(&self, x: &mut WgpuTensor, norm: &Norm<WgpuWeight>) -> Result<(), BackendError> {
        self.norm_rows(None, norm, x)
    }

    fn linear(
        &self,
        input: Input<'_, WgpuWeight, WgpuTensor>,
        outputs: &mut [(&Linear<WgpuWeight>, &mut WgpuTensor)],
    ) -> Result<(), BackendError> {
        let x = self.rows_of(input)?;
        let outputs: Vec<(&Linear<WgpuWeight>, &WgpuTensor)> =
            outputs.iter().map(|(linear, out)| (*linear, &**out)).collect();
        outputs.iter().try_for_each(|(linear, out)| check_linear(linear, out))?;
        for run in outputs.chunk_by(|this, next| are_one(*this, *next)) {
            let Some(&(Linear { weight, bias, .. }, out)) = run.first() else { continue };
            let out_features = run.iter().map(|(linear, _)| linear.out_features).sum();
            let bias = bias.as_ref();
            self.product(x, &Product { weight, bias, out, out_features, accumulate: false })?;
        }
        Ok(())
    }

    fn linear_add(
        &self,
        x: &WgpuTensor,
        linear: &Linear<WgpuWeight>,
        _room: &mut WgpuTensor,
        sum: &mut WgpuTensor,
    ) -> Result<(), BackendError> {
        check_linear(linear, sum)?;
        let Linear { weight, bias, out_features } = linear;
        let bias = bias.as_ref();
        self.product(x, &Product { weight, bias, out: sum, out_features: *out_features, accumulate: true })
    }

    fn activated_linear(
        &self,
        input: Input<'_, WgpuWeight, WgpuTensor>,
        activated: Activated<'_, WgpuWeight>,
        [inner, factor]: &mut [WgpuTensor; 2],
        out: &mut WgpuTensor,
    ) -> Result<(), BackendError> {
        match activated {
            Activated::Gated { activation, gate, up } => {
                self.linear(input, &mut [(gate, inner), (up, factor)])?;
                self.elementwise(Elementwise::Gated(function(activation)), &[inner, factor], 0.0, out)
            }
            Activated::Plain { activation, up } => {
                self.linear(input, &mut [(up, inner)])?;
                self.elementwise(Elementwise::Activate(function(activation)), &[inner], 0.0, out)
            }
        }
    }

    fn write_kv(
        &self,
        step: &WgpuStep<'_>,
        cache: &mut WgpuCache,
        layer: usize,
        Heads { q, k, v }: Heads<'_, WgpuTensor>,
    ) -> Result<(), BackendError> {
        self.rotate(step, q, k)?;
        let (place, ..) = step.layer(layer)?;
        let mut work = lock(&self.work);
        let Work { recorder, memory, .. } = &mut *work;
        memory.write_kv(&self.gpu, recorder, step, (layer, cache.layer(place.buffer)?), k, v)
    }

    fn attention(
        &self,
        step: &WgpuStep<'_>,
        cache: &WgpuCache,
        layer: usize,
        q: &WgpuTensor,
        out: &mut WgpuTensor,
    ) -> Result<(), BackendError> {
        let (place, ..) = step.layer(layer)?;
        let mut work = lock(&self.work);
        let Work { recorder, memory, .. } = &mut *work;
        memory.attention(&self.gpu, recorder, step, (layer, cache.layer(place.buffer)?), q, out)
    }

    fn scale(&self, factor: f32, x: &mut WgpuTensor) -> Result<(), BackendError> {
        self.elementwise(Elementwise::Scale, &[], factor, x)
    }

    fn softcap(&self, cap: f32, x: &mut WgpuTensor) -> Result<(), BackendError> {
        self.elementwise(Elementwise::Softcap, &[], cap, x)
    }

    fn add(&self, x: &mut WgpuTensor, y: &WgpuTensor) -> Result<(), BackendError> {
        self.elementwise(Elementwise::Add, &[y], 0.0, x)
    }

    fn gather_logit_rows(&self, step: &WgpuStep<'_>, x: &WgpuTensor) -> Result<WgpuTensor, BackendError> {
        self.gather(step, x)
    }

    fn answers(&self, _: &RowWanted) -> bool {
        true
    }

    fn runs_ahead(&self) -> bool {
        true
    }

    fn output(&self, logits: Option<WgpuTensor>, wanted: &[RowWanted]) -> Result<WgpuOutput, BackendError> {
        let mut work = lock(&self.work);
        let Work { recorder, chooser, .. } = &mut *work;
        chooser.end(&self.gpu, recorder, logits.as_ref(), wanted)
    }

    fn wait(&self, output: WgpuOutput) -> Result<StepOutput, BackendError> {
        output.read(&self.gpu, &mut lock(&self.work).recorder)
    }
}
