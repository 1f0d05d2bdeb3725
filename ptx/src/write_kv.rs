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

/// Which elements of a head turn together, as a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RotaryStyle {
    /// Element `i` and element `i + rotary_dim / 2`: GPT-NeoX, LLaMA and most others.
    NeoX,
    /// Elements `2 i` and `2 i + 1`: GPT-J, and RoFormer as it was published.
    GptJ,
}

impl RotaryStyle {
    /// Both.
    pub const ALL: [Self; 2] = [Self::NeoX, Self::GptJ];

    const fn name(self) -> &'static str {
        match self {
            Self::NeoX => "neox",
            Self::GptJ => "gptj",
        }
    }
}

/// What a load of the new rows asks of the caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LoadHint {
    /// Nothing.
    Plain,
    /// No place in the L1: every byte is used once.
    Stream,
    /// The same, and the first to leave the L2.
    Once,
}

/// What a store into the cache asks of the caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StoreHint {
    /// Nothing: attention reads the new rows soon.
    Plain,
    /// Likely not read again soon (`st.cs`).
    Stream,
    /// The first to leave the L2.
    Once,
}

/// What moves the clock but not the result, fixed when the text is rendered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WriteKvTuning {
    /// Tokens of a thread, all under way together: 1 to 8.
    pub tokens: u32,
    /// How the new rows are loaded.
    pub load: LoadHint,
    /// How they are stored.
    pub store: StoreHint,
}

impl WriteKvTuning {
    const fn default_of(vector: u32, rotary: Option<RotaryStyle>) -> Self {
        match (vector, rotary) {
            (1, _) => Self { tokens: 1, load: LoadHint::Plain, store: StoreHint::Plain },
            (_, None) => Self { tokens: 2, load: LoadHint::Stream, store: StoreHint::Plain },
            (_, Some(_)) => Self { tokens: 1, load: LoadHint::Plain, store: StoreHint::Plain },
        }
    }

    /// Whether a kernel can be made of it.
    pub const fn is_valid(self) -> bool {
        1 <= self.tokens && self.tokens <= 8
    }
}

/// Which variant: fixed when the text is rendered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WriteKvSpec {
    /// Element type of the new rows: f32, f16 or bf16.
    pub source: DType,
    /// Element type of the cache. An fp8 cache needs sm_89.
    pub cache: DType,
    /// Elements that a thread moves at once: 1, or as many as fit 16 bytes of the source, see
    /// [`WriteKvSpec::vectorised`].
    pub vector: u32,
    /// Rotary embedding of K, and of the queries if there are any.
    pub rotary: Option<RotaryStyle>,
    /// What it is tuned for.
    pub tuning: WriteKvTuning,
    /// Whether it may start before the kernel before it has ended (programmatic dependent launch, sm_90 on); see
    /// [`WriteKvSpec::dependently`].
    pub dependent: bool,
}

impl WriteKvSpec {
    /// The fast variant, 16 bytes of the source at once. Needs every address and stride to be a
    /// multiple of [`WriteKvSpec::source_alignment`] or [`WriteKvSpec::cache_alignment`] bytes, and
    /// head dimensions that are multiples of [`WriteKvSpec::vector`].
    pub const fn vectorised(source: DType, cache: DType) -> Self {
        Self::of_vector(source, cache, 16 / source.size(), None)
    }

    /// The variant for everything else: one element at once, aligned to itself.
    pub const fn scalar(source: DType, cache: DType) -> Self {
        Self::of_vector(source, cache, 1, None)
    }

    /// The same with rotary embedding. The fast variant then also needs half of the rotary dimension to be a
    /// multiple of [`WriteKvSpec::vector`], and tables whose address and stride are multiples of 16 bytes.
    #[must_use]
    pub const fn with_rotary(self, style: RotaryStyle) -> Self {
        Self::of_vector(self.source, self.cache, self.vector, Some(style))
    }

    const fn of_vector(source: DType, cache: DType, vector: u32, rotary: Option<RotaryStyle>) -> Self {
        let tuning = WriteKvTuning::default_of(vector, rotary);
        Self { source, cache, vector, rotary, tuning, dependent: false }
    }

    /// The same for a programmatic dependent launch, where there is one: for what engines do at every layer, with the
    /// cache in the type of the new rows, 16 bytes at once, and no rotary embedding or GPT-NeoX's. It reads slots and
    /// positions before it waits for the kernel before it.
    pub fn dependently(self) -> Option<Self> {
        Some(Self { dependent: true, ..self }).filter(|spec| spec.exists())
    }

    fn exists(self) -> bool {
        let usual = self.source == self.cache
            && self.vector > 1
            && self.rotary != Some(RotaryStyle::GptJ)
            && self.tuning == WriteKvTuning::default_of(self.vector, self.rotary);
        usual || !self.dependent
    }

