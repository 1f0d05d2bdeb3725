//! `prefill`: tiles of query rows attend to their keys in a paged cache, for prefill and chunked prefill.
//!
//! Owns the parameter list, the form of the work items and the launch geometry, which both forms of the kernel share:
//! `kernels/prefill.ptx` (every GPU from sm_80 on) and `kernels/prefill_hopper.ptx` (sm_90a). The variants are
//! `variant.rs`'s, what puts split tiles together `merge.rs`'s. Which rows and keys go to which item is the planner's
//! business, in pagewise-attention.

mod merge;
mod variant;

use minijinja::context;

use crate::decode::{CacheRows, Rows, in_base_two};
use crate::kernel::{Arg, Kernel, Launch, Param, ParamType, Target, parameters};
use crate::{Error, template};

pub use merge::{MergeItem, PrefillMerge, PrefillMergeArgs};
pub use variant::{Form, PrefillSpec};

/// Family and template name.
const FAMILY: &str = "prefill";

/// In the place of a partial result's number: the item writes the output itself.
pub const NO_PARTIAL: u32 = u32::MAX;

/// One unit of work: a tile of rows of one sequence and KV head, over a range of keys. Twelve u32 in device memory.
///
/// Row `r` of a sequence's is query `r / group` of query head `r % group` of those that share the KV head.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PrefillItem {
    /// First entry of the sequence's block table, counted from the beginning of all tables.
    pub table: u32,
    /// The sequence's first row of the queries and of the output.
    pub row: u32,
    /// First row of the tile.
    pub first: u32,
    /// Rows of the tile; 0 marks an item without work.
    pub rows: u32,
    /// First key.
    pub begin: u32,
    /// One past the last key.
    pub end: u32,
    /// All rows see all keys from here …
    pub plain_begin: u32,
    /// … to here.
    pub plain_end: u32,
    /// KV head.
    pub head: u32,
    /// Number of the partial result, or [`NO_PARTIAL`].
    pub partial: u32,
}

impl PrefillItem {
    /// Words of an item in device memory.
    pub const WORDS: usize = 12;

    /// The item as the kernel reads it.
    pub fn words(&self) -> [u32; Self::WORDS] {
        let Self { table, row, first, rows, begin, end, plain_begin, plain_end, head, partial } = *self;
        [table, row, first, rows, begin, end, plain_begin, plain_end, head, partial, 0, 0]
    }
}

/// What one launch works on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PrefillArgs {
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
    /// Query heads.
    pub q_heads: u32,
    /// Query heads that share a KV head.
    pub group: u32,
    /// Elements of a head of K.
    pub head_dim_k: u32,
    /// Elements of a head of V.
    pub head_dim_v: u32,
    /// Factor of the scores.
    pub scale: f32,
    /// Soft cap of the scaled scores.
    pub softcap: Option<f32>,
    /// Device address of ALiBi's slopes, f32 `[q_heads]`, or 0.
    pub slopes: u64,
    /// Device address of the sinks, f32 `[q_heads]`, or 0.
    pub sinks: u64,
    /// Device address of the mask's bits, u32 `[rows, mask_words]`, for variants with bits: bit `j % 32` of word `j / 32`
    /// lets a row see key `j` of its range.
    pub mask_bits: u64,
    /// Words of a row of them.
    pub mask_words: u32,
    /// Device address of the factor of stored keys, f32, one or one for each KV head, or 0 for 1: for fp8 caches.
    pub k_scale: u64,
    /// The same for values.
    pub v_scale: u64,
    /// Whether each KV head has its own.
    pub scale_per_head: bool,
    /// Device address of the work items.
    pub work: u64,
    /// Device address of what each query row sees, i32 `[rows, 4]`: first key, end, position, 0.
    pub ranges: u64,
    /// Output.
    pub out: Rows,
    /// Device address of the log-sum-exp, f32 `[rows, q_heads]`, or 0.
    pub lse: u64,
    /// Device address of the partial outputs.
    pub partial_out: u64,
    /// Device address of the partial maxima and sums.
    pub partial_max: u64,
}

parameters! {
    /// The parameters that all variants have.
    const PARAMS of pub fn PrefillArgs::values(&self);
    q: Pointer = self.q.address,
    k: Pointer = self.k.address,
    v: Pointer = self.v.address,
    tables: Pointer = self.tables,
    work: Pointer = self.work,
    ranges: Pointer = self.ranges,
    out: Pointer = self.out.address,
    lse: Pointer = self.lse,
    partial_out: Pointer = self.partial_out,
    partial_max: Pointer = self.partial_max,
    slopes: Pointer = self.slopes,
    sinks: Pointer = self.sinks,
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
    group: U32 = self.group,
    q_heads: U64 = u64::from(self.q_heads),
    dim_k: U32 = self.head_dim_k,
    dim_v: U32 = self.head_dim_v,
    scale: F32 = in_base_two(self.scale, self.softcap).0,
    cap: F32 = in_base_two(self.scale, self.softcap).1,
}

parameters! {
    /// What the variants with bits have beside.
    const BITS_PARAMS of fn PrefillArgs::values_of_bits(&self);
    mask_bits: Pointer = self.mask_bits,
    mask_words: U32 = self.mask_words,
}

parameters! {
    /// What the variants for fp8 caches have beside, behind all others.
    const FP8_PARAMS of fn PrefillArgs::values_of_fp8(&self);
    k_scale: Pointer = self.k_scale,
    v_scale: Pointer = self.v_scale,
    scale_head_stride: U32 = u32::from(self.scale_per_head),
}

