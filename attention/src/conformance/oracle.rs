//! The oracle: attention in its plainest form, in `f64`.
//!
//! It follows the block table key by key into dense matrices and loops over queries, keys and dimensions. It
//! shares no code with a backend, not even the helpers of the problem description: positions, masks and
//! tables are read here once more, from their documentation.

use super::buffer::value_at;
use super::{AttentionData, CaseMask, MergeData, Tables};
use crate::KvStrides;

/// What a row should be, and what its error is measured against.
#[derive(Clone, Debug)]
pub struct RowReference {
    /// `[head_dim_v]`
    pub out: Vec<f64>,
    /// `ln Σ exp(score)`, the sink included; −∞ for a row that sees no key.
    pub lse: f64,
    /// `Σ p·|v|` of each element: how much an error of the probabilities can move it.
    pub weight: Vec<f64>,
    /// `Σ |v|` over the keys seen: how much errors of probabilities of any size can move it.
    pub reach: Vec<f64>,
    /// Largest sum of the magnitudes that a score was added up from: what its rounding errors scale with.
    pub magnitude: f64,
    /// Number of keys seen.
    pub keys: usize,
}

/// All rows of a problem, `[total_queries, q_heads]`.
#[derive(Clone, Debug)]
pub struct Reference {
    /// One row after the other.
    pub rows: Vec<RowReference>,
}

/// Whether query `query` of a sequence sees key `key`.
fn sees(data: &AttentionData, sequence: usize, query: usize, key: usize) -> bool {
    let keys = i64::from(data.seq_lens[sequence]);
    let first = data.query_start[sequence];
    let queries = i64::from(data.query_start[sequence + 1] - first);
    let row = first as usize + query;
    let position = match &data.query_positions {
        Some(positions) => i64::from(positions[row]),
        None => keys - queries + query as i64,
    };
    let key_position = key as i64;
    match data.case.mask {
        CaseMask::None => true,
        CaseMask::Causal => key_position <= position,
        CaseMask::Window(size) => key_position <= position && position - key_position < size as i64,
        CaseMask::Bits => data.mask_words[row * data.mask_row_words + key / 32] & (1 << (key % 32)) != 0,
    }
}

/// For each key of a sequence, whether any of its queries sees it.
pub(super) fn seen_keys(data: &AttentionData, sequence: usize) -> Vec<bool> {
    let queries = (data.query_start[sequence + 1] - data.query_start[sequence]) as usize;
    (0..data.seq_lens[sequence] as usize)
        .map(|key| (0..queries).any(|query| sees(data, sequence, query, key)))
        .collect()
}

/// Entry of a sequence's block table.
fn block_of(data: &AttentionData, sequence: usize, index: usize) -> i32 {
    match data.case.tables {
        Tables::Padded => data.entries[sequence * data.max_blocks + index],
        Tables::Csr => data.entries[data.indptr[sequence] as usize + index],
    }
}

impl Reference {
    /// Computes what a case's attention should give.
    pub fn attention(data: &AttentionData) -> Self {
        let config = &data.config;
        let group = config.q_heads / config.kv_heads;
        let empty = RowReference {
            out: vec![0.0; config.head_dim_v],
            lse: f64::NEG_INFINITY,
            weight: vec![0.0; config.head_dim_v],
            reach: vec![0.0; config.head_dim_v],
            magnitude: 0.0,
            keys: 0,
        };
        let mut rows = vec![empty; data.total_queries() * config.q_heads];
        for sequence in 0..data.seq_lens.len() {
            let seen = seen_keys(data, sequence);
            let (first, end) = (data.query_start[sequence] as usize, data.query_start[sequence + 1] as usize);
            for kv_head in 0..config.kv_heads {
                // Dense copies of this head's keys and values; rows of zeros where nobody looks.
                let gather = |strides: KvStrides, dim: usize, is_k: bool| {
                    let mut dense = vec![vec![0.0; dim]; seen.len()];
                    for key in (0..seen.len()).filter(|&key| seen[key]) {
                        let block = block_of(data, sequence, key / data.case.block_size) as usize;
                        let place = key % data.case.block_size;
                        for (d, element) in dense[key].iter_mut().enumerate() {
                            let at = block * strides.block as usize
                                + place * strides.token as usize
                                + kv_head * strides.head as usize
                                + d;
                            let (view, scale) = match is_k {
                                true => (data.k_view(), data.k_scales[kv_head]),
                                false => (data.v_view(), data.v_scales[kv_head]),
                            };
                            *element = value_at(view, at) * f64::from(scale);
                        }
                    }
                    dense
                };
                let keys = gather(data.layout.k, config.head_dim_qk, true);
                let values = gather(data.layout.v, config.head_dim_v, false);
                for row in first..end {
                    for q_head in kv_head * group..(kv_head + 1) * group {
                        rows[row * config.q_heads + q_head] =
                            attend(data, sequence, row, q_head, &keys, &values);
                    }
                }
            }
        }
        Self { rows }
    }

