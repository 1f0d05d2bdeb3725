//! The dense layers: which products are one, and which way each takes.
//!
//! Few rows are multiplied by our own kernel, which reads the weights at memory speed and does on its way what stands
//! before and behind the product; many by cuBLASLt. Both sum in f32. Owns that choice; the launches are `kernels.rs`'s
//! and `blaslt`'s.

mod factor;

use pagewise_attention::DType;
use pagewise_attention::cuda::ptx::model::activate::ActivateArgs;
use pagewise_attention::cuda::ptx::model::add::AddArgs;
use pagewise_attention::cuda::ptx::model::matvec::{self, MatvecArgs, MatvecNorm, MatvecShape, Store};
use pagewise_attention::cuda::ptx::model::norm::{NormArgs, NormKind, Parts};
use pagewise_attention::cuda::ptx::model::{Activation as Function, Rows};

use factor::{Behind, Factor, Operand, activated_factor, function};

use super::CudaBackend;
use super::blaslt::{Matrix, Product};
use super::kernels::small;
use super::tensor::{CudaTensor, CudaWeight, shape_error};
use crate::backend::{Activated, BackendError, Input, Linear, Norm};

/// Rows that our own kernel takes: with more, cuBLASLt is quicker.
const FEW_ROWS: usize = 8;

/// Rows that our own kernel norms on the way: with more, a kernel of its own does it quicker.
const NORMED_ROWS: usize = 2;

/// Elements of a row of a stream that our own kernel converts: what eight rows of take the shared memory that it has.
const MAX_STREAM: usize = 4096;

impl CudaBackend {
    pub(super) fn norm_into(
        &self,
        x: &CudaTensor,
        norm: &Norm<CudaWeight>,
        out: &CudaTensor,
    ) -> Result<(), BackendError> {
        let (weight, bias, eps, kind) = match norm {
            Norm::Rms { weight, eps } => (weight, None, *eps, NormKind::Rms),
            Norm::Layer { weight, bias, eps } => (weight, Some(bias), *eps, NormKind::Layer),
        };
        let [width] = *weight.shape else {
            return Err(shape_error("a norm's weight", &weight.shape, &[x.width]));
        };
        if width == 0 || !x.width.is_multiple_of(width) || (out.rows, out.width) != (x.rows, x.width) {
            return Err(shape_error("the output of a norm", &[out.rows, out.width], &[x.rows, x.width]));
        }
        let parts = |tensor: &CudaTensor| Parts {
            address: tensor.address,
            row_stride: tensor.stride as u64,
            part_stride: width as u64,
        };
        let args = NormArgs {
            rows: x.rows32()?,
            parts: small("the heads of a norm", x.width / width)?,
            width: small("the width of a norm", width)?,
            kind,
            eps,
            x: parts(x),
            weight: weight.vector("a norm's weight", width)?,
            bias: bias.map_or(Ok(0), |bias| bias.vector("a norm's bias", width))?,
            out: parts(out),
        };
        // SAFETY: tensors are as large as their shapes, vectors as the width.
        unsafe { self.kernels().norm(x.dtype, out.dtype, &args) }
    }

    /// Rows of the compute type: normed or converted, where they are not that yet.
    fn direct(&self, operand: &Operand<'_>) -> Result<CudaTensor, BackendError> {
        match operand {
            Operand::Direct(x) => Ok(x.again()),
            Operand::Normed { x, norm, room } => {
                self.norm_into(x, norm, room)?;
                Ok(room.again())
            }
            // Our own kernel converts on the way, unless a row is longer than any model's.
            Operand::Stream(x) => Err(shape_error("a stream that is multiplied", &[x.width], &[MAX_STREAM])),
        }
    }

