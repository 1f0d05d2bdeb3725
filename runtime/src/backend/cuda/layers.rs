//! The layers that are no products: embeddings, keys and values into blocks, attention, sums.
//!
//! Owns the checks of shapes and the rotary table; the launches are `kernels.rs`'s and the attention crate's.

use std::sync::Arc;

use pagewise_attention::cuda::ptx::model::Rows;
use pagewise_attention::cuda::ptx::model::add::AddArgs;
use pagewise_attention::cuda::ptx::model::embed::EmbedArgs;
use pagewise_attention::cuda::ptx::model::gather_rows::GatherRowsArgs;
use pagewise_attention::cuda::ptx::model::scale::ScaleArgs;
use pagewise_attention::cuda::ptx::write_kv::RotaryStyle;
use pagewise_attention::cuda::{
    AttentionCall, Device, PositionType, Rotary, RotaryQueries, RotaryTables, WriteKvCall,
};
use pagewise_attention::{AttentionConfig, DType};

use super::CudaBackend;
use super::cache::CudaCache;
use super::gpu::{DeviceMemory, Gpu, Purpose};
use super::inputs::Inputs;
use super::kernels::small;
use super::staging::Staging;
use super::step::{CudaStep, sizes};
use super::tensor::{CudaTensor, CudaWeight, shape_error};
use crate::backend::cpu::dense::RopeAngles;
use crate::backend::{AttentionSpec, BackendError, Heads, Rope};

/// Bytes of a pinned piece of the rotary table.
const TABLE_PIECE: usize = 1 << 20;

/// Numbers of rows of a table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ids {
    /// i32 `[rows]`
    pub(super) address: u64,
    /// Added to each.
    pub(super) offset: u64,
}

/// Cosines and sines of all positions: f32 `[positions, 2, half]`.
#[derive(Debug)]
pub(super) struct RotaryTable {
    memory: DeviceMemory,
    rope: Rope,
    half: usize,
    positions: usize,
}

impl RotaryTable {
    fn new(gpu: &Arc<Gpu>, rope: &Rope, positions: usize) -> Result<Self, BackendError> {
        let half = rope.frequencies().len();
        let numbers: Vec<i32> = (0..positions).map(|position| position as i32).collect();
        let angles = RopeAngles::new(rope.frequencies(), &numbers).stretched(rope.magnitude());
        let bytes: &[u8] = bytemuck::cast_slice(angles.cos_sin());
        let memory = DeviceMemory::new(gpu, bytes.len(), Purpose::CACHE)?;
        let mut staging = Staging::new(gpu, 2, TABLE_PIECE, Purpose::CACHE)?;
        // SAFETY: the memory is as large as the table.
        unsafe { staging.send_all(memory.address(), bytes, &gpu.stream) }?;
        gpu.synchronize()?;
        Ok(Self { memory, rope: rope.clone(), half, positions })
    }

    fn tables(&self) -> RotaryTables {
        let cos = self.memory.address();
        let sin = cos + (self.half * size_of::<f32>()) as u64;
        RotaryTables { cos, sin, stride: 2 * self.half as u64, positions: self.positions }
    }
}

/// What rows of a cache begin at a multiple of, in bytes.
const ROW_ALIGNMENT: usize = 16;

/// Whether there are kernels for weights of a type and this cache.
fn check_cache_type(config: &AttentionConfig, dtype: DType, gpu: &Device) -> Result<(), BackendError> {
    let kv = config.kv_dtype;
    if config.q_dtype == dtype && kv == dtype {
        return Ok(());
    }
    let mut dims = [config.head_dim_qk, config.head_dim_v].into_iter();
    let problem = if config.q_dtype != dtype || dtype.size() != 2 || !kv.is_fp8() {
        format!(
            "on CUDA the KV cache has the type of the weights ({dtype}) or, with weights of 16 bits, one of fp8, and {kv} is \
             asked for; leave it at auto"
        )
    } else if !gpu.converts_fp8() {
        format!(
            "{kv} takes compute capability 8.9 and a driver of CUDA 12.1, and {} has {} and {}; leave it at auto",
            gpu.name, gpu.compute_capability, gpu.driver
        )
    } else if let Some(dim) = dims.find(|dim| !(dim * kv.size()).is_multiple_of(ROW_ALIGNMENT)) {
        format!(
            "{kv} takes heads of a multiple of 16 elements on CUDA, and they have {dim}; leave it at auto"
        )
    } else {
        return Ok(());
    };
    Err(BackendError::Option { option: "--kv-dtype", problem })
}

impl CudaBackend {
    /// Whether a cache of this kind can be had.
    ///
    /// # Errors
    /// [`BackendError::Option`] if it has neither the type of the weights nor, with weights of 16 bits, one of fp8, or if
    /// the GPU is too old for fp8.
    pub fn check_cache(&self, spec: &AttentionSpec) -> Result<(), BackendError> {
        let (dtype, gpu) = (self.dtype(), self.gpu().device());
        spec.groups.iter().try_for_each(|config| check_cache_type(config, dtype, gpu))
    }

