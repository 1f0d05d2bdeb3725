//! `decode`: one query row of each sequence attends to its keys in a paged cache; keys split over thread blocks.
//!
//! Owns the variants, the parameter list, the form of the work items and the launch geometry; the kernel is
//! `kernels/decode.ptx`. Which keys go to which item is the planner's business, in pagewise-attention.

use minijinja::context;

use crate::kernel::{Arg, Kernel, Launch, Param, ParamType, Target};
use crate::{DType, Error, template};

/// Family and template name.
const FAMILY: &str = "decode";

/// Keys that a warp takes at a time. Items end at multiples of it, or at the end of a sequence.
pub const TILE_KEYS: u32 = 16;

/// The most keys of an item of any variant.
pub const MAX_ITEM_KEYS: u32 = 32 * MAX_WARPS * TILE_KEYS;

/// Query heads of a thread block.
pub const TILE_QUERIES: u32 = 8;

/// The most warps of a thread block: more do not fit their results into 48 KiB of shared memory.
const MAX_WARPS: u32 = 8;

/// Splits whose partial results a warp has on their way at a time while it merges.
const MERGE_FLIGHT: u32 = 16;

/// What moves the clock but not the result, fixed when the text is rendered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DecodeTuning {
    /// Warps of a thread block, which share an item's keys: 1 to 8.
    pub warps: u32,
    /// Thread blocks that fit a multiprocessor at once; bounds the registers.
    pub blocks_per_multiprocessor: u32,
    /// Splits of a sequence that are merged together before the others: a power of two, at least 2.
    pub merge_group: u32,
    /// How K and V are loaded.
    pub load: LoadHint,
}

/// What a load of K or V asks of the caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LoadHint {
    /// Nothing.
    Plain,
    /// No place in the L1: every byte is used once.
    Stream,
    /// The same, and the L2 may fetch the 128 bytes around.
    Stream128,
    /// The same with 256 bytes.
    Stream256,
}

impl LoadHint {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Plain, Self::Stream, Self::Stream128, Self::Stream256];

    /// As PTX spells it, after `ld.global.nc`.
    const fn ptx(self) -> &'static str {
        match self {
            Self::Plain => "",
            Self::Stream => ".L1::no_allocate",
            Self::Stream128 => ".L1::no_allocate.L2::128B",
            Self::Stream256 => ".L1::no_allocate.L2::256B",
        }
    }

    /// Short name, part of an entry point's.
    const fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Stream => "stream",
            Self::Stream128 => "stream128",
            Self::Stream256 => "stream256",
        }
    }
}

impl DecodeTuning {
    /// Keys that one round of a thread block's warps takes: shorter items leave warps idle.
    pub const fn round_keys(self) -> u32 {
        self.warps * TILE_KEYS
    }

    /// The most keys of an item: each lane of a warp remembers the block of one tile.
    pub const fn max_item_keys(self) -> u32 {
        32 * self.round_keys()
    }

    /// Whether a kernel can be made of it.
    pub const fn is_valid(self) -> bool {
        1 <= self.warps
            && self.warps <= MAX_WARPS
            && 1 <= self.blocks_per_multiprocessor
            && self.blocks_per_multiprocessor <= 32
            && self.merge_group >= 2
            && self.merge_group.is_power_of_two()
    }
}

impl Default for DecodeTuning {
    fn default() -> Self {
        Self { warps: 4, blocks_per_multiprocessor: 3, merge_group: 16, load: LoadHint::Stream256 }
    }
}

/// Which variant: fixed when the text is rendered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DecodeSpec {
    /// Type of queries, cache and output: f16 or bf16.
    pub dtype: DType,
    /// Elements of a head, of K and of V: 64 or 128.
    pub head_dim: u32,
    /// What it is tuned for.
    pub tuning: DecodeTuning,
}

impl DecodeSpec {
    /// Every variant, tuned as it is when nothing else is asked for.
    pub fn all() -> impl Iterator<Item = Self> {
        let tuning = DecodeTuning::default();
        [DType::Bf16, DType::F16].into_iter().flat_map(move |dtype| {
            [64, 128].into_iter().map(move |head_dim| Self { dtype, head_dim, tuning })
        })
    }

    /// Whether there is such a variant.
    pub fn exists(self) -> bool {
        matches!(self.dtype, DType::Bf16 | DType::F16)
            && matches!(self.head_dim, 64 | 128)
            && self.tuning.is_valid()
    }

    /// The entry point: `decode_bf16_d128`, and what is tuned otherwise than by default.
    pub fn entry(self) -> String {
        let Self { dtype, head_dim, tuning } = self;
        let DecodeTuning { warps, blocks_per_multiprocessor, merge_group, load } = tuning;
        let plain = format!("{FAMILY}_{dtype}_d{head_dim}");
        if tuning == DecodeTuning::default() {
            return plain;
        }
        format!("{plain}_w{warps}x{blocks_per_multiprocessor}_m{merge_group}_{}", load.name())
    }
}

