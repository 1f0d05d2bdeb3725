//! The blocks of all layers in host memory. Pages of it that no sequence has touched cost nothing: the
//! operating system hands them out zeroed on first use.

use crate::backend::{AttentionSpec, BackendError, LayerPlace};
use half::{bf16, f16};
use pagewise_attention::cpu::{self as attention, KvPair};
use pagewise_attention::{AttentionConfig, CacheLayout, DType, HostTensor, HostTensorMut, ProblemError};
use pagewise_kvcache::{BlockCopy, BlockOps};

/// Keys and values of all layers, and the host blocks to swap with.
#[derive(Debug)]
pub struct CpuCache {
    config: AttentionConfig,
    device: Pool,
    host: Pool,
}

/// One of the two pools: buffers of equal layout, one pair for each layer of the largest KV group.
#[derive(Debug)]
struct Pool {
    layout: CacheLayout,
    buffers: Vec<KvPair<Buffer>>,
}

#[derive(Debug)]
enum Buffer {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
    F8E4M3(Vec<u8>),
    F8E5M2(Vec<u8>),
}

impl CpuCache {
    pub(super) fn new(spec: &AttentionSpec) -> Result<Self, BackendError> {
        let Some(config) = spec.groups.first().cloned() else { return Err(no_layer(0)) };
        let pool = |num_blocks, hint| Pool::new(spec, &config, num_blocks, hint);
        let device = pool(spec.num_blocks, "--kv-blocks or --kv-memory")?;
        let host = pool(spec.host_blocks, "--swap-space")?;
        Ok(Self { config, device, host })
    }

    pub(super) fn layer(&self, buffer: usize) -> Result<(HostTensor<'_>, HostTensor<'_>), BackendError> {
        let pair = self.device.buffers.get(buffer).ok_or_else(|| no_layer(buffer))?;
        Ok((pair.k.host(), pair.v.host()))
    }

    pub(super) fn layer_mut(
        &mut self,
        buffer: usize,
    ) -> Result<(HostTensorMut<'_>, HostTensorMut<'_>), BackendError> {
        let pair = self.device.buffers.get_mut(buffer).ok_or_else(|| no_layer(buffer))?;
        Ok((pair.k.host_mut(), pair.v.host_mut()))
    }

    /// Swap out, swap in, copy: in that order, in every buffer. A copy names the KV group whose layers it is
    /// meant for; as groups share buffers and no two share a block, doing it in all of them is the same.
    pub(super) fn apply(&mut self, ops: &BlockOps) -> Result<(), BackendError> {
        let pairs = |copies: &[BlockCopy]| copies.iter().map(|c| (c.src, c.dst)).collect::<Vec<_>>();
        let (out, back, copies) = (pairs(&ops.swap_out), pairs(&ops.swap_in), pairs(&ops.copy));
        let Self { config, device, host } = self;
        for (device_pair, host_pair) in device.buffers.iter_mut().zip(&mut host.buffers) {
            swap(config, &device.layout, device_pair, &host.layout, host_pair, &out)?;
            swap(config, &host.layout, host_pair, &device.layout, device_pair, &back)?;
            let KvPair { k, v } = device_pair;
            attention::copy_blocks(config, &device.layout, &copies, &mut k.host_mut(), &mut v.host_mut())?;
        }
        Ok(())
    }
}

fn swap(
    config: &AttentionConfig,
    from_layout: &CacheLayout,
    from: &KvPair<Buffer>,
    to_layout: &CacheLayout,
    to: &mut KvPair<Buffer>,
    pairs: &[(u32, u32)],
) -> Result<(), BackendError> {
    if pairs.is_empty() {
        return Ok(());
    }
    let source = KvPair::new(from.k.host(), from.v.host());
    let target = KvPair::new(to.k.host_mut(), to.v.host_mut());
    attention::swap_blocks(config, from_layout, to_layout, pairs, source, target)?;
    Ok(())
}

impl Pool {
    fn new(
        spec: &AttentionSpec,
        config: &AttentionConfig,
        num_blocks: usize,
        hint: &'static str,
    ) -> Result<Self, BackendError> {
        let layout = CacheLayout::nhd(num_blocks, spec.block_size, config);
        layout.validate(config)?;
        let buffer = |extent: u64| Buffer::new(config.kv_dtype, extent, hint);
        let pair = |_| Ok(KvPair::new(buffer(layout.k_extent(config))?, buffer(layout.v_extent(config))?));
        let buffers = (0..spec.num_buffers()).map(pair).collect::<Result<_, BackendError>>()?;
        Ok(Self { layout, buffers })
    }
}

impl Buffer {
    fn new(dtype: DType, extent: u64, hint: &'static str) -> Result<Self, BackendError> {
        let count = usize::try_from(extent).unwrap_or(usize::MAX);
        let fail = || BackendError::OutOfMemory {
            what: "the KV cache",
            wanted: count.saturating_mul(dtype.size()),
            hint,
        };
        fn zeros<T: bytemuck::Zeroable>(count: usize) -> Result<Vec<T>, ()> {
            bytemuck::allocation::try_zeroed_vec(count)
        }
        match dtype {
            DType::F32 => zeros(count).map(Self::F32),
            DType::F16 => zeros(count).map(Self::F16),
            DType::Bf16 => zeros(count).map(Self::Bf16),
            DType::F8E4M3 => zeros(count).map(Self::F8E4M3),
            DType::F8E5M2 => zeros(count).map(Self::F8E5M2),
        }
        .map_err(|()| fail())
    }

    fn host(&self) -> HostTensor<'_> {
        match self {
            Self::F32(x) => HostTensor::F32(x),
            Self::F16(x) => HostTensor::F16(x),
            Self::Bf16(x) => HostTensor::Bf16(x),
            Self::F8E4M3(x) => HostTensor::F8E4M3(x),
            Self::F8E5M2(x) => HostTensor::F8E5M2(x),
        }
    }

    fn host_mut(&mut self) -> HostTensorMut<'_> {
        match self {
            Self::F32(x) => HostTensorMut::F32(x),
            Self::F16(x) => HostTensorMut::F16(x),
            Self::Bf16(x) => HostTensorMut::Bf16(x),
            Self::F8E4M3(x) => HostTensorMut::F8E4M3(x),
            Self::F8E5M2(x) => HostTensorMut::F8E5M2(x),
        }
    }
}

pub(super) fn place(spec: &AttentionSpec, layer: usize) -> Result<LayerPlace, BackendError> {
    spec.place(layer).ok_or_else(|| no_layer(layer))
}

pub(super) fn no_layer(layer: usize) -> BackendError {
    let problem = format!("the cache has no layer {layer}; it was made for another model");
    ProblemError::Input { input: "layer", problem }.into()
}