    /// Every variant, tuned as it is when nothing else is asked for.
    pub fn all() -> impl Iterator<Item = Self> {
        let rotary = [None, Some(RotaryStyle::NeoX), Some(RotaryStyle::GptJ)];
        let types = [DType::F32, DType::F16, DType::Bf16]
            .into_iter()
            .flat_map(|source| DType::ALL.into_iter().map(move |cache| (source, cache)));
        rotary
            .into_iter()
            .flat_map(move |rotary| {
                types.clone().flat_map(move |(source, cache)| {
                    [16 / source.size(), 1].map(|vector| Self::of_vector(source, cache, vector, rotary))
                })
            })
            .flat_map(|spec| [Some(spec), spec.dependently()])
            .flatten()
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

    /// Bytes to which rows of the tables of cosines and sines must be aligned.
    pub const fn table_alignment(self) -> u32 {
        if self.vector == 1 { 4 } else { 16 }
    }

    /// The entry point: `write_kv_bf16_e4m3_v8`, `write_kv_f16_f16_v8_neox`, and what is tuned otherwise than by
    /// default.
    pub fn entry(self) -> String {
        let Self { source, cache, vector, rotary, tuning, dependent } = self;
        let rotary_name = rotary.map(|style| format!("_{}", style.name())).unwrap_or_default();
        let pdl = if dependent { "_pdl" } else { "" };
        let plain = format!("{FAMILY}_{source}_{cache}_v{vector}{rotary_name}{pdl}");
        if tuning == WriteKvTuning::default_of(vector, rotary) {
            return plain;
        }
        let load = match tuning.load {
            LoadHint::Plain => "plain",
            LoadHint::Stream => "stream",
            LoadHint::Once => "once",
        };
        let store = match tuning.store {
            StoreHint::Plain => "plain",
            StoreHint::Stream => "stream",
            StoreHint::Once => "once",
        };
        format!("{plain}_t{}_{load}_{store}", tuning.tokens)
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
    /// Query heads that turn along: 0 without queries, and without rotary embedding.
    pub q_heads: u32,
}

/// Where one of K and V comes from: `[tokens, kv_heads, head_dim]`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
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
    /// Tokens of a block, a power of two, as its logarithm in base 2.
    pub block_shift: u32,
    /// Slots of the cache: blocks × block size. Slots outside are skipped.
    pub num_slots: u32,
    /// Scales, read by the fp8 variants only.
    pub scales: Option<Scales>,
    /// Rotary embedding, for its variants only.
    pub rotary: Option<RotaryArgs>,
}

/// Rotary embedding: by which angles K and queries turn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct RotaryArgs {
    /// Device address of the queries, `[tokens, q_heads, head_dim_k]`; of the type of K.
    pub query: SourceRows,
    /// Where the turned queries go; may be where they come from.
    pub query_out: SourceRows,
    /// Device address of the positions, i32 or i64 `[tokens]`.
    pub positions: u64,
    /// Bytes of a position: 4 or 8.
    pub position_bytes: u32,
    /// Device address of the cosines, f32 `[num_positions, half]`.
    pub cos: u64,
    /// Device address of the sines.
    pub sin: u64,
    /// Elements from a position's cosines, or sines, to the next's.
    pub table_stride: u64,
    /// Rows of the tables. Positions outside give NaN.
    pub num_positions: u32,
    /// Pairs that turn: half of the rotary dimension.
    pub half: u32,
}

const fn param(name: &'static str, ty: ParamType) -> Param {
    Param { name, ty }
}

/// The parameters of all variants.
const PARAMS: [Param; 24] = {
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
        param("block_shift", U32),
        param("num_slots", U32),
        param("scale_head_stride", U32),
    ]
};

/// What the variants with rotary embedding have beside.
const ROTARY_PARAMS: [Param; 14] = {
    use ParamType::{Pointer, U32, U64};
    [
        param("query", Pointer),
        param("query_out", Pointer),
        param("positions", Pointer),
        param("cos", Pointer),
        param("sin", Pointer),
        param("query_token_stride", U64),
        param("query_head_stride", U64),
        param("query_out_token_stride", U64),
        param("query_out_head_stride", U64),
        param("table_stride", U64),
        param("q_heads", U32),
        param("rotary_half", U32),
        param("num_positions", U32),
        param("position_bytes", U32),
    ]
};

