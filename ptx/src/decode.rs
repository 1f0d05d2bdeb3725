//! `decode`: every query row attends to its keys in a paged cache; keys split over thread blocks.
//!
//! Owns the variants, the parameter list, the form of the work items and the launch geometry; the kernel is
//! `kernels/decode.ptx`. Which keys go to which item is the planner's business, in pagewise-attention.

use minijinja::context;

use crate::kernel::{Arg, Kernel, Launch, Param, ParamType, Target};
use crate::{DType, Error, template};

/// Family and template name.
const FAMILY: &str = "decode";

/// Keys that a warp takes at a time. Items end at multiples of it, or at the end of a row's keys.
pub const TILE_KEYS: u32 = 16;

/// Query heads of a thread block.
pub const TILE_QUERIES: u32 = 8;

/// Elements of a head that a variant has room for; a head takes the smallest that holds it.
pub const HEAD_DIMS: [u32; 3] = [64, 128, 256];

/// The most warps of a thread block: its merge keeps a maximum and a sum of each in registers.
const MAX_WARPS: u32 = 8;

/// How much shared memory a thread block's rings take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ring {
    /// 128 KiB: one thread block of many warps fills a multiprocessor. sm_80, 90 and 100 have that much.
    Large,
    /// At most 96 KiB, which every GPU from sm_80 on has; two or three thread blocks fit a multiprocessor of sm_90.
    Small,
}

impl Ring {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Large, Self::Small];

    /// Shared memory that a GPU must give a thread block, in bytes: sm_80's, and the least from there on (sm_86, 89,
    /// 120).
    pub const fn shared(self) -> u32 {
        match self {
            Self::Large => 163 << 10,
            Self::Small => 99 << 10,
        }
    }
}

/// What moves the clock but not the result, fixed when the text is rendered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DecodeTuning {
    /// Warps of a thread block, which share an item's heads and keys: 1, 2, 4 or 8.
    pub warps: u32,
    /// Tiles in a warp's ring, one in use and the others on their way: 2 to 16.
    pub stages: u32,
    /// Thread blocks that fit a multiprocessor at once; bounds the registers.
    pub blocks_per_multiprocessor: u32,
    /// Splits of a row that are merged together before the others: a power of two, at least 2.
    pub merge_group: u32,
    /// What the L2 fetches beside a 16-byte load of K or V.
    pub prefetch: Prefetch,
}

/// What the L2 fetches beside a load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Prefetch {
    /// Nothing.
    None,
    /// The 128 bytes around.
    L2Bytes128,
    /// The 256 bytes around.
    L2Bytes256,
}

impl Prefetch {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::None, Self::L2Bytes128, Self::L2Bytes256];

    /// As PTX spells it, after `cp.async.cg.shared.global`.
    const fn ptx(self) -> &'static str {
        match self {
            Self::None => "",
            Self::L2Bytes128 => ".L2::128B",
            Self::L2Bytes256 => ".L2::256B",
        }
    }

    /// Short name, part of an entry point's.
    const fn name(self) -> &'static str {
        match self {
            Self::None => "p0",
            Self::L2Bytes128 => "p128",
            Self::L2Bytes256 => "p256",
        }
    }
}

impl DecodeTuning {
    /// What measured best for rows of so many bytes in shared memory.
    pub const fn for_row_bytes(bytes: u32, ring: Ring) -> Self {
        let (warps, stages, blocks_per_multiprocessor) = match (ring, bytes) {
            (Ring::Large, ..=64) => (8, 8, 1),
            (Ring::Large, 65..=128) => (8, 4, 1),
            (Ring::Large, 129..=256) => (8, 2, 1),
            (Ring::Large, 257..=512) => (4, 2, 1),
            (Ring::Large, _) => (2, 2, 1),
            (Ring::Small, ..=64) => (4, 8, 3),
            (Ring::Small, 65..=128) => (4, 4, 3),
            (Ring::Small, 129..=256) => (4, 3, 2),
            (Ring::Small, 257..=512) => (2, 3, 2),
            (Ring::Small, _) => (1, 3, 2),
        };
        let prefetch = Prefetch::L2Bytes128;
        Self { warps, stages, blocks_per_multiprocessor, merge_group: 16, prefetch }
    }

    /// Whether a kernel can be made of it.
    pub const fn is_valid(self) -> bool {
        1 <= self.warps
            && self.warps <= MAX_WARPS
            && self.warps.is_power_of_two()
            && 2 <= self.stages
            && self.stages <= 16
            && 1 <= self.blocks_per_multiprocessor
            && self.blocks_per_multiprocessor <= 32
            && self.merge_group >= 2
            && self.merge_group.is_power_of_two()
    }
}

