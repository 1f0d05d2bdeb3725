//! Owned host memory of any element type, read and written as `f64`; fp8 by the definition of its codes.

use crate::{DType, HostTensor, HostTensorMut};
use half::{bf16, f16};
use std::sync::LazyLock;

use super::Random;

/// Elements of one type.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "the types of `DType`")]
pub enum Buffer {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
    F8E4M3(Vec<u8>),
    F8E5M2(Vec<u8>),
}

/// Value of an fp8 code with `bits` stored significand bits (OCP OFP8, sections 5.1 and 5.2).
fn fp8_value(code: u8, bits: u32, bias: i32) -> f64 {
    let exponent_bits = 7 - bits;
    let exponent = i32::from(code >> bits) & ((1 << exponent_bits) - 1);
    let fraction = f64::from(code & ((1 << bits) - 1)) / f64::from(1 << bits);
    let sign = if code >= 128 { -1.0 } else { 1.0 };
    // E4M3 has one NaN a sign, E5M2 the infinities and NaNs of IEEE 754.
    match (bits, code & 0x7f) {
        (3, 0x7f) => return f64::NAN,
        (2, 0x7c) => return sign * f64::INFINITY,
        (2, 0x7d..) => return f64::NAN,
        _ => {}
    }
    match exponent {
        0 => sign * fraction * f64::from(1 - bias).exp2(),
        _ => sign * (1.0 + fraction) * f64::from(exponent - bias).exp2(),
    }
}

fn e4m3_value(code: u8) -> f64 {
    fp8_value(code, 3, 7)
}

fn e5m2_value(code: u8) -> f64 {
    fp8_value(code, 2, 15)
}

/// The values of the codes that are finite and not negative, in rising order: code `i` at place `i`.
fn fp8_values(value_of: fn(u8) -> f64) -> Vec<f64> {
    (0..128).map(value_of).take_while(|value| value.is_finite()).collect()
}

static E4M3_VALUES: LazyLock<Vec<f64>> = LazyLock::new(|| fp8_values(e4m3_value));
static E5M2_VALUES: LazyLock<Vec<f64>> = LazyLock::new(|| fp8_values(e5m2_value));

/// The code whose value is nearest, the even one of two; finite values only.
fn fp8_code(value: f64, values: &[f64]) -> u8 {
    let magnitude = value.abs();
    let above = values.partition_point(|&other| other < magnitude).min(values.len() - 1);
    let below = above.saturating_sub(1);
    let (up, down) = (values[above] - magnitude, magnitude - values[below]);
    let code = if down < up || (down == up && below % 2 == 0) { below } else { above };
    code as u8 | if value.is_sign_negative() { 0x80 } else { 0 }
}

/// The nearest number with `digits` significand bits and exponents from `least` on, the even one of two.
fn rounded(value: f64, digits: i32, least: i32) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return value;
    }
    let exponent = (((value.to_bits() >> 52) & 0x7ff) as i32 - 1023).max(least);
    let spacing = f64::from(exponent + 1 - digits).exp2();
    (value / spacing).round_ties_even() * spacing
}

impl Buffer {
    /// Zeros.
    pub fn zeros(dtype: DType, len: usize) -> Self {
        match dtype {
            DType::F32 => Self::F32(vec![0.0; len]),
            DType::F16 => Self::F16(vec![f16::ZERO; len]),
            DType::Bf16 => Self::Bf16(vec![bf16::ZERO; len]),
            DType::F8E4M3 => Self::F8E4M3(vec![0; len]),
            DType::F8E5M2 => Self::F8E5M2(vec![0; len]),
        }
    }

    /// What lies about in memory that nobody has written: NaN mostly, infinities, huge numbers.
    pub fn poisoned(dtype: DType, len: usize, random: &mut Random) -> Self {
        let mut buffer = Self::zeros(dtype, len);
        for i in 0..len {
            buffer.poison(i, random);
        }
        buffer
    }

    /// Makes one element something that must not be used.
    pub fn poison(&mut self, i: usize, random: &mut Random) {
        let value = random.pick(f32::NAN, &[f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 3e38, -6e4]);
        match self {
            Self::F32(x) => x[i] = value,
            Self::F16(x) => x[i] = f16::from_f32(value),
            Self::Bf16(x) => x[i] = bf16::from_f32(value),
            Self::F8E4M3(x) => x[i] = random.pick(0x7f, &[0xff, 0x7e]),
            Self::F8E5M2(x) => x[i] = random.pick(0x7f, &[0xff, 0x7c, 0xfc, 0x7b]),
        }
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.as_ref().dtype()
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.as_ref().len()
    }

