//! `decode`: every query row attends to its keys in a paged cache; keys split over thread blocks.
//!
//! Owns the parameter list, the form of the work items and the launch geometry; the variants are `variant.rs`'s, the
//! kernel is `kernels/decode.ptx`. Which keys go to which item is the planner's business, in pagewise-attention.

mod variant;

use minijinja::context;

use crate::kernel::{Kernel, Launch, Target, parameters};
use crate::{Error, template};

pub use variant::{DecodeSpec, DecodeTuning, HEAD_DIMS, Prefetch, Ring};

/// Family and template name.
const FAMILY: &str = "decode";

/// Keys that a warp takes at a time. Items end at multiples of it, or at the end of a row's keys.
pub const TILE_KEYS: u32 = 16;

/// Keys at the end of a row that kernels since the last ordinary launch may write: a dependent variant reads the others
/// while those kernels still run.
pub const FRESH_KEYS: u32 = 16;

/// Query heads of a thread block.
pub const TILE_QUERIES: u32 = 8;

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

/// The factor of a score and its soft cap, 0 for none, as the kernels take them: they work in base 2, and compute tanh(x)
/// from exp2(2 x log2(e)).
pub(crate) fn in_base_two(scale: f32, softcap: Option<f32>) -> (f32, f32) {
    use std::f32::consts::LOG2_E;
    match softcap {
        None => (scale * LOG2_E, 0.0),
        Some(cap) => (2.0 * LOG2_E * scale / cap, cap * LOG2_E),
    }
}

parameters! {
    /// The parameter list, the same for all variants.
    const PARAMS of pub fn DecodeArgs::values(&self);
    q: Pointer = self.q.address,
    k: Pointer = self.k.address,
    v: Pointer = self.v.address,
    tables: Pointer = self.tables,
    work: Pointer = self.work,
    out: Pointer = self.out.address,
    lse: Pointer = self.lse,
    partial_out: Pointer = self.partial_out,
    partial_max: Pointer = self.partial_max,
    tickets: Pointer = self.tickets,
    k_scale: Pointer = self.scores.k_scale,
    v_scale: Pointer = self.scores.v_scale,
    slopes: Pointer = self.scores.slopes,
    sinks: Pointer = self.scores.sinks,
    mask_bits: Pointer = self.scores.mask_bits,
    q_row_stride: U64 = self.q.row_stride,
    q_head_stride: U64 = self.q.head_stride,
    k_block_stride: U64 = self.k.block_stride,
    k_token_stride: U64 = self.k.token_stride,
    k_head_stride: U64 = self.k.head_stride,
    v_block_stride: U64 = self.v.block_stride,
    v_token_stride: U64 = self.v.token_stride,
    v_head_stride: U64 = self.v.head_stride,
    out_row_stride: U64 = self.out.row_stride,
    out_head_stride: U64 = self.out.head_stride,
    block_shift: U32 = self.block_shift,
    group: U32 = self.shape.group,
    tile_rows: U32 = self.shape.tile_rows(),
    heads_shift: U32 = self.shape.block_heads.trailing_zeros(),
    dim_k: U32 = self.head_dim_k,
    dim_v: U32 = self.head_dim_v,
    mask_words: U32 = self.scores.mask_words,
    scale_head_stride: U32 = u32::from(self.scores.scale_per_head),
    scale: F32 = in_base_two(self.scores.scale, self.scores.softcap).0,
    cap: F32 = in_base_two(self.scores.scale, self.scores.softcap).1,
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
        let DecodeSpec { q_dtype, kv_dtype, head_dim, tuning, dependent, .. } = spec;
        if !spec.exists() {
            return Err(Error::UnsupportedDecode { q_dtype, kv_dtype, head_dim });
        }
        // movmatrix came with PTX 7.8; Ada brought the fp8 conversions, PTX 8.1 their names; dependent launches came with
        // Hopper.
        let target = match (kv_dtype.is_fp8(), dependent) {
            (true, true) => Target::from(90, (8, 1)),
            (false, true) => Target::from(90, (8, 0)),
            (true, false) => Target::from(89, (8, 1)),
            (false, false) => Target::from(80, (7, 8)),
        };
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
                dependent,
                fresh_keys => FRESH_KEYS,
                q_load => if dependent { "ld.global" } else { "ld.global.nc" },
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
