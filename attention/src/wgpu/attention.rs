//! Attention through wgpu: query rows over a paged cache, planned once a step, run once a layer.
//!
//! Owns the choice of the kernel variant, the checks of buffers, and the bind groups; the plan is `plan.rs`'s, the
//! kernels are [`pagewise_shaders::decode`]'s.

use std::sync::Arc;

use ::wgpu::{BindGroup, BindingResource, Buffer, BufferUsages, ComputePass, Features};
use pagewise_shaders::decode::{
    CacheRows, Decode, DecodeArgs, DecodeMerge, DecodeNeeds, DecodeSpec, DecodeTuning, LOWEST, Rows, Unit,
};

use pagewise_shaders::prefill::{MatrixNeeds, MatrixSpec, PrefillKernel, PrefillNeeds, PrefillSpec};

use super::buffer::{Bound, Need, bind};
use super::context::Pipeline;
use super::dtype::shader_type;
use super::{AttentionPlan, BufferRange, Context, PrefillChoice, WgpuError};
use crate::{AttentionConfig, CacheLayout, DType, KvStrides, Mask, ProblemError, RowStrides};

/// What stored keys or values are multiplied with.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum KvScale<'a> {
    /// Nothing.
    #[default]
    One,
    /// One scale.
    PerTensor(f32),
    /// `[kv_heads]`
    PerHead(&'a [f32]),
}

/// A layer's numbers for each head. They are copied when the call is prepared.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct HeadTerms<'a> {
    /// ALiBi's slopes, `[q_heads]`, if the configuration says so.
    pub alibi_slopes: Option<&'a [f32]>,
    /// Attention sinks, `[q_heads]`, if the configuration says so.
    pub sinks: Option<&'a [f32]>,
    /// Of stored keys.
    pub k_scale: KvScale<'a>,
    /// Of stored values.
    pub v_scale: KvScale<'a>,
}

