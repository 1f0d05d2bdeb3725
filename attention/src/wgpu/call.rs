//! What attention of one layer is given: buffers, and numbers for each head. Owns the checks that these need by themselves.

use pagewise_shaders::decode::{DecodeTuning, LOWEST};

use super::{BufferRange, WgpuError};
use crate::{AttentionConfig, CacheLayout, ProblemError, RowStrides};

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
    /// Where [`AttentionPlan::words`](super::AttentionPlan::words) are written to, at the range's begin.
    pub plan: BufferRange<'a>,
    /// Workspace of [`AttentionPlan::workspace_bytes`](super::AttentionPlan::workspace_bytes), which may be shared by layers.
    pub workspace: BufferRange<'a>,
    /// How the kernel is tuned, if otherwise than by default.
    pub tuning: Option<DecodeTuning>,
}

impl AttentionCall<'_> {
    /// WebGPU does not let a dispatch read and write one buffer, or write it through two bindings.
    pub(super) fn check_shared_buffers(&self) -> Result<(), WgpuError> {
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
    pub(super) fn words(&self, config: &AttentionConfig) -> Result<Vec<u32>, WgpuError> {
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
