//! This crate's element types as those of the shaders.

use super::WgpuError;
use crate::DType;

/// The shaders' name of a type.
pub(super) fn shader_type(what: &'static str, dtype: DType) -> Result<pagewise_shaders::DType, WgpuError> {
    match dtype {
        DType::F32 => Ok(pagewise_shaders::DType::F32),
        DType::F16 => Ok(pagewise_shaders::DType::F16),
        DType::Bf16 => Ok(pagewise_shaders::DType::Bf16),
        DType::F8E4M3 | DType::F8E5M2 => Err(WgpuError::UnsupportedDType { what, dtype }),
    }
}
