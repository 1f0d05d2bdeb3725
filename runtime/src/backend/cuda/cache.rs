//! The blocks of all layers on the device, those on the host to swap with, and what moves between them.
//!
//! Owns the memory and the order of copies; the kernels are the attention crate's. Swapping is on a stream of its own:
//! blocks leave while the step computes, and the computing stream waits only for those that come back.

use std::sync::Arc;

use pagewise_attention::cuda::cudarc::driver::CudaEvent;
use pagewise_attention::cuda::{
    BlockNumberType, BlockPairs, CacheBlocks, CopyBlocksCall, KvScales, LayerAddresses, SwapBlocksCall,
    SwapMethod,
};
use pagewise_attention::{AttentionConfig, CacheLayout, check_block_pairs};
use pagewise_kvcache::{BlockCopy, BlockOps};

use super::gpu::{DeviceMemory, Gpu, PinnedMemory, Purpose, checked};
use super::staging::Staging;
use super::step::no_layer;
use crate::backend::{AttentionSpec, BackendError};

/// Pairs of blocks that one launch takes.
const PAIRS: usize = 4096;

/// What each piece of memory begins at a multiple of.
const ALIGNMENT: usize = 256;

/// Keys and values of all layers, and the host blocks to swap with.
#[derive(Debug)]
pub struct CudaCache {
    gpu: Arc<Gpu>,
    config: AttentionConfig,
    device: Pool<DeviceMemory>,
    host: Pool<PinnedMemory>,
    /// The scale of an fp8 cache's keys and values: 1, as no checkpoint of these models brings others.
    scale: Option<DeviceMemory>,
    /// Block pairs on the device: of blocks that leave, that come back, that are copied.
    pairs: DeviceMemory,
    staging: Staging,
    /// When the last blocks have left or come.
    swapped: Option<CudaEvent>,
}

/// One of the two pools.
#[derive(Debug)]
struct Pool<M> {
    layout: CacheLayout,
    layers: LayerAddresses,
    /// The addresses as the kernel reads them.
    table: DeviceMemory,
    /// Keeps the memory.
    _memory: M,
}

impl<M> Pool<M> {
    fn blocks(&self) -> CacheBlocks<'_> {
        CacheBlocks { layout: &self.layout, layers: &self.layers, table: self.table.address() }
    }
}

/// How a pool is laid out: bytes of a buffer, and of all of them.
#[derive(Clone, Copy, Debug)]
struct Extent {
    buffers: usize,
    buffer: usize,
    all: usize,
}

impl Extent {
    /// Keys and values are of the same size, and as many.
    fn new(
        spec: &AttentionSpec,
        config: &AttentionConfig,
        layout: &CacheLayout,
    ) -> Result<Self, BackendError> {
        let elements = layout.k_extent(config).max(layout.v_extent(config));
        let bytes = elements.checked_mul(config.kv_dtype.size() as u64);
        let buffer = bytes.and_then(|bytes| usize::try_from(bytes).ok()?.checked_next_multiple_of(ALIGNMENT));
        let buffers = spec.num_buffers();
        let all = buffer.and_then(|buffer| buffer.checked_mul(2 * buffers));
        let Purpose { what, hint } = Purpose::CACHE;
        match (buffer, all) {
            (Some(buffer), Some(all)) => Ok(Self { buffers, buffer, all }),
            _ => Err(BackendError::OutOfMemory { what, wanted: usize::MAX, hint }),
        }
    }

    /// Addresses of K and V of each buffer.
    fn layers(&self, base: u64) -> LayerAddresses {
        let at = |index: usize| base + (index * self.buffer) as u64;
        LayerAddresses::new((0..self.buffers).map(|buffer| (at(2 * buffer), at(2 * buffer + 1))))
    }
}

