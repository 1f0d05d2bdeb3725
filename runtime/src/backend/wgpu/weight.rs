//! Weights on the device: rows filled up with zeros to whole vectors, in buffers that one binding holds. A matrix that
//! is larger lies in several, some of its rows in each; vectors (biases, norms) are widened to f32.

use super::device::{Gpu, WEIGHTS, lock};
use super::kernels::Kernel;
use super::recorder::{Dispatch, Recorder};
use super::tensor::ALIGNMENT;
use crate::backend::BackendError;
use crate::backend::cpu::dense::DenseError;
use crate::model_dir::{MadeUp, WeightTensor};
use pagewise_attention::wgpu::WgpuError;
use pagewise_attention::wgpu::wgpu::Buffer;
use pagewise_attention::{DType, HostTensor};
use pagewise_shaders::model::Rows as Place;
use pagewise_shaders::model::fill_weights::{FillWeightsArgs, FillWeightsSpec};
use std::borrow::Cow;
use std::ops::Range;
use std::sync::{Arc, Mutex};

/// A matrix `[rows, width]` or, with one row, a vector.
#[derive(Clone, Debug)]
pub struct WgpuWeight {
    parts: Arc<[Part]>,
    dtype: pagewise_shaders::DType,
    rows: usize,
    width: usize,
    vector: bool,
}

/// Some rows of a weight in a buffer of their own, or behind those of another weight.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) buffer: Buffer,
    /// First element.
    pub(super) offset: usize,
    /// First row.
    pub(super) first_row: usize,
    pub(super) rows: usize,
}

impl WgpuWeight {
    pub(super) fn parts(&self) -> &[Part] {
        &self.parts
    }

    pub(super) fn dtype(&self) -> pagewise_shaders::DType {
        self.dtype
    }

    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// Elements of a row, without what fills it up.
    pub(super) fn width(&self) -> usize {
        self.width
    }

    pub(super) fn stride(&self) -> usize {
        self.width.next_multiple_of(ALIGNMENT)
    }

    /// Elements of a vector.
    pub(super) fn len(&self) -> usize {
        self.rows * self.width
    }

    /// Whether `next` lies right behind this one, so that both are one matrix (or vector).
    pub(super) fn is_followed_by(&self, next: &Self) -> bool {
        let ([this], [other]) = (self.parts(), next.parts()) else { return false };
        let length = if self.vector { self.width } else { self.rows * self.stride() };
        let alike = (self.dtype, self.vector) == (next.dtype, next.vector)
            && (self.vector || self.width == next.width);
        alike && this.buffer == other.buffer && this.offset + length == other.offset
    }
}

/// Brings weights to the device.
#[derive(Debug)]
pub(super) struct Uploader {
    /// Bytes of the largest buffer.
    pub(super) largest: u64,
    /// Bytes that were sent and may still lie in the host's memory.
    under_way: Mutex<u64>,
}

/// When so many bytes are under way, they are waited for.
const MOST_UNDER_WAY: u64 = 256 << 20;

impl Uploader {
    pub(super) fn new(largest: u64) -> Self {
        Self { largest, under_way: Mutex::new(0) }
    }

    /// Weights that may lie one behind the other.
    pub(super) fn upload(
        &self,
        gpu: &Gpu,
        recorder: &mut Recorder,
        weights: Vec<WeightTensor>,
    ) -> Result<Vec<WgpuWeight>, BackendError> {
        let weights: Vec<Rows> = weights.into_iter().map(Rows::new).collect::<Result<_, _>>()?;
        let uploaded = self.place(gpu, recorder, &weights)?;
        if weights.iter().any(|weight| weight.tensor.made_up().is_some()) {
            recorder.submit(gpu, &[])?;
            recorder.forget_bindings();
        }
        Ok(uploaded)
    }

    fn place(
        &self,
        gpu: &Gpu,
        recorder: &mut Recorder,
        weights: &[Rows],
    ) -> Result<Vec<WgpuWeight>, BackendError> {
        let bytes: u64 = weights.iter().map(Rows::bytes).sum();
        let alike = |a: &Rows, b: &Rows| {
            a.dtype == b.dtype && a.vector == b.vector && (a.vector || a.width == b.width)
        };
        let together = weights.iter().zip(weights.iter().skip(1)).all(|(a, b)| alike(a, b));
        if weights.len() < 2 || !together || bytes > self.largest {
            return weights.iter().map(|weight| self.alone(gpu, recorder, weight)).collect();
        }
        let buffer = gpu.storage(WEIGHTS, bytes)?;
        let mut at = 0;
        let mut uploaded = Vec::with_capacity(weights.len());
        for weight in weights {
            self.put(gpu, recorder, weight, 0..weight.rows, (&buffer, at))?;
            let offset = (at / weight.dtype.size() as u64) as usize;
            let part = Part { buffer: buffer.clone(), offset, first_row: 0, rows: weight.rows };
            uploaded.push(weight.on_device(vec![part]));
            at += weight.bytes();
        }
        Ok(uploaded)
    }