/// Which variant: fixed when the text is rendered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DecodeSpec {
    /// Type of queries and output: f32, f16 or bf16.
    pub q_dtype: DType,
    /// Type of the cache: the same, or with 16-bit queries one of the fp8 types (sm_89).
    pub kv_dtype: DType,
    /// Elements of a head that there is room for, one of [`HEAD_DIMS`].
    pub head_dim: u32,
    /// How much shared memory it takes.
    pub ring: Ring,
    /// What it is tuned for.
    pub tuning: DecodeTuning,
}

impl DecodeSpec {
    /// The variant for a head of so many elements, tuned as it measured best. `None` if there is none.
    pub fn for_head(q_dtype: DType, kv_dtype: DType, head_dim: u32, ring: Ring) -> Option<Self> {
        let head_dim = HEAD_DIMS.into_iter().find(|&room| head_dim <= room)?;
        let tuning = DecodeTuning::for_row_bytes(head_dim * kv_dtype.size(), ring);
        Some(Self { q_dtype, kv_dtype, head_dim, ring, tuning }).filter(|spec| spec.exists())
    }

    /// Every variant, tuned as it is when nothing else is asked for.
    pub fn all() -> impl Iterator<Item = Self> {
        let types = DType::ALL.into_iter().flat_map(|q| DType::ALL.into_iter().map(move |kv| (q, kv)));
        let rooms = types.flat_map(|(q, kv)| HEAD_DIMS.into_iter().map(move |dim| (q, kv, dim)));
        rooms.flat_map(|(q, kv, dim)| {
            Ring::ALL.into_iter().filter_map(move |ring| Self::for_head(q, kv, dim, ring))
        })
    }

    /// Whether there is such a variant.
    pub fn exists(self) -> bool {
        let Self { q_dtype, kv_dtype, .. } = self;
        let types = !q_dtype.is_fp8() && (q_dtype == kv_dtype || (q_dtype.size() == 2 && kv_dtype.is_fp8()));
        types && HEAD_DIMS.contains(&self.head_dim) && self.tuning.is_valid()
    }

    /// The entry point: `decode_bf16_e4m3_d128`, and what is tuned otherwise than by default.
    pub fn entry(self) -> String {
        let Self { q_dtype, kv_dtype, head_dim, ring, tuning } = self;
        let DecodeTuning { warps, stages, blocks_per_multiprocessor, merge_group, prefetch } = tuning;
        let small = if ring == Ring::Small { "_small" } else { "" };
        let plain = format!("{FAMILY}_{q_dtype}_{kv_dtype}_d{head_dim}{small}");
        if tuning == DecodeTuning::for_row_bytes(head_dim * kv_dtype.size(), ring) {
            return plain;
        }
        format!("{plain}_w{warps}s{stages}x{blocks_per_multiprocessor}_m{merge_group}_{}", prefetch.name())
    }

    /// Elements that begin at 16-byte boundaries: head dimensions are multiples of 4 in f32 and of 8 else.
    pub const fn dim_multiple(self) -> u32 {
        if self.q_dtype.size() == 4 { 4 } else { 8 }
    }

    /// Bytes of shared memory of a thread block.
    pub const fn shared_bytes(self) -> u32 {
        self.static_bytes() + self.ring_bytes()
    }

    /// Of them, those that the text declares; the ring after them begins at a multiple of 128.
    const fn static_bytes(self) -> u32 {
        (self.tuning.warps * TILE_QUERIES * 8 + 4).next_multiple_of(128)
    }

    /// Bytes of shared memory for the rings: `warps` x `stages` tiles of K and V.
    const fn ring_bytes(self) -> u32 {
        self.tuning.warps * self.tuning.stages * 2 * TILE_KEYS * self.head_dim * self.kv_dtype.size()
    }
}

/// One unit of work: the keys `begin..end` of a query row, for each KV head. Eight u32 in device memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct WorkItem {
    /// First entry of the sequence's block table, counted from the beginning of all tables.
    pub table: u32,
    /// The row of the queries and of the output.
    pub row: u32,
    /// First key.
    pub begin: u32,
    /// One past the last key.
    pub end: u32,
    /// Which split of the row this is.
    pub split: u32,
    /// Splits of the row. With one, the thread block writes the output itself; 0 marks an item without work, which
    /// fills a grid of fixed size.
    pub splits: u32,
    /// Number of the row's first partial result in the workspace.
    pub first_partial: u32,
    /// The query's position, for ALiBi.
    pub position: i32,
}