    /// No elements?
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// An element's value, exactly.
    pub fn get(&self, i: usize) -> f64 {
        value_at(self.as_ref(), i)
    }

    /// Sets an element to the nearest value of the type, the even one of two; 8-bit types saturate.
    pub fn set(&mut self, i: usize, value: f64) {
        match self {
            Self::F32(x) => x[i] = value as f32,
            Self::F16(x) => x[i] = f16::from_f64(rounded(value, 11, -14)),
            Self::Bf16(x) => x[i] = bf16::from_f64(rounded(value, 8, -126)),
            Self::F8E4M3(x) => x[i] = fp8_code(value, &E4M3_VALUES),
            Self::F8E5M2(x) => x[i] = fp8_code(value, &E5M2_VALUES),
        }
    }

    /// An element's bits.
    pub fn bits(&self, i: usize) -> u32 {
        match self {
            Self::F32(x) => x[i].to_bits(),
            Self::F16(x) => u32::from(x[i].to_bits()),
            Self::Bf16(x) => u32::from(x[i].to_bits()),
            Self::F8E4M3(x) | Self::F8E5M2(x) => u32::from(x[i]),
        }
    }

    /// The elements, to read.
    pub fn as_ref(&self) -> HostTensor<'_> {
        match self {
            Self::F32(x) => HostTensor::F32(x),
            Self::F16(x) => HostTensor::F16(x),
            Self::Bf16(x) => HostTensor::Bf16(x),
            Self::F8E4M3(x) => HostTensor::F8E4M3(x),
            Self::F8E5M2(x) => HostTensor::F8E5M2(x),
        }
    }

    /// The elements from one on, to read.
    pub fn from(&self, start: usize) -> HostTensor<'_> {
        match self {
            Self::F32(x) => HostTensor::F32(&x[start..]),
            Self::F16(x) => HostTensor::F16(&x[start..]),
            Self::Bf16(x) => HostTensor::Bf16(&x[start..]),
            Self::F8E4M3(x) => HostTensor::F8E4M3(&x[start..]),
            Self::F8E5M2(x) => HostTensor::F8E5M2(&x[start..]),
        }
    }

    /// The elements, to write.
    pub fn as_mut(&mut self) -> HostTensorMut<'_> {
        match self {
            Self::F32(x) => HostTensorMut::F32(x),
            Self::F16(x) => HostTensorMut::F16(x),
            Self::Bf16(x) => HostTensorMut::Bf16(x),
            Self::F8E4M3(x) => HostTensorMut::F8E4M3(x),
            Self::F8E5M2(x) => HostTensorMut::F8E5M2(x),
        }
    }
}

/// The value of an element of a tensor.
pub(super) fn value_at(tensor: HostTensor<'_>, i: usize) -> f64 {
    match tensor {
        HostTensor::F32(x) => f64::from(x[i]),
        HostTensor::F16(x) => x[i].to_f64(),
        HostTensor::Bf16(x) => x[i].to_f64(),
        HostTensor::F8E4M3(x) => e4m3_value(x[i]),
        HostTensor::F8E5M2(x) => e5m2_value(x[i]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sixteen_bits_round_once() {
        let mut buffer = Buffer::zeros(DType::Bf16, 1);
        // Just above the midpoint of two neighbours: rounding to fewer bits first would lose it.
        buffer.set(0, -0.045_043_956_488_370_895);
        assert_eq!(buffer.get(0), -0.045_166_015_625);
        let mut buffer = Buffer::zeros(DType::F16, 1);
        buffer.set(0, 1.0 + 2f64.powi(-11) + 2f64.powi(-40));
        assert_eq!(buffer.get(0), 1.0 + 2f64.powi(-10));
        buffer.set(0, 1e-7);
        assert_eq!(buffer.get(0), 2.0 * 2f64.powi(-24));
        buffer.set(0, 1e9);
        assert_eq!(buffer.get(0), f64::INFINITY);
    }

    #[test]
    fn fp8_landmarks() {
        assert_eq!(e4m3_value(0x7e), 448.0);
        assert_eq!(e4m3_value(0x38), 1.0);
        assert_eq!(e4m3_value(0x81), -(2f64.powi(-9)));
        assert_eq!(e5m2_value(0x7b), 57344.0);
        assert_eq!(e5m2_value(0x3c), 1.0);
        assert_eq!(fp8_code(1e9, &E4M3_VALUES), 0x7e);
        assert_eq!(fp8_code(-1e9, &E5M2_VALUES), 0xfb);
        assert_eq!(fp8_code(17.0, &E4M3_VALUES), fp8_code(16.0, &E4M3_VALUES));
        assert_eq!(fp8_code(0.0, &E4M3_VALUES), 0);
    }
}
