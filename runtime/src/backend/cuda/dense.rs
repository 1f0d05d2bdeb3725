//! The dense layers: which products are one, and which way each takes.
//!
//! Few rows are multiplied by our own kernel, which reads the weights at memory speed and does on its way what stands
//! before and behind the product; many by cuBLASLt. Both sum in f32. Owns that choice; the launches are `kernels.rs`'s
//! and `blaslt`'s.

use pagewise_attention::DType;
use pagewise_attention::cuda::ptx::model::activate::ActivateArgs;
use pagewise_attention::cuda::ptx::model::add::AddArgs;
use pagewise_attention::cuda::ptx::model::norm::{NormArgs, NormKind, Parts};
use pagewise_attention::cuda::ptx::model::{Activation as Function, Rows};

use super::CudaBackend;
use super::blaslt::Product;
use super::tensor::{CudaTensor, CudaWeight, shape_error};
use crate::backend::{Activated, BackendError, Input, Linear, Norm};
use crate::model_dir::Activation;

/// A weight, or several that lie one behind the other, and where the product goes.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Factor {
    weight: u64,
    n: usize,
    k: usize,
    /// The bias in the compute type and in f32; 0 for none.
    bias: [u64; 2],
    out: u64,
    stride: usize,
    dtype: DType,
}

impl Factor {
    fn new(linear: &Linear<CudaWeight>, out: &CudaTensor, k: usize) -> Result<Self, BackendError> {
        let Linear { weight, bias, out_features: n } = linear;
        if weight.matrix() != (*n, k) {
            return Err(shape_error("a weight", &weight.shape, &[*n, k]));
        }
        if out.width != *n {
            return Err(shape_error("the output of a product", &[out.width], &[*n]));
        }
        let bias = match bias {
            Some(bias) => [bias.address, bias.vector("a bias", *n)?],
            None => [0, 0],
        };
        Ok(Self { weight: weight.address, n: *n, k, bias, out: out.address, stride: out.stride, dtype: out.dtype })
    }

