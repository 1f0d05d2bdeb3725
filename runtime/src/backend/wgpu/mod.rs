//! Any GPU that speaks Vulkan, Metal or DX12 as a [`Backend`]: WGSL kernels through wgpu. Weights stay f32, f16 or bf16,
//! activations are f32. A step is one submission; only the ids of likeliest tokens come back, or the logits that are asked for.
//!
//! Owns which kernel does what on which tensors. The device and its failures are `device`'s, commands `recorder`'s,
//! activations `tensor`'s, weights `weight`'s, blocks `cache`'s, a step's numbers and attention `step`'s.

mod cache;
mod device;
mod recorder;
mod step;
mod tensor;
mod weight;

pub use cache::WgpuCache;
pub use device::AdapterChoice;
pub use step::WgpuStep;
pub use tensor::WgpuTensor;
pub use weight::WgpuWeight;

use super::cpu::dense::DenseError;
use super::{Activated, AttentionSpec, Backend, BackendError, Heads, Input, Linear, Norm, StepBatch};
use crate::executor::{RowOutput, RowWanted, StepOutput, TokenOutput};
use crate::model_dir::{Activation, WeightTensor};
use device::{Gpu, lock};
use pagewise_attention::wgpu::wgpu::Buffer;
use pagewise_attention::wgpu::{AdapterReport, WgpuError};
use pagewise_kvcache::BlockOps;
use pagewise_shaders::DType;
use pagewise_shaders::model::elementwise::{Elementwise, ElementwiseArgs, Function};
use pagewise_shaders::model::lookup::{LookupArgs, LookupSpec};
use pagewise_shaders::model::norm::{NormArgs, NormKind, NormSpec};
use pagewise_shaders::model::product::{Form, ProductArgs, ProductSpec};
use pagewise_shaders::model::{Rows, argmax, rotary::RotaryArgs};
use recorder::{Dispatch, Kernel, Piece, Reading, Recorder};
use std::sync::{Arc, Mutex};
use step::StepMemory;
use tensor::Pool;
use weight::{Part, Uploader};

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

    fn per_dimension(&self) -> u32 {
        self.gpu.context.limits().max_compute_workgroups_per_dimension
    }

    fn dispatch(
        &self,
        kernel: Kernel,
        buffers: &[&Buffer],
        uniform: [u32; pagewise_shaders::model::PARAM_WORDS],
        workgroups: Result<[u32; 3], pagewise_shaders::Error>,
    ) -> Result<(), BackendError> {
        let workgroups = workgroups.map_err(WgpuError::from)?;
        let dispatch = Dispatch { kernel, buffers, uniform, workgroups };
        lock(&self.work).recorder.dispatch(&self.gpu, &dispatch)
    }

    /// Looks up rows of a table, part by part: each row is in one of them.
    fn lookup(
        &self,
        (table, adds): (&WgpuWeight, bool),
        (numbers, number_offset): (&Buffer, usize),
        out: &WgpuTensor,
    ) -> Result<(), BackendError> {
        expect("the table's width", table.width(), out.width())?;
        if out.rows() == 0 {
            return Ok(());
        }
        for part in table.parts() {
            let args = LookupArgs {
                rows: out.rows() as u32,
                width: out.width() as u32,
                numbers: 0,
                number_offset: number_offset as u32,
                first_row: part.first_row as u32,
                table_rows: part.rows as u32,
                table: Rows { offset: part.offset as u32, stride: table.stride() as u32 },
                out: out.place(),
            };
            let kernel = Kernel::Lookup(LookupSpec { dtype: table.dtype(), adds });
            let buffers = [numbers, &part.buffer, out.buffer()];
            self.dispatch(kernel, &buffers, args.uniform(), args.workgroups(self.per_dimension()))?;
        }
        Ok(())
    }

    fn norm_rows(
        &self,
        x: Option<&WgpuTensor>,
        norm: &Norm<WgpuWeight>,
        out: &WgpuTensor,
    ) -> Result<(), BackendError> {
        let (kind, weight, bias, eps) = match norm {
            Norm::Rms { weight, eps } => (NormKind::Rms, weight, None, *eps),
            Norm::Layer { weight, bias, eps } => (NormKind::Layer, weight, Some(bias), *eps),
        };
        let width = weight.len();
        if let Some(x) = x {
            expect("the rows of a norm", out.rows(), x.rows())?;
            expect("the width of a norm", out.width(), x.width())?;
        }
        if width == 0 || !out.width().is_multiple_of(width) {
            return Err(BackendError::Shape {
                what: "the weight of a norm",
                found: vec![width],
                needed: vec![out.width()],
            });
        }
        if out.rows() == 0 {
            return Ok(());
        }
        let place = |vector: &WgpuWeight| {
            let part = vector.parts().first();
            let missing = BackendError::Shape { what: "a norm's parts", found: vec![0], needed: vec![1] };
            part.map(|part| (part.buffer.clone(), part.offset as u32)).ok_or(missing)
        };
        let (weight_buffer, weight_offset) = place(weight)?;
        let bias = bias
            .map(|bias| {
                expect("the bias of a norm", bias.len(), width)?;
                place(bias)
            })
            .transpose()?;
        let args = NormArgs {
            rows: out.rows() as u32,
            parts: (out.width() / width) as u32,
            width: width as u32,
            eps,
            x: x.map_or(Rows::default(), WgpuTensor::place),
            out: out.place(),
            weight: weight_offset,
            bias: bias.as_ref().map_or(0, |(_, offset)| *offset),
        };
        let mut buffers = vec![&weight_buffer];
        buffers.extend(bias.as_ref().map(|(buffer, _)| buffer));
        buffers.extend(x.map(WgpuTensor::buffer));
        buffers.push(out.buffer());
        let kernel = Kernel::Norm(NormSpec { kind, in_place: x.is_none() });
        self.dispatch(kernel, &buffers, args.uniform(), args.workgroups(self.per_dimension()))
    }

    /// What goes into a product, normed if it must be.
    fn rows_of<'a>(&self, input: Input<'a, WgpuWeight, WgpuTensor>) -> Result<&'a WgpuTensor, BackendError> {
        match input {
            Input::Rows(x) => Ok(x),
            Input::Normed { x, norm, room } => {
                self.norm_rows(Some(x), norm, room)?;
                Ok(room)
            }
        }
    }

    /// One matrix, or several that lie one behind the other as their outputs do.
    fn product(&self, x: &WgpuTensor, product: &Product<'_>) -> Result<(), BackendError> {
        let Product { weight, bias, out, out_features, accumulate } = *product;
        expect("the input of a product", x.width(), weight.width())?;
        expect("the rows of a product", out.rows(), x.rows())?;
        if x.rows() == 0 {
            return Ok(());
        }
        let bias = bias.and_then(|bias| bias.parts().first());
        let form = Form::for_rows(x.rows() as u32);
        let spec = ProductSpec { dtype: weight.dtype(), form };
        for (index, part) in weight.parts().iter().enumerate() {
            // A weight of several parts stands alone, so the last ends with it.
            let last = index + 1 == weight.parts().len();
            let features = if last { out_features - part.first_row } else { part.rows };
            let first = part.first_row as u32;
            let place = out.place();
            let args = ProductArgs {
                rows: x.rows() as u32,
                in_features: x.width() as u32,
                out_features: features as u32,
                x: x.place(),
                weight: Rows { offset: part.offset as u32, stride: weight.stride() as u32 },
                bias: bias.map(|bias| bias.offset as u32 + first),
                out: Rows { offset: place.offset + first, ..place },
                accumulate,
            };
            let no_bias = &self.no_bias;
            let bias = bias.map_or(no_bias, |Part { buffer, .. }| buffer);
            let buffers = [x.buffer(), &part.buffer, bias, out.buffer()];
            let uniform = spec.uniform(&args).map_err(WgpuError::from)?;
            let workgroups = spec.workgroups(&args, self.per_dimension());
            self.dispatch(Kernel::Product(spec), &buffers, uniform, workgroups)?;
        }
        Ok(())
    }

    fn elementwise(
        &self,
        op: Elementwise,
        inputs: &[&WgpuTensor],
        factor: f32,
        out: &WgpuTensor,
    ) -> Result<(), BackendError> {
        for input in inputs {
            expect("the rows of an element-wise operation", input.rows(), out.rows())?;
            expect("the width of an element-wise operation", input.width(), out.width())?;
        }
        if out.rows() == 0 {
            return Ok(());
        }
        let place = |index: usize| inputs.get(index).map_or(Rows::default(), |tensor| tensor.place());
        let args = ElementwiseArgs {
            rows: out.rows() as u32,
            width: out.width() as u32,
            x: place(0),
            y: place(1),
            out: out.place(),
            factor,
        };
        let mut buffers: Vec<&Buffer> = inputs.iter().map(|tensor| tensor.buffer()).collect();
        buffers.push(out.buffer());
        let workgroups = args.workgroups(self.per_dimension());
        self.dispatch(Kernel::Elementwise(op), &buffers, args.uniform(), workgroups)
    }

    fn rotate(&self, step: &WgpuStep<'_>, q: &WgpuTensor, k: &WgpuTensor) -> Result<(), BackendError> {
        let Some(rope) = &step.spec.rope else { return Ok(()) };
        let cos_sin = lock(&self.work).memory.cos_sin()?.clone();
        let heads = |x: &WgpuTensor| x.width().checked_div(rope.head_dim()).unwrap_or(0);
        let rotate = |x: &WgpuTensor, heads: usize| {
            let args = RotaryArgs {
                rows: x.rows() as u32,
                heads: heads as u32,
                head_dim: rope.head_dim() as u32,
                half: rope.frequencies().len() as u32,
                x: x.place(),
            };
            let workgroups = args.workgroups(self.per_dimension());
            self.dispatch(Kernel::Rotary, &[&cos_sin, x.buffer()], args.uniform(), workgroups)
        };
        if rope.frequencies().is_empty() {
            return Ok(());
        }
        if q.is_followed_by(k) {
            return rotate(q, heads(q) + heads(k));
        }
        rotate(q, heads(q))?;
        rotate(k, heads(k))
    }
}

