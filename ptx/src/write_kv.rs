//! `write_kv`: stores the K and V rows of new tokens into the blocks of a paged cache, in one launch.
//!
//! The paper's fused reshape and block write (Kwon et al., SOSP 2023, section 5.1). Owns the choice
//! of variant, the parameter list and the launch geometry; the kernel is `kernels/write_kv.ptx`.

use minijinja::context;

use crate::kernel::{Arg, Kernel, Launch, Param, ParamType, Target};
use crate::{DType, Error, template};

/// Family and template name.
const FAMILY: &str = "write_kv";

/// The most threads of a block: enough to hide latency with eight blocks on a multiprocessor.
const MAX_THREADS: u32 = 256;

/// The most blocks along y and z that CUDA allows (along x it allows more than there are tokens).
const MAX_GRID_YZ: u32 = 65_535;

/// Which variant: fixed when the text is rendered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WriteKvSpec {
    /// Element type of the new rows: f32, f16 or bf16.
    pub source: DType,
    /// Element type of the cache. An fp8 cache needs sm_89.
    pub cache: DType,
    /// Elements that a thread moves: 1, or as many as fit 16 bytes of the source, see
    /// [`WriteKvSpec::vectorised`].
    pub vector: u32,
}

impl WriteKvSpec {
    /// The fast variant, 16 bytes of the source a thread. Needs every address and stride to be a
    /// multiple of [`WriteKvSpec::source_alignment`] or [`WriteKvSpec::cache_alignment`] bytes, and
    /// head dimensions that are multiples of [`WriteKvSpec::vector`].
    pub const fn vectorised(source: DType, cache: DType) -> Self {
        Self { source, cache, vector: 16 / source.size() }
    }

    /// The variant for everything else: one element a thread, aligned to itself.
    pub const fn scalar(source: DType, cache: DType) -> Self {
        Self { source, cache, vector: 1 }
    }

    /// Every variant that exists.
    pub fn all() -> impl Iterator<Item = Self> {
        [DType::F32, DType::F16, DType::Bf16].into_iter().flat_map(|source| {
            DType::ALL
                .into_iter()
                .flat_map(move |cache| [Self::vectorised(source, cache), Self::scalar(source, cache)])
        })
    }

    /// Bytes to which the new rows must be aligned.
    pub const fn source_alignment(self) -> u32 {
        let bytes = self.vector * self.source.size();
        if bytes < 16 { bytes } else { 16 }
    }

    /// Bytes to which rows in the cache must be aligned.
    pub const fn cache_alignment(self) -> u32 {
        let bytes = self.vector * self.cache.size();
        if bytes < 16 { bytes } else { 16 }
    }

    /// The entry point: `write_kv_bf16_e4m3_v8`.
    pub fn entry(self) -> String {
        format!("{FAMILY}_{}_{}_v{}", self.source, self.cache, self.vector)
    }
}

/// The sizes that decide the grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WriteKvShape {
    /// New tokens, skipped ones included.
    pub tokens: u32,
    /// KV heads.
    pub kv_heads: u32,
    /// Elements of a K row.
    pub head_dim_k: u32,
    /// Elements of a V row.
    pub head_dim_v: u32,
}

/// Where one of K and V comes from: `[tokens, kv_heads, head_dim]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SourceRows {
    /// Device address of the first element.
    pub address: u64,
    /// Elements from a token to the next.
    pub token_stride: u64,
    /// Elements from a head to the next.
    pub head_stride: u64,
}

/// Where one of K and V goes: `[blocks, block_size, kv_heads, head_dim]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CacheRows {
    /// Device address of the first element.
    pub address: u64,
    /// Elements from a block to the next.
    pub block_stride: u64,
    /// Elements from a token of a block to the next.
    pub token_stride: u64,
    /// Elements from a head to the next.
    pub head_stride: u64,
}

