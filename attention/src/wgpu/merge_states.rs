//! `merge_states` through wgpu: puts attention over disjoint sets of keys together, by their log-sum-exp.
//!
//! Owns the checks, the choice of variant and the bind group; the kernel is [`pagewise_shaders::merge_states`]'s.

use std::sync::Arc;

use ::wgpu::{BindGroup, BindingResource, BufferUsages, CommandEncoder, ComputePass, ComputePassDescriptor};
use pagewise_shaders::decode::Rows;
use pagewise_shaders::merge_states::{MergeStates, MergeStatesArgs, MergeStatesSpec};

use super::buffer::{Bound, Need, bind};
use super::context::Pipeline;
use super::dtype::shader_type;
use super::{BufferRange, Context, WgpuError};
use crate::{DType, MAX_HEAD_DIM, ProblemError, RowStrides};

/// A `merge_states` over parts of the caller's buffers. The parts lie in one buffer, so that their number is not
/// limited by bindings: attention over each of them writes its own range of it.
#[derive(Clone, Copy, Debug)]
pub struct MergeStatesCall<'a> {
    /// Parts, at least 1.
    pub parts: usize,
    /// Query rows.
    pub rows: usize,
    /// Heads of a row.
    pub heads: usize,
    /// Elements of a head: 1 to 256; even where one of the types has 16 bits.
    pub head_dim: usize,
    /// Element type of the parts' outputs: f32, f16 or bf16.
    pub part_dtype: DType,
    /// Outputs of the parts, `[parts, rows, heads, head_dim]`.
    pub part_out: BufferRange<'a>,
    /// Strides of a part's outputs.
    pub part_out_strides: RowStrides,
    /// Elements from a part's outputs to the next's.
    pub part_out_stride: u64,
    /// Log-sum-exp (natural logarithm) of the parts, f32 `[parts, rows, heads]`; −∞ where a part has no key, and then
    /// its output does not matter.
    pub part_lse: BufferRange<'a>,
    /// Strides of a part's log-sum-exp.
    pub part_lse_strides: RowStrides,
    /// Elements from a part's log-sum-exp to the next's.
    pub part_lse_stride: u64,
    /// Element type of the merged output: f32, f16 or bf16.
    pub out_dtype: DType,
    /// Merged output, `[rows, heads, head_dim]`: 0 where every part is empty.
    pub out: BufferRange<'a>,
    /// Its strides.
    pub out_strides: RowStrides,
    /// Merged log-sum-exp, f32 `[rows, heads]`, if wanted: −∞ where every part is empty.
    pub lse: Option<BufferRange<'a>>,
    /// Its strides.
    pub lse_strides: RowStrides,
}

/// A `merge_states` whose bind group is made: encoding it allocates nothing.
#[derive(Debug)]
pub struct PreparedMergeStates {
    pipeline: Arc<Pipeline<MergeStates>>,
    group: BindGroup,
    workgroups: Option<[u32; 3]>,
}

impl PreparedMergeStates {
    /// The kernel variant, as in `pagewise_shaders`: `merge_states_bf16_f32_x4`.
    pub fn variant(&self) -> &str {
        self.pipeline.descriptor.shader().name()
    }

    /// Puts the dispatch into a compute pass: `lse = ln Σ exp(lseₚ)`, `out = Σ exp(lseₚ − lse) · outₚ`. The parts are
    /// added in their order. Changes the pass's pipeline and its bind group 0.
    pub fn encode(&self, pass: &mut ComputePass<'_>) {
        if let Some([x, y, z]) = self.workgroups {
            pass.set_pipeline(&self.pipeline.pipeline);
            pass.set_bind_group(0, &self.group, &[]);
            pass.dispatch_workgroups(x, y, z);
        }
    }
}

