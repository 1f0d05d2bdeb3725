//! Attention through wgpu: query rows over a paged cache, planned once a step, run once a layer.
//!
//! Owns the bind groups and what is encoded; which kernel it is is `variant.rs`'s, the plan `plan.rs`'s, and the kernels are
//! [`pagewise_shaders::decode`]'s.

use std::sync::Arc;

use ::wgpu::{BindGroup, BindingResource, Buffer, BufferUsages, ComputePass};
use pagewise_shaders::decode::{CacheRows, Decode, DecodeArgs, DecodeMerge, Rows};
use pagewise_shaders::prefill::PrefillSpec;

use super::buffer::{Bound, Need, bind};
use super::context::Pipeline;
use super::dtype::shader_type;
use super::variant::small;
use super::{AttentionCall, AttentionPlan, BufferRange, Context, WgpuError};
use crate::{AttentionConfig, CacheLayout, KvStrides, RowStrides};

/// Attention whose bind groups are made: encoding it allocates nothing. One for each layer, made once.
#[derive(Debug)]
pub struct PreparedAttention {
    decode: Arc<Pipeline<Decode>>,
    merge: Arc<Pipeline<DecodeMerge>>,
    decode_group: BindGroup,
    prefill_group: BindGroup,
    merge_group: BindGroup,
    config: AttentionConfig,
    layout: CacheLayout,
    q: RowStrides,
    out: RowStrides,
    rows: usize,
    plan_bytes: u64,
    workspace_bytes: u64,
}

impl PreparedAttention {
    /// The decode kernel's variant, as in `pagewise_shaders`; the prefill kernel's is the plan's.
    pub fn variant(&self) -> String {
        self.decode.descriptor.spec().name()
    }

    /// Puts a plan's dispatches into a compute pass. Changes the pass's pipeline and its bind group 0. The plan's
    /// words must be in its buffer when the pass runs.
    ///
    /// # Errors
    /// [`WgpuError::OtherPlan`] for a plan of another configuration, layout or strides, or of more rows than the call
    /// was prepared for; [`WgpuError::Range`] when its buffers are too small for the plan.
    pub fn encode(&self, pass: &mut ComputePass<'_>, plan: &AttentionPlan) -> Result<(), WgpuError> {
        self.check(plan)?;
        if let Some([x, y, z]) = plan.dispatch {
            pass.set_pipeline(&self.decode.pipeline);
            pass.set_bind_group(0, &self.decode_group, &[]);
            pass.dispatch_workgroups(x, y, z);
        }
        if let Some(prefill) = &plan.prefill {
            let [x, y, z] = prefill.dispatch;
            pass.set_pipeline(&prefill.pipeline.pipeline);
            pass.set_bind_group(0, &self.prefill_group, &[]);
            pass.dispatch_workgroups(x, y, z);
        }
        if let Some([x, y, z]) = plan.merge_dispatch {
            pass.set_pipeline(&self.merge.pipeline);
            pass.set_bind_group(0, &self.merge_group, &[]);
            pass.dispatch_workgroups(x, y, z);
        }
        Ok(())
    }

    fn check(&self, plan: &AttentionPlan) -> Result<(), WgpuError> {
        let other = |what| Err(WgpuError::OtherPlan { what });
        if plan.config != self.config {
            return other("configuration");
        }
        if plan.layout != self.layout {
            return other("cache layout");
        }
        if (plan.q, plan.out) != (self.q, self.out) {
            return other("strides of queries or outputs");
        }
        if plan.rows > self.rows {
            return Err(WgpuError::TooManyTokens { tokens: plan.rows, prepared: self.rows });
        }
        for (tensor, found, needed) in [
            ("the plan", self.plan_bytes, plan.plan_bytes()),
            ("the workspace", self.workspace_bytes, plan.workspace_bytes()),
        ] {
            if found < needed {
                let reason = format!("this plan needs {needed} bytes, but the range has {found}");
                return Err(WgpuError::Range { tensor, reason });
            }
        }
        Ok(())
    }
}

