//! The blocks of all layers in buffers of the device, a pair for each layer of the largest KV group, and those of the
//! host to swap with.

use super::device::{Gpu, KV_CACHE, Purpose};
use super::reading::Reading;
use crate::backend::{AttentionSpec, BackendError};
use pagewise_attention::wgpu::wgpu::{Buffer, BufferUsages, CommandEncoderDescriptor};
use pagewise_attention::wgpu::{BufferRange, CopyBlocksCall, SwapBlocksCall, SwapSide};
use pagewise_attention::{AttentionConfig, CacheLayout, DType, ProblemError};
use pagewise_kvcache::{BlockCopy, BlockOps};

/// Keys and values of all layers, and the host blocks to swap with.
#[derive(Debug)]
pub struct WgpuCache {
    config: AttentionConfig,
    layout: CacheLayout,
    layers: Vec<Sides<Buffer>>,
    /// Blocks one behind the other, for each of `layers`.
    host: Vec<Sides<Vec<u8>>>,
    host_blocks: usize,
    /// Bytes of a block of each side.
    block: Sides<u64>,
    staging: Option<Buffer>,
}

/// One for keys and one for values.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sides<T> {
    pub(super) k: T,
    pub(super) v: T,
}

/// Bytes that are swapped out at once.
const STAGING_BYTES: u64 = 32 << 20;
const STAGING: Purpose = Purpose { what: "blocks on their way to the host", hint: "--kv-memory" };

impl WgpuCache {
    pub(super) fn new(gpu: &Gpu, spec: &AttentionSpec) -> Result<Self, BackendError> {
        let Some(config) = spec.groups.first().cloned() else { return Err(no_layer(0)) };
        if matches!(config.kv_dtype, DType::F8E4M3 | DType::F8E5M2) {
            let problem = format!("WGSL has no {}; use f32, f16 or bf16", config.kv_dtype);
            return Err(ProblemError::Input { input: "--kv-dtype", problem }.into());
        }
        let layout = CacheLayout::nhd(spec.num_blocks, spec.block_size, &config);
        layout.validate(&config)?;
        let element = config.kv_dtype.size() as u64;
        let bytes = Sides { k: layout.k_extent(&config) * element, v: layout.v_extent(&config) * element };
        let block = Sides { k: layout.k.block * element, v: layout.v.block * element };
        for (what, size) in [("a block of keys", block.k), ("a block of values", block.v)] {
            if !size.is_multiple_of(4) {
                let problem = format!("{what} takes {size} bytes, which are no whole words");
                return Err(ProblemError::Input { input: "--block-size", problem }.into());
            }
        }
        let device_pair =
            |_| Ok(Sides { k: gpu.storage(KV_CACHE, bytes.k)?, v: gpu.storage(KV_CACHE, bytes.v)? });
        let layers = (0..spec.num_buffers()).map(device_pair).collect::<Result<_, BackendError>>()?;
        let host_side = |block: u64| {
            let wanted = (block as usize).saturating_mul(spec.host_blocks);
            let zeroed = bytemuck::allocation::try_zeroed_vec(wanted);
            zeroed.map_err(|()| BackendError::OutOfMemory {
                what: "host blocks",
                wanted,
                hint: "--swap-space",
            })
        };
        let host_pair = |_| Ok(Sides { k: host_side(block.k)?, v: host_side(block.v)? });
        let host = (0..spec.num_buffers()).map(host_pair).collect::<Result<_, BackendError>>()?;
        Ok(Self { config, layout, layers, host, host_blocks: spec.host_blocks, block, staging: None })
    }

    /// The buffers of a layer.
    pub(super) fn layer(&self, buffer: usize) -> Result<&Sides<Buffer>, BackendError> {
        self.layers.get(buffer).ok_or_else(|| no_layer(buffer))
    }

    /// Swap out, swap in, copy: in that order, in every buffer. A copy names the KV group whose layers it is meant
    /// for; as groups share buffers and no two share a block, doing it in all of them is the same.
    pub(super) fn apply(&mut self, gpu: &Gpu, ops: &BlockOps) -> Result<(), BackendError> {
        let (device, host) = (self.layout.num_blocks, self.host_blocks);
        check(&ops.swap_out, device, host)?;
        check(&ops.swap_in, host, device)?;
        self.swap_out(gpu, &ops.swap_out)?;
        self.swap_in(gpu, &ops.swap_in)?;
        self.copy(gpu, &ops.copy)
    }

