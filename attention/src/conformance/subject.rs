//! What is checked: a backend that can be asked for each operation, over host memory.

use crate::{AttentionConfig, CacheLayout, HostTensor, HostTensorMut, Problem, WriteKv};

/// Why a subject gave no result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It does not do this, and says so: the case is skipped, with the reason.
    Unsupported(String),
    /// It should have, and failed.
    Failed(String),
    /// Its device works, and this thread must not wait for it, as in a browser: to be asked the same again later. See
    /// [`try_case`](super::try_case).
    Pending,
}

/// What stored elements are multiplied with: dequantised value = stored · scale.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scale<'a> {
    /// Nothing.
    One,
    /// One scale.
    PerTensor(f32),
    /// `[kv_heads]`
    PerHead(&'a [f32]),
}

/// An attention problem with its inputs. Outputs have the problem's strides.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "named as everywhere in this crate")]
pub struct AttentionTask<'a> {
    pub problem: Problem<'a>,
    pub q: HostTensor<'a>,
    pub k: HostTensor<'a>,
    pub v: HostTensor<'a>,
    pub k_scale: Scale<'a>,
    pub v_scale: Scale<'a>,
    pub alibi_slopes: Option<&'a [f32]>,
    pub sinks: Option<&'a [f32]>,
}

/// New keys and values to be written.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "named as everywhere in this crate")]
pub struct WriteTask<'a> {
    pub config: &'a AttentionConfig,
    pub layout: CacheLayout,
    pub write: WriteKv<'a>,
    pub k: HostTensor<'a>,
    pub v: HostTensor<'a>,
    pub k_scale: Scale<'a>,
    pub v_scale: Scale<'a>,
}

/// Blocks to be copied within a cache.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "named as everywhere in this crate")]
pub struct CopyTask<'a> {
    pub config: &'a AttentionConfig,
    pub layout: CacheLayout,
    pub pairs: &'a [(u32, u32)],
}

/// Blocks to be copied between two caches.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "named as everywhere in this crate")]
pub struct SwapTask<'a> {
    pub config: &'a AttentionConfig,
    pub source_layout: CacheLayout,
    pub target_layout: CacheLayout,
    pub pairs: &'a [(u32, u32)],
    pub k: HostTensor<'a>,
    pub v: HostTensor<'a>,
}

/// Attention over a part of the keys: `out` `[rows, heads, head_dim]`, `lse` `[rows, heads]`.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "named as everywhere in this crate")]
pub struct MergePart<'a> {
    pub out: HostTensor<'a>,
    pub lse: &'a [f32],
}

/// Partial results to be merged, with outputs of the parts' type and shape.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "named as everywhere in this crate")]
pub struct MergeTask<'a> {
    pub rows: usize,
    pub heads: usize,
    pub head_dim: usize,
    pub parts: &'a [MergePart<'a>],
}

/// How a backend rounds probabilities for its matrix units.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ProbabilityRounding {
    /// Unit roundoff of their type.
    pub relative: f64,
    /// Largest error of those too small for that type's normal numbers, the largest probability of a row being 1.
    pub absolute: f64,
}

/// A backend under test. Buffers to be written come with whatever lay in them; a subject that works on copies
/// must bring back every element, so that writes outside of the result show.
pub trait Subject {
    /// What the report calls it: backend, device, instruction set.
    fn name(&self) -> String;

    /// How the probabilities were rounded before they met the values, in the attention that ran last: not at all, unless a
    /// backend says otherwise.
    fn probability_rounding(&self, config: &AttentionConfig) -> ProbabilityRounding {
        let _ = config;
        ProbabilityRounding::default()
    }

    /// Computes attention.
    ///
    /// # Errors
    /// [`Refusal`]
    fn attention(
        &mut self,
        task: &AttentionTask<'_>,
        out: HostTensorMut<'_>,
        lse: Option<&mut [f32]>,
    ) -> Result<(), Refusal>;

    /// Writes new keys and values.
    ///
    /// # Errors
    /// [`Refusal`]
    fn write_kv(
        &mut self,
        task: &WriteTask<'_>,
        k: HostTensorMut<'_>,
        v: HostTensorMut<'_>,
    ) -> Result<(), Refusal>;

    /// Copies blocks within a cache.
    ///
    /// # Errors
    /// [`Refusal`]
    fn copy_blocks(
        &mut self,
        task: &CopyTask<'_>,
        k: HostTensorMut<'_>,
        v: HostTensorMut<'_>,
    ) -> Result<(), Refusal>;

    /// Copies blocks between two caches.
    ///
    /// # Errors
    /// [`Refusal`]
    fn swap_blocks(
        &mut self,
        task: &SwapTask<'_>,
        k: HostTensorMut<'_>,
        v: HostTensorMut<'_>,
    ) -> Result<(), Refusal>;

    /// Merges partial results.
    ///
    /// # Errors
    /// [`Refusal`]
    fn merge_states(
        &mut self,
        task: &MergeTask<'_>,
        out: HostTensorMut<'_>,
        lse: &mut [f32],
    ) -> Result<(), Refusal>;
}
