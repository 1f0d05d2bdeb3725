//! `decode`: every query row attends to its keys in a paged cache, its keys split over workgroups; and
//! `decode_merge`, which merges the splits of a row.
//!
//! Owns the choice of variant, the uniform parameters and the form of the plan in memory; the kernels are
//! `kernels/decode.wgsl` and `kernels/decode_merge.wgsl`. Which keys go to which item is the planner's business, in
//! pagewise-attention.

mod variant;

use minijinja::context;

pub use crate::dispatch::workgroups;
use crate::shader::{Binding, BindingKind, Shader};
use crate::{DType, Error, dispatch, template};

pub use variant::{DecodeNeeds, DecodeSpec, DecodeTuning, Unit};

/// Family, template name and entry point.
const FAMILY: &str = "decode";
/// The same of the merge.
const MERGE_FAMILY: &str = "decode_merge";

/// Words of `decode`'s uniform buffer, and of `prefill`'s.
pub const PARAM_WORDS: usize = 28;
/// Words of `decode_merge`'s.
const MERGE_PARAM_WORDS: usize = 12;

/// Invocations of the merge's workgroup.
const MERGE_WORKGROUP: u32 = 256;

/// Splits of a row that `decode_merge` can merge.
pub const MAX_SPLITS: u32 = 1024;

/// Splits that a thread of `decode_merge` merges by itself, if no row of a plan has more: then a workgroup has several
/// heads ([`merge_heads`]).
pub const FEW_SPLITS: u32 = 4;

/// Heads of a workgroup of `decode_merge` where rows have few splits.
pub fn merge_heads(head_dim_v: u32) -> u32 {
    MERGE_WORKGROUP / head_dim_v.div_ceil(4).next_power_of_two().clamp(1, MERGE_WORKGROUP)
}

/// Words of the plan before its first item: numbers of items and of rows to merge, where block tables and mask bits
/// begin, the words of a row of mask bits, where the rows to merge begin; `prefill`'s number of items, where they begin.
pub const HEADER_WORDS: usize = 8;

/// Words of a row that is to be merged: row, first partial result, splits; in the first, whether all have few splits, else 0.
pub const MERGE_WORDS: usize = 4;

/// A score below all others, and the sink of a head that has none.
pub const LOWEST: f32 = -3.4e38;

/// One unit of work: the keys `begin..end` of a query row, for each KV head. Eight u32 in the plan.
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
    /// Splits of the row. With one, the workgroup writes the output itself.
    pub splits: u32,
    /// Number of the row's first partial result in the workspace.
    pub first_partial: u32,
    /// The query's position, for ALiBi.
    pub position: i32,
}

impl WorkItem {
    /// Words of an item in the plan.
    pub const WORDS: usize = 8;

    /// The item as the kernel reads it.
    pub fn words(&self) -> [u32; Self::WORDS] {
        let Self { table, row, begin, end, split, splits, first_partial, position } = *self;
        [table, row, begin, end, split, splits, first_partial, position.cast_unsigned()]
    }
}

/// Where rows of queries or outputs lie, `[rows, q_heads, head_dim]`: in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rows {
    /// The first element's place in its binding.
    pub offset: u64,
    /// From a row to the next.
    pub row_stride: u64,
    /// From a head to the next.
    pub head_stride: u64,
}

/// Where K or V lies, `[blocks, block_size, kv_heads, head_dim]`: in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CacheRows {
    /// The first element's place in its binding.
    pub offset: u64,
    /// From a block to the next.
    pub block_stride: u64,
    /// From a token of a block to the next.
    pub token_stride: u64,
    /// From a head to the next.
    pub head_stride: u64,
    /// Elements of the whole cache, from the first to the last that a block table can reach.
    pub extent: u64,
}

/// What the dispatches of one layer work on. The caller has checked that every binding holds what this reaches.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DecodeArgs {
    /// KV heads.
    pub kv_heads: u32,
    /// Query heads that share a KV head.
    pub group: u32,
    /// Elements of a query or K row.
    pub head_dim_k: u32,
    /// Elements of a V or output row.
    pub head_dim_v: u32,
    /// log2 of the block size.
    pub block_shift: u32,
    /// Queries.
    pub q: Rows,
    /// K cache.
    pub k: CacheRows,
    /// V cache.
    pub v: CacheRows,
    /// Outputs.
    pub out: Rows,
    /// First word of lse in its binding, if it is wanted.
    pub lse: Option<u64>,
    /// First word of the terms in their binding: slopes and sinks (in units of log2, [`LOWEST`] for none) of the query
    /// heads, scales of K and of V of the KV heads.
    pub terms: u64,
    /// What scores are multiplied with.
    pub scale: f32,
    /// Soft cap of the scores.
    pub softcap: Option<f32>,
}

