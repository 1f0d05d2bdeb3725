//! `write_kv` on CUDA: stores new K and V rows into cache blocks, in one launch.
//!
//! Owns the checks, the choice of variant and the launch; the kernel and its geometry are
//! [`pagewise_ptx::write_kv`]'s.

use std::sync::Arc;

use cudarc::driver::{CudaStream, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr};
use pagewise_ptx::write_kv::{
    CacheRows, Scales, SourceRows, WriteKv, WriteKvArgs, WriteKvShape, WriteKvSpec,
};

use super::checks::{aligned, check_addresses, small};
use super::context::Entry;
use super::decode::ptx_type;
use super::{Context, CudaError, Order, RawStream};
use crate::{AttentionConfig, CacheLayout, DType, KvStrides, ProblemError, RowStrides};

/// The scales of an fp8 cache, in device memory. The cache holds `value / scale`; a scale is above zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvScales {
    /// Device address of K's scale (f32), or of `[kv_heads]` of them.
    pub k: u64,
    /// Device address of V's scale (f32), or of `[kv_heads]` of them.
    pub v: u64,
    /// Whether each head has its own.
    pub per_head: bool,
}

/// A `write_kv` over raw device addresses.
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
    /// Device address of the slots, i64 `[tokens]`. A negative slot skips its token; so does one past the
    /// cache's last slot, which no check on the host can find. No slot may occur twice.
    pub slots: u64,
    /// Device address of the new keys, `[tokens, kv_heads, head_dim_qk]`.
    pub k: u64,
    /// Their strides.
    pub k_strides: RowStrides,
    /// Device address of the new values, `[tokens, kv_heads, head_dim_v]`.
    pub v: u64,
    /// Their strides.
    pub v_strides: RowStrides,
    /// Device address of the key cache.
    pub k_cache: u64,
    /// Device address of the value cache.
    pub v_cache: u64,
    /// Scales, for an fp8 cache only.
    pub scales: Option<KvScales>,
    /// When it begins. [`Order::Dependent`] is for slots, positions and tables that were there before the kernel before
    /// this one began, and for a GPU and a driver that know such launches; where there is no variant for it, the launch
    /// is an ordinary one.
    pub order: Order,
}

/// The kernel variant that a call takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteKvVariant(pub(super) WriteKvSpec);

impl WriteKvVariant {
    /// The kernel's name, as in `pagewise_ptx`: `write_kv_bf16_bf16_v8`.
    pub fn name(&self) -> String {
        self.0.entry()
    }

    /// What was rendered for it.
    pub fn spec(&self) -> WriteKvSpec {
        self.0
    }

    /// Elements that a thread moves: 1 where an address or stride is not aligned to 16 bytes.
    pub fn vector(&self) -> u32 {
        self.0.vector
    }
}

impl WriteKvCall<'_> {
    /// Checks the call and says which kernel variant it takes.
    ///
    /// # Errors
    /// [`CudaError`] names the field, its value and what it must be.
    pub fn variant(&self) -> Result<WriteKvVariant, CudaError> {
        let widest = self.widest()?;
        let spec = widest.unwrap_or(WriteKvSpec::scalar(ptx_type(self.source), self.cache_type()));
        Ok(self.ordered(spec))
    }

    /// The variant of a kernel for the order of the call.
    pub(super) fn ordered(&self, spec: WriteKvSpec) -> WriteKvVariant {
        let dependent = if self.order == Order::Dependent { spec.dependently() } else { None };
        WriteKvVariant(dependent.unwrap_or(spec))
    }

    fn cache_type(&self) -> pagewise_ptx::DType {
        ptx_type(self.config.kv_dtype)
    }

    /// Checks the call; the variant that moves 16 bytes at once, if all is aligned for it.
    pub(super) fn widest(&self) -> Result<Option<WriteKvSpec>, CudaError> {
        let Self { config, layout, source, .. } = *self;
        config.validate()?;
        layout.validate(config)?;
        self.k_strides.validate("new K", config.kv_heads, config.head_dim_qk)?;
        self.v_strides.validate("new V", config.kv_heads, config.head_dim_v)?;
        match (config.kv_dtype.is_fp8(), self.scales) {
            (true, None) => return Err(wrong_scales("an fp8 cache needs scales (1.0 where none are known)")),
            (false, Some(_)) => return Err(wrong_scales("only an fp8 cache has scales; leave them out")),
            _ => {}
        }
        let (source_type, cache_type) = (ptx_type(source), self.cache_type());
        if source.is_fp8() {
            return Err(CudaError::UnsupportedDType { what: "new keys and values", dtype: source });
        }
        let (source_size, cache_size) = (source.size() as u64, config.kv_dtype.size() as u64);
        check_addresses([
            ("new K", self.k, source_size),
            ("new V", self.v, source_size),
            ("slots", self.slots, 8),
            ("the K cache", self.k_cache, cache_size),
            ("the V cache", self.v_cache, cache_size),
        ])?;

        let wide = WriteKvSpec::vectorised(source_type, cache_type);
        let row = |address, strides: RowStrides| {
            aligned(address, &[strides.token, strides.head], source_size, wide.source_alignment())
        };
        let cache = |address, strides: KvStrides| {
            let all = [strides.block, strides.token, strides.head];
            aligned(address, &all, cache_size, wide.cache_alignment())
        };
        let whole = |head_dim: usize| head_dim.is_multiple_of(wide.vector as usize);
        let is_wide = whole(config.head_dim_qk)
            && whole(config.head_dim_v)
            && row(self.k, self.k_strides)
            && row(self.v, self.v_strides)
            && cache(self.k_cache, layout.k)
            && cache(self.v_cache, layout.v);
        Ok(is_wide.then_some(wide))
    }

    /// The kernel's arguments.
    ///
    /// # Errors
    /// [`CudaError::TooLarge`] for a size that 32 bits do not hold.
    pub fn args(&self) -> Result<WriteKvArgs, CudaError> {
        let Self { config, layout, .. } = *self;
        let cache = |address, strides: KvStrides| CacheRows {
            address,
            block_stride: strides.block,
            token_stride: strides.token,
            head_stride: strides.head,
        };
        Ok(WriteKvArgs {
            shape: WriteKvShape {
                tokens: small("tokens", self.tokens as u64)?,
                kv_heads: small("kv_heads", config.kv_heads as u64)?,
                head_dim_k: small("head_dim_qk", config.head_dim_qk as u64)?,
                head_dim_v: small("head_dim_v", config.head_dim_v as u64)?,
                q_heads: 0,
            },
            key: source_rows(self.k, self.k_strides),
            value: source_rows(self.v, self.v_strides),
            slots: self.slots,
            key_cache: cache(self.k_cache, layout.k),
            value_cache: cache(self.v_cache, layout.v),
            block_shift: layout.block_size.trailing_zeros(),
            num_slots: small("the number of slots", layout.slots())?,
            scales: self.scales.map(|scales| Scales {
                key: scales.k,
                value: scales.v,
                per_head: scales.per_head,
            }),
            rotary: None,
        })
    }
}