impl CudaCache {
    pub(super) fn new(gpu: &Arc<Gpu>, spec: &AttentionSpec) -> Result<Self, BackendError> {
        let Some(config) = spec.groups.first().cloned() else { return Err(no_layer(0)) };
        let mut staging = Staging::new(gpu, 2, PAIRS * 8, Purpose::CACHE)?;
        let mut table = |layers: &LayerAddresses| -> Result<DeviceMemory, BackendError> {
            let words: &[u8] = bytemuck::cast_slice(layers.words());
            let table = DeviceMemory::zeros(gpu, words.len(), Purpose::CACHE)?;
            // SAFETY: the memory is as large as the words.
            unsafe { staging.send(&[(table.address(), words)], &gpu.stream) }?;
            Ok(table)
        };
        let layout = CacheLayout::nhd(spec.num_blocks, spec.block_size, &config);
        layout.validate(&config)?;
        let extent = Extent::new(spec, &config, &layout)?;
        let memory = DeviceMemory::zeros(gpu, extent.all, Purpose::CACHE)?;
        let layers = extent.layers(memory.address());
        let device = Pool { layout, table: table(&layers)?, layers, _memory: memory };

        let layout = CacheLayout::nhd(spec.host_blocks, spec.block_size, &config);
        let extent = Extent::new(spec, &config, &layout)?;
        let memory = PinnedMemory::new(gpu, extent.all, Purpose::SWAP)?;
        let layers = extent.layers(gpu.context.pinned_address(memory.as_ptr())?);
        let host = Pool { layout, table: table(&layers)?, layers, _memory: memory };
        let pairs = DeviceMemory::new(gpu, 3 * PAIRS * 8, Purpose::CACHE)?;
        let scale = match config.kv_dtype.is_fp8() {
            true => {
                let one = DeviceMemory::zeros(gpu, size_of::<f32>(), Purpose::CACHE)?;
                // SAFETY: the memory is as large as an f32.
                unsafe { staging.send(&[(one.address(), &1f32.to_ne_bytes())], &gpu.stream) }?;
                Some(one)
            }
            false => None,
        };
        let gpu = Arc::clone(gpu);
        let cache = Self { gpu, config, device, host, scale, pairs, staging, swapped: None };
        cache.load_kernels()?;
        Ok(cache)
    }

    /// Addresses of a buffer's keys and values.
    pub(super) fn buffer(&self, buffer: usize) -> Result<(u64, u64), BackendError> {
        match self.device.layers.words().get(2 * buffer..2 * buffer + 2) {
            Some(&[k, v]) => Ok((k, v)),
            _ => Err(no_layer(buffer)),
        }
    }

    /// What new keys and values are divided by; for an fp8 cache only.
    pub(super) fn scales(&self) -> Option<KvScales> {
        let scale = self.scale.as_ref()?.address();
        Some(KvScales { k: scale, v: scale, per_head: false })
    }

    /// Loads what moving blocks takes, so that the first time takes no longer than others.
    fn load_kernels(&self) -> Result<(), BackendError> {
        let context = &self.gpu.context;
        context.prepare_copy_blocks(&self.copy_call(1))?;
        context.prepare_swap_blocks(&self.swap_call(true, &[(0, 0)], 0))?;
        context.prepare_swap_blocks(&self.swap_call(false, &[(0, 0)], 0))?;
        Ok(())
    }