impl Context {
    /// Checks a call, builds its pipelines if no call did before, and makes its bind groups.
    ///
    /// # Errors
    /// [`WgpuError`] names the field, buffer or limit, what is there and what is needed.
    pub fn prepare_attention(&self, call: &AttentionCall<'_>) -> Result<PreparedAttention, WgpuError> {
        let AttentionCall { config, layout, rows, .. } = *call;
        config.validate()?;
        layout.validate(config)?;
        call.q_strides.validate("q", config.q_heads, config.head_dim_qk)?;
        call.out_strides.validate("out", config.q_heads, config.head_dim_v)?;
        call.check_shared_buffers()?;
        shader_type("queries", config.q_dtype)?;
        shader_type("the cache", config.kv_dtype)?;
        let (q_size, kv_size) = (config.q_dtype.size() as u64, config.kv_dtype.size() as u64);
        let limits = self.limits();
        let range = |tensor, range, element, extent| bind(range, Need { tensor, element, extent }, limits);

        let q = range("q", call.q, q_size, call.q_strides.extent(rows, config.q_heads, config.head_dim_qk))?;
        let k_extent = layout.k_extent(config);
        let k = range("the K cache", call.k_cache, kv_size, k_extent)?;
        let v_extent = layout.v_extent(config);
        let v = range("the V cache", call.v_cache, kv_size, v_extent)?;
        let out_extent = call.out_strides.extent(rows, config.q_heads, config.head_dim_v);
        let out = range("out", call.out, q_size, out_extent)?;
        let plan = range("the plan", call.plan, 4, call.plan.size / 4)?;
        let workspace = range("the workspace", call.workspace, 16, call.workspace.size / 16)?;
        for (tensor, bound) in [("the plan", &plan), ("the workspace", &workspace)] {
            if bound.first != 0 {
                let reason = format!(
                    "its offset must be a multiple of {} (min_storage_buffer_offset_alignment)",
                    limits.min_storage_buffer_offset_alignment.max(16)
                );
                return Err(WgpuError::Range { tensor, reason });
            }
        }
        let no_lse = self.buffer("no lse", &[0; 4], BufferUsages::STORAGE);
        let lse = match call.lse {
            Some(lse) => range("lse", lse, 4, (rows * config.q_heads) as u64)?,
            None => range("lse", BufferRange::whole(&no_lse), 4, 4)?,
        };
        let terms = self.buffer("attention terms", &call.terms.words(config)?, BufferUsages::STORAGE);

        let row = |bound: &Bound<'_>, strides: RowStrides| Rows {
            offset: bound.first,
            row_stride: strides.token,
            head_stride: strides.head,
        };
        let cache = |bound: &Bound<'_>, strides: KvStrides, extent| CacheRows {
            offset: bound.first,
            block_stride: strides.block,
            token_stride: strides.token,
            head_stride: strides.head,
            extent: bound.first + extent,
        };
        let args = DecodeArgs {
            kv_heads: small("kv_heads", config.kv_heads)?,
            group: small("the group", config.group())?,
            head_dim_k: small("head_dim_qk", config.head_dim_qk)?,
            head_dim_v: small("head_dim_v", config.head_dim_v)?,
            block_shift: layout.block_size.trailing_zeros(),
            q: row(&q, call.q_strides),
            k: cache(&k, layout.k, k_extent),
            v: cache(&v, layout.v, v_extent),
            out: row(&out, call.out_strides),
            lse: call.lse.map(|_| lse.first),
            terms: 0,
            scale: config.scale,
            softcap: config.softcap,
        };
        let spec = self.choose_decode(config, &args, call.tuning)?;
        let decode = self.decode.get(spec, self.builder(), || Ok(Decode::new(spec)?), Decode::shader)?;
        let merge = self.decode_merge.get(
            spec.q,
            self.builder(),
            || Ok(DecodeMerge::new(spec.q)?),
            DecodeMerge::shader,
        )?;
        let uniform = self.buffer("decode parameters", &args.uniform(spec)?, BufferUsages::UNIFORM);
        let merge_uniform =
            self.buffer("decode_merge parameters", &args.merge_uniform(spec)?, BufferUsages::UNIFORM);
        let prefill_uniform = PrefillSpec::uniform(spec.q, &args)?;
        let prefill_uniform = self.buffer("prefill parameters", &prefill_uniform, BufferUsages::UNIFORM);
        // Both kernels have the same bindings, so decode's layout serves prefill, whose pipeline is the plan's.
        let group = |label, uniform: &Buffer| {
            let tensors = [
                uniform.as_entire_binding(),
                tensor(&q),
                tensor(&k),
                tensor(&v),
                tensor(&plan),
                terms.as_entire_binding(),
                tensor(&out),
                tensor(&lse),
                tensor(&workspace),
            ];
            self.group(label, &decode.layout, tensors)
        };
        let decode_group = group("decode", &uniform);
        let prefill_group = group("prefill", &prefill_uniform);
        let merge_group = self.group(
            "decode_merge",
            &merge.layout,
            [
                merge_uniform.as_entire_binding(),
                tensor(&plan),
                terms.as_entire_binding(),
                tensor(&workspace),
                tensor(&out),
                tensor(&lse),
            ],
        );
        Ok(PreparedAttention {
            decode,
            merge,
            decode_group,
            prefill_group,
            merge_group,
            config: config.clone(),
            layout: *layout,
            q: call.q_strides,
            out: call.out_strides,
            rows,
            plan_bytes: call.plan.size,
            workspace_bytes: call.workspace.size,
        })
    }
}

fn tensor<'a>(bound: &Bound<'a>) -> BindingResource<'a> {
    BindingResource::Buffer(bound.binding.clone())
}
