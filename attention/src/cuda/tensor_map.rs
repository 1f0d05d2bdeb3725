//! Tensor maps: how Hopper's copy engine finds the rows of a paged cache.

use cudarc::driver::sys;
use pagewise_ptx::decode::CacheRows;

use super::CudaError;
use crate::DType;

/// Columns of a box: 128 bytes of 16-bit elements, the width of the swizzle.
const BOX_COLUMNS: u32 = 64;

/// The most rows of a box.
const BOX_ROWS: u32 = 128;

/// A tensor map, as a kernel takes it by value.
#[derive(Clone, Copy, Debug)]
pub(super) struct TensorMap(sys::CUtensorMap);

/// What a map is of: the K or V of a cache.
#[derive(Clone, Copy, Debug)]
pub(super) struct CacheView {
    pub(super) rows: CacheRows,
    pub(super) dtype: DType,
    pub(super) head_dim: u32,
    pub(super) block_size: u32,
    pub(super) kv_heads: u32,
    pub(super) num_blocks: u64,
}

impl TensorMap {
    /// A map `[num_blocks, kv_heads, block_size, head_dim]` with boxes of 64 columns and the rows of a block, at most
    /// 128. What lies past an end is read as zero.
    pub(super) fn new(view: CacheView) -> Result<Self, CudaError> {
        let CacheView { rows, dtype, head_dim, block_size, kv_heads, num_blocks } = view;
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        let dims = [u64::from(head_dim), u64::from(block_size), u64::from(kv_heads), num_blocks.max(1)];
        // A stride of a dimension of one is not used, but must look like one.
        let bytes = |stride: u64| stride.saturating_mul(dtype.size() as u64).clamp(16, (1 << 40) - 16);
        let strides = [bytes(rows.token_stride), bytes(rows.head_stride), bytes(rows.block_stride)];
        let tile = [BOX_COLUMNS, block_size.min(BOX_ROWS), 1, 1];
        let steps = [1u32; 4];
        let element = match dtype {
            DType::F16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            _ => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        };
        // SAFETY: the map is a valid place to write, and the arrays have as many entries as the rank says (one fewer
        // for the strides). The address is only noted.
        let result = unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut map,
                element,
                dims.len() as u32,
                rows.address as *mut std::ffi::c_void,
                dims.as_ptr(),
                strides.as_ptr(),
                tile.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        CudaError::check("cuTensorMapEncodeTiled", result)?;
        Ok(Self(map))
    }

    /// The address of the map, for the driver's array of parameter addresses.
    pub(super) fn as_ptr(&self) -> *const sys::CUtensorMap {
        &raw const self.0
    }
}