impl Context {
    /// Compiles and loads what a call takes, so that the call itself, which may be captured in a CUDA graph,
    /// loads nothing.
    ///
    /// # Errors
    /// As [`WriteKvCall::variant`]; [`CudaError::GpuTooOld`] for an fp8 cache before sm_89;
    /// [`CudaError::Jit`] when the driver's compiler fails.
    pub fn prepare_write_kv(&self, call: &WriteKvCall<'_>) -> Result<WriteKvVariant, CudaError> {
        let variant = call.variant()?;
        let _entered = self.enter()?;
        self.write_kv_kernel(variant)?;
        Ok(variant)
    }

    /// Puts a `write_kv` on a stream.
    ///
    /// # Safety
    /// - Every address is in device memory of this context's GPU and valid, until the launch has completed, for
    ///   what its shape and strides reach: reads of the new rows, slots and scales, writes of the caches.
    /// - Nothing else writes the new rows, slots and scales, or touches the cache slots written, meanwhile.
    /// - The stream belongs to this context.
    ///
    /// # Errors
    /// As [`Context::prepare_write_kv`]; [`CudaError::Driver`] when the launch fails.
    pub unsafe fn write_kv_raw(
        &self,
        call: &WriteKvCall<'_>,
        stream: RawStream,
    ) -> Result<WriteKvVariant, CudaError> {
        let variant = call.variant()?;
        if call.tokens > 0 {
            // SAFETY: promised by the caller.
            unsafe { self.launch_write_kv(variant, &call.args()?, stream) }?;
        }
        Ok(variant)
    }

    /// Launches a variant.
    ///
    /// # Safety
    /// As [`Context::write_kv_raw`] and, with rotary embedding, [`Context::write_kv_rotary_raw`]; the arguments are
    /// those of a call that takes this variant.
    pub(super) unsafe fn launch_write_kv(
        &self,
        variant: WriteKvVariant,
        args: &WriteKvArgs,
        stream: RawStream,
    ) -> Result<(), CudaError> {
        let _entered = self.enter()?;
        let entry = self.write_kv_kernel(variant)?;
        let launch = entry.descriptor.launch(args.shape)?;
        let order = if variant.0.dependent { Order::Dependent } else { Order::Stream };
        // SAFETY: the arguments are in the descriptor's order; the caller answers for addresses and stream, and variants
        // for dependent launches wait.
        unsafe { entry.kernel.launch_in_order(launch, &args.values(), stream, order) }
    }

