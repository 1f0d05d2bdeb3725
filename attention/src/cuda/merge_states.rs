//! `merge_states` on CUDA: puts attention over disjoint sets of keys together, by their log-sum-exp.
//!
//! Owns the checks, the choice of variant and the launch; the kernel and its geometry are
//! [`pagewise_ptx::merge_states`]'s.

use std::sync::Arc;

use pagewise_ptx::merge_states::{
    MergeStates, MergeStatesArgs, MergeStatesShape, MergeStatesSpec, StateRows,
};

use super::checks::{aligned, check_addresses, small};
use super::context::Entry;
use super::decode::ptx_type;
use super::{Context, CudaError, RawStream};
use crate::{DType, MAX_HEAD_DIM, ProblemError, RowStrides};

/// A `merge_states` over raw device addresses. Part `p` of an input lies `p` times its part stride behind part 0, so
/// two results in separate buffers are parts too: their stride is the distance in elements, which may be negative.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MergeStatesCall {
    /// Parts, at least 1.
    pub parts: usize,
    /// Query rows.
    pub rows: usize,
    /// Heads of a row.
    pub heads: usize,
    /// Elements of a head: 1 to 256.
    pub head_dim: usize,
    /// Element type of the parts' outputs: f32, f16 or bf16.
    pub part_dtype: DType,
    /// Device address of the outputs of part 0, `[rows, heads, head_dim]`.
    pub part_out: u64,
    /// Their strides.
    pub part_out_strides: RowStrides,
    /// Elements from a part's outputs to the next's.
    pub part_out_stride: i64,
    /// Device address of the log-sum-exp (natural logarithm) of part 0, f32 `[rows, heads]`; −∞ where the part has no
    /// key, and then its output does not matter.
    pub part_lse: u64,
    /// Their strides.
    pub part_lse_strides: RowStrides,
    /// Elements from a part's log-sum-exp to the next's.
    pub part_lse_stride: i64,
    /// Element type of the merged output: f32, f16 or bf16.
    pub out_dtype: DType,
    /// Device address of the merged output, `[rows, heads, head_dim]`: 0 where every part is empty.
    pub out: u64,
    /// Its strides.
    pub out_strides: RowStrides,
    /// Device address of the merged log-sum-exp, f32 `[rows, heads]`, or 0 for none: −∞ where every part is empty.
    pub lse: u64,
    /// Its strides.
    pub lse_strides: RowStrides,
}

/// The kernel variant that a call takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MergeStatesVariant(MergeStatesSpec);

impl MergeStatesVariant {
    /// The kernel's name, as in `pagewise_ptx`: `merge_states_bf16_bf16_v8`.
    pub fn name(&self) -> String {
        self.0.entry()
    }

    /// What was rendered for it.
    pub fn spec(&self) -> MergeStatesSpec {
        self.0
    }
}

impl MergeStatesCall {
    /// Checks the call and says which kernel variant it takes.
    ///
    /// # Errors
    /// [`CudaError`] names the field, its value and what it must be.
    pub fn variant(&self) -> Result<MergeStatesVariant, CudaError> {
        let Self { parts, heads, head_dim, part_dtype, out_dtype, .. } = *self;
        if parts == 0 {
            let problem = "there is no partial result to merge; give at least one".to_owned();
            return Err(ProblemError::Input { input: "parts", problem }.into());
        }
        if heads == 0 {
            return Err(ProblemError::Heads { q_heads: heads, kv_heads: heads }.into());
        }
        if head_dim == 0 || head_dim > MAX_HEAD_DIM {
            return Err(
                ProblemError::HeadDim { field: "head_dim", value: head_dim, max: MAX_HEAD_DIM }.into()
            );
        }
        for (what, dtype) in [("the parts", part_dtype), ("the merged output", out_dtype)] {
            if dtype.is_fp8() {
                return Err(CudaError::UnsupportedDType { what, dtype });
            }
        }
        self.part_out_strides.validate("the parts' out", heads, head_dim)?;
        self.part_lse_strides.validate("the parts' lse", heads, 1)?;
        self.out_strides.validate("out", heads, head_dim)?;
        if self.lse != 0 {
            self.lse_strides.validate("lse", heads, 1)?;
        }
        let (part_size, out_size) = (part_dtype.size() as u64, out_dtype.size() as u64);
        check_addresses([
            ("the parts' out", self.part_out, part_size),
            ("the parts' lse", self.part_lse, 4),
            ("out", self.out, out_size),
            ("lse", self.lse, 4),
        ])?;
        let (part_type, out_type) = (ptx_type(part_dtype), ptx_type(out_dtype));
        let wide = MergeStatesSpec::vectorised(part_type, out_type);
        // The stride of a single part is never used.
        let distance = if parts > 1 { self.part_out_stride.unsigned_abs() } else { 0 };
        let part_strides = [self.part_out_strides.token, self.part_out_strides.head, distance];
        let out_strides = [self.out_strides.token, self.out_strides.head];
        let is_wide = head_dim.is_multiple_of(wide.vector as usize)
            && aligned(self.part_out, &part_strides, part_size, wide.part_alignment())
            && aligned(self.out, &out_strides, out_size, wide.out_alignment());
        let spec = if is_wide { wide } else { MergeStatesSpec::scalar(part_type, out_type) };
        Ok(MergeStatesVariant(spec))
    }

