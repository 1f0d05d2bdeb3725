//! Decode attention on CUDA: query rows over a paged cache, planned once per step, run per layer.
//!
//! Owns the checks of addresses and the launch; the plan is `plan.rs`'s, the kernel [`pagewise_ptx::decode`]'s.

use std::sync::Arc;

use pagewise_ptx::decode::{Decode, DecodeArgs, ScoreArgs};

use super::call::{Planned, Tensors};
use super::context::Entry;
use super::{AttentionCall, Context, CudaError, DecodePlan, Order, PlannedLaunch, RawStream};
use crate::DType;

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
    /// - What [`PlanOptions::order`](super::PlanOptions::order) asks for, where the plan's is [`Order::Dependent`].
    /// - The stream belongs to this context.
    ///
    /// # Errors
    /// [`CudaError::Misaligned`] for an address or stride that is not a multiple of 16 bytes,
    /// [`CudaError::Missing`] for an input that the configuration needs and the call leaves out,
    /// [`CudaError::Driver`] when the launch fails.
    pub unsafe fn decode_raw(
        &self,
        plan: &DecodePlan,
        call: &AttentionCall,
        stream: RawStream,
    ) -> Result<(), CudaError> {
        if plan.shape.items == 0 {
            return Ok(());
        }
        let args = plan.args(call)?;
        let _entered = self.enter()?;
        let entry = self.decode_kernel(plan)?;
        let launch = entry.descriptor.launch(plan.shape)?;
        let order = if plan.spec.dependent { Order::Dependent } else { Order::Stream };
        // SAFETY: the arguments are in the descriptor's order; the caller answers for addresses and stream, and variants
        // for dependent launches wait.
        unsafe { entry.kernel.launch_in_order(launch, &args.values(), stream, order) }
    }

    fn decode_kernel(&self, plan: &DecodePlan) -> Result<Arc<Entry<Decode>>, CudaError> {
        self.loaded(&self.decode, plan.spec, || Decode::new(plan.spec), Decode::kernel)
    }
}

impl DecodePlan {
    /// The kernel's arguments for a call, once they are seen to be what it can read.
    pub(super) fn args(&self, call: &AttentionCall) -> Result<DecodeArgs, CudaError> {
        let config = &self.config;
        let planned = Planned { config, layout: &self.layout, q: self.q, out: self.out };
        let Tensors { q, k, v, out, slopes, sinks, mask_bits } = Tensors::of("decode", planned, call)?;
        Ok(DecodeArgs {
            q,
            k,
            v,
            tables: call.tables,
            block_shift: self.layout.block_size.trailing_zeros(),
            head_dim_k: config.head_dim_qk as u32,
            head_dim_v: config.head_dim_v as u32,
            shape: self.shape,
            scores: ScoreArgs {
                scale: config.scale,
                softcap: config.softcap,
                slopes,
                sinks,
                mask_bits,
                mask_words: self.mask_words,
                k_scale: call.scales.k,
                v_scale: call.scales.v,
                scale_per_head: call.scales.per_head,
            },
            work: call.work,
            out,
            lse: call.lse,
            partial_out: call.partial_out,
            partial_max: call.partial_max,
            tickets: call.tickets,
        })
    }

    /// The launch for a call, for others than a [`Context`].
    pub(super) fn launch(&self, call: &AttentionCall) -> Result<PlannedLaunch, CudaError> {
        let descriptor = Decode::new(self.spec)?;
        let launch = descriptor.launch(self.shape)?;
        let args = self.args(call)?.values().to_vec();
        Ok(PlannedLaunch { kernel: descriptor.into_kernel(), launch, args })
    }
}

/// An element type as the kernels' crate names it.
pub fn ptx_type(dtype: DType) -> pagewise_ptx::DType {
    match dtype {
        DType::F32 => pagewise_ptx::DType::F32,
        DType::F16 => pagewise_ptx::DType::F16,
        DType::Bf16 => pagewise_ptx::DType::Bf16,
        DType::F8E4M3 => pagewise_ptx::DType::Fp8E4m3,
        DType::F8E5M2 => pagewise_ptx::DType::Fp8E5m2,
    }
}