    /// The operand as it is worked on: in f32 where our own kernel norms it on the way.
    fn operand<'a>(&self, input: Input<'a, CudaWeight, CudaTensor>) -> Result<Operand<'a>, BackendError> {
        let operand = Operand::of(input, self.dtype());
        let stays = match &operand {
            Operand::Direct(_) => true,
            Operand::Normed { x, .. } => x.rows <= NORMED_ROWS && x.dtype == DType::F32,
            Operand::Stream(_) => true,
        };
        if stays { Ok(operand) } else { Ok(Operand::Direct(self.direct(&operand)?)) }
    }

    pub(super) fn products(
        &self,
        input: Input<'_, CudaWeight, CudaTensor>,
        outputs: &mut [(&Linear<CudaWeight>, &mut CudaTensor)],
    ) -> Result<(), BackendError> {
        let mut operand = self.operand(input)?;
        let (rows, width) = operand.shape();
        let mut factors: Vec<Factor> = Vec::with_capacity(outputs.len());
        for (linear, out) in outputs {
            if out.rows != rows {
                return Err(shape_error("the output of a product", &[out.rows, out.width], &[rows]));
            }
            let next = Factor::new(linear, out, width)?;
            match factors.last_mut().and_then(|last| Some((last.with(&next, self.dtype().size())?, last))) {
                Some((both, last)) => *last = both,
                None => factors.push(next),
            }
        }
        let plain = Behind { activation: Function::None, gated: false, adds: false, beside: false };
        factors.iter().try_for_each(|factor| self.multiply(&mut operand, factor, plain))
    }

    pub(super) fn add_product(
        &self,
        x: &CudaTensor,
        linear: &Linear<CudaWeight>,
        sum: &CudaTensor,
    ) -> Result<(), BackendError> {
        if sum.rows != x.rows || sum.dtype != DType::F32 {
            return Err(shape_error("a sum", &[sum.rows, sum.width], &[x.rows, linear.out_features]));
        }
        let adds = Behind {
            activation: Function::None,
            gated: false,
            adds: true,
            beside: x.address == self.attended(),
        };
        self.multiply(&mut self.operand(Input::Rows(x))?, &Factor::new(linear, sum, x.width)?, adds)
    }

    /// A product, our own or the library's. Of an operand that turns out not to fit our own kernel it leaves the rows of
    /// the compute type.
    fn multiply(
        &self,
        operand: &mut Operand<'_>,
        factor: &Factor,
        behind: Behind,
    ) -> Result<(), BackendError> {
        let (rows, _) = operand.shape();
        if rows == 0 || factor.n == 0 {
            return Ok(());
        }
        // A stream is converted there, eight rows at a time.
        let is_few = rows <= FEW_ROWS || matches!(operand, Operand::Stream(_));
        if is_few && self.multiply_few(operand, factor, behind)? {
            return Ok(());
        }
        let x = self.direct(operand)?;
        *operand = Operand::Direct(x.again());
        if rows <= FEW_ROWS && self.multiply_few(operand, factor, behind)? {
            return Ok(());
        }
        self.multiply_many(&x, factor, behind.adds)
    }

    /// A product of few rows by our own kernel; `false` if the operand does not fit it.
    fn multiply_few(
        &self,
        operand: &Operand<'_>,
        factor: &Factor,
        behind: Behind,
    ) -> Result<bool, BackendError> {
        let (x, norm, input) = match operand {
            Operand::Direct(x) => (x, None, matvec::Input::Direct),
            Operand::Stream(x) => (*x, None, matvec::Input::Staged),
            Operand::Normed { x, norm, .. } => {
                (*x, Some(self.matvec_norm(norm, x.width)?), matvec::Input::Staged)
            }
        };
        let Factor { weight, n, k, bias: [_, bias], out, stride, dtype } = *factor;
        let features = if behind.gated { n / 2 } else { n };
        let args = MatvecArgs {
            shape: MatvecShape {
                rows: x.rows32()?,
                features: small("the features of a product", features)?,
                width: x.width32()?,
            },
            x: x.view(),
            norm,
            weight: Rows { address: weight, stride: k as u64 },
            bias,
            activation: behind.activation,
            store: match dtype {
                _ if behind.adds => Store::Add,
                DType::F32 => Store::F32,
                _ => Store::Compute,
            },
            out: Rows { address: out, stride: stride as u64 },
        };
        // SAFETY: weights and tensors are as large as their shapes, which were compared.
        unsafe { self.kernels().matvec(self.dtype(), input, behind.gated, behind.beside, &args) }
    }

    fn matvec_norm(&self, norm: &Norm<CudaWeight>, width: usize) -> Result<MatvecNorm, BackendError> {
        let what = "a norm's vector";
        Ok(match norm {
            Norm::Rms { weight, eps } => {
                MatvecNorm { kind: NormKind::Rms, eps: *eps, weight: weight.vector(what, width)?, bias: 0 }
            }
            Norm::Layer { weight, bias, eps } => MatvecNorm {
                kind: NormKind::Layer,
                eps: *eps,
                weight: weight.vector(what, width)?,
                bias: bias.vector(what, width)?,
            },
        })
    }

    /// A product by the library.
    fn multiply_many(&self, x: &CudaTensor, factor: &Factor, adds: bool) -> Result<(), BackendError> {
        let Factor { weight, n, k, bias: [narrow, wide], out, stride, dtype } = *factor;
        let bias = if dtype == DType::F32 { wide } else { narrow };
        let out = Matrix { address: out, stride, dtype };
        let product = Product { rows: x.rows, x: x.matrix(), k, weight, n, bias, out, adds };
        // SAFETY: weights and tensors are as large as their shapes, which were compared.
        unsafe {
            if self.blaslt().product(&product)? {
                return Ok(());
            }
            // The library has no algorithm that adds this bias: we add it.
            if bias != 0 && self.blaslt().product(&Product { bias: 0, ..product })? {
                return self.add_bias(x.rows, n, out, wide);
            }
        }
        let problem = format!(
            "cuBLASLt {} has no algorithm for {} rows of {k} {} times {n} into {dtype}",
            self.blaslt().version(),
            x.rows,
            x.dtype
        );
        Err(BackendError::Library(problem))
    }

    /// `out += bias`
    ///
    /// # Safety
    /// `out` is `[rows, n]`, the bias f32 `[n]`.
    unsafe fn add_bias(&self, rows: usize, n: usize, out: Matrix, bias: u64) -> Result<(), BackendError> {
        let rows = small("the rows of a step", rows)?;
        let width = small("the width of a tensor", n)?;
        let view = Rows { address: out.address, stride: out.stride as u64 };
        // SAFETY: the caller's.
        unsafe {
            if out.dtype == DType::F32 {
                let args = AddArgs { rows, width, x: view, y: Rows::default(), bias };
                return self.kernels().add(DType::F32, &args);
            }
            let args = ActivateArgs { rows, width, x: view, bias, out: view, ..ActivateArgs::default() };
            self.kernels().activate(out.dtype, &args)
        }
    }

    pub(super) fn activated_products(
        &self,
        input: Input<'_, CudaWeight, CudaTensor>,
        activated: Activated<'_, CudaWeight>,
        [first, second]: &mut [CudaTensor; 2],
        out: &CudaTensor,
    ) -> Result<(), BackendError> {
        let mut operand = self.operand(input)?;
        let (rows, width) = operand.shape();
        if (out.rows, out.dtype, out.stride) != (rows, self.dtype(), out.width) {
            return Err(shape_error("activated rows", &[out.rows, out.stride], &[rows, out.width]));
        }
        // Few rows: both products and what is done with them in one launch.
        let factor = activated_factor(&activated, out, width)?;
        if rows <= FEW_ROWS
            && let Some((factor, behind)) = factor
        {
            return self.multiply(&mut operand, &factor, behind);
        }
        if let Operand::Normed { .. } = operand {
            operand = Operand::Direct(self.direct(&operand)?);
        }
        let x = match &operand {
            Operand::Direct(x) | Operand::Normed { room: x, .. } => x.again(),
            Operand::Stream(x) => x.again(),
        };
        let (activation, up) = match activated {
            Activated::Gated { activation, gate, up } => {
                self.products(Input::Rows(&x), &mut [(gate, first), (up, second)])?;
                (activation, second.view())
            }
            Activated::Plain { activation, up } => {
                self.products(Input::Rows(&x), &mut [(up, first)])?;
                (activation, Rows::default())
            }
        };
        if (out.rows, out.width, out.dtype) != (first.rows, first.width, first.dtype) {
            return Err(shape_error("activated rows", &[out.rows, out.width], &[first.rows, first.width]));
        }
        if out.rows == 0 || out.width == 0 {
            return Ok(());
        }
        let args = ActivateArgs {
            rows: out.rows32()?,
            width: out.width32()?,
            activation: function(activation),
            x: first.view(),
            bias: 0,
            up,
            out: out.view(),
        };
        // SAFETY: tensors are as large as their shapes, which were compared.
        unsafe { self.kernels().activate(out.dtype, &args) }
    }
}
