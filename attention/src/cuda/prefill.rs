//! Prefill attention on CUDA: tiles of query rows over a paged cache.
//!
//! Owns the launches; what is launched is planned in `prefill_plan.rs`, the kernels are [`pagewise_ptx::prefill`]'s.

use std::sync::Arc;

use pagewise_ptx::prefill::{
    Form, MergeItem, Prefill, PrefillArgs, PrefillItem, PrefillMerge, PrefillMergeArgs, PrefillSpec,
};

use super::call::{Planned, Tensors};
use super::context::Entry;
use super::plan::small;
use super::prefill_plan::PrefillPart;
use super::tensor_map::{CacheView, TensorMap};
use super::{AttentionCall, Context, CudaError, PlannedLaunch, RawStream};

impl Context {
    /// Compiles and loads what a prefill needs.
    pub(super) fn prepare_prefill(&self, part: &PrefillPart) -> Result<(), CudaError> {
        self.prefill_kernel(part.spec)?;
        if !part.merges.is_empty() {
            self.prefill_merge_kernel(part.spec)?;
        }
        Ok(())
    }

    /// Puts a prefill on a stream of this context, which is current; `work` is the address of the part's words.
    ///
    /// # Safety
    /// As [`Context::attention_raw`].
    pub(super) unsafe fn launch_prefill(
        &self,
        part: &PrefillPart,
        planned: Planned<'_>,
        call: &AttentionCall,
        work: u64,
        stream: RawStream,
    ) -> Result<(), CudaError> {
        let config = planned.config;
        let (args, merge_args) = part.args(planned, call, work)?;
        let entry = self.prefill_kernel(part.spec)?;
        let launch = entry.descriptor.launch(part.grid)?;
        // SAFETY: the arguments are in the descriptor's order; the caller answers for addresses and stream.
        unsafe {
            match part.spec.form {
                Form::Hopper => {
                    let (layout, PrefillArgs { k, v, .. }) = (planned.layout, args);
                    let view = |rows, head_dim: usize| CacheView {
                        rows,
                        dtype: config.kv_dtype,
                        head_dim: head_dim as u32,
                        block_size: layout.block_size as u32,
                        kv_heads: config.kv_heads as u32,
                        num_blocks: layout.num_blocks as u64,
                    };
                    let k_map = TensorMap::new(view(k, config.head_dim_qk))?;
                    let v_map = TensorMap::new(view(v, config.head_dim_v))?;
                    let args = args.hopper_values(part.items.len() as u32);
                    entry.kernel.launch_with_maps(launch, &[k_map, v_map], &args, stream)?;
                }
                Form::Large | Form::Small => {
                    let (values, count) = args.values_for(part.spec);
                    let values = values.get(..count).unwrap_or_default();
                    entry.kernel.launch(launch, values, stream)?;
                }
            }
        }
        if part.merges.is_empty() {
            return Ok(());
        }
        let entry = self.prefill_merge_kernel(part.spec)?;
        let launch = entry.descriptor.launch(small("the number of merges", part.merges.len())?)?;
        // SAFETY: as above.
        unsafe { entry.kernel.launch(launch, &merge_args.values(), stream) }
    }

    fn prefill_kernel(&self, spec: PrefillSpec) -> Result<Arc<Entry<Prefill>>, CudaError> {
        self.loaded(&self.prefill, spec, || Prefill::new(spec), Prefill::kernel)
    }

    fn prefill_merge_kernel(&self, spec: PrefillSpec) -> Result<Arc<Entry<PrefillMerge>>, CudaError> {
        self.loaded(&self.prefill_merge, spec.usual(), || PrefillMerge::new(spec), PrefillMerge::kernel)
    }
}

impl PrefillPart {
    /// The kernels' arguments for a call, once they are seen to be what they can read; `work` is the address of the part's
    /// words.
    fn args(
        &self,
        planned: Planned<'_>,
        call: &AttentionCall,
        work: u64,
    ) -> Result<(PrefillArgs, PrefillMergeArgs), CudaError> {
        let config = planned.config;
        let Tensors { q, k, v, out, slopes, sinks, mask_bits } = Tensors::of("prefill", planned, call)?;
        let merges = work + 4 * (self.items.len() * PrefillItem::WORDS) as u64;
        let ranges = merges + 4 * (self.merges.len() * MergeItem::WORDS) as u64;
        let args = PrefillArgs {
            q,
            k,
            v,
            tables: call.tables,
            block_shift: planned.layout.block_size.trailing_zeros(),
            q_heads: config.q_heads as u32,
            group: self.group,
            head_dim_k: config.head_dim_qk as u32,
            head_dim_v: config.head_dim_v as u32,
            scale: config.scale,
            softcap: config.softcap,
            slopes,
            sinks,
            mask_bits,
            mask_words: self.mask_words,
            k_scale: call.scales.k,
            v_scale: call.scales.v,
            scale_per_head: call.scales.per_head,
            work,
            ranges,
            out,
            lse: call.lse,
            partial_out: call.partial_out,
            partial_max: call.partial_max,
        };
        let merge = PrefillMergeArgs {
            work: merges,
            partial_out: call.partial_out,
            partial_max: call.partial_max,
            out,
            lse: call.lse,
            sinks,
            q_heads: config.q_heads as u32,
            group: self.group,
            head_dim_v: config.head_dim_v as u32,
        };
        Ok((args, merge))
    }

    /// The launches for a call, for others than a [`Context`].
    pub(super) fn launches(
        &self,
        planned: Planned<'_>,
        call: &AttentionCall,
        work: u64,
    ) -> Result<Vec<PlannedLaunch>, CudaError> {
        let (args, merge) = self.args(planned, call, work)?;
        let args = match self.spec.form {
            Form::Hopper => {
                return Err(CudaError::Unsupported {
                    kernel: "prefill",
                    what: "the Hopper form, whose tensor maps are the driver's to make".to_owned(),
                    advice: "plan with another AttentionOptions::form, or launch through a Context",
                });
            }
            Form::Large | Form::Small => {
                let (values, count) = args.values_for(self.spec);
                values.into_iter().take(count).collect()
            }
        };
        let prefill = Prefill::new(self.spec)?;
        let launch = prefill.launch(self.grid)?;
        let mut launches = vec![PlannedLaunch { kernel: prefill.kernel().clone(), launch, args }];
        if !self.merges.is_empty() {
            let descriptor = PrefillMerge::new(self.spec)?;
            let launch = descriptor.launch(small("the number of merges", self.merges.len())?)?;
            let kernel = descriptor.kernel().clone();
            launches.push(PlannedLaunch { kernel, launch, args: merge.values().to_vec() });
        }
        Ok(launches)
    }
}
