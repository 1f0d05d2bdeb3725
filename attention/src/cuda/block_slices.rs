//! `copy_blocks` and `swap_blocks` over cudarc's slices: checked lengths, types and pairs, and a workspace that owns what
//! the kernel reads.
//!
//! A comfort over [`Context::copy_blocks_raw`] and [`Context::swap_blocks_raw`], which do the work.

use std::sync::Arc;

use cudarc::driver::{
    CudaSlice, CudaStream, CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr, HostSlice, PinnedHostSlice,
    SyncOnDrop,
};

use super::{
    BlockNumberType, BlockPairs, CacheBlocks, Context, CopyBlocksCall, CopyBlocksVariant, CudaError, Element,
    LayerAddresses, SwapBlocksCall, SwapMethod,
};
use crate::{AttentionConfig, CacheLayout, ProblemError, check_block_pairs};

/// K and V of one layer in device memory.
#[derive(Debug)]
pub enum LayerSlices<'a, C> {
    /// A slice each.
    Apart {
        /// Key cache.
        k: CudaViewMut<'a, C>,
        /// Value cache.
        v: CudaViewMut<'a, C>,
    },
    /// Both in one slice, as in [`CacheLayout::interleaved`].
    Together {
        /// Key and value cache; K begins at element 0.
        kv: CudaViewMut<'a, C>,
        /// Element at which V begins.
        v_start: usize,
    },
}

impl<C: DeviceRepr> LayerSlices<'_, C> {
    /// Elements for K and for V from where they begin.
    fn lens(&self) -> (u64, u64) {
        match self {
            Self::Apart { k, v } => (k.len() as u64, v.len() as u64),
            Self::Together { kv, v_start } => (kv.len() as u64, kv.len().saturating_sub(*v_start) as u64),
        }
    }

    /// Addresses of K and V, and guards that make the stream wait for, and record, what other streams do with them.
    fn addresses<'s>(
        &'s mut self,
        stream: &'s CudaStream,
    ) -> ((u64, u64), (SyncOnDrop<'s>, Option<SyncOnDrop<'s>>)) {
        match self {
            Self::Apart { k, v } => {
                let ((k, k_guard), (v, v_guard)) = (k.device_ptr_mut(stream), v.device_ptr_mut(stream));
                ((k, v), (k_guard, Some(v_guard)))
            }
            Self::Together { kv, v_start } => {
                let offset = (*v_start * size_of::<C>()) as u64;
                let (k, guard) = kv.device_ptr_mut(stream);
                ((k, k + offset), (guard, None))
            }
        }
    }
}

/// The device memory that the kernel reads: addresses and pairs. One for each stream.
#[derive(Debug)]
pub struct BlocksWorkspace {
    tables: CudaSlice<u64>,
    pairs: CudaSlice<u32>,
}

impl BlocksWorkspace {
    /// Room for so many layers, and for so many pairs in a call.
    ///
    /// # Errors
    /// [`CudaError::Driver`] when the memory is not there.
    pub fn new(stream: &Arc<CudaStream>, layers: usize, pairs: usize) -> Result<Self, CudaError> {
        // Never empty, so that each has an address; two sides of K and V.
        let (layers, pairs) = (layers.max(1), pairs.max(1));
        Ok(Self { tables: stream.alloc_zeros(4 * layers)?, pairs: stream.alloc_zeros(2 * pairs)? })
    }

    /// Copies both sides' addresses and the pairs to the device: addresses of the tables and of the pairs.
    fn upload(
        &mut self,
        stream: &Arc<CudaStream>,
        sides: [&LayerAddresses; 2],
        pairs: &[(u32, u32)],
    ) -> Result<([u64; 2], u64), CudaError> {
        let words = sides.map(LayerAddresses::words).concat();
        let numbers: Vec<u32> = pairs.iter().flat_map(|&(from, to)| [from, to]).collect();
        let (room, needed) = (self.tables.len() as u64, words.len() as u64);
        let mut tables = self
            .tables
            .try_slice_mut(..words.len())
            .ok_or_else(|| too_short("the workspace's addresses", room, needed))?;
        stream.memcpy_htod(&words, &mut tables)?;
        let (room, needed) = (self.pairs.len() as u64, numbers.len() as u64);
        let mut target = self
            .pairs
            .try_slice_mut(..numbers.len())
            .ok_or_else(|| too_short("the workspace's pairs", room, needed))?;
        stream.memcpy_htod(&numbers, &mut target)?;
        let first = self.tables.device_ptr(stream).0;
        let second = first + 8 * sides[0].words().len() as u64;
        Ok(([first, second], self.pairs.device_ptr(stream).0))
    }
}