/// One product, or several as one.
#[derive(Clone, Copy)]
struct Product<'a> {
    weight: &'a WgpuWeight,
    bias: Option<&'a WgpuWeight>,
    out: &'a WgpuTensor,
    out_features: usize,
    accumulate: bool,
}

/// Whether two outputs of the same rows, and the matrices and biases behind them, lie one behind the other.
fn are_one(
    (this, out): (&Linear<WgpuWeight>, &WgpuTensor),
    (next, next_out): (&Linear<WgpuWeight>, &WgpuTensor),
) -> bool {
    let biases = match (&this.bias, &next.bias) {
        (None, None) => true,
        (Some(bias), Some(next)) => bias.is_followed_by(next),
        _ => false,
    };
    biases && this.weight.is_followed_by(&next.weight) && out.is_followed_by(next_out)
}

fn expect(what: &'static str, found: usize, expected: usize) -> Result<(), BackendError> {
    if found == expected {
        Ok(())
    } else {
        Err(BackendError::Shape { what, found: vec![found], needed: vec![expected] })
    }
}

fn check_linear(linear: &Linear<WgpuWeight>, out: &WgpuTensor) -> Result<(), BackendError> {
    expect("the output of a product", out.width(), linear.out_features)?;
    expect("the rows of a matrix", linear.weight.rows(), linear.out_features)?;
    match &linear.bias {
        Some(bias) => expect("a bias", bias.len(), linear.out_features),
        None => Ok(()),
    }
}