/// The parameters of the Hopper form: two tensor maps, those of all forms, and the number of items.
fn hopper_params() -> Vec<Param> {
    let param = |name, ty| Param { name, ty };
    let maps = ["k_map", "v_map"].map(|name| param(name, ParamType::TensorMap));
    maps.into_iter().chain(PARAMS).chain([param("items", ParamType::U32)]).collect()
}

impl PrefillArgs {
    /// Those of a variant of the `mma.sync` forms: the first so many of the array.
    pub fn values_for(&self, spec: PrefillSpec) -> ([Arg; MOST_VALUES], usize) {
        let bits = self.values_of_bits().into_iter().filter(|_| spec.bits);
        let fp8 = self.values_of_fp8().into_iter().filter(|_| spec.kv_dtype.is_fp8());
        let mut values = [Arg::u32(0); MOST_VALUES];
        let known = self.values().into_iter().chain(bits).chain(fp8);
        let count = values.iter_mut().zip(known).map(|(place, value)| *place = value).count();
        (values, count)
    }

    /// Those of the Hopper form that follow the tensor maps, for so many items.
    pub fn hopper_values(&self, items: u32) -> [Arg; HOPPER_VALUES] {
        let mut values = [Arg::u32(items); HOPPER_VALUES];
        values.iter_mut().zip(self.values()).for_each(|(place, value)| *place = value);
        values
    }
}

/// The parameters of the Hopper form after the tensor maps.
const HOPPER_VALUES: usize = PARAMS.len() + 1;

/// The parameters of a variant of the `mma.sync` forms that has all.
const MOST_VALUES: usize = PARAMS.len() + BITS_PARAMS.len() + FP8_PARAMS.len();

/// The parameters of a variant of the `mma.sync` forms.
fn mma_params(spec: PrefillSpec) -> Vec<Param> {
    let bits = BITS_PARAMS.into_iter().filter(|_| spec.bits);
    let fp8 = FP8_PARAMS.into_iter().filter(|_| spec.kv_dtype.is_fp8());
    PARAMS.into_iter().chain(bits).chain(fp8).collect()
}

/// One variant, rendered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prefill {
    spec: PrefillSpec,
    kernel: Kernel,
}

impl Prefill {
    /// Renders a variant.
    ///
    /// # Errors
    /// [`Error::UnsupportedPrefill`] for a type, a head dimension or a form without a variant.
    pub fn new(spec: PrefillSpec) -> Result<Self, Error> {
        let PrefillSpec { dtype, kv_dtype, head_dim, .. } = spec;
        if !spec.exists() {
            return Err(Error::UnsupportedPrefill { dtype, kv_dtype, head_dim });
        }
        let fp8 = kv_dtype.is_fp8();
        let target = match (spec.form, fp8) {
            (Form::Hopper, _) => Target::only(90, (8, 0)),
            // The prefetch size of cp.async came with PTX 7.4, sm_90 with 7.8; Ada brought the fp8 conversions, PTX 8.1
            // their names.
            (Form::Large, false) => Target::from(90, (7, 8)),
            (Form::Large, true) => Target::from(90, (8, 1)),
            (Form::Small, false) => Target::from(80, (7, 4)),
            (Form::Small, true) => Target::from(89, (8, 1)),
        };
        let ptx_version = format!("{}.{}", target.ptx.0, target.ptx.1);
        let (entry, dtype, kv_dtype) = (spec.entry(), dtype.name(), kv_dtype.name());
        let (text, params) = match spec.form {
            Form::Hopper => (
                template::render(
                    FAMILY,
                    include_str!("../kernels/prefill_hopper.ptx"),
                    context! {
                        entry, ptx_version, dtype, kv_dtype, fp8, head_dim,
                        stages => spec.stages(),
                        // Of 65,536: 128 threads with the first, 256 with the second.
                        producer_registers => 40,
                        consumer_registers => 232,
                        rows_name => "%r_rows_at",
                        bits => false,
                    },
                )?,
                hopper_params(),
            ),
            Form::Large | Form::Small => (
                template::render(
                    FAMILY,
                    include_str!("../kernels/prefill.ptx"),
                    context! {
                        entry, ptx_version, dtype, kv_dtype, fp8, head_dim,
                        sm => target.sm,
                        warps => spec.warps(),
                        atoms => spec.atoms(),
                        keys => spec.tile_keys(),
                        blocks_per_sm => spec.blocks_per_multiprocessor(),
                        rows_name => "s_rows",
                        bits => spec.bits,
                        words => spec.tile_words(),
                    },
                )?,
                mma_params(spec),
            ),
        };
        Ok(Self {
            spec,
            kernel: Kernel {
                family: FAMILY,
                entry: spec.entry(),
                text,
                target,
                params,
                max_threads: spec.warps() * 32,
                static_shared: spec.static_bytes(),
                dynamic_shared: spec.dynamic_bytes(),
            },
        })
    }

    /// The variant.
    pub fn spec(&self) -> PrefillSpec {
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

    /// Grid and block for so many thread blocks: as many as there are items, or with the Hopper form no more than
    /// multiprocessors, of which each takes every so-manieth item.
    ///
    /// # Errors
    /// [`Error::Zero`] for none.
    pub fn launch(&self, blocks: u32) -> Result<Launch, Error> {
        if blocks == 0 {
            return Err(Error::Zero { kernel: FAMILY, field: "items" });
        }
        Ok(Launch {
            grid: [blocks, 1, 1],
            block: [self.kernel.max_threads, 1, 1],
            dynamic_shared: self.kernel.dynamic_shared,
        })
    }
}