/// The scales of an fp8 cache, which holds `value / scale`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Scales {
    /// Device address of the scale (f32) of K, or of one for each head.
    pub key: u64,
    /// Device address of the scale (f32) of V, or of one for each head.
    pub value: u64,
    /// Whether each head has its own.
    pub per_head: bool,
}

/// What one launch works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WriteKvArgs {
    /// Sizes; the same as given to [`WriteKv::launch`].
    pub shape: WriteKvShape,
    /// New K rows.
    pub key: SourceRows,
    /// New V rows.
    pub value: SourceRows,
    /// Device address of the slots, i64 `[tokens]`.
    pub slots: u64,
    /// K cache.
    pub key_cache: CacheRows,
    /// V cache.
    pub value_cache: CacheRows,
    /// Tokens of a block.
    pub block_size: u32,
    /// Slots of the cache: blocks × block size. Slots outside are skipped.
    pub num_slots: u32,
    /// Scales, read by the fp8 variants only.
    pub scales: Option<Scales>,
}

/// The parameter list, the same for all variants.
const PARAMS: [Param; 24] = {
    const fn param(name: &'static str, ty: ParamType) -> Param {
        Param { name, ty }
    }
    use ParamType::{Pointer, U32, U64};
    [
        param("key", Pointer),
        param("value", Pointer),
        param("slots", Pointer),
        param("key_cache", Pointer),
        param("value_cache", Pointer),
        param("key_scale", Pointer),
        param("value_scale", Pointer),
        param("key_token_stride", U64),
        param("key_head_stride", U64),
        param("value_token_stride", U64),
        param("value_head_stride", U64),
        param("key_cache_block_stride", U64),
        param("key_cache_token_stride", U64),
        param("key_cache_head_stride", U64),
        param("value_cache_block_stride", U64),
        param("value_cache_token_stride", U64),
        param("value_cache_head_stride", U64),
        param("tokens", U32),
        param("kv_heads", U32),
        param("head_dim_k", U32),
        param("head_dim_v", U32),
        param("block_size", U32),
        param("num_slots", U32),
        param("scale_head_stride", U32),
    ]
};

impl WriteKvArgs {
    /// The values of the parameters, in launch order.
    pub fn values(&self) -> [Arg; PARAMS.len()] {
        let scales = self.scales.unwrap_or(Scales { key: 0, value: 0, per_head: false });
        [
            Arg::pointer(self.key.address),
            Arg::pointer(self.value.address),
            Arg::pointer(self.slots),
            Arg::pointer(self.key_cache.address),
            Arg::pointer(self.value_cache.address),
            Arg::pointer(scales.key),
            Arg::pointer(scales.value),
            Arg::u64(self.key.token_stride),
            Arg::u64(self.key.head_stride),
            Arg::u64(self.value.token_stride),
            Arg::u64(self.value.head_stride),
            Arg::u64(self.key_cache.block_stride),
            Arg::u64(self.key_cache.token_stride),
            Arg::u64(self.key_cache.head_stride),
            Arg::u64(self.value_cache.block_stride),
            Arg::u64(self.value_cache.token_stride),
            Arg::u64(self.value_cache.head_stride),
            Arg::u32(self.shape.tokens),
            Arg::u32(self.shape.kv_heads),
            Arg::u32(self.shape.head_dim_k),
            Arg::u32(self.shape.head_dim_v),
            Arg::u32(self.block_size),
            Arg::u32(self.num_slots),
            Arg::u32(u32::from(scales.per_head)),
        ]
    }
}

/// One variant, rendered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WriteKv {
    spec: WriteKvSpec,
    kernel: Kernel,
}

