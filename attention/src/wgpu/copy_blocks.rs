//! `copy_blocks` through wgpu: blocks from one place of a cache to another, for copy-on-write.
//!
//! Owns the checks, the choice of variant and the dispatch; the kernel is [`pagewise_shaders::copy_blocks`]'s.

use ::wgpu::{BindingResource, BufferUsages, CommandEncoder, ComputePassDescriptor};
use pagewise_shaders::copy_blocks::{CopyBlocks, CopyBlocksArgs, CopyUnit};
use pagewise_shaders::decode::CacheRows;

use super::buffer::{Bound, Need, bind};
use super::dtype::shader_type;
use super::{BufferRange, Context, WgpuError};
use crate::problem::check_block_pairs;
use crate::{AttentionConfig, CacheLayout, KvStrides};

/// A `copy_blocks` over parts of the caller's buffers.
#[derive(Clone, Copy, Debug)]
pub struct CopyBlocksCall<'a> {
    /// Heads, head dimensions and the cache's type.
    pub config: &'a AttentionConfig,
    /// Where blocks lie in the caches.
    pub layout: &'a CacheLayout,
    /// Source and destination of each copy. No block may be written twice, or read and written.
    pub pairs: &'a [(u32, u32)],
    /// Key cache.
    pub k_cache: BufferRange<'a>,
    /// Value cache; may lie in the key cache's buffer (interleaved).
    pub v_cache: BufferRange<'a>,
}

impl Context {
    /// Puts the copies into a pass of their own. Unlike the other calls it makes two small buffers: the pairs differ
    /// from step to step, and most steps have none.
    ///
    /// # Errors
    /// [`WgpuError`] names the pair, field, buffer or limit, what is there and what is needed.
    pub fn copy_blocks(
        &self,
        encoder: &mut CommandEncoder,
        call: &CopyBlocksCall<'_>,
    ) -> Result<(), WgpuError> {
        let CopyBlocksCall { config, layout, pairs, .. } = *call;
        config.validate()?;
        layout.validate(config)?;
        check_block_pairs(pairs, layout.num_blocks, None)?;
        let dtype = shader_type("the cache", config.kv_dtype)?;
        let (k_extent, v_extent) = (layout.k_extent(config), layout.v_extent(config));
        let element = config.kv_dtype.size() as u64;
        let k = Need { tensor: "the K cache", element, extent: k_extent };
        let k = bind(call.k_cache, k, self.limits())?;
        let v = Need { tensor: "the V cache", element, extent: v_extent };
        let v = bind(call.v_cache, v, self.limits())?;
        if pairs.is_empty() {
            return Ok(());
        }
        let cache = |bound: &Bound<'_>, strides: KvStrides, extent| CacheRows {
            offset: bound.first,
            block_stride: strides.block,
            token_stride: strides.token,
            head_stride: strides.head,
            extent: bound.first + extent,
        };
        let args = CopyBlocksArgs {
            dtype,
            pairs: small("the number of pairs", pairs.len())?,
            pairs_offset: 0,
            kv_heads: small("kv_heads", config.kv_heads)?,
            block_size: small("block_size", layout.block_size)?,
            head_dim_k: small("head_dim_qk", config.head_dim_qk)?,
            head_dim_v: small("head_dim_v", config.head_dim_v)?,
            key: cache(&k, layout.k, k_extent),
            value: cache(&v, layout.v, v_extent),
        };
        let unit = CopyUnit::ALL.into_iter().find(|&unit| args.uniform(unit).is_ok());
        let unit = unit.unwrap_or(CopyUnit::Word);
        let uniform = match args.uniform(unit) {
            Ok(words) => self.buffer("copy_blocks parameters", &words, BufferUsages::UNIFORM),
            Err(reason @ pagewise_shaders::Error::NotDivisible { .. }) => {
                let advice = "16-bit caches need even offsets, strides and head dimensions in WGSL";
                return Err(WgpuError::Alignment { reason, advice });
            }
            Err(error) => return Err(error.into()),
        };
        let [x, y, z] = args.workgroups(unit, self.limits().max_compute_workgroups_per_dimension)?;
        let words: Vec<u32> = pairs.iter().flat_map(|&(from, to)| [from, to]).collect();
        let pairs = self.buffer("copy_blocks pairs", &words, BufferUsages::STORAGE);
        let pipeline =
            self.copy_blocks.get(unit, self.builder(), || Ok(CopyBlocks::new(unit)?), CopyBlocks::shader)?;
        let group = self.group(
            "copy_blocks",
            &pipeline.layout,
            [
                uniform.as_entire_binding(),
                pairs.as_entire_binding(),
                BindingResource::Buffer(k.binding),
                BindingResource::Buffer(v.binding),
            ],
        );
        let descriptor = ComputePassDescriptor { label: Some("copy_blocks"), timestamp_writes: None };
        let mut pass = encoder.begin_compute_pass(&descriptor);
        pass.set_pipeline(&pipeline.pipeline);
        pass.set_bind_group(0, &group, &[]);
        pass.dispatch_workgroups(x, y, z);
        Ok(())
    }
}

fn small(field: &'static str, value: usize) -> Result<u32, WgpuError> {
    u32::try_from(value).map_err(|_| {
        pagewise_shaders::Error::TooLarge { kernel: "copy_blocks", field, value: value as u64 }.into()
    })
}