    /// The product of both, if this and the next lie one behind the other throughout.
    fn with(self, next: &Self, weight_size: usize) -> Option<Self> {
        let [narrow, wide] = self.bias;
        let follows = next.weight == self.weight + (self.n * self.k * weight_size) as u64
            && next.out == self.out + (self.n * self.dtype.size()) as u64
            && (next.k, next.stride, next.dtype) == (self.k, self.stride, self.dtype)
            && match next.bias {
                [0, 0] => self.bias == [0, 0],
                bias => {
                    narrow != 0 && bias == [narrow + (self.n * weight_size) as u64, wide + (self.n * 4) as u64]
                }
            };
        // Without rows of the wider output there is no room beside.
        (follows && self.stride >= self.n + next.n).then_some(Self { n: self.n + next.n, ..self })
    }
}

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
        let [width] = *weight.shape else { return Err(shape_error("a norm's weight", &weight.shape, &[x.width])) };
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
            parts: super::kernels::small("the heads of a norm", x.width / width)?,
            width: super::kernels::small("the width of a norm", width)?,
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

    /// The rows that go into a product, of the compute type.
    fn rows_of(&self, input: Input<'_, CudaWeight, CudaTensor>) -> Result<CudaTensor, BackendError> {
        match input {
            Input::Normed { x, norm, room } => {
                self.norm_into(x, norm, room)?;
                Ok(room.again())
            }
            Input::Rows(x) if x.dtype == self.dtype() => Ok(x.again()),
            Input::Rows(x) => {
                let narrow = self.new_tensor(x.rows, x.width, self.dtype())?;
                self.convert(x, &narrow)?;
                Ok(narrow)
            }
        }
    }

    pub(super) fn products(
        &self,
        input: Input<'_, CudaWeight, CudaTensor>,
        outputs: &mut [(&Linear<CudaWeight>, &mut CudaTensor)],
    ) -> Result<(), BackendError> {
        let x = self.rows_of(input)?;
        let mut factors: Vec<Factor> = Vec::with_capacity(outputs.len());
        for (linear, out) in outputs {
            if out.rows != x.rows {
                return Err(shape_error("the output of a product", &[out.rows, out.width], &[x.rows]));
            }
            let next = Factor::new(linear, out, x.width)?;
            match factors.last_mut().and_then(|last| Some((last.with(&next, self.dtype().size())?, last))) {
                Some((both, last)) => *last = both,
                None => factors.push(next),
            }
        }
        factors.iter().try_for_each(|factor| self.multiply(&x, factor, false))
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
        let x = self.rows_of(Input::Rows(x))?;
        self.multiply(&x, &Factor::new(linear, sum, x.width)?, true)
    }

    /// `out = x · weightᵀ + bias`, or `out += …`
    fn multiply(&self, x: &CudaTensor, factor: &Factor, adds: bool) -> Result<(), BackendError> {
        let Factor { weight, n, k, bias: [narrow, wide], out, stride, dtype } = *factor;
        if x.rows == 0 || n == 0 {
            return Ok(());
        }
        let bias = if dtype == DType::F32 { wide } else { narrow };
        let out = super::blaslt::Matrix { address: out, stride, dtype };
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
    unsafe fn add_bias(
        &self,
        rows: usize,
        n: usize,
        out: super::blaslt::Matrix,
        bias: u64,
    ) -> Result<(), BackendError> {
        let rows = super::kernels::small("the rows of a step", rows)?;
        let width = super::kernels::small("the width of a tensor", n)?;
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
        let (activation, up) = match activated {
            Activated::Gated { activation, gate, up } => {
                self.products(input, &mut [(gate, first), (up, second)])?;
                (activation, second.view())
            }
            Activated::Plain { activation, up } => {
                self.products(input, &mut [(up, first)])?;
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

fn function(activation: Activation) -> Function {
    match activation {
        Activation::Silu => Function::Silu,
        Activation::Relu => Function::Relu,
        Activation::Gelu => Function::Gelu,
        Activation::GeluTanh => Function::GeluTanh,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn factor(weight: u64, n: usize, bias: [u64; 2], out: u64) -> Factor {
        Factor { weight, n, k: 64, bias, out, stride: 96, dtype: DType::Bf16 }
    }

    #[test]
    fn products_that_lie_together_are_one() {
        let (q, k) = (factor(1 << 20, 64, [0, 0], 4096), factor((1 << 20) + 64 * 64 * 2, 16, [0, 0], 4096 + 128));
        assert_eq!(q.with(&k, 2), Some(Factor { n: 80, ..q }));
        let v = Factor { weight: k.weight + 16 * 64 * 2, out: k.out + 32, ..k };
        assert_eq!(q.with(&k, 2).unwrap().with(&v, 2), Some(Factor { n: 96, ..q }));
        // Anything out of place makes them two.
        for other in [
            Factor { weight: k.weight + 2, ..k },
            Factor { out: k.out + 2, ..k },
            Factor { stride: 95, ..k },
            Factor { k: 63, ..k },
            Factor { dtype: DType::F32, ..k },
            Factor { bias: [8, 16], ..k },
        ] {
            assert_eq!(q.with(&other, 2), None, "{other:?}");
        }
        // Biases in both types, one behind the other.
        let (q, k) = (Factor { bias: [512, 1024], ..q }, Factor { bias: [512 + 128, 1024 + 256], ..k });
        assert_eq!(q.with(&k, 2).map(|both| both.bias), Some([512, 1024]));
        assert_eq!(q.with(&Factor { bias: [512 + 128, 1024 + 128], ..k }, 2), None);
        assert_eq!(q.with(&Factor { bias: [0, 0], ..k }, 2), None);
        // Packed rows of the first have no room for the second.
        let narrow = Factor { stride: 64, ..q };
        assert_eq!(narrow.with(&Factor { stride: 64, ..k }, 2), None);
    }
}