/// Copies of blocks within the caches of all layers.
#[derive(Debug)]
pub struct CopyBlocksSlices<'a, 'b, C> {
    /// KV heads, head dimensions and the cache's type.
    pub config: &'b AttentionConfig,
    /// Where blocks lie in each layer's cache.
    pub layout: &'b CacheLayout,
    /// The layers.
    pub layers: &'b mut [LayerSlices<'a, C>],
    /// Block to read, block to write.
    pub pairs: &'b [(u32, u32)],
}

/// The caches of all layers in pinned host memory, in one buffer.
#[derive(Debug)]
pub struct HostCache<'a, C> {
    /// Where blocks lie in each layer's cache; as many tokens a block as on the device.
    pub layout: &'a CacheLayout,
    /// The buffer: `alloc_pinned_with_flags` of cudarc's context, with flags 0 where the host reads it.
    pub memory: &'a mut PinnedHostSlice<C>,
    /// Elements at which K and V of each layer begin.
    pub starts: &'a [(usize, usize)],
}

/// Blocks that move between device and host.
#[derive(Debug)]
pub struct SwapBlocksSlices<'a, 'b, C> {
    /// KV heads, head dimensions and the cache's type.
    pub config: &'b AttentionConfig,
    /// Where blocks lie in each layer's cache on the device.
    pub layout: &'b CacheLayout,
    /// The layers on the device.
    pub layers: &'b mut [LayerSlices<'a, C>],
    /// The caches in host memory.
    pub host: HostCache<'b, C>,
    /// Block to read, block to write.
    pub pairs: &'b [(u32, u32)],
    /// What moves the bytes.
    pub method: SwapMethod,
}

/// Which way blocks move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SwapDirection {
    /// From the device to the host.
    Out,
    /// From the host to the device.
    In,
}

impl Context {
    /// Puts copies of blocks on a cudarc stream: all layers in one launch.
    ///
    /// # Errors
    /// [`CudaError::OtherContext`] for a stream of another context, [`ProblemError::BufferTooShort`] for a slice or a
    /// workspace that is too small, [`ProblemError::BufferDType`] for another type than the configuration's,
    /// [`ProblemError::Input`] for pairs as in [`check_block_pairs`]; nothing is copied then. Else as
    /// [`Context::copy_blocks_raw`].
    pub fn copy_blocks<C: Element>(
        &self,
        stream: &Arc<CudaStream>,
        workspace: &mut BlocksWorkspace,
        args: CopyBlocksSlices<'_, '_, C>,
    ) -> Result<CopyBlocksVariant, CudaError> {
        let CopyBlocksSlices { config, layout, layers, pairs } = args;
        if !self.is(stream.context()) {
            return Err(CudaError::OtherContext);
        }
        check_device::<C>(config, layout, layers)?;
        check_block_pairs(pairs, layout.num_blocks, None)?;
        let (addresses, _guards): (Vec<_>, Vec<_>) =
            layers.iter_mut().map(|layer| layer.addresses(stream)).unzip();
        let layers = LayerAddresses::new(addresses);
        let ([table, _], address) = workspace.upload(stream, [&layers, &layers], pairs)?;
        let cache = CacheBlocks { layout, layers: &layers, table };
        let call = CopyBlocksCall {
            config,
            from: cache,
            to: cache,
            pairs: BlockPairs { address, number_type: BlockNumberType::I32, count: pairs.len(), count_at: 0 },
            thread_blocks: None,
            tuning: None,
        };
        // SAFETY: the slices hold what strides and shapes reach, the pairs are independent (both checked above), and the
        // guards order this launch with other uses of the slices.
        unsafe { self.copy_blocks_raw(&call, stream.cu_stream().into()) }
    }

