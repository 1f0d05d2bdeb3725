//! What goes into a product, which weights lie so that they are one, and what is done behind it. Owns these alone: which way
//! a product takes is `dense.rs`'s.

use pagewise_attention::DType;
use pagewise_attention::cuda::ptx::model::Activation as Function;

use super::super::tensor::{CudaTensor, CudaWeight, shape_error};
use crate::backend::{Activated, BackendError, Input, Linear, Norm};
use crate::model_dir::Activation;

/// The rows that go into a product.
#[derive(Debug)]
pub(super) enum Operand<'a> {
    /// Of the compute type.
    Direct(CudaTensor),
    /// f32 rows as they are, of which the compute type is not f32.
    Stream(&'a CudaTensor),
    /// Rows to be normed; the room is of the compute type.
    Normed { x: &'a CudaTensor, norm: &'a Norm<CudaWeight>, room: CudaTensor },
}

impl<'a> Operand<'a> {
    pub(super) fn of(input: Input<'a, CudaWeight, CudaTensor>, dtype: DType) -> Self {
        match input {
            Input::Normed { x, norm, room } => Self::Normed { x, norm, room: room.again() },
            Input::Rows(x) if x.dtype == dtype => Self::Direct(x.again()),
            Input::Rows(x) => Self::Stream(x),
        }
    }

    /// Rows and width.
    pub(super) fn shape(&self) -> (usize, usize) {
        match self {
            Self::Direct(x) => (x.rows, x.width),
            Self::Stream(x) | Self::Normed { x, .. } => (x.rows, x.width),
        }
    }
}

/// What is done behind a product.
#[derive(Clone, Copy, Debug)]
pub(super) struct Behind {
    pub(super) activation: Function,
    /// Whether the first half of the features is a gate, and the second what it multiplies.
    pub(super) gated: bool,
    /// Whether to add to what is there.
    pub(super) adds: bool,
    /// Whether attention's thread blocks are on the multiprocessors meanwhile.
    pub(super) beside: bool,
}

/// A weight, or several that lie one behind the other, and where the product goes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Factor {
    pub(super) weight: u64,
    pub(super) n: usize,
    pub(super) k: usize,
    /// The bias in the compute type and in f32; 0 for none.
    pub(super) bias: [u64; 2],
    pub(super) out: u64,
    pub(super) stride: usize,
    pub(super) dtype: DType,
}

impl Factor {
    pub(super) fn new(linear: &Linear<CudaWeight>, out: &CudaTensor, k: usize) -> Result<Self, BackendError> {
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
        Ok(Self {
            weight: weight.address,
            n: *n,
            k,
            bias,
            out: out.address,
            stride: out.stride,
            dtype: out.dtype,
        })
    }

    /// The product of both, if this and the next lie one behind the other throughout.
    pub(super) fn with(self, next: &Self, weight_size: usize) -> Option<Self> {
        let [narrow, wide] = self.bias;
        let follows = next.weight == self.weight + (self.n * self.k * weight_size) as u64
            && next.out == self.out + (self.n * self.dtype.size()) as u64
            && (next.k, next.stride, next.dtype) == (self.k, self.stride, self.dtype)
            && match next.bias {
                [0, 0] => self.bias == [0, 0],
                bias => {
                    narrow != 0
                        && bias == [narrow + (self.n * weight_size) as u64, wide + (self.n * 4) as u64]
                }
            };
        // Without rows of the wider output there is no room beside.
        (follows && self.stride >= self.n + next.n).then_some(Self { n: self.n + next.n, ..self })
    }
}

/// The product and what is done behind it as our own kernel takes them, if gate and up lie one behind the other.
pub(super) fn activated_factor(
    activated: &Activated<'_, CudaWeight>,
    out: &CudaTensor,
    width: usize,
) -> Result<Option<(Factor, Behind)>, BackendError> {
    match activated {
        Activated::Plain { activation, up } => {
            let behind =
                Behind { activation: function(*activation), gated: false, adds: false, beside: false };
            Ok(Some((Factor::new(up, out, width)?, behind)))
        }
        Activated::Gated { activation, gate, up } => {
            let behind =
                Behind { activation: function(*activation), gated: true, adds: false, beside: false };
            let size = out.dtype.size();
            // As if the output had room for both halves: the kernel writes but one.
            let wide = 2 * out.width;
            let first = Factor { stride: wide, ..Factor::new(gate, out, width)? };
            let second = Factor::new(up, out, width)?;
            let second = Factor { stride: wide, out: out.address + (out.width * size) as u64, ..second };
            Ok(first.with(&second, size).map(|both| (Factor { stride: out.stride, ..both }, behind)))
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn factor(weight: u64, n: usize, bias: [u64; 2], out: u64) -> Factor {
        Factor { weight, n, k: 64, bias, out, stride: 96, dtype: DType::Bf16 }
    }

    #[test]
    fn products_that_lie_together_are_one() {
        let (q, k) =
            (factor(1 << 20, 64, [0, 0], 4096), factor((1 << 20) + 64 * 64 * 2, 16, [0, 0], 4096 + 128));
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
