//! The element types that queries, keys and values can have.

use std::{fmt, str::FromStr};

/// Element type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper half of a binary32.
    Bf16,
    /// 8-bit float with 4 exponent bits, no infinities (OCP OFP8 E4M3). Caches only, with a scale.
    F8E4M3,
    /// 8-bit float with 5 exponent bits (OCP OFP8 E5M2). Caches only, with a scale.
    F8E5M2,
}

impl DType {
    /// All of them, in the order of their declaration.
    pub const ALL: [Self; 5] = [Self::F32, Self::F16, Self::Bf16, Self::F8E4M3, Self::F8E5M2];

    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::F8E4M3 | Self::F8E5M2 => 1,
        }
    }

    /// Unit roundoff: the largest relative error of rounding a number in the normal range to this type.
    pub const fn unit_roundoff(self) -> f64 {
        // 2^-(number of significand bits, the implicit one counted)
        match self {
            Self::F32 => 1.0 / (1u64 << 24) as f64,
            Self::F16 => 1.0 / (1u64 << 11) as f64,
            Self::Bf16 => 1.0 / (1u64 << 8) as f64,
            Self::F8E4M3 => 1.0 / (1u64 << 4) as f64,
            Self::F8E5M2 => 1.0 / (1u64 << 3) as f64,
        }
    }

    /// Whether it is one of the 8-bit types, which carry a scale and occur in caches only.
    pub const fn is_fp8(self) -> bool {
        matches!(self, Self::F8E4M3 | Self::F8E5M2)
    }

    /// The name used on command lines and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::F8E4M3 => "fp8_e4m3",
            Self::F8E5M2 => "fp8_e5m2",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The text names no element type.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not an element type; use f32, f16, bf16, fp8_e4m3 or fp8_e5m2")]
pub struct ParseDTypeError(pub String);

impl FromStr for DType {
    type Err = ParseDTypeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|dtype| dtype.name() == text)
            .ok_or_else(|| ParseDTypeError(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_read_back() {
        for dtype in DType::ALL {
            assert_eq!(dtype.name().parse(), Ok(dtype));
        }
        assert!("f64".parse::<DType>().is_err());
    }

    #[test]
    fn unit_roundoff_is_half_an_ulp_of_one() {
        assert_eq!(DType::F32.unit_roundoff(), f64::from(f32::EPSILON) / 2.0);
        assert_eq!(DType::F16.unit_roundoff(), half::f16::EPSILON.to_f64() / 2.0);
        assert_eq!(DType::Bf16.unit_roundoff(), half::bf16::EPSILON.to_f64() / 2.0);
    }
}
