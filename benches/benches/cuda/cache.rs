//! Paged caches of known contents: as many sets of blocks as it takes not to find them in the L2.

use cudarc::driver::CudaSlice;
use pagewise_attention::cuda::cudarc;
use pagewise_attention::{AttentionConfig, CacheLayout, KvStrides};

use crate::gpu::{Gpu, ROTATION, Random};

pub const BLOCK: usize = 16;

/// V begins elsewhere in the pattern, so that it is not K.
const V_SHIFT: usize = 16 * 1001;

/// How a cache lies in memory.
#[derive(Clone, Copy)]
pub struct Layout {
    pub hnd: bool,
    /// K and V each in a buffer of their own, and not block by block side by side.
    pub apart: bool,
}

impl std::fmt::Display for Layout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match (self.hnd, self.apart) {
            (false, false) => "NHD",
            (true, false) => "HND",
            (false, true) => "NHD apart",
            (true, true) => "HND apart",
        })
    }
}

/// K and V of a batch of sequences, several times over.
pub struct Cache {
    pub layout: CacheLayout,
    pub max_blocks: usize,
    /// The block tables of each set.
    pub tables: Vec<Vec<i32>>,
    k: CudaSlice<u8>,
    /// Of its own, if K's buffer does not hold V too.
    v: Option<CudaSlice<u8>>,
    v_start: usize,
    device_tables: CudaSlice<i32>,
}

impl Cache {
    /// For sequences of such lengths; blocks in random order.
    pub fn new(gpu: &Gpu<'_>, config: &AttentionConfig, lens: &[i32], layout: Layout) -> Self {
        let kv_dtype = config.kv_dtype;
        let blocks_of = |len: i32| (len as usize).div_ceil(BLOCK);
        let blocks_per_set: usize = lens.iter().map(|len| blocks_of(*len)).sum();
        let token = config.kv_heads * (config.head_dim_qk + config.head_dim_v) * kv_dtype.size();
        let sets = (ROTATION / (blocks_per_set * BLOCK * token)).clamp(1, 128);
        let blocks = sets * blocks_per_set;
        let apart = match layout.hnd {
            false => CacheLayout::nhd(blocks, BLOCK, config),
            true => CacheLayout::hnd(blocks, BLOCK, config),
        };
        // Where V begins in K's buffer, or in the pattern of its own.
        let (layout, v_start) = match layout.apart {
            false => (apart.interleaved(), apart.k.block as usize),
            true => (apart, V_SHIFT),
        };
        let k = gpu.filled(kv_dtype, layout.k_extent(config) as usize + v_start);
        let v =
            (v_start == V_SHIFT).then(|| gpu.filled(kv_dtype, layout.v_extent(config) as usize + V_SHIFT));

        // Dealt to the sets and their sequences.
        let order = Random(11).permutation(blocks);
        let max_blocks = lens.iter().map(|len| blocks_of(*len)).max().unwrap();
        let mut next = order.iter();
        let tables: Vec<Vec<i32>> = (0..sets)
            .map(|_| {
                let rows = lens.iter().flat_map(|len| {
                    let mut row: Vec<i32> = next.by_ref().take(blocks_of(*len)).copied().collect();
                    row.resize(max_blocks, 0);
                    row
                });
                rows.collect()
            })
            .collect();
        let device_tables = gpu.stream.clone_htod(&tables.concat()).unwrap();
        Self { layout, max_blocks, tables, k, v, v_start, device_tables }
    }

    pub fn k_address(&self, gpu: &Gpu<'_>) -> u64 {
        gpu.address(&self.k)
    }

    pub fn v_address(&self, gpu: &Gpu<'_>, config: &AttentionConfig) -> u64 {
        gpu.address(self.v.as_ref().unwrap_or(&self.k)) + (config.kv_dtype.size() * self.v_start) as u64
    }

    /// Those of one set.
    pub fn tables_address(&self, gpu: &Gpu<'_>, set: usize) -> u64 {
        gpu.address(&self.device_tables) + (4 * set * self.tables[0].len()) as u64
    }

    /// One row of attention in f64, by the definition, over the first `len` keys of a sequence of the first set.
    pub fn attend(
        &self,
        gpu: &Gpu<'_>,
        config: &AttentionConfig,
        q: &[half::bf16],
        sequence: usize,
        len: usize,
        head: usize,
    ) -> Vec<f64> {
        let table = &self.tables[0][sequence * self.max_blocks..][..self.max_blocks];
        let element = |index| gpu.element(config.kv_dtype, index);
        let place = |strides: KvStrides, key: usize| {
            table[key / BLOCK] as usize * strides.block as usize
                + key % BLOCK * strides.token as usize
                + head * strides.head as usize
        };
        let scores: Vec<f64> = (0..len)
            .map(|key| {
                let first = place(self.layout.k, key);
                let dot: f64 = q.iter().enumerate().map(|(d, q)| q.to_f64() * element(first + d)).sum();
                dot * f64::from(config.scale)
            })
            .collect();
        let largest = scores.iter().fold(f64::NEG_INFINITY, |largest, score| largest.max(*score));
        let mut out = vec![0.0; config.head_dim_v];
        let mut sum = 0.0;
        for (key, score) in scores.iter().enumerate() {
            let weight = (score - largest).exp();
            sum += weight;
            let first = place(self.layout.v, key) + self.v_start;
            out.iter_mut().enumerate().for_each(|(d, out)| *out += weight * element(first + d));
        }
        out.iter().map(|out| out / sum).collect()
    }
}