/// A value in units, which must fit an index of 32 bits.
fn in_units(field: &'static str, value: u64, unit: u32) -> Result<u32, Error> {
    dispatch::in_units(FAMILY, field, value, unit)
}

impl DecodeArgs {
    /// The contents of `decode`'s uniform buffer.
    ///
    /// # Errors
    /// [`Error::NotDivisible`] when the variant's units do not divide an offset, stride or head dimension,
    /// [`Error::TooLarge`] when one does not fit 32 bits.
    pub fn uniform(&self, spec: DecodeSpec) -> Result<[u32; PARAM_WORDS], Error> {
        let query_tiles = self.group.div_ceil(spec.queries);
        let tiles = self.kv_heads.checked_mul(query_tiles);
        let too_large = Error::TooLarge { kernel: FAMILY, field: "q_heads", value: u64::from(self.kv_heads) };
        self.uniform_in_units(spec.q, spec.unit_elements(), tiles.ok_or(too_large)?)
    }

    /// The same for caches in units of so many elements, and so many workgroups of an item.
    pub(crate) fn uniform_in_units(
        &self,
        q_dtype: DType,
        unit: u32,
        tiles: u32,
    ) -> Result<[u32; PARAM_WORDS], Error> {
        let Self { kv_heads, group, q, k, v, out, .. } = *self;
        let cache = |field, elements| in_units(field, elements, unit);
        let word = 4 / q_dtype.size();
        let row = |field, elements| in_units(field, elements, word);
        // No index may wrap around, so the ends of the caches must be addressable too.
        cache("k_cache.extent", k.extent.next_multiple_of(u64::from(unit)))?;
        cache("v_cache.extent", v.extent.next_multiple_of(u64::from(unit)))?;
        Ok([
            tiles,
            kv_heads,
            group,
            self.block_shift,
            in_units("head_dim_k", self.head_dim_k.into(), 4)?,
            in_units("head_dim_v", self.head_dim_v.into(), 4)?,
            cache("head_dim_k", self.head_dim_k.into())?,
            cache("head_dim_v", self.head_dim_v.into())?,
            row("q.offset", q.offset)?,
            row("q.row_stride", q.row_stride)?,
            row("q.head_stride", q.head_stride)?,
            row("out.offset", out.offset)?,
            row("out.row_stride", out.row_stride)?,
            row("out.head_stride", out.head_stride)?,
            in_units("lse.offset", self.lse.unwrap_or(0), 1)?,
            u32::from(self.lse.is_some()),
            cache("k_cache.offset", k.offset)?,
            cache("k_cache.block_stride", k.block_stride)?,
            cache("k_cache.token_stride", k.token_stride)?,
            cache("k_cache.head_stride", k.head_stride)?,
            cache("v_cache.offset", v.offset)?,
            cache("v_cache.block_stride", v.block_stride)?,
            cache("v_cache.token_stride", v.token_stride)?,
            cache("v_cache.head_stride", v.head_stride)?,
            in_units("terms.offset", self.terms, 1)?,
            self.scale.to_bits(),
            self.softcap.unwrap_or(0.0).to_bits(),
            0,
        ])
    }

    /// The contents of `decode_merge`'s uniform buffer.
    ///
    /// # Errors
    /// As [`DecodeArgs::uniform`].
    pub fn merge_uniform(&self, spec: DecodeSpec) -> Result<[u32; MERGE_PARAM_WORDS], Error> {
        let word = 4 / spec.q.size();
        let vectors = in_units("head_dim_v", self.head_dim_v.into(), 4)?;
        Ok([
            self.kv_heads,
            self.group,
            vectors,
            vectors.next_power_of_two(),
            in_units("out.offset", self.out.offset, word)?,
            in_units("out.row_stride", self.out.row_stride, word)?,
            in_units("out.head_stride", self.out.head_stride, word)?,
            in_units("lse.offset", self.lse.unwrap_or(0), 1)?,
            u32::from(self.lse.is_some()),
            in_units("terms.offset", self.terms, 1)?,
            0,
            0,
        ])
    }

    /// Whether a variant's units divide every offset, stride and head dimension.
    pub fn fits(&self, spec: DecodeSpec) -> bool {
        self.uniform(spec).is_ok()
    }
}

