//! A cache in typed slices for the tests of block copies: what it holds on the host, and what copies make of it.

use std::sync::Arc;

use pagewise_attention::cuda::cudarc::driver::{CudaSlice, CudaStream};
use pagewise_attention::{AttentionConfig, CacheLayout, DType};

use super::random::Random;

/// A cache of several layers in slices, K and V apart, and what it holds.
#[derive(Clone)]
pub struct SliceCache {
    pub config: AttentionConfig,
    pub layout: CacheLayout,
    pub host: Vec<(Vec<half::bf16>, Vec<half::bf16>)>,
}

impl SliceCache {
    pub fn new(random: &mut Random, blocks: usize, layers: usize) -> Self {
        let config = AttentionConfig::new(8, 2, 64, DType::Bf16);
        let layout = CacheLayout::nhd(blocks, 16, &config);
        let mut numbers = |len: u64| -> Vec<half::bf16> {
            (0..len).map(|_| half::bf16::from_bits(random.next() as u16)).collect()
        };
        let host = (0..layers)
            .map(|_| (numbers(layout.k_extent(&config)), numbers(layout.v_extent(&config))))
            .collect();
        Self { config, layout, host }
    }

    /// The elements of a block: blocks are whole here.
    pub fn block(&self, number: u32) -> std::ops::Range<usize> {
        let len = self.layout.k.block as usize;
        number as usize * len..(number as usize + 1) * len
    }

    /// K and V of each layer in device memory.
    pub fn upload(&self, stream: &Arc<CudaStream>) -> Vec<(CudaSlice<half::bf16>, CudaSlice<half::bf16>)> {
        let upload = |numbers: &Vec<half::bf16>| stream.clone_htod(numbers).unwrap();
        self.host.iter().map(|(k, v)| (upload(k), upload(v))).collect()
    }

    /// What copies of blocks make of it.
    pub fn copy(&mut self, pairs: &[(u32, u32)]) {
        for &(from, to) in pairs {
            let (from, to) = (self.block(from), self.block(to).start);
            for (k, v) in &mut self.host {
                k.copy_within(from.clone(), to);
                v.copy_within(from.clone(), to);
            }
        }
    }
}

pub fn bits(numbers: &[half::bf16]) -> Vec<u16> {
    numbers.iter().map(|number| number.to_bits()).collect()
}
