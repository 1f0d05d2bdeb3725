//! `write_kv` in WGSL: stores new K and V rows into cache blocks, in one dispatch.
//!
//! Owns the checks, the choice of variant, the uniform buffer and the bind group; the kernel and its parameters
//! are [`pagewise_shaders::write_kv`]'s.

use std::sync::Arc;

use ::wgpu::{
    BindGroup, BindGroupDescriptor, BindGroupEntry, BindingResource, Buffer, BufferDescriptor, BufferUsages,
    CommandEncoder, ComputePass, ComputePassDescriptor, Features, Queue,
};
use pagewise_shaders::write_kv::{
    Access, CacheRows, SourceRows, WriteKv, WriteKvArgs, WriteKvShape, WriteKvSpec,
};

use super::buffer::{Need, bind};
use super::context::Pipeline;
use super::dtype::shader_type;
use super::{BufferRange, Context, WgpuError};
use crate::{AttentionConfig, CacheLayout, DType, KvStrides, RowStrides};

/// A `write_kv` over parts of the caller's buffers.
#[derive(Clone, Copy, Debug)]
pub struct WriteKvCall<'a> {
    /// Heads, head dimensions and the cache's type.
    pub config: &'a AttentionConfig,
    /// Where blocks lie in the caches.
    pub layout: &'a CacheLayout,
    /// Element type of the new rows: f32, f16 or bf16.
    pub source: DType,
    /// Number of new tokens, skipped ones included.
    pub tokens: usize,
    /// Slots, i32 or u32 `[tokens]`. A negative slot skips its token; so does one past the cache's last slot.
    /// No slot may occur twice.
    pub slots: BufferRange<'a>,
    /// New keys, `[tokens, kv_heads, head_dim_qk]`.
    pub k: BufferRange<'a>,
    /// Their strides.
    pub k_strides: RowStrides,
    /// New values, `[tokens, kv_heads, head_dim_v]`.
    pub v: BufferRange<'a>,
    /// Their strides.
    pub v_strides: RowStrides,
    /// Key cache.
    pub k_cache: BufferRange<'a>,
    /// Value cache; may lie in the key cache's buffer (interleaved), but neither with the new rows or the slots.
    pub v_cache: BufferRange<'a>,
}

/// The kernel variant that a call takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteKvVariant(WriteKvSpec);

impl WriteKvVariant {
    /// The kernel's name, as in `pagewise_shaders`: `write_kv_f32_bf16_vec4`.
    pub fn name(&self) -> String {
        self.0.name()
    }
}

/// A `write_kv` whose bind group is made: encoding it allocates nothing. One for each layer, made once.
#[derive(Debug)]
pub struct PreparedWriteKv {
    pipeline: Arc<Pipeline<WriteKv>>,
    bind_group: BindGroup,
    uniform: Buffer,
    shape: WriteKvShape,
    prepared: usize,
    per_dimension: u32,
    workgroups: Option<[u32; 3]>,
}

impl PreparedWriteKv {
    /// The kernel variant.
    pub fn variant(&self) -> WriteKvVariant {
        WriteKvVariant(self.pipeline.descriptor.spec())
    }

    /// Changes the number of tokens, from the next submission on: the slots and rows in the same buffers.
    ///
    /// # Errors
    /// [`WgpuError::TooManyTokens`] beyond the number that the call was prepared for.
    pub fn set_tokens(&mut self, queue: &Queue, tokens: usize) -> Result<(), WgpuError> {
        let prepared = self.prepared;
        let count = u32::try_from(tokens).ok().filter(|_| tokens <= prepared);
        self.shape.tokens = count.ok_or(WgpuError::TooManyTokens { tokens, prepared })?;
        self.workgroups = workgroups(&self.pipeline.descriptor, self.shape, self.per_dimension)?;
        // The number of tokens is the first word.
        queue.write_buffer(&self.uniform, 0, bytemuck::bytes_of(&self.shape.tokens));
        Ok(())
    }

    /// Puts the dispatch into a compute pass. Changes the pass's pipeline and its bind group 0.
    pub fn encode(&self, pass: &mut ComputePass<'_>) {
        if let Some([x, y, z]) = self.workgroups {
            pass.set_pipeline(&self.pipeline.pipeline);
            pass.set_bind_group(0, &self.bind_group, &[]);
            pass.dispatch_workgroups(x, y, z);
        }
    }
}

fn workgroups(
    descriptor: &WriteKv,
    shape: WriteKvShape,
    per_dimension: u32,
) -> Result<Option<[u32; 3]>, WgpuError> {
    match shape.tokens {
        0 => Ok(None),
        _ => Ok(Some(descriptor.workgroups(shape, per_dimension)?)),
    }
}