/// The bindings of `decode` and `prefill`, whose caches are read in units of so many bytes.
pub(crate) fn bindings(unit_size: u32) -> Vec<Binding> {
    let binding = |index, name, kind, element_size| Binding { index, name, kind, element_size };
    let uniform = BindingKind::Uniform { size: 4 * PARAM_WORDS as u32 };
    vec![
        binding(0, "params", uniform, 4),
        binding(1, "q", BindingKind::ReadOnly, 4),
        binding(2, "k_cache", BindingKind::ReadOnly, unit_size),
        binding(3, "v_cache", BindingKind::ReadOnly, unit_size),
        binding(4, "plan", BindingKind::ReadOnly, 4),
        binding(5, "terms", BindingKind::ReadOnly, 4),
        binding(6, "out", BindingKind::ReadWrite, 4),
        binding(7, "lse", BindingKind::ReadWrite, 4),
        binding(8, "partials", BindingKind::ReadWrite, 16),
    ]
}

/// One variant of `decode`, rendered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decode {
    spec: DecodeSpec,
    shader: Shader,
}

impl Decode {
    /// Renders a variant.
    ///
    /// # Errors
    /// [`Error::Template`]: a defect of this crate. [`Error::NoSuchVariant`] for a specification out of its bounds.
    pub fn new(spec: DecodeSpec) -> Result<Self, Error> {
        let name = spec.name();
        if !spec.exists() {
            return Err(Error::NoSuchVariant { kernel: FAMILY, name });
        }
        let DecodeSpec { lanes, chunks, queries, tuning, .. } = spec;
        let DecodeTuning { rows, workgroup_size, kept, ahead, half } = tuning;
        let share = lanes / queries;
        let offsets: Vec<u32> = (0..share.trailing_zeros()).rev().map(|bit| 1 << bit).collect();
        let unit_size = spec.unit.bytes();
        let variables = context! {
            name,
            q => spec.q.name(),
            kv => spec.kv.name(),
            unit => match (half, spec.unit) {
                (false, unit) => unit.wgsl(),
                (true, Unit::Vec4) => "Unit",
                (true, Unit::Vec2) => "vec4<f16>",
            },
            unit_words => unit_size / 4,
            lanes,
            chunks,
            vectors => spec.vectors(),
            queries,
            rows,
            groups => workgroup_size / lanes,
            workgroup_size,
            subgroups => spec.subgroups,
            bits => spec.bits,
            kept,
            ahead,
            half,
            offsets,
            gather_queries => spec.gather_queries(),
            scratch => spec.scratch(),
        };
        let text = template::render(FAMILY, include_str!("../kernels/decode.wgsl"), variables)?;
        let shader = Shader {
            family: FAMILY,
            name: spec.name(),
            text,
            bindings: bindings(unit_size),
            workgroup_size,
            needs_f16: half,
            needs_subgroups: spec.subgroups,
            needs_matrices: false,
        };
        Ok(Self { spec, shader })
    }

    /// The variant.
    pub fn spec(&self) -> DecodeSpec {
        self.spec
    }

    /// The rendered kernel.
    pub fn shader(&self) -> &Shader {
        &self.shader
    }

    /// The rendered kernel, by value.
    pub fn into_shader(self) -> Shader {
        self.shader
    }
}

/// `decode_merge` for outputs of a type, rendered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DecodeMerge {
    shader: Shader,
}

impl DecodeMerge {
    /// Renders the variant.
    ///
    /// # Errors
    /// [`Error::Template`]: a defect of this crate.
    pub fn new(q: DType) -> Result<Self, Error> {
        let name = format!("{MERGE_FAMILY}_{q}");
        let levels: Vec<u32> = (0..MERGE_WORKGROUP.trailing_zeros()).rev().map(|bit| 1 << bit).collect();
        let variables = context! {
            name => name.clone(),
            q => q.name(),
            workgroup_size => MERGE_WORKGROUP,
            max_splits => MAX_SPLITS,
            few => FEW_SPLITS,
            levels,
        };
        let text = template::render(MERGE_FAMILY, include_str!("../kernels/decode_merge.wgsl"), variables)?;
        let binding = |index, name, kind, element_size| Binding { index, name, kind, element_size };
        let uniform = BindingKind::Uniform { size: 4 * MERGE_PARAM_WORDS as u32 };
        let bindings = vec![
            binding(0, "params", uniform, 4),
            binding(1, "plan", BindingKind::ReadOnly, 4),
            binding(2, "terms", BindingKind::ReadOnly, 4),
            binding(3, "partials", BindingKind::ReadOnly, 16),
            binding(4, "out", BindingKind::ReadWrite, 4),
            binding(5, "lse", BindingKind::ReadWrite, 4),
        ];
        let shader = Shader {
            family: MERGE_FAMILY,
            name,
            text,
            bindings,
            workgroup_size: MERGE_WORKGROUP,
            needs_f16: false,
            needs_subgroups: false,
            needs_matrices: false,
        };
        Ok(Self { shader })
    }

    /// The rendered kernel.
    pub fn shader(&self) -> &Shader {
        &self.shader
    }

    /// The rendered kernel, by value.
    pub fn into_shader(self) -> Shader {
        self.shader
    }
}
