//! The element types that the kernels read and write.

use std::fmt;

/// How one element of a tensor is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DType {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper half of a binary32.
    Bf16,
    /// 8 bits: 4 exponent, 3 mantissa, no infinity, largest value 448.
    Fp8E4m3,
    /// 8 bits: 5 exponent, 2 mantissa, largest finite value 57344.
    Fp8E5m2,
}

impl DType {
    /// All types, widest first.
    pub const ALL: [Self; 5] = [Self::F32, Self::F16, Self::Bf16, Self::Fp8E4m3, Self::Fp8E5m2];

    /// Bytes of one element.
    pub const fn size(self) -> u32 {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Fp8E4m3 | Self::Fp8E5m2 => 1,
        }
    }

    /// Whether this is one of the 8-bit types, which are stored with a scale.
    pub const fn is_fp8(self) -> bool {
        matches!(self, Self::Fp8E4m3 | Self::Fp8E5m2)
    }

    /// The name used in kernel names and templates: `f32`, `f16`, `bf16`, `e4m3`, `e5m2`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Fp8E4m3 => "e4m3",
            Self::Fp8E5m2 => "e5m2",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