impl WriteKv {
    /// Renders a variant.
    ///
    /// # Errors
    /// [`Error::UnsupportedTypes`] for an fp8 source, [`Error::UnsupportedVector`] for a vector that
    /// is neither 1 nor 16 bytes of the source.
    pub fn new(spec: WriteKvSpec) -> Result<Self, Error> {
        let WriteKvSpec { source, cache, vector } = spec;
        if source.is_fp8() {
            return Err(Error::UnsupportedTypes { kernel: FAMILY, source_dtype: source, cache });
        }
        let widest = WriteKvSpec::vectorised(source, cache).vector;
        if vector != 1 && vector != widest {
            return Err(Error::UnsupportedVector { kernel: FAMILY, vector, source_dtype: source, widest });
        }
        // Ada brought the fp8 conversions, PTX 8.1 their names.
        let target =
            if cache.is_fp8() { Target { sm: 89, ptx: (8, 1) } } else { Target { sm: 80, ptx: (7, 0) } };
        let entry = spec.entry();
        let variables = context! {
            entry => &entry,
            sm => target.sm,
            ptx_version => format!("{}.{}", target.ptx.0, target.ptx.1),
            max_threads => MAX_THREADS,
            source_dtype => source.name(),
            source_size => source.size(),
            cache_dtype => cache.name(),
            cache_size => cache.size(),
            vector,
            fp8 => cache.is_fp8(),
        };
        let text = template::render(FAMILY, include_str!("../kernels/write_kv.ptx"), variables)?;
        Ok(Self {
            spec,
            kernel: Kernel {
                family: FAMILY,
                entry,
                text,
                target,
                params: PARAMS.to_vec(),
                max_threads: MAX_THREADS,
                static_shared: 0,
                dynamic_shared: 0,
            },
        })
    }

    /// The variant.
    pub fn spec(&self) -> WriteKvSpec {
        self.spec
    }

    /// The rendered kernel.
    pub fn kernel(&self) -> &Kernel {
        &self.kernel
    }

    /// The rendered kernel, by value.
    pub fn into_kernel(self) -> Kernel {
        self.kernel
    }

    /// Grid and block for a shape: threads run along a head's elements, then heads, then tokens.
    ///
    /// # Errors
    /// [`Error::Zero`] for an empty dimension (a call without tokens needs no launch),
    /// [`Error::NotDivisible`] when the vector does not divide a head dimension,
    /// [`Error::GridTooLarge`] beyond CUDA's limits.
    pub fn launch(&self, shape: WriteKvShape) -> Result<Launch, Error> {
        let vector = self.spec.vector;
        for (field, value) in [
            ("tokens", shape.tokens),
            ("kv_heads", shape.kv_heads),
            ("head_dim_k", shape.head_dim_k),
            ("head_dim_v", shape.head_dim_v),
        ] {
            if value == 0 {
                return Err(Error::Zero { kernel: FAMILY, field });
            }
        }
        for (field, value) in [("head_dim_k", shape.head_dim_k), ("head_dim_v", shape.head_dim_v)] {
            if value % vector != 0 {
                return Err(Error::NotDivisible { kernel: FAMILY, vector, field, value });
            }
        }
        let head_dim = shape.head_dim_k.max(shape.head_dim_v);
        let pieces = head_dim / vector;
        let x = pieces.min(MAX_THREADS);
        let y = shape.kv_heads.min(MAX_THREADS / x);
        // A block has at most 64 threads along z.
        let z = shape.tokens.min(MAX_THREADS / (x * y)).min(64);
        let grid = [shape.tokens.div_ceil(z), shape.kv_heads.div_ceil(y), pieces.div_ceil(x)];
        for (field, value, needed) in [("kv_heads", shape.kv_heads, grid[1]), ("head_dim", head_dim, grid[2])]
        {
            if needed > MAX_GRID_YZ {
                return Err(Error::GridTooLarge { kernel: FAMILY, field, value, needed, limit: MAX_GRID_YZ });
            }
        }
        if grid[0] > i32::MAX as u32 {
            return Err(Error::GridTooLarge {
                kernel: FAMILY,
                field: "tokens",
                value: shape.tokens,
                needed: grid[0],
                limit: i32::MAX as u32,
            });
        }
        Ok(Launch { grid, block: [x, y, z], dynamic_shared: 0 })
    }
}
