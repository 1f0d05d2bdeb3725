//! Inputs of `copy_blocks` and `swap_blocks` cases.

use super::super::subject::{CopyTask, SwapTask};
use super::super::{Buffer, Case, Random};
use super::SPARE_BLOCKS;
use crate::{AttentionConfig, CacheLayout, DType};

/// A cache with random bits that are numbers.
fn random_cache(config: &AttentionConfig, layout: &CacheLayout, random: &mut Random) -> (Buffer, Buffer) {
    let mut buffer = |len: u64, dtype: DType| {
        let mut buffer = Buffer::zeros(dtype, len as usize);
        (0..buffer.len()).for_each(|i| buffer.set(i, random.uniform(-100.0, 100.0)));
        buffer
    };
    (buffer(layout.k_extent(config), config.kv_dtype), buffer(layout.v_extent(config), config.kv_dtype))
}

/// Inputs of a `copy_blocks` case.
#[derive(Clone, Debug)]
pub struct CopyData {
    /// What the layer computes.
    pub config: AttentionConfig,
    /// Where keys and values lie.
    pub layout: CacheLayout,
    /// Block to read, block to write.
    pub pairs: Vec<(u32, u32)>,
    /// Keys and values before the copy.
    pub cache: (Buffer, Buffer),
}

impl CopyData {
    /// Makes the data of a case.
    pub fn generate(case: &Case) -> Self {
        let mut random = Random::new(case.seed);
        let config = case.config();
        // Some blocks are copied more than once, none to two places' harm: sources and targets are disjoint.
        let sources = case.count.div_ceil(2).max(1);
        let layout = case.cache_layout(sources + case.count + SPARE_BLOCKS);
        let mut blocks: Vec<u32> = (0..layout.num_blocks as u32).collect();
        random.shuffle(&mut blocks);
        let (from, to) = blocks.split_at(sources);
        let pairs = to.iter().take(case.count).map(|&to| (from[random.below(sources)], to)).collect();
        let cache = random_cache(&config, &layout, &mut random);
        Self { config, layout, pairs, cache }
    }

    /// What a subject is given.
    pub fn task(&self) -> CopyTask<'_> {
        CopyTask { config: &self.config, layout: self.layout, pairs: &self.pairs }
    }
}

/// Inputs of a `swap_blocks` case.
#[derive(Clone, Debug)]
pub struct SwapData {
    /// What the layer computes.
    pub config: AttentionConfig,
    /// The cache that is read.
    pub source_layout: CacheLayout,
    /// The cache that is written.
    pub target_layout: CacheLayout,
    /// Block to read, block to write.
    pub pairs: Vec<(u32, u32)>,
    /// Keys and values that are read.
    pub source: (Buffer, Buffer),
    /// Keys and values before they are written.
    pub target: (Buffer, Buffer),
}

impl SwapData {
    /// Makes the data of a case.
    pub fn generate(case: &Case) -> Self {
        let mut random = Random::new(case.seed);
        let config = case.config();
        let source_layout = case.cache_layout(case.count + SPARE_BLOCKS);
        let target_layout = case.cache_layout(2 * case.count + SPARE_BLOCKS);
        let mut order = |blocks: usize| {
            let mut order: Vec<u32> = (0..blocks as u32).collect();
            random.shuffle(&mut order);
            order
        };
        let (from, to) = (order(source_layout.num_blocks), order(target_layout.num_blocks));
        let pairs = from.into_iter().zip(to).take(case.count).collect();
        let source = random_cache(&config, &source_layout, &mut random);
        let target = random_cache(&config, &target_layout, &mut random);
        Self { config, source_layout, target_layout, pairs, source, target }
    }

    /// What a subject is given.
    pub fn task(&self) -> SwapTask<'_> {
        SwapTask {
            config: &self.config,
            source_layout: self.source_layout,
            target_layout: self.target_layout,
            pairs: &self.pairs,
            k: self.source.0.as_ref(),
            v: self.source.1.as_ref(),
        }
    }
}
