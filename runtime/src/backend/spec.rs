//! What a device is told of a model's attention layers and of the cache that they share, once.

use pagewise_attention::{AttentionConfig, DType, Mask};

use super::Rope;
use crate::model_dir::ModelConfig;

/// What a device must be told once about the attention layers of a model and the cache they share.
///
/// Every KV group uses the same cache buffers: block ids are unique over all groups, so the n-th layer of each
/// group can live in the n-th buffer. A model with two groups of equal size needs half the buffers that it
/// has layers.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionSpec {
    /// One entry a layer: its KV group.
    pub layer_groups: Vec<usize>,
    /// One entry a KV group: what its layers compute. They differ in their masks only.
    pub groups: Vec<AttentionConfig>,
    /// Rotary embedding of queries and keys; `None` where positions are learned.
    pub rope: Option<Rope>,
    /// Tokens a block.
    pub block_size: usize,
    /// Blocks on the device.
    pub num_blocks: usize,
    /// Blocks on the host to swap with.
    pub host_blocks: usize,
    /// What no step exceeds.
    pub limits: StepLimits,
}

/// The largest step: what a device makes room for once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepLimits {
    /// Tokens in all.
    pub max_rows: usize,
    /// Sequences.
    pub max_sequences: usize,
    /// Tokens of one sequence, those in the cache included.
    pub max_seq_len: usize,
}

impl AttentionSpec {
    /// The attention layers of a model over a cache of this shape; queries and outputs are f32, and a step has at most
    /// 512 tokens of 256 sequences.
    pub fn new(config: &ModelConfig, kv_dtype: DType, block_size: usize, num_blocks: usize) -> Self {
        let (kv_groups, layer_groups) = config.kv_groups();
        let attention = |window: Option<usize>| AttentionConfig {
            kv_dtype,
            mask: window.map_or(Mask::Causal, |size| Mask::Window { size }),
            scale: config.attention_scale,
            softcap: config.attention_softcap,
            ..AttentionConfig::new(config.q_heads, config.kv_heads, config.head_dim, DType::F32)
        };
        let groups = kv_groups.iter().map(|group| attention(group.window)).collect();
        let rope = config.rope.as_ref().map(|rope| Rope::new(rope, config.head_dim));
        let limits = StepLimits { max_rows: 512, max_sequences: 256, max_seq_len: config.max_positions };
        Self { layer_groups, groups, rope, block_size, num_blocks, host_blocks: 0, limits }
    }

    /// The same with queries and outputs of another type.
    #[must_use]
    pub fn with_compute_dtype(mut self, dtype: DType) -> Self {
        self.groups.iter_mut().for_each(|group| group.q_dtype = dtype);
        self
    }

    /// The group and the cache buffer of a layer: the buffer's number is the layer's rank within its group.
    pub fn place(&self, layer: usize) -> Option<LayerPlace> {
        let group = *self.layer_groups.get(layer)?;
        let buffer = self.layer_groups.iter().take(layer).filter(|&&other| other == group).count();
        Some(LayerPlace { group, buffer })
    }

    /// Cache buffers of keys (and as many of values).
    pub fn num_buffers(&self) -> usize {
        let layers_of = |group| self.layer_groups.iter().filter(|&&other| other == group).count();
        (0..self.groups.len()).map(layers_of).max().unwrap_or(0)
    }

    /// Bytes that one block takes in all buffers, keys and values.
    pub fn block_bytes(&self) -> usize {
        let token_bytes = self.groups.first().map_or(0, |config| {
            config.kv_heads * (config.head_dim_qk + config.head_dim_v) * config.kv_dtype.size()
        });
        self.num_buffers() * self.block_size * token_bytes
    }
}

/// Where a layer's keys and values are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerPlace {
    /// Its KV group.
    pub group: usize,
    /// Its cache buffer.
    pub buffer: usize,
}