impl WorkItem {
    /// Words of an item in device memory.
    pub const WORDS: usize = 8;

    /// The item as the kernel reads it.
    pub fn words(&self) -> [u32; Self::WORDS] {
        let Self { table, row, begin, end, split, splits, first_partial, position } = *self;
        [table, row, begin, end, split, splits, first_partial, position.cast_unsigned()]
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
    /// KV heads of a thread block: a power of two that divides them, at most its warps.
    pub block_heads: u32,
}

impl DecodeShape {
    /// Whether thread blocks of so many warps can work for so many KV heads each.
    pub const fn divides_heads(self, warps: u32) -> bool {
        self.block_heads.is_power_of_two()
            && self.block_heads <= warps
            && self.kv_heads.is_multiple_of(self.block_heads)
    }

    /// Thread blocks that share an item for its different KV heads.
    pub const fn head_groups(self) -> u32 {
        self.kv_heads / self.block_heads
    }

    /// Groups of at most [`TILE_QUERIES`] query heads that share a KV head.
    pub const fn query_tiles(self) -> u32 {
        self.group.div_ceil(TILE_QUERIES)
    }

    /// Query heads of the largest of them.
    pub const fn tile_rows(self) -> u32 {
        if self.group < TILE_QUERIES { self.group } else { TILE_QUERIES }
    }
}

/// Bytes of the three parts of the workspace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
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

/// What is added to the scores or multiplied with them; device addresses are 0 where not used.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScoreArgs {
    /// Factor of the scores.
    pub scale: f32,
    /// Soft cap of the scaled scores.
    pub softcap: Option<f32>,
    /// Device address of ALiBi's slopes, f32 `[q_heads]`, or 0.
    pub slopes: u64,
    /// Device address of the sinks, f32 `[q_heads]`, or 0.
    pub sinks: u64,
    /// Device address of the mask's bits, u32 `[rows, mask_words]`, or 0: bit `j % 32` of word `j / 32` lets key `j`
    /// through.
    pub mask_bits: u64,
    /// Words of a row of them.
    pub mask_words: u32,
    /// Device address of the factor of stored keys, f32, one or one for each KV head, or 0 for 1.
    pub k_scale: u64,
    /// The same for values.
    pub v_scale: u64,
    /// Whether each KV head has its own.
    pub scale_per_head: bool,
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
    /// Device address of the block tables, i32.
    pub tables: u64,
    /// log2 of the block size, which is 1 … 256.
    pub block_shift: u32,
    /// Elements of a head of K.
    pub head_dim_k: u32,
    /// Elements of a head of V.
    pub head_dim_v: u32,
    /// The same as given to [`Decode::launch`].
    pub shape: DecodeShape,
    /// How scores come about.
    pub scores: ScoreArgs,
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
const PARAMS: [Param; 35] = {
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
        param("k_scale", Pointer),
        param("v_scale", Pointer),
        param("slopes", Pointer),
        param("sinks", Pointer),
        param("mask_bits", Pointer),
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
        param("block_shift", U32),
        param("group", U32),
        param("tile_rows", U32),
        param("heads_shift", U32),
        param("dim_k", U32),
        param("dim_v", U32),
        param("mask_words", U32),
        param("scale_head_stride", U32),
        param("scale", F32),
        param("cap", F32),
    ]
};