    /// Puts a `write_kv` on a cudarc stream.
    ///
    /// # Errors
    /// As [`Context::prepare_write_kv`]; [`CudaError::OtherContext`] for a stream of another context;
    /// [`ProblemError::BufferTooShort`] when a slice does not hold what its shape and strides reach;
    /// [`CudaError::Driver`] when the launch fails.
    pub fn write_kv<S: Element, C: Element>(
        &self,
        stream: &Arc<CudaStream>,
        args: WriteKvSlices<'_, '_, S, C>,
    ) -> Result<WriteKvVariant, CudaError> {
        let WriteKvSlices { config, layout, slots, k, k_strides, v, v_strides, k_cache, v_cache, scales } =
            args;
        if !self.is(stream.context()) {
            return Err(CudaError::OtherContext);
        }
        let tokens = slots.len();
        let (heads, dim_k, dim_v) = (config.kv_heads, config.head_dim_qk, config.head_dim_v);
        for (tensor, len, needed) in [
            ("new K", k.len() as u64, k_strides.extent(tokens, heads, dim_k)),
            ("new V", v.len() as u64, v_strides.extent(tokens, heads, dim_v)),
            ("the K cache", k_cache.len() as u64, layout.k_extent(config)),
            ("the V cache", v_cache.len() as u64, layout.v_extent(config)),
        ] {
            if len < needed {
                return Err(ProblemError::BufferTooShort { tensor, len, needed }.into());
            }
        }
        if C::DTYPE.size() != config.kv_dtype.size()
            || (!config.kv_dtype.is_fp8() && C::DTYPE != config.kv_dtype)
        {
            return Err(ProblemError::BufferDType {
                tensor: "the cache",
                found: C::DTYPE,
                expected: config.kv_dtype,
            }
            .into());
        }
        let per_head = scales.as_ref().is_some_and(|(k, v)| k.len() > 1 || v.len() > 1);
        if let Some((k, v)) = &scales {
            let needed = if per_head { heads as u64 } else { 1 };
            for (tensor, len) in [("K scales", k.len() as u64), ("V scales", v.len() as u64)] {
                if len < needed {
                    return Err(ProblemError::BufferTooShort { tensor, len, needed }.into());
                }
            }
        }
        // The guards make the stream wait for, and record, what other streams do with the slices.
        let (k, _k) = k.device_ptr(stream);
        let (v, _v) = v.device_ptr(stream);
        let (slots, _slots) = slots.device_ptr(stream);
        let (k_cache, _k_cache) = k_cache.device_ptr_mut(stream);
        let (v_cache, _v_cache) = v_cache.device_ptr_mut(stream);
        let scale_guards = scales.as_ref().map(|(k, v)| (k.device_ptr(stream), v.device_ptr(stream)));
        let scales = scale_guards.as_ref().map(|((k, _), (v, _))| KvScales { k: *k, v: *v, per_head });
        let call = WriteKvCall {
            config,
            layout,
            source: S::DTYPE,
            tokens,
            slots,
            k,
            k_strides,
            v,
            v_strides,
            k_cache,
            v_cache,
            scales,
            order: Order::Stream,
        };
        // SAFETY: the slices hold what strides and shapes reach (checked above), the kernel skips slots outside
        // of the cache, and the guards order this launch with other uses of the slices.
        unsafe { self.write_kv_raw(&call, stream.cu_stream().into()) }
    }

    pub(super) fn write_kv_kernel(&self, variant: WriteKvVariant) -> Result<Arc<Entry<WriteKv>>, CudaError> {
        self.loaded(&self.write_kv, variant.0, || WriteKv::new(variant.0), WriteKv::kernel)
    }
}

/// An element type that cudarc slices can have.
pub trait Element: DeviceRepr {
    /// The type; for `u8`, an fp8 cache, of which the configuration says which.
    const DTYPE: DType;
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
}

impl Element for half::f16 {
    const DTYPE: DType = DType::F16;
}

impl Element for half::bf16 {
    const DTYPE: DType = DType::Bf16;
}

impl Element for u8 {
    const DTYPE: DType = DType::F8E4M3;
}

/// A `write_kv` over cudarc slices: `S` is the type of the new rows, `C` that of the cache (`u8` for fp8).
#[derive(Debug)]
pub struct WriteKvSlices<'a, 'b, S, C> {
    /// Heads, head dimensions and the cache's type.
    pub config: &'a AttentionConfig,
    /// Where blocks lie in the caches.
    pub layout: &'a CacheLayout,
    /// `[tokens]`; a slot outside of the cache, a negative one above all, skips its token.
    pub slots: CudaView<'a, i64>,
    /// New keys, `[tokens, kv_heads, head_dim_qk]`.
    pub k: CudaView<'a, S>,
    /// Their strides.
    pub k_strides: RowStrides,
    /// New values, `[tokens, kv_heads, head_dim_v]`.
    pub v: CudaView<'a, S>,
    /// Their strides.
    pub v_strides: RowStrides,
    /// Key cache.
    pub k_cache: &'b mut CudaViewMut<'a, C>,
    /// Value cache. Where both lie interleaved in one buffer, use the raw API.
    pub v_cache: &'b mut CudaViewMut<'a, C>,
    /// Scales of K and V for an fp8 cache: one, or one for each head.
    pub scales: Option<(CudaView<'a, f32>, CudaView<'a, f32>)>,
}

fn wrong_scales(problem: &str) -> CudaError {
    ProblemError::Input { input: "scales", problem: problem.to_owned() }.into()
}

pub(super) fn source_rows(address: u64, strides: RowStrides) -> SourceRows {
    SourceRows { address, token_stride: strides.token, head_stride: strides.head }
}