/// One unit of work: the keys `begin..end` of a sequence, for each KV head. Eight u32 in device memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct WorkItem {
    /// Which sequence: its row of the block tables.
    pub sequence: u32,
    /// Its row of the queries and of the output.
    pub row: u32,
    /// First key.
    pub begin: u32,
    /// One past the last key; at most [`DecodeTuning::max_item_keys`] past `begin` rounded down to a tile.
    pub end: u32,
    /// Which split of the sequence this is.
    pub split: u32,
    /// Splits of the sequence. With one, the thread block writes the output itself.
    pub splits: u32,
    /// Number of the sequence's first partial result in the workspace.
    pub first_partial: u32,
}

impl WorkItem {
    /// Words of an item in device memory.
    pub const WORDS: usize = 8;

    /// The item as the kernel reads it.
    pub fn words(&self) -> [u32; Self::WORDS] {
        let Self { sequence, row, begin, end, split, splits, first_partial } = *self;
        [sequence, row, begin, end, split, splits, first_partial, 0]
    }
}

/// The sizes that decide the grid and the workspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DecodeShape {
    /// Work items.
    pub items: u32,
    /// KV heads.
    pub kv_heads: u32,
    /// Query heads that share a KV head.
    pub group: u32,
}

impl DecodeShape {
    /// Groups of at most [`TILE_QUERIES`] query heads that share a KV head.
    pub const fn query_tiles(self) -> u32 {
        self.group.div_ceil(TILE_QUERIES)
    }
}

/// Bytes of the three parts of the workspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WorkspaceSizes {
    /// Partial outputs.
    pub partial_out: u64,
    /// Partial maxima and sums.
    pub partial_max: u64,
    /// Tickets, which must be zero before the first launch and are zero again after each.
    pub tickets: u64,
}

/// Where rows of queries or outputs lie: `[rows, q_heads, head_dim]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rows {
    /// Device address of the first element; aligned to 16 bytes, as all strides.
    pub address: u64,
    /// Elements from a row to the next.
    pub row_stride: u64,
    /// Elements from a head to the next.
    pub head_stride: u64,
}

/// Where K or V lies: `[blocks, block_size, kv_heads, head_dim]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CacheRows {
    /// Device address of the first element; aligned to 16 bytes, as all strides.
    pub address: u64,
    /// Elements from a block to the next.
    pub block_stride: u64,
    /// Elements from a token of a block to the next.
    pub token_stride: u64,
    /// Elements from a head to the next.
    pub head_stride: u64,
}

/// What one launch works on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DecodeArgs {
    /// Queries.
    pub q: Rows,
    /// K cache.
    pub k: CacheRows,
    /// V cache.
    pub v: CacheRows,
    /// Device address of the block tables, i32 `[sequences, table_stride]`.
    pub tables: u64,
    /// Entries from a block table to the next.
    pub table_stride: u32,
    /// log2 of the block size, which is 16 … 256.
    pub block_shift: u32,
    /// Query heads that share a KV head.
    pub group: u32,
    /// Factor of the scores, not yet in base 2.
    pub scale: f32,
    /// Device address of the work items.
    pub work: u64,
    /// Output.
    pub out: Rows,
    /// Device address of the log-sum-exp, f32 `[rows, q_heads]`, or 0.
    pub lse: u64,
    /// Device address of the partial outputs.
    pub partial_out: u64,
    /// Device address of the partial maxima and sums.
    pub partial_max: u64,
    /// Device address of the tickets.
    pub tickets: u64,
}

/// The parameter list, the same for all variants.
const PARAMS: [Param; 24] = {
    const fn param(name: &'static str, ty: ParamType) -> Param {
        Param { name, ty }
    }
    use ParamType::{F32, Pointer, U32, U64};
    [
        param("q", Pointer),
        param("k", Pointer),
        param("v", Pointer),
        param("tables", Pointer),
        param("work", Pointer),
        param("out", Pointer),
        param("lse", Pointer),
        param("partial_out", Pointer),
        param("partial_max", Pointer),
        param("tickets", Pointer),
        param("q_row_stride", U64),
        param("q_head_stride", U64),
        param("k_block_stride", U64),
        param("k_token_stride", U64),
        param("k_head_stride", U64),
        param("v_block_stride", U64),
        param("v_token_stride", U64),
        param("v_head_stride", U64),
        param("out_row_stride", U64),
        param("out_head_stride", U64),
        param("table_stride", U32),
        param("block_shift", U32),
        param("group", U32),
        param("scale_log2", F32),
    ]
};