impl DecodeArgs {
    /// The values of the parameters, in launch order.
    pub fn values(&self) -> [Arg; PARAMS.len()] {
        use std::f32::consts::LOG2_E;
        let scores = &self.scores;
        // The kernel works in base 2, and computes tanh(x) from exp2(2 x log2(e)).
        let (scale, cap) = match scores.softcap {
            None => (scores.scale * LOG2_E, 0.0),
            Some(cap) => (2.0 * LOG2_E * scores.scale / cap, cap * LOG2_E),
        };
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
            Arg::pointer(scores.k_scale),
            Arg::pointer(scores.v_scale),
            Arg::pointer(scores.slopes),
            Arg::pointer(scores.sinks),
            Arg::pointer(scores.mask_bits),
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
            Arg::u32(self.block_shift),
            Arg::u32(self.shape.group),
            Arg::u32(self.shape.tile_rows()),
            Arg::u32(self.shape.block_heads.trailing_zeros()),
            Arg::u32(self.head_dim_k),
            Arg::u32(self.head_dim_v),
            Arg::u32(scores.mask_words),
            Arg::u32(u32::from(scores.scale_per_head)),
            Arg::f32(scale),
            Arg::f32(cap),
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
    /// [`Error::UnsupportedDecode`] for types, a head dimension or a tuning without a variant.
    pub fn new(spec: DecodeSpec) -> Result<Self, Error> {
        let DecodeSpec { q_dtype, kv_dtype, head_dim, tuning, .. } = spec;
        if !spec.exists() {
            return Err(Error::UnsupportedDecode { q_dtype, kv_dtype, head_dim });
        }
        // movmatrix came with PTX 7.8; Ada brought the fp8 conversions, PTX 8.1 their names.
        let target =
            if kv_dtype.is_fp8() { Target { sm: 89, ptx: (8, 1) } } else { Target { sm: 80, ptx: (7, 8) } };
        let threads = tuning.warps * 32;
        let text = template::render(
            FAMILY,
            include_str!("../kernels/decode.ptx"),
            context! {
                entry => spec.entry(),
                sm => target.sm,
                ptx_version => format!("{}.{}", target.ptx.0, target.ptx.1),
                q_dtype => q_dtype.name(),
                q_size => q_dtype.size(),
                kv_dtype => kv_dtype.name(),
                kv_size => kv_dtype.size(),
                head_dim,
                warps => tuning.warps,
                stages => tuning.stages,
                blocks_per_sm => tuning.blocks_per_multiprocessor,
                merge_group => tuning.merge_group,
                merge_mask => format!("{:#010x}", !(tuning.merge_group - 1)),
                merge_shift => tuning.merge_group.trailing_zeros(),
                // Splits that a warp has on their way at a time while it merges: 64 registers of them at most.
                merge_flight => (64 * 32 / head_dim).min(16),
                prefetch => tuning.prefetch.ptx(),
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
                static_shared: spec.static_bytes(),
                dynamic_shared: spec.ring_bytes(),
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
        let DecodeShape { items, kv_heads, group, block_heads } = shape;
        for (field, value) in [("items", items), ("kv_heads", kv_heads), ("group", group)] {
            if value == 0 {
                return Err(Error::Zero { kernel: FAMILY, field });
            }
        }
        let most = self.spec.tuning.warps;
        if !shape.divides_heads(most) {
            return Err(Error::BlockHeads { block_heads, kv_heads, most });
        }
        let limit = 65_535;
        for (field, value, needed) in [("items", items, items), ("group", group, shape.query_tiles())] {
            if needed > limit {
                return Err(Error::GridTooLarge { kernel: FAMILY, field, value, needed, limit });
            }
        }
        let threads = self.kernel.max_threads;
        Ok(Launch {
            grid: [shape.head_groups(), items, shape.query_tiles()],
            block: [threads, 1, 1],
            dynamic_shared: self.kernel.dynamic_shared,
        })
    }

    /// Bytes of workspace that a variant needs for so many partial results.
    pub fn workspace_of(spec: DecodeSpec, partials: u32, shape: DecodeShape) -> WorkspaceSizes {
        let heads = u64::from(shape.kv_heads) * u64::from(shape.query_tiles());
        let rows = u64::from(partials) * heads * u64::from(shape.tile_rows());
        WorkspaceSizes {
            partial_out: rows * u64::from(spec.head_dim) * 4,
            partial_max: rows * 8,
            tickets: u64::from(partials.max(1)) * heads * 4,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn every_variant_fits_the_gpus_that_it_is_for() {
        for spec in DecodeSpec::all() {
            let kernel = Decode::new(spec).unwrap().into_kernel();
            let shared = kernel.static_shared() + kernel.dynamic_shared();
            let most = spec.ring.shared();
            assert!(shared <= most, "{} takes {shared} bytes", spec.entry());
        }
    }

    #[test]
    fn a_head_takes_the_smallest_variant_that_holds_it() {
        let room =
            |dim| DecodeSpec::for_head(DType::Bf16, DType::Bf16, dim, Ring::Large).map(|spec| spec.head_dim);
        assert_eq!([8, 64, 72, 128, 136, 256].map(room), [64, 64, 128, 128, 256, 256].map(Some));
        assert_eq!(room(264), None);
        for (q, kv) in [(DType::F32, DType::F16), (DType::F16, DType::Bf16), (DType::F32, DType::Fp8E4m3)] {
            assert_eq!(DecodeSpec::for_head(q, kv, 64, Ring::Large), None);
        }
    }
}
