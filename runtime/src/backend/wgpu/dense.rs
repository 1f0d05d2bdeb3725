//! What the dense operations are on the device: which kernel runs over which tensors, part by part of a weight.

use super::WgpuBackend;
use super::device::lock;
use super::kernels::Kernel;
use super::recorder::Dispatch;
use super::step::WgpuStep;
use super::tensor::WgpuTensor;
use super::weight::{Part, WgpuWeight};
use crate::backend::{BackendError, Input, Linear, Norm};
use crate::model_dir::Activation;
use pagewise_attention::wgpu::WgpuError;
use pagewise_attention::wgpu::wgpu::Buffer;
use pagewise_shaders::DType;
use pagewise_shaders::model::elementwise::{Elementwise, ElementwiseArgs, Function};
use pagewise_shaders::model::lookup::{LookupArgs, LookupSpec};
use pagewise_shaders::model::norm::{NormArgs, NormKind, NormSpec};
use pagewise_shaders::model::product::{Form, ProductArgs, ProductSpec};
use pagewise_shaders::model::rotary::RotaryArgs;
use pagewise_shaders::model::{PARAM_WORDS, Rows};

impl WgpuBackend {
    pub(super) fn dispatch(
        &self,
        kernel: Kernel,
        buffers: &[&Buffer],
        uniform: [u32; PARAM_WORDS],
        workgroups: Result<[u32; 3], pagewise_shaders::Error>,
    ) -> Result<(), BackendError> {
        let dispatch = Dispatch { kernel, buffers, uniform, workgroups };
        lock(&self.work).recorder.dispatch(&self.gpu, dispatch)
    }

    /// Looks up rows of a table, part by part: each row is in one of them.
    pub(super) fn lookup(
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
            self.dispatch(kernel, &buffers, args.uniform(), args.workgroups(self.gpu.per_dimension()))?;
        }
        Ok(())
    }

    /// The rows whose logits the step asks for.
    pub(super) fn gather(&self, step: &WgpuStep<'_>, x: &WgpuTensor) -> Result<WgpuTensor, BackendError> {
        let rows = step.batch.logit_rows.len();
        let [out] = self.pool.beside(&self.gpu, rows, [x.width()])?;
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
        self.dispatch(kernel, &buffers, args.uniform(), args.workgroups(self.gpu.per_dimension()))?;
        Ok(out)
    }

    pub(super) fn norm_rows(
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
        self.dispatch(kernel, &buffers, args.uniform(), args.workgroups(self.gpu.per_dimension()))
    }

    /// What goes into a product, normed if it must be.
    pub(super) fn rows_of<'a>(
        &self,
        input: Input<'a, WgpuWeight, WgpuTensor>,
    ) -> Result<&'a WgpuTensor, BackendError> {
        match input {
            Input::Rows(x) => Ok(x),
            Input::Normed { x, norm, room } => {
                self.norm_rows(Some(x), norm, room)?;
                Ok(room)
            }
        }
    }

    /// One matrix, or several that lie one behind the other as their outputs do.
    pub(super) fn product(&self, x: &WgpuTensor, product: &Product<'_>) -> Result<(), BackendError> {
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
            let workgroups = spec.workgroups(&args, self.gpu.per_dimension());
            self.dispatch(Kernel::Product(spec), &buffers, uniform, workgroups)?;
        }
        Ok(())
    }

    pub(super) fn elementwise(
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
        let workgroups = args.workgroups(self.gpu.per_dimension());
        self.dispatch(Kernel::Elementwise(op), &buffers, args.uniform(), workgroups)
    }

    pub(super) fn rotate(
        &self,
        step: &WgpuStep<'_>,
        q: &WgpuTensor,
        k: &WgpuTensor,
    ) -> Result<(), BackendError> {
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
            let workgroups = args.workgroups(self.gpu.per_dimension());
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
pub(super) struct Product<'a> {
    pub(super) weight: &'a WgpuWeight,
    pub(super) bias: Option<&'a WgpuWeight>,
    pub(super) out: &'a WgpuTensor,
    pub(super) out_features: usize,
    pub(super) accumulate: bool,
}

/// Whether two outputs of the same rows, and the matrices and biases behind them, lie one behind the other.
pub(super) fn are_one(
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

pub(super) fn check_linear(linear: &Linear<WgpuWeight>, out: &WgpuTensor) -> Result<(), BackendError> {
    expect("the output of a product", out.width(), linear.out_features)?;
    expect("the rows of a matrix", linear.weight.rows(), linear.out_features)?;
    match &linear.bias {
        Some(bias) => expect("a bias", bias.len(), linear.out_features),
        None => Ok(()),
    }
}

pub(super) fn function(activation: Activation) -> Function {
    match activation {
        Activation::Silu => Function::Silu,
        Activation::Relu => Function::Relu,
        Activation::Gelu => Function::Gelu,
        Activation::GeluTanh => Function::GeluTanh,
    }
}
