//! `write_kv` with rotary embedding: K turns on its way into the cache, and the queries of the same tokens with it.
//!
//! Owns the checks of what rotary embedding adds to a [`WriteKvCall`] and the choice of variant; the launch is
//! `write_kv.rs`'s.

use pagewise_ptx::write_kv::{RotaryArgs, RotaryStyle, WriteKvArgs, WriteKvSpec};

use super::checks::{aligned, check_addresses, small};
use super::decode::ptx_type;
use super::write_kv::{WriteKvCall, WriteKvVariant, source_rows};
use super::{Context, CudaError, RawStream};
use crate::{ProblemError, RowStrides};

/// The integer type of the positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PositionType {
    /// 4 bytes.
    I32,
    /// 8 bytes.
    I64,
}

impl PositionType {
    const fn size(self) -> u32 {
        match self {
            Self::I32 => 4,
            Self::I64 => 8,
        }
    }
}

/// Cosines and sines of the angles, in device memory: f32 `[positions, dim / 2]` each. One table that holds the
/// cosines of a position and then its sines is both, `dim` elements from row to row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RotaryTables {
    /// Device address of the first cosine.
    pub cos: u64,
    /// Device address of the first sine.
    pub sin: u64,
    /// Elements from a position to the next, in both.
    pub stride: u64,
    /// Positions in the tables.
    pub positions: usize,
}

/// The queries of the same tokens, `[tokens, q_heads, head_dim_qk]`, of the type of the new rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RotaryQueries {
    /// Device address of the queries.
    pub q: u64,
    /// Their strides.
    pub q_strides: RowStrides,
    /// Device address of the turned queries: that of `q`, with the same strides, or of other memory.
    pub out: u64,
    /// Their strides.
    pub out_strides: RowStrides,
}

/// Rotary embedding (Su et al. 2021): pair `i` of token `t` turns by the angle whose cosine and sine are in
/// row `positions[t]`, column `i` of the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rotary {
    /// Which elements are pairs.
    pub style: RotaryStyle,
    /// The first so many elements of a head turn; even, at most `head_dim_qk`.
    pub dim: usize,
    /// The angles.
    pub tables: RotaryTables,
    /// Device address of the positions, `[tokens]`. A position outside of the tables, which no check on the host
    /// can find, gives NaN. Queries turn whether their token has a slot or not.
    pub positions: u64,
    /// Their type.
    pub position_type: PositionType,
    /// Queries that turn in the same launch.
    pub queries: Option<RotaryQueries>,
}

impl Rotary {
    /// Checks the description against a call and says which kernel variant both take together.
    ///
    /// # Errors
    /// As [`WriteKvCall::variant`]; [`ProblemError::Input`] for a rotary dimension or tables that do not fit.
    pub fn variant(&self, call: &WriteKvCall<'_>) -> Result<WriteKvVariant, CudaError> {
        let widest = call.widest()?;
        let Self { dim, tables, position_type, .. } = *self;
        let head_dim = call.config.head_dim_qk;
        if dim == 0 || !dim.is_multiple_of(2) || dim > head_dim {
            let problem = format!(
                "the rotary dimension is {dim}; it must be even, above 0 and at most head_dim_qk = {head_dim}"
            );
            return Err(wrong(problem));
        }
        if tables.stride < dim as u64 / 2 {
            let problem =
                format!("the stride of the tables is {}; a row holds {} elements", tables.stride, dim / 2);
            return Err(wrong(problem));
        }
        if tables.stride.checked_mul(tables.positions as u64).is_none_or(|elements| elements >= 1 << 61) {
            return Err(ProblemError::TooLarge { tensor: "the rotary tables" }.into());
        }
        let size = call.source.size() as u64;
        let position_size = u64::from(position_type.size());
        let mut addresses = vec![
            ("the cosines", tables.cos, 4),
            ("the sines", tables.sin, 4),
            ("the positions", self.positions, position_size),
        ];
        if let Some(queries) = &self.queries {
            addresses.extend([("q", queries.q, size), ("the turned q", queries.out, size)]);
            for (tensor, strides) in [("q", queries.q_strides), ("the turned q", queries.out_strides)] {
                strides.validate(tensor, call.config.q_heads, head_dim)?;
            }
            if queries.q == queries.out && queries.q_strides != queries.out_strides {
                return Err(wrong("queries that turn in place need the same strides for both".to_owned()));
            }
        }
        check_addresses(addresses)?;
        let fits = |wide: &WriteKvSpec| {
            (dim / 2).is_multiple_of(wide.vector as usize)
                && aligned(tables.cos, &[tables.stride], 4, wide.table_alignment())
                && aligned(tables.sin, &[], 4, wide.table_alignment())
                && self.queries.is_none_or(|RotaryQueries { q, q_strides, out, out_strides }| {
                    let alignment = wide.source_alignment();
                    aligned(q, &[q_strides.token, q_strides.head], size, alignment)
                        && aligned(out, &[out_strides.token, out_strides.head], size, alignment)
                })
        };
        let plain = widest
            .filter(fits)
            .unwrap_or(WriteKvSpec::scalar(ptx_type(call.source), ptx_type(call.config.kv_dtype)));
        Ok(call.ordered(plain.with_rotary(self.style)))
    }