    fn swap_out(&mut self, gpu: &Gpu, copies: &[BlockCopy]) -> Result<(), BackendError> {
        let Self { config, layout, layers, host, block, staging, .. } = self;
        let pair = block.k + block.v;
        let at_once = (STAGING_BYTES / (pair * layers.len() as u64).max(1)).max(1) as usize;
        for copies in copies.chunks(at_once) {
            let bytes = pair * layers.len() as u64 * copies.len() as u64;
            let staging = match staging {
                Some(buffer) if buffer.size() >= bytes => buffer,
                _ => {
                    let usage = BufferUsages::MAP_READ | BufferUsages::COPY_DST;
                    let size = bytes.max(STAGING_BYTES);
                    staging.insert(gpu.buffer(STAGING, size, usage)?)
                }
            };
            let descriptor = CommandEncoderDescriptor { label: Some("swap out") };
            let mut encoder = gpu.context.device().create_command_encoder(&descriptor);
            let staged = CacheLayout::nhd(copies.len(), layout.block_size, config);
            let pairs: Vec<(u32, u32)> = copies.iter().map(|copy| copy.src).zip(0..).collect();
            let mut at = 0;
            let mut room = |block: u64| {
                let size = block * copies.len() as u64;
                let range = BufferRange { buffer: staging, offset: at, size };
                at += size;
                range
            };
            for Sides { k, v } in layers.iter() {
                let (k, v) = (BufferRange::whole(k), BufferRange::whole(v));
                let from = SwapSide { layout, k, v };
                let to = SwapSide { layout: &staged, k: room(block.k), v: room(block.v) };
                let call = SwapBlocksCall { config, from, to, pairs: &pairs };
                gpu.context.swap_blocks(&mut encoder, &call)?;
            }
            let reading = Reading::start(gpu, encoder, Some(staging.clone()), bytes)?;
            let (moved, _) = reading.finish::<u8>(gpu)?;
            let mut rest = moved.as_slice();
            for Sides { k, v } in host.iter_mut() {
                for (blocks, size) in [(k, block.k as usize), (v, block.v as usize)] {
                    for copy in copies {
                        let (from, behind) = rest.split_at_checked(size).unwrap_or_default();
                        rest = behind;
                        let start = copy.dst as usize * size;
                        if let Some(to) = blocks.get_mut(start..start + size) {
                            to.copy_from_slice(from);
                        }
                    }
                }
            }
        }
        Ok(())
    }

    fn swap_in(&self, gpu: &Gpu, copies: &[BlockCopy]) -> Result<(), BackendError> {
        if copies.is_empty() {
            return Ok(());
        }
        let Self { layers, host, block, .. } = self;
        for (to, from) in layers.iter().zip(host) {
            for (to, from, size) in [(&to.k, &from.k, block.k), (&to.v, &from.v, block.v)] {
                for copy in copies {
                    let start = (u64::from(copy.src) * size) as usize;
                    if let Some(bytes) = from.get(start..start + size as usize) {
                        gpu.context.queue().write_buffer(to, u64::from(copy.dst) * size, bytes);
                    }
                }
            }
        }
        // What was written lies in the host's memory until something is submitted.
        gpu.context.queue().submit([]);
        gpu.check()
    }

    fn copy(&self, gpu: &Gpu, copies: &[BlockCopy]) -> Result<(), BackendError> {
        if copies.is_empty() {
            return Ok(());
        }
        let pairs: Vec<(u32, u32)> = copies.iter().map(|copy| (copy.src, copy.dst)).collect();
        let descriptor = CommandEncoderDescriptor { label: Some("copy blocks") };
        let mut encoder = gpu.context.device().create_command_encoder(&descriptor);
        for Sides { k, v } in &self.layers {
            let call = CopyBlocksCall {
                config: &self.config,
                layout: &self.layout,
                pairs: &pairs,
                k_cache: BufferRange::whole(k),
                v_cache: BufferRange::whole(v),
            };
            gpu.context.copy_blocks(&mut encoder, &call)?;
        }
        gpu.context.queue().submit([encoder.finish()]);
        gpu.check()
    }
}

fn check(copies: &[BlockCopy], sources: usize, targets: usize) -> Result<(), BackendError> {
    let inside = |copy: &&BlockCopy| copy.src as usize >= sources || copy.dst as usize >= targets;
    match copies.iter().find(inside) {
        None => Ok(()),
        Some(BlockCopy { src, dst, .. }) => {
            let problem = format!("block {src} to {dst}, where there are {sources} and {targets}");
            Err(ProblemError::Input { input: "the blocks to swap", problem }.into())
        }
    }
}

pub(super) fn no_layer(layer: usize) -> BackendError {
    let problem = format!("the cache has no layer {layer}; it was made for another model");
    ProblemError::Input { input: "layer", problem }.into()
}
