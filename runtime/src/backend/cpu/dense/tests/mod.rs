//! Dense layers against plain f64 loops, and their bits against themselves. Here is what those tests share; each layer
//! has a file.

mod elementwise;
mod linear;
mod norm;
mod rope;
mod tokens;

use super::*;
use crate::model_dir::Activation;
use half::{bf16, f16};
use pagewise_attention::HostTensor;

/// SplitMix64 as a source of inputs.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// Uniform in -1 … 1.
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.unit()).collect()
    }
}

/// Weights in memory, in one of the types that are stored.
#[derive(Debug)]
enum Stored {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Stored {
    fn new(dtype: usize, x: Vec<f32>) -> Self {
        match dtype {
            0 => Self::F32(x),
            1 => Self::F16(x.into_iter().map(f16::from_f32).collect()),
            _ => Self::Bf16(x.into_iter().map(bf16::from_f32).collect()),
        }
    }

    fn view(&self) -> HostTensor<'_> {
        match self {
            Self::F32(x) => HostTensor::F32(x),
            Self::F16(x) => HostTensor::F16(x),
            Self::Bf16(x) => HostTensor::Bf16(x),
        }
    }

    fn get(&self, i: usize) -> f64 {
        match self {
            Self::F32(x) => f64::from(x[i]),
            Self::F16(x) => x[i].to_f64(),
            Self::Bf16(x) => x[i].to_f64(),
        }
    }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn what_does_not_fit_is_refused_and_nothing_written() {
    let (x, w) = ([1.0f32; 12], [1.0f32; 8]);
    let mut out = [f32::NAN; 6];
    let weight = HostTensor::F32(&w);
    let refused = |rows, weight, bias, out: &mut [f32]| linear(&x, rows, weight, bias, out).unwrap_err();
    assert!(matches!(refused(5, weight, None, &mut out), DenseError::Rows { .. }));
    assert!(matches!(refused(3, HostTensor::F32(&w[1..]), None, &mut out), DenseError::Length { .. }));
    assert!(matches!(refused(3, weight, Some(weight), &mut out), DenseError::Length { .. }));
    assert!(matches!(refused(3, weight, None, &mut out[1..]), DenseError::Rows { .. }));
    assert!(matches!(refused(3, HostTensor::F8E4M3(&[0; 8]), None, &mut out), DenseError::DType { .. }));
    assert!(out.iter().all(|x| x.is_nan()));
    assert!(linear(&x, 3, weight, None, &mut out).is_ok());
    assert!(linear(&[], 0, weight, None, &mut []).is_ok());
    // Rows of no inputs: sums of nothing, and the bias.
    let mut out = [f32::NAN; 4];
    linear(&[], 2, HostTensor::F32(&[]), Some(HostTensor::F32(&[3.0, 4.0])), &mut out).unwrap();
    assert_eq!(out, [3.0, 4.0, 3.0, 4.0]);
    assert!(rms_norm(&x, HostTensor::F32(&w[..5]), 1e-5, &mut [0.0; 12]).is_err());
    assert!(gated_activation(Activation::Silu, &x, &w, &mut [0.0; 12]).is_err());
    assert!(activate(Activation::Relu, &x, &mut [0.0; 11]).is_err());
    assert!(
        layer_norm(&x, HostTensor::F32(&w[..4]), HostTensor::F32(&w[..3]), 1e-5, &mut [0.0; 12]).is_err()
    );
    assert!(add(&x, &mut [0.0; 11]).is_err());
    assert!(rope(&mut [0.0; 12], 1, &RopeAngles::new(&[1.0], &[0])).is_err());
}
