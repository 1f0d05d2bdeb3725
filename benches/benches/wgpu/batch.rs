//! What decode and prefill measure on: blocks in random order, caches full of a pattern, rows computed again in f64.

use half::f16;
use pagewise_attention::wgpu::shaders::decode::DecodeTuning;
use pagewise_attention::wgpu::wgpu::Buffer;
use pagewise_attention::wgpu::{AttentionCall, AttentionPlan, BufferRange, HeadTerms};
use pagewise_attention::{AttentionConfig, CacheLayout, KvStrides, RowStrides};

use crate::gpu::{Gpu, Random, element};

pub const BLOCK: usize = 16;

/// Elements of the pattern before V's first: 256-byte aligned, as bindings want it.
pub const V_SHIFT: usize = 128 * 125;

pub fn blocks_of(len: i32) -> usize {
    (len as usize).div_ceil(BLOCK)
}

/// A block table for each of some sets of sequences, `[sets][sequences * max_blocks]`, and `max_blocks`; no block is in two.
pub fn tables(lens: &[i32], sets: usize) -> (Vec<Vec<i32>>, usize) {
    let blocks: usize = lens.iter().map(|len| blocks_of(*len)).sum();
    let max_blocks = lens.iter().map(|len| blocks_of(*len)).max().unwrap();
    let order = Random(11).permutation(sets * blocks);
    let mut next = order.iter();
    let tables = (0..sets).map(|_| {
        let rows = lens.iter().flat_map(|len| {
            let mut row: Vec<i32> = next.by_ref().take(blocks_of(*len)).copied().collect();
            row.resize(max_blocks, 0);
            row
        });
        rows.collect()
    });
    (tables.collect(), max_blocks)
}

/// Caches and queries, and some rows of what should come out.
pub struct Tensors {
    pub config: AttentionConfig,
    pub layout: CacheLayout,
    pub rows: usize,
    pub k_cache: Buffer,
    pub v_cache: Buffer,
    pub q: Buffer,
    /// First element of a row of the output, and what it should be.
    pub expected: Vec<(usize, Vec<f64>)>,
}

impl Tensors {
    /// K and V, V from elsewhere in the pattern, so that it is not K.
    pub fn caches(gpu: &Gpu<'_>, config: &AttentionConfig, layout: &CacheLayout) -> [Buffer; 2] {
        [layout.k_extent(config), layout.v_extent(config) + V_SHIFT as u64]
            .map(|extent| gpu.filled(2 * extent))
    }

    /// An output full of NaN.
    pub fn out(&self, gpu: &Gpu<'_>) -> Buffer {
        gpu.upload(&f16::NAN.to_le_bytes().repeat(self.rows * self.config.q_heads * self.config.head_dim_v))
    }

    pub fn call<'a>(
        &'a self,
        out: &'a Buffer,
        plan: &'a Buffer,
        workspace: &'a Buffer,
        tuning: Option<DecodeTuning>,
    ) -> AttentionCall<'a> {
        let strides = RowStrides::packed(self.config.q_heads, self.config.head_dim_qk);
        AttentionCall {
            config: &self.config,
            layout: &self.layout,
            rows: self.rows,
            q: BufferRange::whole(&self.q),
            q_strides: strides,
            k_cache: BufferRange::whole(&self.k_cache),
            v_cache: BufferRange {
                buffer: &self.v_cache,
                offset: 2 * V_SHIFT as u64,
                size: self.v_cache.size() - 2 * V_SHIFT as u64,
            },
            terms: HeadTerms::default(),
            out: BufferRange::whole(out),
            out_strides: strides,
            lse: None,
            plan: BufferRange::whole(plan),
            workspace: BufferRange::whole(workspace),
            tuning,
        }
    }

    /// How far the output is from what it should be, relative to the largest element of a row. Every element must be
    /// written.
    pub fn checked_error(&self, gpu: &Gpu<'_>, out: &Buffer, what: &str) -> f64 {
        let bytes = gpu.read(out);
        let found: Vec<f64> = bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f64()).collect();
        let elements = self.rows * self.config.q_heads * self.config.head_dim_v;
        assert!(found[..elements].iter().all(|x| x.is_finite()), "{what}: every element is written");
        let mut error = 0.0f64;
        for (start, expected) in &self.expected {
            let largest = expected.iter().fold(0.0f64, |largest, x| largest.max(x.abs()));
            for (found, expected) in found[*start..].iter().zip(expected) {
                error = error.max((found - expected).abs() / largest);
            }
        }
        // Roundings to f16, and f32 sums over up to 131072 keys.
        assert!(error < 2e-3, "{what}: relative error {error:.1e}");
        error
    }
}

/// A plan's words on the device.
pub fn upload_plan(gpu: &Gpu<'_>, plan: &AttentionPlan) -> Buffer {
    gpu.upload(&plan.words().iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>())
}

/// One query row of one head.
pub struct Row<'a> {
    pub q: &'a [f16],
    pub table: &'a [i32],
    pub len: usize,
    pub head: usize,
}

/// One row of attention in f64, by the definition.
pub fn attend(config: &AttentionConfig, layout: &CacheLayout, row: &Row<'_>) -> Vec<f64> {
    let place = |strides: KvStrides, key: usize| {
        row.table[key / BLOCK] as usize * strides.block as usize
            + key % BLOCK * strides.token as usize
            + row.head * strides.head as usize
    };
    let scores: Vec<f64> = (0..row.len)
        .map(|key| {
            let first = place(layout.k, key);
            let dot: f64 = row.q.iter().enumerate().map(|(d, q)| q.to_f64() * element(first + d)).sum();
            dot * f64::from(config.scale)
        })
        .collect();
    let largest = scores.iter().fold(f64::NEG_INFINITY, |largest, score| largest.max(*score));
    let mut out = vec![0.0; config.head_dim_v];
    let mut sum = 0.0;
    for (key, score) in scores.iter().enumerate() {
        let weight = (score - largest).exp();
        sum += weight;
        let first = place(layout.v, key) + V_SHIFT;
        out.iter_mut().enumerate().for_each(|(d, out)| *out += weight * element(first + d));
    }
    out.iter().map(|out| out / sum).collect()
}