    fn copy_call(&self, count: usize) -> CopyBlocksCall<'_> {
        let address = self.pairs.address() + 2 * PAIRS as u64 * 8;
        let pairs = BlockPairs { address, number_type: BlockNumberType::I32, count, count_at: 0 };
        let blocks = self.device.blocks();
        CopyBlocksCall {
            config: &self.config,
            from: blocks,
            to: blocks,
            pairs,
            thread_blocks: None,
            tuning: None,
        }
    }

    fn swap_call<'a>(
        &'a self,
        leave: bool,
        pairs: &'a [(u32, u32)],
        device_pairs: u64,
    ) -> SwapBlocksCall<'a> {
        let (device, host) = (self.device.blocks(), self.host.blocks());
        let (from, to) = if leave { (device, host) } else { (host, device) };
        SwapBlocksCall { config: &self.config, from, to, pairs, device_pairs, method: SwapMethod::default() }
    }

    /// Swap out, swap in, copy: in that order, in every buffer. A copy names the KV group whose layers it is meant for;
    /// as groups share buffers and no two share a block, doing it in all of them is the same.
    pub(super) fn apply(&mut self, ops: &BlockOps) -> Result<(), BackendError> {
        let pairs = |copies: &[BlockCopy]| copies.iter().map(|c| (c.src, c.dst)).collect::<Vec<_>>();
        let (out, back, copies) = (pairs(&ops.swap_out), pairs(&ops.swap_in), pairs(&ops.copy));
        let (device, host) = (self.device.layout.num_blocks, self.host.layout.num_blocks);
        // All is checked before anything moves.
        check_block_pairs(&out, device, Some(host))?;
        check_block_pairs(&back, host, Some(device))?;
        check_block_pairs(&copies, device, None)?;
        self.gpu.bind()?;
        // What left during the last step has left: its blocks may be written now.
        self.wait_for_swaps()?;
        self.swap(true, &out)?;
        self.swap(false, &back)?;
        if !back.is_empty() {
            self.wait_for_swaps()?;
        }
        for chunk in copies.chunks(PAIRS) {
            let address = self.send_pairs(2, chunk)?;
            let call = self.copy_call(chunk.len());
            debug_assert_eq!(address, call.pairs.address);
            // SAFETY: the caches are ours and as large as their layouts; the pairs were checked; launches on the
            // stream follow each other.
            unsafe { self.gpu.context.copy_blocks_raw(&call, self.gpu.raw_stream()) }?;
        }
        Ok(())
    }

    fn swap(&mut self, leave: bool, pairs: &[(u32, u32)]) -> Result<(), BackendError> {
        for chunk in pairs.chunks(PAIRS) {
            // The pairs of the last chunk have been read when its blocks have moved.
            if pairs.len() > PAIRS {
                self.wait_for_swaps()?;
            }
            let address = self.send_pairs(usize::from(!leave), chunk)?;
            let gpu = &self.gpu;
            // What the computing stream has yet to write to blocks that leave, and has yet to read from those that are
            // filled; and the pairs.
            checked("cuStreamWaitEvent", gpu.copies.join(&gpu.stream))?;
            let call = self.swap_call(leave, chunk, address);
            // SAFETY: both pools are ours and as large as their layouts; the pairs were checked, and so it is with the
            // order of the streams.
            unsafe { gpu.context.swap_blocks_raw(&call, gpu.copies.cu_stream().into()) }?;
            let swapped = checked("cuEventRecord", gpu.copies.record_event(None))?;
            self.swapped = Some(swapped);
        }
        Ok(())
    }

    /// Lets the computing stream wait for the swaps so far.
    fn wait_for_swaps(&mut self) -> Result<(), BackendError> {
        match self.swapped.take() {
            Some(swapped) => checked("cuStreamWaitEvent", self.gpu.stream.wait(&swapped)),
            None => Ok(()),
        }
    }

    /// Sends pairs to one of the three places for them.
    fn send_pairs(&mut self, place: usize, pairs: &[(u32, u32)]) -> Result<u64, BackendError> {
        let flat: Vec<u32> = pairs.iter().flat_map(|&(src, dst)| [src, dst]).collect();
        let address = self.pairs.address() + (place * PAIRS * 8) as u64;
        // SAFETY: each place holds PAIRS pairs.
        unsafe { self.staging.send(&[(address, bytemuck::cast_slice(&flat))], &self.gpu.stream) }?;
        Ok(address)
    }
}

impl Drop for CudaCache {
    fn drop(&mut self) {
        // Nothing may move any more when the memory goes.
        let _ = self.gpu.copies.synchronize();
        let _ = self.gpu.stream.synchronize();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pagewise_attention::DType;

    #[test]
    fn buffers_lie_one_behind_the_other() {
        let config = AttentionConfig::new(4, 2, 16, DType::Bf16);
        let layout = CacheLayout::nhd(3, 4, &config);
        let limits = crate::backend::StepLimits { max_rows: 1, max_sequences: 1, max_seq_len: 1 };
        let spec = AttentionSpec {
            layer_groups: vec![0, 0],
            groups: vec![config.clone()],
            rope: None,
            block_size: 4,
            num_blocks: 3,
            host_blocks: 0,
            limits,
        };
        let extent = Extent::new(&spec, &config, &layout).unwrap();
        assert_eq!((extent.buffer, extent.all), (3 * 4 * 2 * 16 * 2, 4 * 3 * 4 * 2 * 16 * 2));
        let layers = extent.layers(1 << 20);
        let at = |index: u64| (1 << 20) + index * 768;
        assert_eq!(layers.words(), [at(0), at(1), at(2), at(3)]);
        // No blocks: addresses all the same, of which none is ever followed.
        let none = Extent::new(&spec, &config, &CacheLayout::nhd(0, 4, &config)).unwrap();
        assert_eq!(none.all, 0);
        assert_eq!(none.layers(7).words(), [7; 4]);
    }
}
