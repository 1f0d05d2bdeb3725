//! `merge_states`: puts attention over disjoint sets of keys together, by their log-sum-exp.
//!
//! Owns the choice of variant, the parameter list and the launch geometry; the kernel is
//! `kernels/merge_states.ptx`.

use minijinja::context;

use crate::kernel::{Launch, Source, Target, descriptor, parameters};
use crate::{DType, Error};

/// Family and template name.
const FAMILY: &str = "merge_states";

/// The most threads of a block.
const MAX_THREADS: u32 = 256;

/// The most blocks along y and z that CUDA allows.
const MAX_GRID_YZ: u32 = 65_535;

/// Parts whose rows a thread has on their way at a time.
const IN_FLIGHT: u32 = 4;

/// Which variant: fixed when the text is rendered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MergeStatesSpec {
    /// Element type of the parts: f32, f16 or bf16.
    pub part: DType,
    /// Element type of the merged output: f32, f16 or bf16.
    pub out: DType,
    /// Elements of a thread: 1, or as many as fit 16 bytes of a part.
    pub vector: u32,
}

impl MergeStatesSpec {
    /// The fast variant, 16 bytes of a part a thread. Needs every address and stride to be a multiple of
    /// [`MergeStatesSpec::part_alignment`] or [`MergeStatesSpec::out_alignment`] bytes, and a head dimension that
    /// is a multiple of [`MergeStatesSpec::vector`].
    pub const fn vectorised(part: DType, out: DType) -> Self {
        Self { part, out, vector: 16 / part.size() }
    }

    /// The variant for everything else: one element a thread.
    pub const fn scalar(part: DType, out: DType) -> Self {
        Self { part, out, vector: 1 }
    }

    /// Every variant that exists.
    pub fn all() -> impl Iterator<Item = Self> {
        const TYPES: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];
        TYPES.into_iter().flat_map(|part| {
            TYPES.into_iter().flat_map(move |out| [Self::vectorised(part, out), Self::scalar(part, out)])
        })
    }

    /// Bytes to which rows of the parts must be aligned.
    pub const fn part_alignment(self) -> u32 {
        self.vector * self.part.size()
    }

    /// Bytes to which rows of the output must be aligned.
    pub const fn out_alignment(self) -> u32 {
        let bytes = self.vector * self.out.size();
        if bytes < 16 { bytes } else { 16 }
    }

    /// The entry point: `merge_states_f32_bf16_v4`.
    pub fn entry(self) -> String {
        format!("{FAMILY}_{}_{}_v{}", self.part, self.out, self.vector)
    }
}

/// The sizes that decide the grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MergeStatesShape {
    /// Query rows.
    pub rows: u32,
    /// Heads of a row.
    pub heads: u32,
    /// Elements of a head.
    pub head_dim: u32,
}

/// Where rows lie: address, and elements from a row to the next and from a head to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StateRows {
    /// Device address of the first element.
    pub address: u64,
    /// Elements from a row to the next.
    pub row_stride: u64,
    /// Elements from a head to the next.
    pub head_stride: u64,
}

/// What one launch works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MergeStatesArgs {
    /// Sizes; the same as given to [`MergeStates::launch`].
    pub shape: MergeStatesShape,
    /// Parts, at least one.
    pub parts: u32,
    /// Outputs of part 0.
    pub part_out: StateRows,
    /// Elements from a part's outputs to the next's.
    pub part_out_stride: i64,
    /// LSE of part 0, f32.
    pub part_lse: StateRows,
    /// Elements from a part's LSE to the next's.
    pub part_lse_stride: i64,
    /// Merged output.
    pub out: StateRows,
    /// Merged LSE, f32; address 0 for none.
    pub lse: StateRows,
}

