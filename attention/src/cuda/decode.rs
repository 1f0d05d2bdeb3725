//! Decode attention on CUDA: query rows over a paged cache, planned once per step, run per layer.
//!
//! Owns the checks of addresses and the launch; the plan is `plan.rs`'s, the kernel [`pagewise_ptx::decode`]'s.

use std::sync::Arc;

use pagewise_ptx::decode::{CacheRows, Decode, DecodeArgs, Rows, ScoreArgs};

use super::context::Entry;
use super::{Context, CudaError, DecodePlan, RawStream};
use crate::{DType, KvStrides, Mask, RowStrides};

/// The device addresses of one decode. What the planned configuration does not use is 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DecodeCall {
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
    /// [`DecodePlan::work`], copied to the device.
    pub work: u64,
    /// Workspace of [`DecodePlan::workspace`]'s `partial_out` bytes.
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

impl Context {
    /// Compiles and loads the kernel of a plan, so that [`Context::decode_raw`], which may be captured in a CUDA
    /// graph, loads nothing.
    ///
    /// # Errors
    /// [`CudaError::Jit`] when the driver's compiler fails.
    pub fn prepare_decode(&self, plan: &DecodePlan) -> Result<(), CudaError> {
        let _entered = self.enter()?;
        self.decode_kernel(plan).map(|_| ())
    }

    /// Puts a decode on a stream.
    ///
    /// # Safety
    /// - Every address is in device memory of this context's GPU and valid, until the launch has completed, for
    ///   what the plan's shapes and strides reach.
    /// - The block tables on the device agree with those that were planned, wherever a query sees a key.
    /// - `work` holds the plan's items, and the workspace is used by no other launch meanwhile.
    /// - The stream belongs to this context.
    ///
    /// # Errors
    /// [`CudaError::Misaligned`] for an address or stride that is not a multiple of 16 bytes,
    /// [`CudaError::Missing`] for an input that the configuration needs and the call leaves out,
    /// [`CudaError::Driver`] when the launch fails.
    pub unsafe fn decode_raw(
        &self,
        plan: &DecodePlan,
        call: &DecodeCall,
        stream: RawStream,
    ) -> Result<(), CudaError> {
        if plan.shape.items == 0 {
            return Ok(());
        }
        let args = arguments(plan, call)?;
        let _entered = self.enter()?;
        let entry = self.decode_kernel(plan)?;
        let launch = entry.descriptor.launch(plan.shape)?;
        // SAFETY: the arguments are in the descriptor's order; the caller answers for addresses and stream.
        unsafe { entry.kernel.launch(launch, &args.values(), stream) }
    }

    fn decode_kernel(&self, plan: &DecodePlan) -> Result<Arc<Entry<Decode>>, CudaError> {
        self.decode.get(plan.spec, || {
            let descriptor = Decode::new(plan.spec)?;
            let kernel = self.load(descriptor.kernel())?;
            Ok(Entry { descriptor, kernel })
        })
    }
}

/// The kernel's arguments for a call, once they are seen to be what it can read.
fn arguments(plan: &DecodePlan, call: &DecodeCall) -> Result<DecodeArgs, CudaError> {
    let config = &plan.config;
    let rows = |tensor, address, strides: RowStrides| {
        aligned(tensor, address, &[strides.token, strides.head], config.q_dtype.size() as u64)?;
        Ok::<Rows, CudaError>(Rows { address, row_stride: strides.token, head_stride: strides.head })
    };
    let cache = |tensor, address, strides: KvStrides| {
        let KvStrides { block, token, head } = strides;
        aligned(tensor, address, &[block, token, head], config.kv_dtype.size() as u64)?;
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
        aligned(tensor, address, &[], 1)?;
    }
    let wanted = |what: &'static str, wanted: bool, address: u64| match (wanted, address) {
        (true, 0) => Err(CudaError::Missing { what }),
        (true, address) => Ok(address),
        (false, _) => Ok(0),
    };
    Ok(DecodeArgs {
        q: rows("q", call.q, plan.q)?,
        k: cache("the K cache", call.k_cache, plan.layout.k)?,
        v: cache("the V cache", call.v_cache, plan.layout.v)?,
        tables: call.tables,
        block_shift: plan.layout.block_size.trailing_zeros(),
        head_dim_k: config.head_dim_qk as u32,
        head_dim_v: config.head_dim_v as u32,
        shape: plan.shape,
        scores: ScoreArgs {
            scale: config.scale,
            softcap: config.softcap,
            slopes: wanted("ALiBi's slopes", config.alibi, call.alibi_slopes)?,
            sinks: wanted("the sinks", config.sinks, call.sinks)?,
            mask_bits: wanted("the mask's bits", config.mask == Mask::Bits, call.mask_bits)?,
            mask_words: plan.mask_words,
            k_scale: call.scales.k,
            v_scale: call.scales.v,
            scale_per_head: call.scales.per_head,
        },
        work: call.work,
        out: rows("out", call.out, plan.out)?,
        lse: call.lse,
        partial_out: call.partial_out,
        partial_max: call.partial_max,
        tickets: call.tickets,
    })
}

/// The kernel reads and writes 16 bytes at a time.
fn aligned(tensor: &'static str, address: u64, strides: &[u64], element: u64) -> Result<(), CudaError> {
    if !address.is_multiple_of(16) {
        return Err(CudaError::Misaligned { tensor, address, size: 16 });
    }
    match strides.iter().find(|stride| !stride.wrapping_mul(element).is_multiple_of(16)) {
        Some(&stride) => Err(CudaError::Unsupported {
            kernel: "decode",
            what: format!("{tensor} with a stride of {stride} elements"),
            advice: "strides must be multiples of 16 bytes",
        }),
        None => Ok(()),
    }
}

pub(super) fn ptx_type(dtype: DType) -> pagewise_ptx::DType {
    match dtype {
        DType::F32 => pagewise_ptx::DType::F32,
        DType::F16 => pagewise_ptx::DType::F16,
        DType::Bf16 => pagewise_ptx::DType::Bf16,
        DType::F8E4M3 => pagewise_ptx::DType::Fp8E4m3,
        DType::F8E5M2 => pagewise_ptx::DType::Fp8E5m2,
    }
}
