//! Inputs of a `write_kv` case.

use super::super::subject::WriteTask;
use super::super::{Buffer, Case, Random, Rows};
use super::SPARE_BLOCKS;
use super::shapes::scale_of;
use crate::{AttentionConfig, CacheLayout, RowStrides, WriteKv};

/// Inputs of a `write_kv` case.
#[derive(Clone, Debug)]
pub struct WriteData {
    /// The case.
    pub case: Case,
    /// What the layer computes.
    pub config: AttentionConfig,
    /// Where keys and values lie.
    pub layout: CacheLayout,
    /// `[tokens]`
    pub slots: Vec<i64>,
    /// Strides of new keys and new values.
    pub strides: (RowStrides, RowStrides),
    /// New keys and new values.
    pub source: (Buffer, Buffer),
    /// Scales of keys and values.
    pub scales: (Vec<f32>, Vec<f32>),
}

impl WriteData {
    /// Makes the data of a case.
    pub fn generate(case: &Case) -> Self {
        let mut random = Random::new(case.seed);
        let config = case.config();
        let tokens: usize = case.sequences.iter().map(|shape| shape.queries).sum();
        let layout = case.cache_layout(tokens.div_ceil(case.block_size) + SPARE_BLOCKS);
        let mut slots: Vec<i64> = (0..layout.slots() as i64).collect();
        random.shuffle(&mut slots);
        slots.truncate(tokens);
        for slot in &mut slots {
            if random.one_in(7) {
                *slot = random.pick(-1, &[-5, i64::MIN]);
            }
        }
        let (heads, qk, v) = (config.kv_heads as u64, config.head_dim_qk as u64, config.head_dim_v as u64);
        let token = config.q_heads as u64 * qk + heads * (qk + v);
        let strides = match case.rows {
            Rows::Packed => {
                let packed = WriteKv::packed(&slots, &config);
                (packed.k, packed.v)
            }
            Rows::Fused => (RowStrides { token, head: qk }, RowStrides { token, head: v }),
        };
        let mut source = |strides: RowStrides, dim: usize, reach: f64| {
            let len = strides.extent(tokens, config.kv_heads, dim) as usize;
            let mut buffer = Buffer::poisoned(case.q_dtype, len, &mut random);
            for token in 0..tokens {
                for head in 0..config.kv_heads {
                    let at = token * strides.token as usize + head * strides.head as usize;
                    for d in 0..dim {
                        // A few outliers, so that 8-bit caches saturate.
                        let outlier = if random.one_in(50) { 300.0 } else { 1.0 };
                        buffer.set(at + d, random.uniform(-reach, reach) * outlier);
                    }
                }
            }
            buffer
        };
        let reach = case.amplitude();
        let source =
            (source(strides.0, config.head_dim_qk, reach), source(strides.1, config.head_dim_v, 2.0));
        let scales = (case.scales(reach, &mut random), case.scales(2.0, &mut random));
        Self { case: case.clone(), config, layout, slots, strides, source, scales }
    }

    /// What a subject is given.
    pub fn task(&self) -> WriteTask<'_> {
        WriteTask {
            config: &self.config,
            layout: self.layout,
            write: WriteKv { slots: &self.slots, k: self.strides.0, v: self.strides.1 },
            k: self.source.0.as_ref(),
            v: self.source.1.as_ref(),
            k_scale: scale_of(self.case.scale, &self.scales.0),
            v_scale: scale_of(self.case.scale, &self.scales.1),
        }
    }
}