    /// Computes what merging a case's partial results should give.
    pub fn merge(data: &MergeData) -> Self {
        let dim = data.head_dim;
        let rows = (0..data.rows * data.heads).map(|row| {
            let lses: Vec<f64> = data.parts.iter().map(|(_, lse)| f64::from(lse[row])).collect();
            let largest = lses.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let (mut out, mut weight) = (vec![0.0; dim], vec![0.0; dim]);
            if largest == f64::NEG_INFINITY {
                return RowReference {
                    reach: weight.clone(),
                    out,
                    lse: largest,
                    weight,
                    magnitude: 0.0,
                    keys: 0,
                };
            }
            let total: f64 = lses.iter().map(|lse| (lse - largest).exp()).sum();
            for ((part, _), lse) in data.parts.iter().zip(&lses) {
                let p = (lse - largest).exp() / total;
                for d in 0..dim {
                    let value = part.get(row * dim + d);
                    out[d] += p * value;
                    weight[d] += p * value.abs();
                }
            }
            let magnitude =
                lses.iter().filter(|lse| lse.is_finite()).map(|lse| lse.abs()).fold(0.0, f64::max);
            RowReference {
                reach: vec![0.0; data.head_dim],
                out,
                lse: largest + total.ln(),
                weight,
                magnitude,
                keys: data.parts.len(),
            }
        });
        Self { rows: rows.collect() }
    }
}

/// One row of attention.
fn attend(
    data: &AttentionData,
    sequence: usize,
    row: usize,
    q_head: usize,
    keys: &[Vec<f64>],
    values: &[Vec<f64>],
) -> RowReference {
    let config = &data.config;
    let query = row - data.query_start[sequence] as usize;
    let queries = data.query_start[sequence + 1] - data.query_start[sequence];
    let position = match &data.query_positions {
        Some(positions) => f64::from(positions[row]),
        None => f64::from(data.seq_lens[sequence] - queries) + query as f64,
    };
    let start = row * data.q_strides.token as usize + q_head * data.q_strides.head as usize;
    let q: Vec<f64> = (0..config.head_dim_qk).map(|d| data.q.get(start + d)).collect();

    let (mut scores, mut magnitude) = (vec![f64::NEG_INFINITY; keys.len()], 0.0f64);
    for (key, k) in keys.iter().enumerate() {
        if !sees(data, sequence, query, key) {
            continue;
        }
        let (mut dot, mut size) = (0.0, 0.0);
        for (a, b) in q.iter().zip(k) {
            dot += a * b;
            size += (a * b).abs();
        }
        let mut score = f64::from(config.scale) * dot;
        size *= f64::from(config.scale);
        if let Some(cap) = config.softcap {
            score = f64::from(cap) * (score / f64::from(cap)).tanh();
            size += score.abs();
        }
        if let Some(slopes) = &data.alibi_slopes {
            let bias = f64::from(slopes[q_head]) * (key as f64 - position);
            score += bias;
            size += bias.abs();
        }
        scores[key] = score;
        magnitude = magnitude.max(size);
    }
    let seen = scores.iter().filter(|score| **score > f64::NEG_INFINITY).count();
    let (mut out, mut weight) = (vec![0.0; config.head_dim_v], vec![0.0; config.head_dim_v]);
    let mut reach = vec![0.0; config.head_dim_v];
    if seen == 0 {
        return RowReference {
            reach: weight.clone(),
            out,
            lse: f64::NEG_INFINITY,
            weight,
            magnitude: 0.0,
            keys: 0,
        };
    }
    let sink = data.sinks.as_ref().map(|sinks| f64::from(sinks[q_head]));
    let largest = scores.iter().copied().chain(sink).fold(f64::NEG_INFINITY, f64::max);
    let denominator: f64 = scores.iter().copied().chain(sink).map(|score| (score - largest).exp()).sum();
    for (score, value) in scores.iter().zip(values) {
        let p = (score - largest).exp() / denominator;
        for d in 0..config.head_dim_v {
            out[d] += p * value[d];
            weight[d] += p * value[d].abs();
            reach[d] += if *score > f64::NEG_INFINITY { value[d].abs() } else { 0.0 };
        }
    }
    let magnitude = magnitude.max(sink.map_or(0.0, f64::abs));
    RowReference { out, lse: largest + denominator.ln(), weight, reach, magnitude, keys: seen }
}