    /// The kernel's arguments for a call.
    ///
    /// # Errors
    /// [`CudaError::TooLarge`] for a size that 32 bits do not hold.
    pub fn args(&self, call: &WriteKvCall<'_>) -> Result<WriteKvArgs, CudaError> {
        let Self { dim, tables, positions, position_type, queries, .. } = *self;
        let mut args = call.args()?;
        let (query, query_out) = queries
            .map(|RotaryQueries { q, q_strides, out, out_strides }| {
                (source_rows(q, q_strides), source_rows(out, out_strides))
            })
            .unwrap_or_default();
        args.rotary = Some(RotaryArgs {
            query,
            query_out,
            positions,
            position_bytes: position_type.size(),
            cos: tables.cos,
            sin: tables.sin,
            table_stride: tables.stride,
            num_positions: small("the number of positions", tables.positions as u64)?,
            half: small("the rotary dimension", dim as u64 / 2)?,
        });
        if queries.is_some() {
            args.shape.q_heads = small("q_heads", call.config.q_heads as u64)?;
        }
        Ok(args)
    }
}

impl Context {
    /// Compiles and loads what a call with rotary embedding takes, so that the call itself, which may be captured
    /// in a CUDA graph, loads nothing.
    ///
    /// # Errors
    /// As [`Rotary::variant`]; [`CudaError::GpuTooOld`] for an fp8 cache before sm_89; [`CudaError::Jit`] when the
    /// driver's compiler fails.
    pub fn prepare_write_kv_rotary(
        &self,
        call: &WriteKvCall<'_>,
        rotary: &Rotary,
    ) -> Result<WriteKvVariant, CudaError> {
        let variant = rotary.variant(call)?;
        let _entered = self.enter()?;
        self.write_kv_kernel(variant)?;
        Ok(variant)
    }

    /// Puts a `write_kv` with rotary embedding on a stream: K turns in f32 before it is rounded to the cache's type,
    /// V is stored as it is, and the queries, if there are any, turn in the same launch.
    ///
    /// # Safety
    /// - As [`Context::write_kv_raw`].
    /// - Tables, positions and queries are in device memory of this context's GPU and valid for what shapes and
    ///   strides reach, until the launch has completed; nothing else writes them or touches the turned queries
    ///   meanwhile. Queries and turned queries are the same rows or do not overlap.
    ///
    /// # Errors
    /// As [`Context::prepare_write_kv_rotary`]; [`CudaError::Driver`] when the launch fails.
    pub unsafe fn write_kv_rotary_raw(
        &self,
        call: &WriteKvCall<'_>,
        rotary: &Rotary,
        stream: RawStream,
    ) -> Result<WriteKvVariant, CudaError> {
        let variant = rotary.variant(call)?;
        if call.tokens > 0 {
            // SAFETY: promised by the caller.
            unsafe { self.launch_write_kv(variant, &rotary.args(call)?, stream) }?;
        }
        Ok(variant)
    }
}

fn wrong(problem: String) -> CudaError {
    ProblemError::Input { input: "rotary embedding", problem }.into()
}
