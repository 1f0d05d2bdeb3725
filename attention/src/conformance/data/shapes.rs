//! What a case says of shapes, strides, ranges and scales, for the data of every operation.

use super::super::subject::Scale;
use super::super::{Case, CaseMask, Layout, Random, Rows, ScaleKind};
use crate::{AttentionConfig, CacheLayout, KvStrides, Mask, RowStrides};

impl Case {
    /// What the case's layer computes.
    pub fn config(&self) -> AttentionConfig {
        AttentionConfig {
            q_heads: self.q_heads,
            kv_heads: self.kv_heads,
            head_dim_qk: self.head_dim_qk,
            head_dim_v: self.head_dim_v,
            q_dtype: self.q_dtype,
            kv_dtype: self.kv_dtype,
            // Not quite the usual scale, so that a backend that assumes it is found out.
            scale: 0.9 / (self.head_dim_qk as f32).sqrt(),
            mask: match self.mask {
                CaseMask::None => Mask::None,
                CaseMask::Causal => Mask::Causal,
                CaseMask::Window(size) => Mask::Window { size },
                CaseMask::Bits => Mask::Bits,
            },
            softcap: self.softcap,
            alibi: self.alibi,
            sinks: self.sinks,
        }
    }

    /// Strides of a cache with so many blocks.
    pub fn cache_layout(&self, num_blocks: usize) -> CacheLayout {
        let config = self.config();
        let (heads, size) = (self.kv_heads as u64, self.block_size as u64);
        let (qk, v) = (self.head_dim_qk as u64, self.head_dim_v as u64);
        let nhd = CacheLayout::nhd(num_blocks, self.block_size, &config);
        match self.layout {
            Layout::Nhd => nhd,
            Layout::Hnd => CacheLayout::hnd(num_blocks, self.block_size, &config),
            Layout::Gaps => {
                let strides = |dim: u64| {
                    let head = dim + 16;
                    let token = heads * head + 32;
                    KvStrides { block: size * token + 64, token, head }
                };
                CacheLayout { k: strides(qk), v: strides(v), ..nhd }
            }
            Layout::Interleaved => {
                let block = size * heads * (qk + v);
                CacheLayout { k: KvStrides { block, ..nhd.k }, v: KvStrides { block, ..nhd.v }, ..nhd }
            }
            Layout::Shared => CacheLayout { v: nhd.k, ..nhd },
        }
    }

    /// Strides of queries and of outputs.
    pub(super) fn row_strides(&self) -> (RowStrides, RowStrides) {
        let (q_heads, kv_heads) = (self.q_heads as u64, self.kv_heads as u64);
        let (qk, v) = (self.head_dim_qk as u64, self.head_dim_v as u64);
        match self.rows {
            Rows::Packed => (
                RowStrides::packed(self.q_heads, self.head_dim_qk),
                RowStrides::packed(self.q_heads, self.head_dim_v),
            ),
            Rows::Fused => (
                RowStrides { token: (q_heads + kv_heads) * qk + kv_heads * v, head: qk },
                RowStrides { token: q_heads * (v + 8) + 24, head: v + 8 },
            ),
        }
    }

    /// Range of the elements of queries and keys, so that the largest scores are about `self.scores`: a dot
    /// product of uniform numbers from −a to a has the standard deviation a²/3 · √dim, and the largest of
    /// many lies three to four deviations out.
    pub(super) fn amplitude(&self) -> f64 {
        f64::from(self.scores).max(0.0).sqrt()
    }

    /// A scale for each key-value head, such that stored numbers lie within ±`reach`.
    pub(super) fn scales(&self, reach: f64, random: &mut Random) -> Vec<f32> {
        let stored = 8.0;
        let one = (reach / stored * random.uniform(1.0, 2.0)) as f32;
        (0..self.kv_heads)
            .map(|_| match self.scale {
                ScaleKind::One => 1.0,
                ScaleKind::Tensor => one,
                ScaleKind::Head => (reach / stored * random.uniform(1.0, 2.0)) as f32,
            })
            .collect()
    }
}

pub(super) fn scale_of(kind: ScaleKind, scales: &[f32]) -> Scale<'_> {
    match (kind, scales.first()) {
        (ScaleKind::Tensor, Some(&scale)) => Scale::PerTensor(scale),
        (ScaleKind::Head, _) => Scale::PerHead(scales),
        _ => Scale::One,
    }
}