impl DecodeArgs {
    /// The values of the parameters, in launch order.
    pub fn values(&self) -> [Arg; PARAMS.len()] {
        [
            Arg::pointer(self.q.address),
            Arg::pointer(self.k.address),
            Arg::pointer(self.v.address),
            Arg::pointer(self.tables),
            Arg::pointer(self.work),
            Arg::pointer(self.out.address),
            Arg::pointer(self.lse),
            Arg::pointer(self.partial_out),
            Arg::pointer(self.partial_max),
            Arg::pointer(self.tickets),
            Arg::u64(self.q.row_stride),
            Arg::u64(self.q.head_stride),
            Arg::u64(self.k.block_stride),
            Arg::u64(self.k.token_stride),
            Arg::u64(self.k.head_stride),
            Arg::u64(self.v.block_stride),
            Arg::u64(self.v.token_stride),
            Arg::u64(self.v.head_stride),
            Arg::u64(self.out.row_stride),
            Arg::u64(self.out.head_stride),
            Arg::u32(self.table_stride),
            Arg::u32(self.block_shift),
            Arg::u32(self.group),
            Arg::f32(self.scale * std::f32::consts::LOG2_E),
        ]
    }
}

/// One variant, rendered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decode {
    spec: DecodeSpec,
    kernel: Kernel,
}

impl Decode {
    /// Renders a variant.
    ///
    /// # Errors
    /// [`Error::UnsupportedDecode`] for a type or head dimension without a variant.
    pub fn new(spec: DecodeSpec) -> Result<Self, Error> {
        let DecodeSpec { dtype, head_dim, tuning } = spec;
        if !spec.exists() {
            return Err(Error::UnsupportedDecode { dtype, head_dim });
        }
        // movmatrix came with PTX 7.8; everything else here is older.
        let target = Target { sm: 80, ptx: (7, 8) };
        // Four floats more than a row, so that the rows of neighbouring lanes begin in other banks.
        let row_pitch = head_dim + 4;
        let threads = tuning.warps * 32;
        let text = template::render(
            FAMILY,
            include_str!("../kernels/decode.ptx"),
            context! {
                entry => spec.entry(),
                sm => target.sm,
                ptx_version => format!("{}.{}", target.ptx.0, target.ptx.1),
                dtype => dtype.name(),
                head_dim,
                warps => tuning.warps,
                row_pitch,
                blocks_per_sm => tuning.blocks_per_multiprocessor,
                merge_group => tuning.merge_group,
                merge_mask => format!("{:#010x}", !(tuning.merge_group - 1)),
                merge_shift => tuning.merge_group.trailing_zeros(),
                merge_flight => MERGE_FLIGHT,
                load_hint => tuning.load.ptx(),
            },
        )?;
        Ok(Self {
            spec,
            kernel: Kernel {
                family: FAMILY,
                entry: spec.entry(),
                text,
                target,
                params: PARAMS.to_vec(),
                max_threads: threads,
                static_shared: tuning.warps * TILE_QUERIES * (row_pitch * 4 + 8) + 4,
                dynamic_shared: 0,
            },
        })
    }

    /// The variant.
    pub fn spec(&self) -> DecodeSpec {
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

    /// Grid and block for a shape.
    ///
    /// # Errors
    /// [`Error::Zero`] for an empty dimension, [`Error::GridTooLarge`] beyond CUDA's limits.
    pub fn launch(&self, shape: DecodeShape) -> Result<Launch, Error> {
        let DecodeShape { items, kv_heads, group } = shape;
        for (field, value) in [("items", items), ("kv_heads", kv_heads), ("group", group)] {
            if value == 0 {
                return Err(Error::Zero { kernel: FAMILY, field });
            }
        }
        let limit = 65_535;
        for (field, value, needed) in [("items", items, items), ("group", group, shape.query_tiles())] {
            if needed > limit {
                return Err(Error::GridTooLarge { kernel: FAMILY, field, value, needed, limit });
            }
        }
        let threads = self.kernel.max_threads;
        Ok(Launch { grid: [kv_heads, items, shape.query_tiles()], block: [threads, 1, 1], dynamic_shared: 0 })
    }

    /// Bytes of workspace for so many partial results.
    pub fn workspace(&self, partials: u32, shape: DecodeShape) -> WorkspaceSizes {
        let heads = u64::from(shape.kv_heads) * u64::from(shape.query_tiles());
        let rows = u64::from(partials) * heads * u64::from(TILE_QUERIES);
        WorkspaceSizes {
            partial_out: rows * u64::from(self.spec.head_dim) * 4,
            partial_max: rows * 8,
            tickets: u64::from(partials.max(1)) * heads * 4,
        }
    }
}