/// Attention of one layer over parts of the caller's buffers.
#[derive(Clone, Copy, Debug)]
pub struct AttentionCall<'a> {
    /// What the layer computes.
    pub config: &'a AttentionConfig,
    /// Where blocks lie in the caches.
    pub layout: &'a CacheLayout,
    /// Most query rows of a plan that is run.
    pub rows: usize,
    /// Queries, `[rows, q_heads, head_dim_qk]`.
    pub q: BufferRange<'a>,
    /// Their strides.
    pub q_strides: RowStrides,
    /// Key cache.
    pub k_cache: BufferRange<'a>,
    /// Value cache; may lie in the key cache's buffer.
    pub v_cache: BufferRange<'a>,
    /// Slopes, sinks and scales.
    pub terms: HeadTerms<'a>,
    /// Output, `[rows, q_heads, head_dim_v]`.
    pub out: BufferRange<'a>,
    /// Its strides.
    pub out_strides: RowStrides,
    /// Log-sum-exp (natural logarithm), f32 `[rows, q_heads]`, if wanted.
    pub lse: Option<BufferRange<'a>>,
    /// Where [`AttentionPlan::words`] are written to, at the range's begin.
    pub plan: BufferRange<'a>,
    /// Workspace of [`AttentionPlan::workspace_bytes`], which may be shared by layers.
    pub workspace: BufferRange<'a>,
    /// How the kernel is tuned, if otherwise than by default.
    pub tuning: Option<DecodeTuning>,
}

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

    /// The smallest subgroup, where kernels may use subgroup operations.
    fn subgroup(&self) -> Option<u32> {
        self.features().contains(Features::SUBGROUP).then(|| self.device().adapter_info().subgroup_min_size)
    }

    fn needs(&self, config: &AttentionConfig, unit: Unit) -> Result<DecodeNeeds, WgpuError> {
        Ok(DecodeNeeds {
            q: shader_type("queries", config.q_dtype)?,
            kv: shader_type("the cache", config.kv_dtype)?,
            unit,
            head_dim: small("head_dim", config.head_dim_qk.max(config.head_dim_v))?,
            group: small("the group", config.group())?,
            subgroup: self.subgroup(),
            bits: config.mask == Mask::Bits,
        })
    }

    /// The variant for a configuration whose buffers are aligned to 16 bytes. Others read other units, but have as
    /// many queries.
    pub(super) fn usual_spec(&self, config: &AttentionConfig) -> Result<DecodeSpec, WgpuError> {
        let needs = self.needs(config, Unit::Vec4)?;
        DecodeSpec::for_needs(needs).ok_or(WgpuError::NoVariant { kernel: "decode" })
    }

    /// The prefill kernel for a configuration. All of them read caches by four elements.
    ///
    /// # Errors
    /// [`WgpuError::UnsupportedDType`]; [`WgpuError::NoVariant`] where matrix units are asked for that are not there or do
    /// not take the types or heads; [`WgpuError::Limit`] where a tuning takes too much workgroup memory.
    pub fn prefill_kernel(
        &self,
        config: &AttentionConfig,
        choice: PrefillChoice,
    ) -> Result<PrefillKernel, WgpuError> {
        let matrix = || self.matrix_spec(config).map(|spec| spec.map(PrefillKernel::Matrix));
        let kernel = match choice {
            PrefillChoice::Fastest => match matrix()? {
                Some(kernel) => kernel,
                None => PrefillKernel::Tiled(self.tiled_spec(config)?),
            },
            PrefillChoice::Tiled(tuning) => {
                let spec = self.tiled_spec(config)?;
                PrefillKernel::Tiled(PrefillSpec { tuning: tuning.unwrap_or(spec.tuning), ..spec })
            }
            PrefillChoice::Matrix(tuning) => {
                let spec = self.matrix_spec(config)?;
                let spec = spec.ok_or(WgpuError::NoVariant { kernel: "prefill_matrix" })?;
                PrefillKernel::Matrix(MatrixSpec { tuning: tuning.unwrap_or(spec.tuning), ..spec })
            }
        };
        let needed = kernel.workgroup_memory();
        let found = self.limits().max_compute_workgroup_storage_size;
        if needed > found {
            let (limit, what) = ("max_compute_workgroup_storage_size", kernel.name());
            return Err(WgpuError::Limit { limit, what, found: found.into(), needed: needed.into() });
        }
        Ok(kernel)
    }

    fn tiled_spec(&self, config: &AttentionConfig) -> Result<PrefillSpec, WgpuError> {
        Ok(PrefillSpec::for_needs(PrefillNeeds {
            q: shader_type("queries", config.q_dtype)?,
            kv: shader_type("the cache", config.kv_dtype)?,
            head_dim_v: small("head_dim_v", config.head_dim_v)?,
            bits: config.mask == Mask::Bits,
            half: self.features().contains(Features::SHADER_F16),
            workgroup_memory: self.limits().max_compute_workgroup_storage_size,
        }))
    }

    /// Matrix units take f16 alone: others would be rounded to it, or leave its range.
    fn matrix_spec(&self, config: &AttentionConfig) -> Result<Option<MatrixSpec>, WgpuError> {
        let Some(shape) = self.matrices() else { return Ok(None) };
        if (config.q_dtype, config.kv_dtype) != (DType::F16, DType::F16) {
            return Ok(None);
        }
        Ok(MatrixSpec::for_needs(MatrixNeeds {
            shape,
            head_dim_k: small("head_dim_qk", config.head_dim_qk)?,
            head_dim_v: small("head_dim_v", config.head_dim_v)?,
            bits: config.mask == Mask::Bits,
            workgroup_memory: self.limits().max_compute_workgroup_storage_size,
        }))
    }

    /// The variant with the largest units that divide every offset, stride and head dimension.
    fn choose_decode(
        &self,
        config: &AttentionConfig,
        args: &DecodeArgs,
        tuning: Option<DecodeTuning>,
    ) -> Result<DecodeSpec, WgpuError> {
        let usual = self.usual_spec(config)?;
        let mut refusal = None;
        for unit in Unit::ALL {
            let Some(spec) = DecodeSpec::for_needs(self.needs(config, unit)?) else { continue };
            // The plan counts on the usual number of queries.
            let spec = DecodeSpec { queries: usual.queries, tuning: tuning.unwrap_or(spec.tuning), ..spec };
            if spec.tuning.half && !self.features().contains(Features::SHADER_F16) {
                continue;
            }
            match args.uniform(spec) {
                Ok(_) if spec.exists() => return Ok(spec),
                Ok(_) => {}
                Err(error) => refusal = Some(error),
            }
        }
        match refusal {
            Some(reason @ pagewise_shaders::Error::NotDivisible { .. }) => Err(WgpuError::Alignment {
                reason,
                advice: "head dimensions must be multiples of 4 elements; offsets and strides of the caches multiples of 4 elements, those of 16-bit queries and outputs even",
            }),
            Some(error) => Err(error.into()),
            None => Err(WgpuError::NoVariant { kernel: "decode" }),
        }
    }
}