fn function(activation: Activation) -> Function {
    match activation {
        Activation::Silu => Function::Silu,
        Activation::Relu => Function::Relu,
        Activation::Gelu => Function::Gelu,
        Activation::GeluTanh => Function::GeluTanh,
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
        self.uploader.upload(&self.gpu, weights)
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
        work.recorder.restart();
        work.memory.begin(&self.gpu, &step)?;
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
        let Work { recorder, memory } = &mut *work;
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
        let Work { recorder, memory } = &mut *work;
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
        let rows = step.batch.logit_rows.len();
        let out = self.stream(rows, x.width())?;
        if rows == 0 {
            return Ok(out);
        }
        let numbers = lock(&self.work).memory.logit_rows()?.clone();
        let args = LookupArgs {
            rows: rows as u32,
            width: x.width() as u32,
            numbers: 0,
            number_offset: 0,
            first_row: 0,
            table_rows: x.rows() as u32,
            table: x.place(),
            out: out.place(),
        };
        let kernel = Kernel::Lookup(LookupSpec { dtype: DType::F32, adds: false });
        let buffers = [&numbers, x.buffer(), out.buffer()];
        self.dispatch(kernel, &buffers, args.uniform(), args.workgroups(self.per_dimension()))?;
        Ok(out)
    }

    fn answers(&self, wanted: &RowWanted) -> bool {
        match wanted {
            RowWanted::Logits => true,
            RowWanted::Token(token) => {
                token.sampling.is_greedy() && token.changes.is_empty() && token.logprobs.is_none()
            }
            _ => false,
        }
    }

    fn output(&self, logits: Option<WgpuTensor>, wanted: &[RowWanted]) -> Result<WgpuOutput, BackendError> {
        let mut work = lock(&self.work);
        let Work { recorder, memory } = &mut *work;
        let Some(logits) = logits.filter(|logits| logits.rows() > 0) else {
            return Ok(WgpuOutput {
                reading: recorder.submit(&self.gpu, &[])?,
                rows: Vec::new(),
                width: [0, 0],
            });
        };
        let chosen =
            |row: usize| matches!(wanted.get(row), Some(token @ RowWanted::Token(_)) if self.answers(token));
        let ids = memory.ids(&self.gpu, logits.rows())?;
        let mut pieces = Vec::new();
        if (0..logits.rows()).any(chosen) {
            recorder.argmax(&self.gpu, &logits, &ids)?;
            pieces.push(Piece { buffer: &ids, start: 0, bytes: 4 * logits.rows() as u64 });
        }
        let row_bytes = 4 * logits.stride() as u64;
        let mut whole = 0;
        let rows = (0..logits.rows()).map(|row| {
            if chosen(row) {
                return RowOutput::Token(None);
            }
            let start = row as u64 * row_bytes;
            match pieces.last_mut() {
                Some(piece) if piece.buffer == logits.buffer() && piece.start + piece.bytes == start => {
                    piece.bytes += row_bytes;
                }
                _ => pieces.push(Piece { buffer: logits.buffer(), start, bytes: row_bytes }),
            }
            whole += 1;
            RowOutput::Logits(whole - 1)
        });
        let rows = rows.collect();
        let reading = recorder.submit(&self.gpu, &pieces)?;
        Ok(WgpuOutput { reading, rows, width: [logits.width(), logits.stride()] })
    }

    fn wait(&self, output: WgpuOutput) -> Result<StepOutput, BackendError> {
        let WgpuOutput { reading, mut rows, width: [vocab_size, stride] } = output;
        let words = lock(&self.work).recorder.receive(&self.gpu, reading)?;
        let is_token = |row: &RowOutput| matches!(row, RowOutput::Token(_));
        let (ids, words) = match rows.iter().any(is_token) {
            true => words.split_at_checked(rows.len()).unwrap_or_default(),
            false => (&[][..], words.as_slice()),
        };
        for (row, &id) in rows.iter_mut().zip(ids).filter(|(row, _)| is_token(row)) {
            *row = RowOutput::Token((id != argmax::NO_TOKEN).then(|| TokenOutput::new(id)));
        }
        let row =
            |row: &[u32]| row.iter().take(vocab_size).map(|&bits| f32::from_bits(bits)).collect::<Vec<_>>();
        let logits = words.chunks_exact(stride.max(1)).flat_map(row).collect();
        Ok(StepOutput { rows, logits, vocab_size })
    }
}

/// What a step gives, on its way to the host: token ids if any are wanted, then rows of logits.
#[derive(Debug)]
pub struct WgpuOutput {
    reading: Reading,
    rows: Vec<RowOutput>,
    /// Of a row of logits, and from one to the next.
    width: [usize; 2],
}
