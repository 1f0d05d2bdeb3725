//! The CUDA backend as a subject: copies tensors to the GPU, runs, copies all of them back.

mod placed;

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DriverError, PinnedHostSlice};

use super::subject::{
    AttentionTask, CopyTask, MergeTask, ProbabilityRounding, Refusal, Scale, Subject, SwapTask, WriteTask,
};
pub use placed::{PlannedMemory, Upload, cuda_rounding, place_attention};

use crate::cuda::{
    AttentionOptions, AttentionPlan, BlockNumberType, BlockPairs, CacheBlocks, Context, CopyBlocksCall,
    CudaError, KvScales, LayerAddresses, MergeStatesCall, SwapBlocksCall, SwapMethod, WriteKvCall, cudarc,
};
use crate::{AttentionConfig, HostTensor, HostTensorMut, RowStrides};

/// The CUDA backend on one GPU.
#[derive(Debug)]
pub struct Cuda<'a> {
    /// The GPU.
    pub context: &'a Context,
    /// Everything runs on it, in order.
    pub stream: Arc<CudaStream>,
    /// Makes the plans of the next cases.
    pub options: AttentionOptions,
    /// Moves the blocks of the next cases.
    pub swap: SwapMethod,
    /// Kernel variants that ran since this was last emptied.
    pub variants: Vec<String>,
}

impl<'a> Cuda<'a> {
    /// On the default stream of a context; `None` where that is another engine's, without cudarc.
    pub fn new(context: &'a Context) -> Option<Self> {
        Some(Self {
            context,
            stream: context.cudarc()?.default_stream(),
            options: AttentionOptions::default(),
            swap: SwapMethod::default(),
            variants: Vec::new(),
        })
    }

    /// A tensor in device memory, never empty, so that it has an address.
    fn upload(&self, bytes: &[u8]) -> Result<CudaSlice<u8>, Refusal> {
        let bytes = if bytes.is_empty() { &[0xff; 16] } else { bytes };
        self.stream.clone_htod(bytes).map_err(driver)
    }

    fn read(&self, from: &CudaSlice<u8>, mut to: HostTensorMut<'_>) -> Result<(), Refusal> {
        to.set_bytes(&self.stream.clone_dtoh(from).map_err(driver)?);
        Ok(())
    }

    /// Where a slice is.
    pub fn address<T>(&self, slice: &CudaSlice<T>) -> u64 {
        slice.device_ptr(&self.stream).0
    }

    fn scales(&self, k: Scale<'_>, v: Scale<'_>) -> Result<Scales, Refusal> {
        let (k, v) = (placed::scale_list(k), placed::scale_list(v));
        let per_head = k.len() > 1;
        let upload = |scales: &[f32]| self.stream.clone_htod(scales).map_err(driver);
        Ok((upload(&k)?, upload(&v)?, per_head))
    }
}

/// Of keys and values, and whether there is one for each head.
type Scales = (CudaSlice<f32>, CudaSlice<f32>, bool);

fn driver(error: DriverError) -> Refusal {
    Refusal::Failed(error.to_string())
}

fn refusal(error: CudaError) -> Refusal {
    match error {
        CudaError::Unsupported { .. } | CudaError::UnsupportedDType { .. } => {
            Refusal::Unsupported(error.to_string())
        }
        other => Refusal::Failed(other.to_string()),
    }
}

fn unsupported<T>(what: &str) -> Result<T, Refusal> {
    Err(Refusal::Unsupported(what.to_owned()))
}

/// Pairs of blocks as i32 `[pairs, 2]`.
fn pair_bytes(pairs: &[(u32, u32)]) -> Vec<u8> {
    pairs.iter().flat_map(|&(from, to)| [from, to]).flat_map(u32::to_le_bytes).collect()
}

/// Pinned host memory with some bytes in it, never empty.
#[derive(Debug)]
pub struct Pinned {
    memory: PinnedHostSlice<u8>,
    /// As the GPU sees it.
    pub address: u64,
}

impl Pinned {
    /// Memory with these contents; what is added is poison.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(context: &Context, stream: &CudaStream, bytes: &[u8]) -> Result<Self, Refusal> {
        let len = bytes.len().max(16);
        // SAFETY: every byte is written before anything reads it.
        let mut memory = unsafe { stream.context().alloc_pinned_with_flags::<u8>(len, 0) }.map_err(driver)?;
        let slice = memory.as_mut_slice().map_err(driver)?;
        slice.fill(0xff);
        slice[..bytes.len()].copy_from_slice(bytes);
        let address = context.pinned_address(memory.as_ptr().map_err(driver)?).map_err(refusal)?;
        Ok(Self { memory, address })
    }

    /// What is there, once the streams that write it have been waited for.
    ///
    /// # Errors
    /// The driver's.
    pub fn bytes(&self) -> Result<&[u8], Refusal> {
        self.memory.as_slice().map_err(driver)
    }
}