impl MergeStatesCall<'_> {
    fn check(&self) -> Result<(), WgpuError> {
        let Self { parts, heads, head_dim, .. } = *self;
        if parts == 0 {
            let problem = "there is no partial result to merge; give at least one".to_owned();
            return Err(ProblemError::Input { input: "parts", problem }.into());
        }
        if heads == 0 {
            return Err(ProblemError::Heads { q_heads: heads, kv_heads: heads }.into());
        }
        if head_dim == 0 || head_dim > MAX_HEAD_DIM {
            let field = "head_dim";
            return Err(ProblemError::HeadDim { field, value: head_dim, max: MAX_HEAD_DIM }.into());
        }
        self.part_out_strides.validate("the parts' out", heads, head_dim)?;
        self.part_lse_strides.validate("the parts' lse", heads, 1)?;
        self.out_strides.validate("out", heads, head_dim)?;
        if self.lse.is_some() {
            self.lse_strides.validate("lse", heads, 1)?;
        }
        let reads = [("the parts' out", self.part_out), ("the parts' lse", self.part_lse)];
        let writes = [Some(("out", self.out)), self.lse.map(|lse| ("lse", lse))];
        let writes: Vec<_> = writes.into_iter().flatten().collect();
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

impl Context {
    /// Checks a call, builds its pipeline if no call did before, and makes its bind group.
    ///
    /// # Errors
    /// [`WgpuError`] names the field, buffer or limit, what is there and what is needed.
    pub fn prepare_merge_states(&self, call: &MergeStatesCall<'_>) -> Result<PreparedMergeStates, WgpuError> {
        call.check()?;
        let MergeStatesCall { parts, rows, heads, head_dim, .. } = *call;
        let part_type = shader_type("the parts", call.part_dtype)?;
        let out_type = shader_type("the merged output", call.out_dtype)?;
        let limits = self.limits();
        let range = |tensor, range, dtype: DType, extent: u64| {
            bind(range, Need { tensor, element: dtype.size() as u64, extent }, limits)
        };
        let of_parts = |stride: u64, strides: RowStrides, dim: usize| {
            let one = strides.extent(rows, heads, dim);
            (parts as u64 - 1).saturating_mul(stride).saturating_add(one)
        };
        let extent = of_parts(call.part_out_stride, call.part_out_strides, head_dim);
        let part_out = range("the parts' out", call.part_out, call.part_dtype, extent)?;
        let extent = of_parts(call.part_lse_stride, call.part_lse_strides, 1);
        let part_lse = range("the parts' lse", call.part_lse, DType::F32, extent)?;
        let extent = call.out_strides.extent(rows, heads, head_dim);
        let out = range("out", call.out, call.out_dtype, extent)?;
        let no_lse = self.buffer("no lse", &[0; 4], BufferUsages::STORAGE);
        let lse = match call.lse {
            Some(lse) => range("lse", lse, DType::F32, call.lse_strides.extent(rows, heads, 1))?,
            None => range("lse", BufferRange::whole(&no_lse), DType::F32, 4)?,
        };
        let row = |bound: &Bound<'_>, strides: RowStrides| Rows {
            offset: bound.first,
            row_stride: strides.token,
            head_stride: strides.head,
        };
        // The stride of a single part is never used.
        let distance = |stride| if parts > 1 { stride } else { 0 };
        let args = MergeStatesArgs {
            parts: small("parts", parts)?,
            rows: small("rows", rows)?,
            heads: small("heads", heads)?,
            head_dim: small("head_dim", head_dim)?,
            part_out: row(&part_out, call.part_out_strides),
            part_out_stride: distance(call.part_out_stride),
            part_lse: row(&part_lse, call.part_lse_strides),
            part_lse_stride: distance(call.part_lse_stride),
            out: row(&out, call.out_strides),
            lse: call.lse.map(|_| row(&lse, call.lse_strides)),
        };
        let mut chosen = Err(WgpuError::NoVariant { kernel: "merge_states" });
        for spec in MergeStatesSpec::of_types(part_type, out_type) {
            chosen = match args.uniform(spec) {
                Ok(words) => Ok((spec, words)),
                Err(reason @ pagewise_shaders::Error::NotDivisible { .. }) => Err(WgpuError::Alignment {
                    reason,
                    advice: "16-bit tensors need even offsets, strides and head dimensions in WGSL",
                }),
                Err(error) => Err(error.into()),
            };
            if chosen.is_ok() {
                break;
            }
        }
        let (spec, words) = chosen?;
        let pipeline = self.merge_states.get(
            spec,
            self.builder(),
            || Ok(MergeStates::new(spec)?),
            MergeStates::shader,
        )?;
        let workgroups = match rows {
            0 => None,
            _ => Some(args.workgroups(spec, limits.max_compute_workgroups_per_dimension)?),
        };
        let uniform = self.buffer("merge_states parameters", &words, BufferUsages::UNIFORM);
        let group = self.group(
            "merge_states",
            &pipeline.layout,
            [
                uniform.as_entire_binding(),
                BindingResource::Buffer(part_out.binding),
                BindingResource::Buffer(part_lse.binding),
                BindingResource::Buffer(out.binding),
                BindingResource::Buffer(lse.binding),
            ],
        );
        Ok(PreparedMergeStates { pipeline, group, workgroups })
    }

    /// Prepares a call and puts it into a pass of its own. For calls that repeat, prepare once instead.
    ///
    /// # Errors
    /// As [`Context::prepare_merge_states`].
    pub fn merge_states(
        &self,
        encoder: &mut CommandEncoder,
        call: &MergeStatesCall<'_>,
    ) -> Result<PreparedMergeStates, WgpuError> {
        let prepared = self.prepare_merge_states(call)?;
        let descriptor = ComputePassDescriptor { label: Some("merge_states"), timestamp_writes: None };
        prepared.encode(&mut encoder.begin_compute_pass(&descriptor));
        Ok(prepared)
    }
}

fn small(field: &'static str, value: usize) -> Result<u32, WgpuError> {
    u32::try_from(value).map_err(|_| {
        pagewise_shaders::Error::TooLarge { kernel: "merge_states", field, value: value as u64 }.into()
    })
}