    fn alone(&self, gpu: &Gpu, recorder: &mut Recorder, weight: &Rows) -> Result<WgpuWeight, BackendError> {
        let row_bytes = weight.row_bytes();
        let most = ((self.largest / row_bytes.max(1)) as usize).max(1);
        let mut parts = Vec::new();
        for first_row in (0..weight.rows).step_by(most) {
            let rows = most.min(weight.rows - first_row);
            let buffer = gpu.storage(WEIGHTS, rows as u64 * row_bytes)?;
            self.put(gpu, recorder, weight, first_row..first_row + rows, (&buffer, 0))?;
            parts.push(Part { buffer, offset: 0, first_row, rows });
        }
        Ok(weight.on_device(parts))
    }

    /// Some rows of a weight, from a byte of a buffer on: sent, or made there.
    fn put(
        &self,
        gpu: &Gpu,
        recorder: &mut Recorder,
        weight: &Rows,
        rows: Range<usize>,
        (buffer, at): (&Buffer, u64),
    ) -> Result<(), BackendError> {
        let Some(MadeUp { seed, first, center, spread }) = weight.tensor.made_up() else {
            return self.write(gpu, buffer, at, &weight.packed(rows));
        };
        if rows.is_empty() || weight.width == 0 {
            return Ok(());
        }
        let offset = (at / weight.dtype.size() as u64) as u32;
        let args = FillWeightsArgs {
            rows: rows.len() as u32,
            width: weight.width as u32,
            out: Place { offset, stride: weight.stride() as u32 },
            first: first.wrapping_add(rows.start as u64 * weight.width as u64),
            seed,
            center,
            spread,
        };
        let spec = FillWeightsSpec { dtype: weight.shader_dtype };
        let uniform = spec.uniform(&args).map_err(WgpuError::from)?;
        let workgroups = spec.workgroups(&args, gpu.per_dimension());
        let kernel = Kernel::FillWeights(spec);
        recorder.dispatch(gpu, Dispatch { kernel, buffers: &[buffer], uniform, workgroups })
    }

    fn write(&self, gpu: &Gpu, buffer: &Buffer, at: u64, bytes: &[u8]) -> Result<(), BackendError> {
        gpu.context.queue().write_buffer(buffer, at, bytes);
        let mut under_way = lock(&self.under_way);
        *under_way += bytes.len() as u64;
        if *under_way < MOST_UNDER_WAY {
            return gpu.check();
        }
        *under_way = 0;
        let submission = gpu.context.queue().submit([]);
        gpu.wait(Some(submission))
    }
}

/// A weight on the host as rows.
struct Rows {
    tensor: WeightTensor,
    dtype: DType,
    shader_dtype: pagewise_shaders::DType,
    rows: usize,
    width: usize,
    vector: bool,
}

impl Rows {
    fn new(tensor: WeightTensor) -> Result<Self, BackendError> {
        let vector = tensor.shape().len() < 2;
        let tensor = if vector { tensor.to_dtype(DType::F32) } else { tensor };
        let (width, rows) = match tensor.shape().split_last() {
            Some((width, rest)) => (*width, rest.iter().product()),
            None => (1, 1),
        };
        let dtype = tensor.dtype();
        let shader_dtype = match dtype {
            DType::F32 => pagewise_shaders::DType::F32,
            DType::F16 => pagewise_shaders::DType::F16,
            DType::Bf16 => pagewise_shaders::DType::Bf16,
            DType::F8E4M3 | DType::F8E5M2 => {
                return Err(DenseError::DType { what: "a weight", dtype }.into());
            }
        };
        Ok(Self { tensor, dtype, shader_dtype, rows, width, vector })
    }

    /// Vectors are not filled up: they are read element by element, and lie one behind the other.
    fn stride(&self) -> usize {
        if self.vector { self.width } else { self.width.next_multiple_of(ALIGNMENT) }
    }

    fn row_bytes(&self) -> u64 {
        (self.stride() * self.dtype.size()) as u64
    }

    fn bytes(&self) -> u64 {
        self.rows as u64 * self.row_bytes()
    }

    /// Rows as they lie on the device.
    fn packed(&self, rows: Range<usize>) -> Cow<'_, [u8]> {
        let bytes: &[u8] = match self.tensor.host() {
            HostTensor::F32(x) => bytemuck::cast_slice(x),
            HostTensor::F16(x) => bytemuck::cast_slice(x),
            HostTensor::Bf16(x) => bytemuck::cast_slice(x),
            HostTensor::F8E4M3(x) | HostTensor::F8E5M2(x) => x,
        };
        let row = self.width * self.dtype.size();
        let bytes = bytes.get(rows.start * row..rows.end * row).unwrap_or_default();
        let filled = self.row_bytes() as usize;
        if row == filled || row == 0 {
            return Cow::Borrowed(bytes);
        }
        let mut packed = vec![0; rows.len() * filled];
        for (to, from) in packed.chunks_exact_mut(filled).zip(bytes.chunks_exact(row)) {
            to.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
        }
        Cow::Owned(packed)
    }

    fn on_device(&self, parts: Vec<Part>) -> WgpuWeight {
        let Self { shader_dtype: dtype, rows, width, vector, .. } = *self;
        WgpuWeight { parts: parts.into(), dtype, rows, width, vector }
    }
}