impl AttentionCall<'_> {
    /// WebGPU does not let a dispatch read and write one buffer, or write it through two bindings.
    fn check_shared_buffers(&self) -> Result<(), WgpuError> {
        let reads = [
            ("q", self.q),
            ("the K cache", self.k_cache),
            ("the V cache", self.v_cache),
            ("the plan", self.plan),
        ];
        let mut writes = vec![("out", self.out), ("the workspace", self.workspace)];
        writes.extend(self.lse.map(|lse| ("lse", lse)));
        for (index, &(written, range)) in writes.iter().enumerate() {
            let later = writes.iter().skip(index + 1);
            if let Some(&(read, _)) =
                reads.iter().chain(later).find(|(_, other)| other.buffer == range.buffer)
            {
                return Err(WgpuError::SharedBuffer { read, written });
            }
        }
        Ok(())
    }
}

impl HeadTerms<'_> {
    /// Slopes, sinks, scales of K and of V, as the kernels read them.
    fn words(&self, config: &AttentionConfig) -> Result<Vec<u32>, WgpuError> {
        let list =
            |tensor, values: Option<&[f32]>, wanted: bool, len: usize, none: f32| match (values, wanted) {
                (_, false) => Ok(vec![none; len]),
                (None, true) => Err(WgpuError::Missing { what: tensor }),
                (Some(values), true) if values.len() == len => Ok(values.to_vec()),
                (Some(values), true) => Err(WgpuError::Problem(ProblemError::BufferTooShort {
                    tensor,
                    len: values.len() as u64,
                    needed: len as u64,
                })),
            };
        let scales = |tensor, scale: KvScale<'_>| match scale {
            KvScale::One => Ok(vec![1.0; config.kv_heads]),
            KvScale::PerTensor(scale) => Ok(vec![scale; config.kv_heads]),
            KvScale::PerHead(scales) => list(tensor, Some(scales), true, config.kv_heads, 1.0),
        };
        let mut words = list("ALiBi's slopes", self.alibi_slopes, config.alibi, config.q_heads, 0.0)?;
        let sinks = list("the sinks", self.sinks, config.sinks, config.q_heads, f32::NEG_INFINITY)?;
        let log2 = |sink: f32| (f64::from(sink) * std::f64::consts::LOG2_E).max(f64::from(LOWEST)) as f32;
        words.extend(sinks.into_iter().map(log2));
        words.extend(scales("the scales of K", self.k_scale)?);
        words.extend(scales("the scales of V", self.v_scale)?);
        Ok(words.into_iter().map(f32::to_bits).collect())
    }
}

fn small(field: &'static str, value: usize) -> Result<u32, WgpuError> {
    u32::try_from(value).map_err(|_| {
        pagewise_shaders::Error::TooLarge { kernel: "decode", field, value: value as u64 }.into()
    })
}

fn tensor<'a>(bound: &Bound<'a>) -> BindingResource<'a> {
    BindingResource::Buffer(bound.binding.clone())
}
