//! What one attention layer computes: heads, dimensions, dtypes, mask and the terms added to the scores.

use super::ProblemError;
use crate::DType;

/// Largest head dimension that the kernels are written for.
pub const MAX_HEAD_DIM: usize = 256;

/// Which keys a query sees. Query row `t` of a sequence with `n` rows and `len` keys stands at position
/// `len - n + t` (bottom-right alignment: the last query sees every key), or where
/// [`PagedBatch::query_positions`](super::PagedBatch::query_positions) puts it. Key `j` stands at position `j`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mask {
    /// All keys of the sequence.
    None,
    /// Keys at the query's position or before it.
    Causal,
    /// As `Causal`, and only the last `size` of them, the key at the query's own position included.
    Window {
        /// At least 1.
        size: usize,
    },
    /// The keys whose bit is set in [`PagedBatch::mask_bits`](super::PagedBatch::mask_bits); nothing else is
    /// implied.
    Bits,
}

/// What one attention layer computes:
/// `out = softmax(cap(scale · q·kᵀ) + alibi + mask) · v`, with `q_heads / kv_heads` query heads sharing a
/// key-value head.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionConfig {
    /// Query heads; a multiple of `kv_heads`.
    pub q_heads: usize,
    /// Key-value heads.
    pub kv_heads: usize,
    /// Elements of a query or key head.
    pub head_dim_qk: usize,
    /// Elements of a value or output head.
    pub head_dim_v: usize,
    /// Type of queries and outputs (f32, f16 or bf16).
    pub q_dtype: DType,
    /// Type of the cache.
    pub kv_dtype: DType,
    /// Factor of the dot products, usually `1 / sqrt(head_dim_qk)`.
    pub scale: f32,
    /// Which keys a query sees.
    pub mask: Mask,
    /// `cap(s) = softcap · tanh(s / softcap)`, applied to the scaled score before ALiBi and mask.
    pub softcap: Option<f32>,
    /// Adds `slope[q_head] · (key position − query position)` (Press et al. 2022); the slopes are a run-time
    /// input `[q_heads]`.
    pub alibi: bool,
    /// Adds `exp(sink[q_head])` to the softmax's denominator without a value; the sinks are a run-time input
    /// `[q_heads]`, and `lse` includes them.
    pub sinks: bool,
}

impl AttentionConfig {
    /// A causal layer with equal dimensions, one dtype and the usual scale; change fields from there.
    pub fn new(q_heads: usize, kv_heads: usize, head_dim: usize, dtype: DType) -> Self {
        Self {
            q_heads,
            kv_heads,
            head_dim_qk: head_dim,
            head_dim_v: head_dim,
            q_dtype: dtype,
            kv_dtype: dtype,
            scale: 1.0 / (head_dim as f32).sqrt(),
            mask: Mask::Causal,
            softcap: None,
            alibi: false,
            sinks: false,
        }
    }

    /// Query heads that share a key-value head.
    pub fn group(&self) -> usize {
        self.q_heads / self.kv_heads.max(1)
    }

    /// Checks the fields against each other.
    ///
    /// # Errors
    /// [`ProblemError`] names the field, its value and what it must be.
    pub fn validate(&self) -> Result<(), ProblemError> {
        let Self { q_heads, kv_heads, .. } = *self;
        if kv_heads == 0 || q_heads == 0 || q_heads % kv_heads != 0 {
            return Err(ProblemError::Heads { q_heads, kv_heads });
        }
        for (field, value) in [("head_dim_qk", self.head_dim_qk), ("head_dim_v", self.head_dim_v)] {
            if value == 0 || value > MAX_HEAD_DIM {
                return Err(ProblemError::HeadDim { field, value, max: MAX_HEAD_DIM });
            }
        }
        if self.q_dtype.is_fp8() {
            return Err(ProblemError::QueryDType { dtype: self.q_dtype });
        }
        if !self.scale.is_finite() {
            return Err(ProblemError::NotFinite { field: "scale", value: self.scale });
        }
        if let Some(cap) = self.softcap
            && !(cap.is_finite() && cap > 0.0)
        {
            return Err(ProblemError::Softcap { value: cap });
        }
        if self.mask == (Mask::Window { size: 0 }) {
            return Err(ProblemError::EmptyWindow);
        }
        Ok(())
    }
}