parameters! {
    /// The parameter list, the same for all variants.
    const PARAMS of pub fn MergeStatesArgs::values(&self);
    part_out: Pointer = self.part_out.address,
    part_lse: Pointer = self.part_lse.address,
    out: Pointer = self.out.address,
    lse: Pointer = self.lse.address,
    part_out_part_stride: U64 = self.part_out_stride.cast_unsigned(),
    part_out_row_stride: U64 = self.part_out.row_stride,
    part_out_head_stride: U64 = self.part_out.head_stride,
    part_lse_part_stride: U64 = self.part_lse_stride.cast_unsigned(),
    part_lse_row_stride: U64 = self.part_lse.row_stride,
    part_lse_head_stride: U64 = self.part_lse.head_stride,
    out_row_stride: U64 = self.out.row_stride,
    out_head_stride: U64 = self.out.head_stride,
    lse_row_stride: U64 = self.lse.row_stride,
    lse_head_stride: U64 = self.lse.head_stride,
    parts: U32 = self.parts,
    rows: U32 = self.shape.rows,
    heads: U32 = self.shape.heads,
    head_dim: U32 = self.shape.head_dim,
}

descriptor!(
    /// One variant, rendered.
    MergeStates of MergeStatesSpec
);

impl MergeStates {
    /// Renders a variant.
    ///
    /// # Errors
    /// [`Error::UnsupportedTypes`] for an fp8 type, [`Error::UnsupportedVector`] for a vector that is neither 1 nor
    /// 16 bytes of a part.
    pub fn new(spec: MergeStatesSpec) -> Result<Self, Error> {
        let MergeStatesSpec { part, out, vector } = spec;
        if part.is_fp8() || out.is_fp8() {
            return Err(Error::UnsupportedTypes { kernel: FAMILY, source_dtype: part, cache: out });
        }
        let widest = 16 / part.size();
        if vector != 1 && vector != widest {
            return Err(Error::UnsupportedVector { kernel: FAMILY, vector, source_dtype: part, widest });
        }
        let source = Source {
            family: FAMILY,
            text: include_str!("../kernels/merge_states.ptx"),
            params: &PARAMS,
            max_threads: MAX_THREADS,
            static_shared: 0,
            dynamic_shared: 0,
        };
        let variables = context! {
            part_dtype => part.name(),
            part_size => part.size(),
            out_dtype => out.name(),
            out_size => out.size(),
            vector,
            in_flight => IN_FLIGHT,
        };
        Ok(Self { spec, kernel: source.render(spec.entry(), Target::from(80, (7, 4)), variables)? })
    }

    /// Grid and block for a shape: threads run along a head's elements, then heads, then rows.
    ///
    /// # Errors
    /// [`Error::Zero`] for an empty dimension (a call without rows needs no launch), [`Error::NotDivisible`] when
    /// the vector does not divide the head dimension, [`Error::GridTooLarge`] beyond CUDA's limits,
    /// [`Error::TooLarge`] beyond 2³¹ rows.
    pub fn launch(&self, shape: MergeStatesShape) -> Result<Launch, Error> {
        let MergeStatesShape { rows, heads, head_dim } = shape;
        let vector = self.spec.vector;
        for (field, value) in [("rows", rows), ("heads", heads), ("head_dim", head_dim)] {
            if value == 0 {
                return Err(Error::Zero { kernel: FAMILY, field });
            }
        }
        if head_dim % vector != 0 {
            return Err(Error::NotDivisible { kernel: FAMILY, vector, field: "head_dim", value: head_dim });
        }
        let limit = i32::MAX as u32;
        if rows > limit {
            return Err(Error::TooLarge { kernel: FAMILY, field: "rows", value: rows, limit });
        }
        let pieces = head_dim / vector;
        let x = pieces.min(MAX_THREADS);
        let y = heads.min(MAX_THREADS / x);
        // A block has at most 64 threads along z.
        let z = rows.min(MAX_THREADS / (x * y)).min(64);
        let grid = [rows.div_ceil(z), heads.div_ceil(y), pieces.div_ceil(x)];
        for (field, value, needed) in [("heads", heads, grid[1]), ("head_dim", head_dim, grid[2])] {
            if needed > MAX_GRID_YZ {
                return Err(Error::GridTooLarge { kernel: FAMILY, field, value, needed, limit: MAX_GRID_YZ });
            }
        }
        Ok(Launch { grid, block: [x, y, z], dynamic_shared: 0 })
    }
}