    /// The kernel's arguments.
    ///
    /// # Errors
    /// [`CudaError::TooLarge`] for a size that 32 bits do not hold.
    pub fn args(&self) -> Result<MergeStatesArgs, CudaError> {
        let rows = |address, strides: RowStrides| StateRows {
            address,
            row_stride: strides.token,
            head_stride: strides.head,
        };
        Ok(MergeStatesArgs {
            shape: MergeStatesShape {
                rows: small("the number of query rows", self.rows as u64)?,
                heads: small("the number of heads", self.heads as u64)?,
                head_dim: small("head_dim", self.head_dim as u64)?,
            },
            parts: small("the number of parts", self.parts as u64)?,
            part_out: rows(self.part_out, self.part_out_strides),
            part_out_stride: self.part_out_stride,
            part_lse: rows(self.part_lse, self.part_lse_strides),
            part_lse_stride: self.part_lse_stride,
            out: rows(self.out, self.out_strides),
            lse: rows(self.lse, self.lse_strides),
        })
    }
}

impl Context {
    /// Compiles and loads what a call takes, so that the call itself, which may be captured in a CUDA graph, loads
    /// nothing.
    ///
    /// # Errors
    /// As [`MergeStatesCall::variant`]; [`CudaError::Jit`] when the driver's compiler fails.
    pub fn prepare_merge_states(&self, call: &MergeStatesCall) -> Result<MergeStatesVariant, CudaError> {
        let variant = call.variant()?;
        let _entered = self.enter()?;
        self.merge_states_kernel(variant)?;
        Ok(variant)
    }

    /// Puts a `merge_states` on a stream: `lse = ln Σ exp(lseₚ)`, `out = Σ exp(lseₚ − lse) · outₚ`. The parts are
    /// added in their order, so the same parts give the same bits.
    ///
    /// # Safety
    /// - Every address is in device memory of this context's GPU and valid, until the launch has completed, for what
    ///   its shape and strides reach: reads of the parts, writes of `out` and `lse`.
    /// - Nothing else writes the parts, or touches `out` and `lse`, meanwhile; they do not overlap.
    /// - The stream belongs to this context.
    ///
    /// # Errors
    /// As [`Context::prepare_merge_states`]; [`CudaError::Driver`] when the launch fails.
    pub unsafe fn merge_states_raw(
        &self,
        call: &MergeStatesCall,
        stream: RawStream,
    ) -> Result<MergeStatesVariant, CudaError> {
        let variant = call.variant()?;
        if call.rows == 0 {
            return Ok(variant);
        }
        let args = call.args()?;
        let _entered = self.enter()?;
        let entry = self.merge_states_kernel(variant)?;
        let launch = entry.descriptor.launch(args.shape)?;
        // SAFETY: the arguments are in the descriptor's order; the caller answers for addresses and stream.
        unsafe { entry.kernel.launch(launch, &args.values(), stream) }?;
        Ok(variant)
    }

    fn merge_states_kernel(&self, variant: MergeStatesVariant) -> Result<Arc<Entry<MergeStates>>, CudaError> {
        self.loaded(&self.merge_states, variant.0, || MergeStates::new(variant.0), MergeStates::kernel)
    }
}