impl WriteKvArgs {
    /// The values of the parameters, in launch order.
    pub fn values(&self) -> Vec<Arg> {
        let scales = self.scales.unwrap_or(Scales { key: 0, value: 0, per_head: false });
        let mut values = vec![
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
            Arg::u32(self.block_shift),
            Arg::u32(self.num_slots),
            Arg::u32(u32::from(scales.per_head)),
        ];
        if let Some(rotary) = self.rotary {
            values.extend([
                Arg::pointer(rotary.query.address),
                Arg::pointer(rotary.query_out.address),
                Arg::pointer(rotary.positions),
                Arg::pointer(rotary.cos),
                Arg::pointer(rotary.sin),
                Arg::u64(rotary.query.token_stride),
                Arg::u64(rotary.query.head_stride),
                Arg::u64(rotary.query_out.token_stride),
                Arg::u64(rotary.query_out.head_stride),
                Arg::u64(rotary.table_stride),
                Arg::u32(self.shape.q_heads),
                Arg::u32(rotary.half),
                Arg::u32(rotary.num_positions),
                Arg::u32(rotary.position_bytes),
            ]);
        }
        values
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
        let WriteKvSpec { source, cache, vector, rotary, tuning, dependent } = spec;
        if source.is_fp8() {
            return Err(Error::UnsupportedTypes { kernel: FAMILY, source_dtype: source, cache });
        }
        let widest = 16 / source.size();
        if vector != 1 && vector != widest {
            return Err(Error::UnsupportedVector { kernel: FAMILY, vector, source_dtype: source, widest });
        }
        if !tuning.is_valid() {
            return Err(Error::UnsupportedTuning {
                kernel: FAMILY,
                what: "tokens of a thread",
                bounds: "1 to 8",
            });
        }
        if !spec.exists() {
            return Err(Error::UnsupportedTypes {
                kernel: "write_kv for a dependent launch",
                source_dtype: source,
                cache,
            });
        }
        // Ada brought the fp8 conversions, PTX 8.1 their names; PTX 7.4 brought cache hints. Dependent launches came with
        // Hopper.
        let target = match (cache.is_fp8(), dependent) {
            (_, true) => Target::from(90, (8, 0)),
            (true, false) => Target::from(89, (8, 1)),
            (false, false) => Target::from(80, (7, 4)),
        };
        let (load_how, load_policy) = match tuning.load {
            // What the kernel before writes is not constant for as long as this one runs.
            LoadHint::Plain | LoadHint::Stream if dependent => ("ld.global", ""),
            LoadHint::Plain => ("ld.global.nc", ""),
            LoadHint::Stream => ("ld.global.nc.L1::no_allocate", ""),
            LoadHint::Once => ("ld.global.nc.L1::no_allocate.L2::cache_hint", ", %rd_once"),
        };
        let (store_how, store_policy) = match tuning.store {
            StoreHint::Plain => ("st.global", ""),
            StoreHint::Stream => ("st.global.cs", ""),
            StoreHint::Once => ("st.global.L2::cache_hint", ", %rd_once"),
        };
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
            tokens => tuning.tokens,
            dependent,
            fp8 => cache.is_fp8(),
            rotary => rotary.map_or("", RotaryStyle::name),
            load_how,
            load_policy,
            store_how,
            store_policy,
            policies => tuning.load == LoadHint::Once || tuning.store == StoreHint::Once,
        };
        let text = template::render(FAMILY, include_str!("../kernels/write_kv.ptx"), variables)?;
        let mut params = PARAMS.to_vec();
        if rotary.is_some() {
            params.extend(ROTARY_PARAMS);
        }
        Ok(Self {
            spec,
            kernel: Kernel {
                family: FAMILY,
                entry,
                text,
                target,
                params,
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
    /// [`Error::GridTooLarge`] beyond CUDA's limits, [`Error::TooLarge`] beyond 2³¹ tokens.
    pub fn launch(&self, shape: WriteKvShape) -> Result<Launch, Error> {
        let WriteKvSpec { vector, tuning, .. } = self.spec;
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
        // The kernel numbers tokens, those past the last one included, with 32 bits.
        let limit = i32::MAX as u32;
        for (field, value) in
            [("tokens", shape.tokens), ("kv_heads", shape.kv_heads), ("q_heads", shape.q_heads)]
        {
            if value > limit {
                return Err(Error::TooLarge { kernel: FAMILY, field, value, limit });
            }
        }
        let head_dim = shape.head_dim_k.max(shape.head_dim_v);
        let units = (head_dim / vector).div_ceil(2);
        let heads = shape.kv_heads + shape.q_heads;
        let x = units.min(MAX_THREADS);
        let y = heads.min(MAX_THREADS / x);
        // A block has at most 64 threads along z.
        let z = shape.tokens.div_ceil(tuning.tokens).min(MAX_THREADS / (x * y)).min(64);
        let grid = [shape.tokens.div_ceil(z * tuning.tokens), heads.div_ceil(y), units.div_ceil(x)];
        for (field, value, needed) in [("heads", heads, grid[1]), ("head_dim", head_dim, grid[2])] {
            if needed > MAX_GRID_YZ {
                return Err(Error::GridTooLarge { kernel: FAMILY, field, value, needed, limit: MAX_GRID_YZ });
            }
        }
        Ok(Launch { grid, block: [x, y, z], dynamic_shared: 0 })
    }
}