    /// Puts a swap of blocks on a cudarc stream: all layers at once. The host waits for nothing but, when it reads the
    /// host's cache through cudarc, for the swap.
    ///
    /// # Errors
    /// As [`Context::copy_blocks`]; else as [`Context::swap_blocks_raw`].
    pub fn swap_blocks<C: Element>(
        &self,
        stream: &Arc<CudaStream>,
        workspace: &mut BlocksWorkspace,
        direction: SwapDirection,
        args: SwapBlocksSlices<'_, '_, C>,
    ) -> Result<(), CudaError> {
        let SwapBlocksSlices { config, layout, layers, host, pairs, method } = args;
        if !self.is(stream.context()) || !self.is(host.memory.context()) {
            return Err(CudaError::OtherContext);
        }
        check_device::<C>(config, layout, layers)?;
        host.layout.validate(config)?;
        let (k, v) = (host.layout.k_extent(config), host.layout.v_extent(config));
        let len = host.memory.len() as u64;
        for &(k_start, v_start) in host.starts {
            let needed = k.saturating_add(k_start as u64).max(v.saturating_add(v_start as u64));
            if len < needed {
                return Err(too_short("the host's cache", len, needed));
            }
        }
        // What else could go wrong is found before anything moves by swap_blocks_raw.
        let (addresses, _guards): (Vec<_>, Vec<_>) =
            layers.iter_mut().map(|layer| layer.addresses(stream)).unzip();
        // SAFETY: the slice is only used on this stream.
        let (memory, _host_guard) = unsafe { host.memory.stream_synced_mut_slice(stream) };
        let base = self.pinned_address(memory.as_ptr().cast())?;
        let at = |start: usize| base + (start * size_of::<C>()) as u64;
        let device = LayerAddresses::new(addresses);
        let pinned = LayerAddresses::new(host.starts.iter().map(|&(k, v)| (at(k), at(v))));
        let ([device_table, pinned_table], device_pairs) = match method {
            SwapMethod::Kernel { .. } => workspace.upload(stream, [&device, &pinned], pairs)?,
            SwapMethod::CopyEngines => ([0, 0], 0),
        };
        let device = CacheBlocks { layout, layers: &device, table: device_table };
        let pinned = CacheBlocks { layout: host.layout, layers: &pinned, table: pinned_table };
        let (from, to) = match direction {
            SwapDirection::Out => (device, pinned),
            SwapDirection::In => (pinned, device),
        };
        let call = SwapBlocksCall { config, from, to, pairs, device_pairs, method };
        // SAFETY: slices and host memory hold what strides and shapes reach (checked above), and the guards order the
        // work with other uses of them.
        unsafe { self.swap_blocks_raw(&call, stream.cu_stream().into()) }
    }
}

/// Whether the slices of all layers have the type and the length that the layout reaches.
fn check_device<C: Element>(
    config: &AttentionConfig,
    layout: &CacheLayout,
    layers: &[LayerSlices<'_, C>],
) -> Result<(), CudaError> {
    config.validate()?;
    layout.validate(config)?;
    let (found, expected) = (C::DTYPE, config.kv_dtype);
    if found != expected && !(found.is_fp8() && expected.is_fp8()) {
        return Err(ProblemError::BufferDType { tensor: "the cache", found, expected }.into());
    }
    for layer in layers {
        let (k, v) = layer.lens();
        for (tensor, len, needed) in
            [("the K cache", k, layout.k_extent(config)), ("the V cache", v, layout.v_extent(config))]
        {
            if len < needed {
                return Err(too_short(tensor, len, needed));
            }
        }
    }
    Ok(())
}

fn too_short(tensor: &'static str, len: u64, needed: u64) -> CudaError {
    ProblemError::BufferTooShort { tensor, len, needed }.into()
}
