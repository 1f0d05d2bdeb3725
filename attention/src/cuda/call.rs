//! The device addresses of one attention, and what a kernel can take them for.

use pagewise_ptx::decode::{CacheRows, Rows};

use super::CudaError;
use crate::{AttentionConfig, CacheLayout, DType, KvStrides, Mask, RowStrides};

/// The device addresses of one attention. What the planned configuration does not use is 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AttentionCall {
    /// Queries, `[rows, q_heads, head_dim_qk]` with the strides of the planned problem.
    pub q: u64,
    /// Key cache.
    pub k_cache: u64,
    /// Value cache.
    pub v_cache: u64,
    /// Block tables, i32: `[sequences, max_blocks]`, or the `indices` of CSR tables.
    pub tables: u64,
    /// What stored keys and values are multiplied with.
    pub scales: CacheScales,
    /// ALiBi's slopes, f32 `[q_heads]`, if the configuration says so.
    pub alibi_slopes: u64,
    /// Attention sinks, f32 `[q_heads]`, if the configuration says so.
    pub sinks: u64,
    /// The mask's words, u32 `[rows, row_words]`, if the mask is one of bits.
    pub mask_bits: u64,
    /// Output, `[rows, q_heads, head_dim_v]` with the strides of the planned problem.
    pub out: u64,
    /// Log-sum-exp (natural logarithm), f32 `[rows, q_heads]`, or 0 for none.
    pub lse: u64,
    /// The plan's `work()`, copied to the device.
    pub work: u64,
    /// Workspace of the plan's `workspace().partial_out` bytes.
    pub partial_out: u64,
    /// Workspace of its `partial_max` bytes.
    pub partial_max: u64,
    /// Workspace of its `tickets` bytes: zero before the first run, and left zero by each.
    pub tickets: u64,
}

/// Device addresses of the factors of stored keys and values; 0 for none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheScales {
    /// Of K: f32, one, or `[kv_heads]`.
    pub k: u64,
    /// Of V: f32, one, or `[kv_heads]`.
    pub v: u64,
    /// Whether each KV head has its own.
    pub per_head: bool,
}

/// What was planned of the tensors of a call.
#[derive(Clone, Copy, Debug)]
pub(super) struct Planned<'a> {
    pub(super) config: &'a AttentionConfig,
    pub(super) layout: &'a CacheLayout,
    pub(super) q: RowStrides,
    pub(super) out: RowStrides,
}

/// The tensors of a call, once they are seen to be what kernels can read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tensors {
    pub(super) q: Rows,
    pub(super) k: CacheRows,
    pub(super) v: CacheRows,
    pub(super) out: Rows,
    pub(super) slopes: u64,
    pub(super) sinks: u64,
    pub(super) mask_bits: u64,
}

impl Tensors {
    /// Checks the addresses of a call against what was planned.
    pub(super) fn of(
        kernel: &'static str,
        planned: Planned<'_>,
        call: &AttentionCall,
    ) -> Result<Self, CudaError> {
        let Planned { config, layout, q, out } = planned;
        let rows = |tensor, address, strides: RowStrides| {
            aligned(kernel, tensor, address, &[strides.token, strides.head], config.q_dtype)?;
            Ok::<Rows, CudaError>(Rows { address, row_stride: strides.token, head_stride: strides.head })
        };
        let cache = |tensor, address, strides: KvStrides| {
            let KvStrides { block, token, head } = strides;
            aligned(kernel, tensor, address, &[block, token, head], config.kv_dtype)?;
            Ok::<CacheRows, CudaError>(CacheRows {
                address,
                block_stride: block,
                token_stride: token,
                head_stride: head,
            })
        };
        for (tensor, address) in [
            ("the work items", call.work),
            ("the partial outputs", call.partial_out),
            ("the partial maxima", call.partial_max),
        ] {
            aligned(kernel, tensor, address, &[], config.q_dtype)?;
        }
        let wanted = |what: &'static str, wanted: bool, address: u64| match (wanted, address) {
            (true, 0) => Err(CudaError::Missing { what }),
            (true, address) => Ok(address),
            (false, _) => Ok(0),
        };
        Ok(Self {
            q: rows("q", call.q, q)?,
            k: cache("the K cache", call.k_cache, layout.k)?,
            v: cache("the V cache", call.v_cache, layout.v)?,
            out: rows("out", call.out, out)?,
            slopes: wanted("ALiBi's slopes", config.alibi, call.alibi_slopes)?,
            sinks: wanted("the sinks", config.sinks, call.sinks)?,
            mask_bits: wanted("the mask's bits", config.mask == Mask::Bits, call.mask_bits)?,
        })
    }
}

/// Kernels read and write 16 bytes at a time.
fn aligned(
    kernel: &'static str,
    tensor: &'static str,
    address: u64,
    strides: &[u64],
    element: DType,
) -> Result<(), CudaError> {
    if !address.is_multiple_of(16) {
        return Err(CudaError::Misaligned { tensor, address, size: 16 });
    }
    match strides.iter().find(|stride| !stride.wrapping_mul(element.size() as u64).is_multiple_of(16)) {
        Some(&stride) => Err(CudaError::Unsupported {
            kernel,
            what: format!("{tensor} with a stride of {stride} elements"),
            advice: "strides must be multiples of 16 bytes",
        }),
        None => Ok(()),
    }
}