    /// The cache, and with it all that is made once for steps within the limits of `spec`.
    pub(super) fn new_cache(&self, spec: &AttentionSpec) -> Result<CudaCache, BackendError> {
        let gpu = self.gpu();
        gpu.bind()?;
        self.check_cache(spec)?;
        self.finish_uploads()?;
        // Graphs and inputs of an earlier cache point to what is about to go.
        self.forget_graphs()?;
        let mut sizes = sizes(self, spec)?;
        // As much as the largest steps took that were made before: growing later would cost all graphs.
        sizes.least_bytes = self.inputs().take().map_or(0, |before| before.bytes().next_power_of_two());
        *self.inputs() = Some(Inputs::new(gpu, spec, sizes)?);
        let positions = spec.limits.max_seq_len;
        if let Some(rope) = &spec.rope
            && !self
                .rotary()
                .as_ref()
                .is_some_and(|table| table.rope == *rope && table.positions >= positions)
        {
            *self.rotary() = Some(RotaryTable::new(gpu, rope, positions)?);
        }
        CudaCache::new(gpu, spec)
    }

    /// `out[t] = table[offset + id t]`, or `+=` that.
    pub(super) fn look_up(
        &self,
        table: &CudaWeight,
        ids: Ids,
        adds: bool,
        out: &CudaTensor,
    ) -> Result<(), BackendError> {
        let (rows, width) = table.matrix();
        if out.width != width || out.dtype != DType::F32 {
            return Err(shape_error("rows of a table", &[out.rows, out.width], &[out.rows, width]));
        }
        if out.rows == 0 {
            return Ok(());
        }
        let args = EmbedArgs {
            rows: out.rows32()?,
            width: out.width32()?,
            ids: ids.address,
            id_bytes: 4,
            offset: ids.offset,
            table: Rows { address: table.address, stride: width as u64 },
            table_rows: small("the rows of a table", rows)?,
            scale: 1.0,
            adds,
            out: out.view(),
        };
        // SAFETY: tables and tensors are as large as their shapes; the step's ids are as many as its rows.
        unsafe { self.kernels().embed(table.dtype, &args) }
    }

    /// `x = cap · tanh(x · factor / cap)`; without a cap `x *= factor`.
    pub(super) fn scale_stream(&self, factor: f32, cap: f32, x: &CudaTensor) -> Result<(), BackendError> {
        if x.dtype != DType::F32 {
            return Err(shape_error("a stream", &[x.rows, x.width], &[x.rows, x.width]));
        }
        if x.rows == 0 || x.width == 0 {
            return Ok(());
        }
        let args = ScaleArgs { rows: x.rows32()?, width: x.width32()?, x: x.view(), factor, cap };
        // SAFETY: the tensor is as large as its shape.
        unsafe { self.kernels().scale(&args) }
    }

    /// `x += y`
    pub(super) fn add_rows(&self, x: &CudaTensor, y: &CudaTensor) -> Result<(), BackendError> {
        if (x.rows, x.width) != (y.rows, y.width) || x.dtype != DType::F32 {
            return Err(shape_error("rows that are added", &[y.rows, y.width], &[x.rows, x.width]));
        }
        if x.rows == 0 || x.width == 0 {
            return Ok(());
        }
        let args = AddArgs { rows: x.rows32()?, width: x.width32()?, x: x.view(), y: y.view(), bias: 0 };
        // SAFETY: tensors are as large as their shapes, which were compared.
        unsafe { self.kernels().add(y.dtype, &args) }
    }

    /// The rows whose logits are wanted.
    pub(super) fn gather(&self, step: &CudaStep<'_>, x: &CudaTensor) -> Result<CudaTensor, BackendError> {
        if x.dtype != DType::F32 {
            return Err(shape_error("a stream", &[x.rows, x.width], &[x.rows, x.width]));
        }
        if step.key.is_some() && x.rows == step.logit_rows {
            // A decode, of which the logits of every row are wanted.
            return Ok(x.again());
        }
        let out = self.new_tensor(step.logit_rows, x.width, DType::F32)?;
        if out.rows == 0 || out.width == 0 {
            return Ok(out);
        }
        let args = GatherRowsArgs {
            rows: out.rows32()?,
            width: out.width32()?,
            x: x.view(),
            x_rows: x.rows32()?,
            index: step.logit_row_numbers,
            out: out.view(),
        };
        // SAFETY: tensors are as large as their shapes, and there are as many numbers as logit rows.
        unsafe { self.kernels().gather_rows(&args) }?;
        Ok(out)
    }