impl Subject for Cuda<'_> {
    fn name(&self) -> String {
        format!("cuda ({})", self.context.device())
    }

    fn probability_rounding(&self, config: &AttentionConfig) -> ProbabilityRounding {
        cuda_rounding(config, &self.variants)
    }

    fn attention(
        &mut self,
        task: &AttentionTask<'_>,
        mut out: HostTensorMut<'_>,
        lse: Option<&mut [f32]>,
    ) -> Result<(), Refusal> {
        let problem = &task.problem;
        // Tiles take the scales of fp8 caches alone; row by row all caches do.
        let tiles_from = match (task.k_scale, task.v_scale) {
            (Scale::One, Scale::One) => self.options.tiles_from,
            _ if task.problem.config().kv_dtype.is_fp8() => self.options.tiles_from,
            _ => Some(usize::MAX),
        };
        let options = AttentionOptions { tiles_from, ..self.options };
        let plan = AttentionPlan::new(problem, self.context.device(), options).map_err(refusal)?;
        let memory = PlannedMemory { work: plan.work(), workspace: plan.workspace() };
        let mut slices = Vec::new();
        let mut upload = |bytes: &[u8]| {
            let slice = self.upload(bytes)?;
            let address = self.address(&slice);
            slices.push(slice);
            Ok(address)
        };
        let call = place_attention(task, &memory, out.as_ref(), lse.as_deref(), &mut upload)?;
        // SAFETY: all addresses are those of live slices that hold what the plan reaches.
        unsafe { self.context.attention_raw(&plan, &call, self.stream.cu_stream().into()) }
            .map_err(refusal)?;
        self.variants.extend(plan.variants());
        let at = |address| {
            let found = slices.iter().find(|slice| self.address(slice) == address);
            found.ok_or_else(|| Refusal::Failed("a tensor is gone".to_owned()))
        };
        self.read(at(call.out)?, out.reborrow())?;
        if let Some(lse) = lse {
            self.read(at(call.lse)?, HostTensorMut::F32(lse))?;
        }
        match self.stream.clone_dtoh(at(call.tickets)?).map_err(driver)?.iter().all(|&byte| byte == 0) {
            true => Ok(()),
            false => Err(Refusal::Failed("a ticket is not zero after the run".to_owned())),
        }
    }

    fn write_kv(
        &mut self,
        task: &WriteTask<'_>,
        mut k: HostTensorMut<'_>,
        mut v: HostTensorMut<'_>,
    ) -> Result<(), Refusal> {
        let is_fp8 = task.config.kv_dtype.is_fp8();
        if !is_fp8 && (task.k_scale != Scale::One || task.v_scale != Scale::One) {
            return unsupported("scales of a cache that is not fp8");
        }
        let scales = if is_fp8 { Some(self.scales(task.k_scale, task.v_scale)?) } else { None };
        let slots: Vec<u8> = task.write.slots.iter().flat_map(|slot| slot.to_le_bytes()).collect();
        let slots = self.upload(&slots)?;
        let new_k = self.upload(&task.k.to_bytes())?;
        let new_v = self.upload(&task.v.to_bytes())?;
        let k_cache = self.upload(&k.as_ref().to_bytes())?;
        let v_cache = self.upload(&v.as_ref().to_bytes())?;
        let call = WriteKvCall {
            config: task.config,
            layout: &task.layout,
            source: task.k.dtype(),
            tokens: task.write.slots.len(),
            slots: self.address(&slots),
            k: self.address(&new_k),
            k_strides: task.write.k,
            v: self.address(&new_v),
            v_strides: task.write.v,
            k_cache: self.address(&k_cache),
            v_cache: self.address(&v_cache),
            scales: scales.as_ref().map(|(k, v, per_head)| KvScales {
                k: self.address(k),
                v: self.address(v),
                per_head: *per_head,
            }),
            order: self.options.decode.order,
        };
        // SAFETY: all addresses are those of live slices that hold what shapes and strides reach.
        let variant = unsafe { self.context.write_kv_raw(&call, self.stream.cu_stream().into()) };
        self.variants.push(variant.map_err(refusal)?.name());
        self.read(&k_cache, k.reborrow())?;
        self.read(&v_cache, v.reborrow())?;
        Ok(())
    }

    fn copy_blocks(
        &mut self,
        task: &CopyTask<'_>,
        mut k: HostTensorMut<'_>,
        mut v: HostTensorMut<'_>,
    ) -> Result<(), Refusal> {
        let (k_cache, v_cache) = (self.upload(&k.as_ref().to_bytes())?, self.upload(&v.as_ref().to_bytes())?);
        let layers = LayerAddresses::new([(self.address(&k_cache), self.address(&v_cache))]);
        let table = self.stream.clone_htod(layers.words()).map_err(driver)?;
        let pairs = self.upload(&pair_bytes(task.pairs))?;
        let cache = CacheBlocks { layout: &task.layout, layers: &layers, table: self.address(&table) };
        let call = CopyBlocksCall {
            config: task.config,
            from: cache,
            to: cache,
            pairs: BlockPairs {
                address: self.address(&pairs),
                number_type: BlockNumberType::I32,
                count: task.pairs.len(),
                count_at: 0,
            },
            thread_blocks: None,
            tuning: None,
        };
        // SAFETY: all addresses are those of live slices that hold what shapes and strides reach; the suite's pairs are
        // independent.
        let variant = unsafe { self.context.copy_blocks_raw(&call, self.stream.cu_stream().into()) };
        self.variants.push(variant.map_err(refusal)?.name());
        self.read(&k_cache, k.reborrow())?;
        self.read(&v_cache, v.reborrow())?;
        Ok(())
    }

    /// From device memory to pinned host memory.
    fn swap_blocks(
        &mut self,
        task: &SwapTask<'_>,
        mut k: HostTensorMut<'_>,
        mut v: HostTensorMut<'_>,
    ) -> Result<(), Refusal> {
        let (source_k, source_v) = (self.upload(&task.k.to_bytes())?, self.upload(&task.v.to_bytes())?);
        let pinned = |tensor: HostTensor<'_>| Pinned::new(self.context, &self.stream, &tensor.to_bytes());
        let (target_k, target_v) = (pinned(k.as_ref())?, pinned(v.as_ref())?);
        let source = LayerAddresses::new([(self.address(&source_k), self.address(&source_v))]);
        let target = LayerAddresses::new([(target_k.address, target_v.address)]);
        let table = |layers: &LayerAddresses| self.stream.clone_htod(layers.words()).map_err(driver);
        let tables = (table(&source)?, table(&target)?);
        let pairs = self.upload(&pair_bytes(task.pairs))?;
        let side = |layout, layers, table| CacheBlocks { layout, layers, table: self.address(table) };
        let call = SwapBlocksCall {
            config: task.config,
            from: side(&task.source_layout, &source, &tables.0),
            to: side(&task.target_layout, &target, &tables.1),
            pairs: task.pairs,
            device_pairs: self.address(&pairs),
            method: self.swap,
        };
        // SAFETY: all addresses are those of live memory that holds what shapes and strides reach.
        unsafe { self.context.swap_blocks_raw(&call, self.stream.cu_stream().into()) }.map_err(refusal)?;
        self.stream.synchronize().map_err(driver)?;
        k.set_bytes(target_k.bytes()?);
        v.set_bytes(target_v.bytes()?);
        Ok(())
    }

    fn merge_states(
        &mut self,
        task: &MergeTask<'_>,
        mut out: HostTensorMut<'_>,
        lse: &mut [f32],
    ) -> Result<(), Refusal> {
        let MergeTask { rows, heads, head_dim, parts } = *task;
        let dtype = out.dtype();
        let part_out: Vec<u8> = parts.iter().flat_map(|part| part.out.to_bytes()).collect();
        let part_lse: Vec<u8> = parts.iter().flat_map(|part| HostTensor::F32(part.lse).to_bytes()).collect();
        let (part_out, part_lse) = (self.upload(&part_out)?, self.upload(&part_lse)?);
        let device_out = self.upload(&out.as_ref().to_bytes())?;
        let device_lse = self.upload(&HostTensor::F32(lse).to_bytes())?;
        let (packed, one_each) = (RowStrides::packed(heads, head_dim), RowStrides::packed(heads, 1));
        let call = MergeStatesCall {
            parts: parts.len(),
            rows,
            heads,
            head_dim,
            part_dtype: dtype,
            part_out: self.address(&part_out),
            part_out_strides: packed,
            part_out_stride: (rows * heads * head_dim) as i64,
            part_lse: self.address(&part_lse),
            part_lse_strides: one_each,
            part_lse_stride: (rows * heads) as i64,
            out_dtype: dtype,
            out: self.address(&device_out),
            out_strides: packed,
            lse: self.address(&device_lse),
            lse_strides: one_each,
        };
        // SAFETY: all addresses are those of live slices that hold what shapes and strides reach.
        let variant = unsafe { self.context.merge_states_raw(&call, self.stream.cu_stream().into()) };
        self.variants.push(variant.map_err(refusal)?.name());
        self.read(&device_out, out.reborrow())?;
        self.read(&device_lse, HostTensorMut::F32(lse))?;
        Ok(())
    }
}