impl Context {
    /// Checks a call, builds its pipeline if no call did before, and makes its bind group.
    ///
    /// # Errors
    /// [`WgpuError`] names the field, buffer or limit, what is there and what is needed.
    pub fn prepare_write_kv(&self, call: &WriteKvCall<'_>) -> Result<PreparedWriteKv, WgpuError> {
        let WriteKvCall { config, layout, source, tokens, .. } = *call;
        config.validate()?;
        layout.validate(config)?;
        call.k_strides.validate("new K", config.kv_heads, config.head_dim_qk)?;
        call.v_strides.validate("new V", config.kv_heads, config.head_dim_v)?;
        call.check_shared_buffers()?;
        let source_type = shader_type("new keys and values", source)?;
        let cache_type = shader_type("the cache", config.kv_dtype)?;

        let (heads, dim_k, dim_v) = (config.kv_heads, config.head_dim_qk, config.head_dim_v);
        let need = |tensor, dtype: DType, extent| Need { tensor, element: dtype.size() as u64, extent };
        let slots = Need { tensor: "slots", element: 4, extent: tokens as u64 };
        let slots = bind(call.slots, slots, self.limits())?;
        let k = need("new K", source, call.k_strides.extent(tokens, heads, dim_k));
        let k = bind(call.k, k, self.limits())?;
        let v = need("new V", source, call.v_strides.extent(tokens, heads, dim_v));
        let v = bind(call.v, v, self.limits())?;
        let k_cache = need("the K cache", config.kv_dtype, layout.k_extent(config));
        let k_cache = bind(call.k_cache, k_cache, self.limits())?;
        let v_cache = need("the V cache", config.kv_dtype, layout.v_extent(config));
        let v_cache = bind(call.v_cache, v_cache, self.limits())?;

        let rows = |offset, strides: RowStrides| SourceRows {
            offset,
            token_stride: strides.token,
            head_stride: strides.head,
        };
        let blocks = |offset, strides: KvStrides| CacheRows {
            offset,
            block_stride: strides.block,
            token_stride: strides.token,
            head_stride: strides.head,
        };
        let args = WriteKvArgs {
            shape: WriteKvShape {
                tokens: small("tokens", tokens as u64)?,
                kv_heads: small("kv_heads", heads as u64)?,
                head_dim_k: small("head_dim_qk", dim_k as u64)?,
                head_dim_v: small("head_dim_v", dim_v as u64)?,
                block_size: small("block_size", layout.block_size as u64)?,
                num_slots: small("the number of slots", layout.slots())?,
                slots_offset: small("the slots' offset", slots.first)?,
            },
            key: rows(k.first, call.k_strides),
            value: rows(v.first, call.v_strides),
            key_cache: blocks(k_cache.first, layout.k),
            value_cache: blocks(v_cache.first, layout.v),
        };
        let spec = self.choose(source_type, cache_type, &args)?;
        let pipeline =
            self.write_kv.get(spec, self.builder(), || Ok(WriteKv::new(spec)?), WriteKv::shader)?;
        let per_dimension = self.limits().max_compute_workgroups_per_dimension;
        let workgroups = workgroups(&pipeline.descriptor, args.shape, per_dimension)?;

        let words = args.uniform(spec)?;
        let uniform = self.device().create_buffer(&BufferDescriptor {
            label: Some("write_kv parameters"),
            size: size_of_val(&words) as u64,
            usage: BufferUsages::UNIFORM | BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        self.queue().write_buffer(&uniform, 0, bytemuck::cast_slice(&words));
        let tensors = [k.binding, v.binding, slots.binding, k_cache.binding, v_cache.binding];
        let mut entries = vec![BindGroupEntry { binding: 0, resource: uniform.as_entire_binding() }];
        entries.extend(
            (1..).zip(tensors).map(|(binding, tensor)| BindGroupEntry {
                binding,
                resource: BindingResource::Buffer(tensor),
            }),
        );
        let bind_group = self.device().create_bind_group(&BindGroupDescriptor {
            label: Some("write_kv"),
            layout: &pipeline.layout,
            entries: &entries,
        });
        Ok(PreparedWriteKv {
            pipeline,
            bind_group,
            uniform,
            shape: args.shape,
            prepared: tokens,
            per_dimension,
            workgroups,
        })
    }

    /// Prepares a call and puts it into a pass of its own. For calls that repeat, prepare once instead.
    ///
    /// # Errors
    /// As [`Context::prepare_write_kv`].
    pub fn write_kv(
        &self,
        encoder: &mut CommandEncoder,
        call: &WriteKvCall<'_>,
    ) -> Result<WriteKvVariant, WgpuError> {
        let prepared = self.prepare_write_kv(call)?;
        let descriptor = ComputePassDescriptor { label: Some("write_kv"), timestamp_writes: None };
        prepared.encode(&mut encoder.begin_compute_pass(&descriptor));
        Ok(prepared.variant())
    }

    /// The widest access that divides every offset, stride and head dimension.
    fn choose(
        &self,
        source: pagewise_shaders::DType,
        cache: pagewise_shaders::DType,
        args: &WriteKvArgs,
    ) -> Result<WriteKvSpec, WgpuError> {
        let spec = |access| WriteKvSpec { source, cache, access };
        let has_f16 = self.features().contains(Features::SHADER_F16);
        for access in Access::ALL {
            let spec = spec(access);
            if spec.exists() && (access != Access::Half || has_f16) && args.fits(spec) {
                return Ok(spec);
            }
        }
        // Nothing fits: say what kept the access by words from fitting.
        match args.uniform(spec(Access::Word)) {
            Err(reason @ pagewise_shaders::Error::NotDivisible { .. }) => Err(WgpuError::Alignment {
                reason,
                advice: "16-bit tensors need even offsets, strides and head dimensions in WGSL (f16 does not on a device with SHADER_F16)",
            }),
            Err(error) => Err(error.into()),
            Ok(_) => Ok(spec(Access::Word)),
        }
    }
}

impl WriteKvCall<'_> {
    /// WebGPU does not let a dispatch read and write one buffer.
    fn check_shared_buffers(&self) -> Result<(), WgpuError> {
        for (read, range) in [("new K", self.k), ("new V", self.v), ("slots", self.slots)] {
            for (written, cache) in [("the K cache", self.k_cache), ("the V cache", self.v_cache)] {
                if range.buffer == cache.buffer {
                    return Err(WgpuError::SharedBuffer { read, written });
                }
            }
        }
        Ok(())
    }
}

fn small(field: &'static str, value: u64) -> Result<u32, WgpuError> {
    u32::try_from(value)
        .map_err(|_| pagewise_shaders::Error::TooLarge { kernel: "write_kv", field, value }.into())
}