    /// Rotates queries and keys, and writes keys and values into the layer's blocks.
    pub(super) fn write_heads(
        &self,
        step: &CudaStep<'_>,
        cache: &CudaCache,
        layer: usize,
        Heads { q, k, v }: Heads<'_, CudaTensor>,
    ) -> Result<(), BackendError> {
        let (place, config, group) = step.layer(layer)?;
        let (queries, keys) = (config.q_heads * config.head_dim_qk, config.kv_heads * config.head_dim_qk);
        let widths = [queries, keys, config.kv_heads * config.head_dim_v];
        if [q.width, k.width, v.width] != widths || [q.rows, k.rows, v.rows] != [step.rows; 3] {
            return Err(shape_error("queries, keys and values", &[q.width, k.width, v.width], &widths));
        }
        let (k_cache, v_cache) = cache.buffer(place.buffer)?;
        let call = WriteKvCall {
            config,
            layout: &group.layout,
            source: self.dtype(),
            tokens: step.rows,
            slots: group.slots,
            k: k.address,
            k_strides: k.heads(config.head_dim_qk),
            v: v.address,
            v_strides: v.heads(config.head_dim_v),
            k_cache,
            v_cache,
            scales: cache.scales(),
            order: self.gpu().order(),
        };
        let (context, stream) = (&self.gpu().context, self.gpu().raw_stream());
        let table = self.rotary();
        let Some(table) = table.as_ref().filter(|_| step.spec.rope.is_some()) else {
            // SAFETY: tensors and cache are as large as their shapes, the step has as many slots as rows, each of which
            // its own; launches on the stream follow each other.
            unsafe { context.write_kv_raw(&call, stream) }?;
            return Ok(());
        };
        let q_strides = q.heads(config.head_dim_qk);
        let rotary = Rotary {
            style: RotaryStyle::NeoX,
            dim: 2 * table.half,
            tables: table.tables(),
            positions: step.positions,
            position_type: PositionType::I32,
            queries: Some(RotaryQueries { q: q.address, q_strides, out: q.address, out_strides: q_strides }),
        };
        // SAFETY: as above; there are as many positions as rows, and queries turn where they are.
        unsafe { context.write_kv_rotary_raw(&call, &rotary, stream) }?;
        Ok(())
    }

    /// Paged attention over the layer's blocks.
    pub(super) fn attend(
        &self,
        step: &CudaStep<'_>,
        cache: &CudaCache,
        layer: usize,
        q: &CudaTensor,
        out: &CudaTensor,
    ) -> Result<(), BackendError> {
        let (place, config, group) = step.layer(layer)?;
        let needed = [step.rows, config.q_heads * config.head_dim_qk, group.q.token as usize];
        if [q.rows, q.width, q.stride] != needed {
            return Err(shape_error("queries", &[q.rows, q.width, q.stride], &needed));
        }
        let needed = [step.rows, config.q_heads * config.head_dim_v, config.q_heads * config.head_dim_v];
        if [out.rows, out.width, out.stride] != needed {
            return Err(shape_error("the output of attention", &[out.rows, out.width, out.stride], &needed));
        }
        let (k_cache, v_cache) = cache.buffer(place.buffer)?;
        let [partial_out, partial_max, tickets] = step.workspace;
        let call = AttentionCall {
            q: q.address,
            k_cache,
            v_cache,
            tables: group.tables,
            out: out.address,
            work: group.work,
            partial_out,
            partial_max,
            tickets,
            ..AttentionCall::default()
        };
        // SAFETY: tensors and cache are as large as their shapes, tables and work are the plan's, the workspace is as
        // large as the plan asks, and launches on the stream follow each other.
        unsafe { self.gpu().context.attention_raw(&group.plan, &call, self.gpu().raw_stream()) }?;
        self.set_attended(out.address);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pagewise_attention::cuda::ComputeCapability;

    #[test]
    fn caches_have_the_type_of_the_weights_or_of_fp8() {
        let check = |weights, kv_dtype, device: &Device| {
            let config = AttentionConfig { kv_dtype, ..AttentionConfig::new(8, 2, 64, weights) };
            check_cache_type(&config, weights, device).map_err(|error| error.to_string())
        };
        let (h100, f8) = (Device::h100(), DType::F8E4M3);
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            assert_eq!(check(dtype, dtype, &h100), Ok(()));
        }
        assert_eq!(check(DType::Bf16, f8, &h100), Ok(()));
        assert_eq!(check(DType::F16, DType::F8E5M2, &h100), Ok(()));
        for (weights, kv) in [(DType::F32, f8), (DType::Bf16, DType::F16), (DType::F16, DType::F32)] {
            let refused = check(weights, kv, &h100).unwrap_err();
            assert!(refused.contains("--kv-dtype") && refused.contains(&kv.to_string()), "{refused}");
        }
        let a100 = Device {
            name: "NVIDIA A100".to_owned(),
            compute_capability: ComputeCapability { major: 8, minor: 0 },
            ..h100
        };
        let refused = check(DType::Bf16, f8, &a100).unwrap_err();
        assert!(refused.contains("NVIDIA A100 has 8.0"), "{refused}");
        let config = AttentionConfig { kv_dtype: f8, ..AttentionConfig::new(8, 2, 72, DType::Bf16) };
        let refused = check_cache_type(&config, DType::Bf16, &Device::h100()).unwrap_err().to_string();
        assert!(refused.contains("they have 72"), "{refused}");
    }
}
