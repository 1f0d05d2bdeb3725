//! `matvec`: products of one to eight rows with a matrix, at the speed at which the matrix can be read; with a norm
//! before, and bias, activation, gate or residual sum behind.
//!
//! Owns the variants, the parameter list and the choice of the geometry; the kernel is `kernels/model/matvec.ptx`.

use minijinja::context;

use super::{
    Activation, COMPUTE_TYPES, MAX_GRID_YZ, NormKind, Rows, Source, check_types, descriptor, suffix,
};
use crate::kernel::{Launch, parameters};
use crate::{DType, Error};

/// Family and template name.
const FAMILY: &str = "matvec";

/// Features of a tile.
pub const TILE: u32 = 8;

/// Rows that one pass over the weights serves.
pub const ROWS: u32 = 8;

/// The most warps of a block; a multiple of [`WARP_STEP`], as every number of warps.
const MAX_WARPS: u32 = 16;

/// Warps come in so many.
const WARP_STEP: u32 = 4;

/// Bytes of a warp's sums of a tile.
const SUM_BYTES: u32 = ROWS * TILE * 4;

/// Bytes of a step of a warp, of both halves of a gated matrix together.
const STEP_BYTES: u32 = 2048;

/// How many steps of a warp may be on their way: what the memory needs, and what it is worth where there is room.
const DEPTHS: [u32; 2] = [2, 4];

/// Loads of x that a thread holds at once when its thread block brings it to shared memory.
const CHUNKS: u32 = 4;

/// Bytes of x up to which a thread block copies it: more takes longer than it saves.
const COPIED_BYTES: u64 = 16 << 10;

/// Dynamic shared memory of a block if nothing else is said: what every GPU from sm_80 on has.
const COMMON_SHARED: u32 = 96 << 10;

/// Which variant: fixed when the text is rendered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MatvecSpec {
    /// Type of the weights.
    pub dtype: DType,
    /// Where x comes from.
    pub input: Input,
    /// Whether the matrix has two halves, gates and what they multiply.
    pub gated: bool,
    /// Elements of a load: 1, or as many as fit 16 bytes.
    pub vector: u32,
    /// Whether it may start before the kernel before it has ended (programmatic dependent launch, sm_90 on).
    pub dependent: bool,
}

/// Where a product's rows come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Input {
    /// Rows of the weights' type, copied to shared memory where there is room, else read where they lie.
    Direct,
    /// f32 rows, normed or not, which each thread block rounds to the weights' type in shared memory. Worth it for one
    /// or two rows; for more, a kernel of its own norms them faster. [`Matvec::launch`] refuses what does not fit.
    Staged,
}

impl MatvecSpec {
    /// Every variant that exists.
    pub fn all() -> impl Iterator<Item = Self> {
        let vectors = |dtype: DType| [16 / dtype.size(), 1].map(|vector| (dtype, vector));
        COMPUTE_TYPES.into_iter().flat_map(vectors).flat_map(|(dtype, vector)| {
            [Input::Direct, Input::Staged].into_iter().flat_map(move |input| {
                [(false, false), (false, true), (true, false), (true, true)].map(|(gated, dependent)| Self {
                    dtype,
                    input,
                    gated,
                    vector,
                    dependent,
                })
            })
        })
    }

    /// The entry point: `matvec_bf16_direct_plain_v8`.
    pub fn entry(self) -> String {
        let input = if self.input == Input::Staged { "staged" } else { "direct" };
        let gated = if self.gated { "gated" } else { "plain" };
        format!("{FAMILY}_{}_{input}_{gated}_v{}{}", self.dtype, self.vector, suffix(self.dependent))
    }

    /// Loads of a row that a lane takes in a step.
    const fn parts(self) -> u32 {
        if self.gated { 2 } else { 4 }
    }

    /// Elements of a row that a warp takes in a step.
    const fn warp_step(self) -> u32 {
        self.parts() * 4 * self.vector
    }

    /// Whether the weights come through shared memory. What is less than 16 bytes is loaded when it is needed.
    const fn has_ring(self) -> bool {
        self.vector > 1
    }

    /// Dynamic shared memory of a block.
    fn shared(self, shape: MatvecShape, geometry: Geometry) -> u64 {
        let Geometry { warps, slots, copies, .. } = geometry;
        let halves = if self.gated { 2 } else { 1 };
        let ring = if self.has_ring() { warps * slots * STEP_BYTES } else { 0 };
        let padded = u64::from(shape.width).next_multiple_of(u64::from(warps * self.warp_step()));
        let size = u64::from(self.dtype.size());
        let gap = if size == 2 { 64 } else { 16 };
        let staged = copies || self.input == Input::Staged;
        let x = if staged { u64::from(shape.rows.min(ROWS)) * (padded * size + gap) } else { 0 };
        u64::from(ring) + x + u64::from(2 * halves * warps * SUM_BYTES)
    }
}

/// The sizes that decide the geometry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MatvecShape {
    /// Rows of x. The weights are read once for every eight.
    pub rows: u32,
    /// Features of the result: of a gated matrix half of its rows.
    pub features: u32,
    /// Elements of a row of x and of the weights.
    pub width: u32,
}

/// What becomes of the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Store {
    /// Stored in the weights' type.
    Compute,
    /// Stored as f32.
    F32,
    /// Added to f32.
    Add,
}

impl Store {
    /// The number by which the kernel knows it.
    const fn code(self) -> u32 {
        match self {
            Self::Compute => 0,
            Self::F32 => 1,
            Self::Add => 2,
        }
    }
}

/// A norm of x before the product.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MatvecNorm {
    /// Which norm.
    pub kind: NormKind,
    /// Added to the mean of the squares.
    pub eps: f32,
    /// Device address of the weight, f32 `[width]`.
    pub weight: u64,
    /// Device address of the bias, f32 `[width]`; 0 for none.
    pub bias: u64,
}

/// What one launch works on: `out = f(norm(x) · weightᵀ + bias)`, for a gated matrix times
/// `norm(x) · upᵀ + bias`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MatvecArgs {
    /// Sizes; the same as given to [`Matvec::launch`].
    pub shape: MatvecShape,
    /// `[rows, width]`: of the weights' type for [`Input::Direct`], f32 for [`Input::Staged`].
    pub x: Rows,
    /// A norm of x; for [`Input::Staged`] only.
    pub norm: Option<MatvecNorm>,
    /// `[features, width]`; gated `[2 · features, width]`, the gates first.
    pub weight: Rows,
    /// Device address of f32 `[features]` (gated: `[2 · features]`); 0 for none.
    pub bias: u64,
    /// The function of the product, or of the gate.
    pub activation: Activation,
    /// What becomes of the result.
    pub store: Store,
    /// `[rows, features]`, of the type that `store` says.
    pub out: Rows,
}

const SOURCE: Source = Source {
    family: FAMILY,
    text: include_str!("../../kernels/model/matvec.ptx"),
    params: &PARAMS,
    max_threads: 32 * MAX_WARPS,
    static_shared: 0,
    dynamic_shared: COMMON_SHARED,
};

parameters! {
    const PARAMS of pub fn MatvecArgs::values(&self, geometry: Geometry);
    x: Pointer = self.x.address,
    weight: Pointer = self.weight.address,
    bias: Pointer = self.bias,
    norm_weight: Pointer = self.norm.map_or(0, |norm| norm.weight),
    norm_bias: Pointer = self.norm.map_or(0, |norm| norm.bias),
    out: Pointer = self.out.address,
    x_stride: U64 = self.x.stride,
    weight_stride: U64 = self.weight.stride,
    out_stride: U64 = self.out.stride,
    rows: U32 = self.shape.rows,
    features: U32 = self.shape.features,
    width: U32 = self.shape.width,
    norm: U32 = self.norm.map_or(0, |norm| if norm.kind == NormKind::Rms { 1 } else { 2 }),
    activation: U32 = self.activation.code(),
    store: U32 = self.store.code(),
    eps: F32 = self.norm.map_or(0.0, |norm| norm.eps),
    slots: U32 = geometry.slots,
    copies: U32 = u32::from(geometry.copies),
}

descriptor! {
    /// One variant, rendered.
    Matvec of MatvecSpec
}

/// How a launch is laid out; [`Matvec::geometry`] chooses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Geometry {
    /// Warps of a block, a multiple of 4 up to 16.
    pub warps: u32,
    /// Blocks, which share the tiles.
    pub blocks: u32,
    /// Steps of a warp that are on their way, 2 or 4.
    pub slots: u32,
    /// Whether rows of [`Input::Direct`] are copied to shared memory.
    pub copies: bool,
}

impl Matvec {
    /// Renders a variant.
    ///
    /// # Errors
    /// [`Error::UnsupportedTypes`] for an fp8 type, [`Error::UnsupportedVector`] for a vector that is neither 1 nor 16
    /// bytes.
    pub fn new(spec: MatvecSpec) -> Result<Self, Error> {
        let MatvecSpec { dtype, input, gated, vector, dependent } = spec;
        check_types(FAMILY, dtype, vector)?;
        let staged = input == Input::Staged;
        let variables = context! {
            dtype => dtype.name(),
            size => dtype.size(),
            vector,
            parts => spec.parts(),
            depths => DEPTHS,
            chunks => CHUNKS,
            staged,
            gated,
            mma => dtype.size() == 2 && vector == 8,
        };
        let source = Source { static_shared: if staged { 256 } else { 0 }, ..SOURCE };
        Ok(Self { spec, kernel: source.kernel(spec.entry(), dependent, variables)? })
    }

    /// The same for a GPU whose thread blocks can have so many bytes of shared memory, when they ask for it.
    #[must_use]
    pub fn with_shared(mut self, bytes: u32) -> Self {
        self.kernel.dynamic_shared = bytes.saturating_sub(self.kernel.static_shared()).max(COMMON_SHARED);
        self
    }

    /// The geometry for a shape on a GPU of so many multiprocessors. `beside` is for a dependent launch behind a kernel whose
    /// thread blocks leave half of a multiprocessor, as attention's do: blocks of fewer warps find room beside them, and
    /// what they ask for first arrives meanwhile.
    pub fn geometry(&self, shape: MatvecShape, multiprocessors: u32, beside: bool) -> Geometry {
        let tiles = shape.features.div_ceil(TILE).max(1);
        // One block a multiprocessor, even where some then have a tile less to do than others.
        let blocks = tiles.min(multiprocessors.max(1));
        // No more warps than have something to do.
        let busy = shape.width.div_ceil(self.spec.warp_step()).next_multiple_of(WARP_STEP).max(WARP_STEP);
        let geometry = |(warps, slots, copies): (u32, u32, bool)| Geometry {
            warps: warps.min(busy),
            blocks,
            slots,
            copies,
        };
        let x_bytes =
            u64::from(shape.rows.min(ROWS)) * u64::from(shape.width) * u64::from(self.spec.dtype.size());
        let may_copy = self.spec.input == Input::Direct && self.spec.has_ring() && x_bytes <= COPIED_BYTES;
        let [short, long] = DEPTHS;
        let fits = |(_, geometry): &(bool, Geometry)| {
            self.spec.shared(shape, *geometry) <= u64::from(self.kernel.dynamic_shared)
        };
        // Many warps and long rings; where staged rows leave no room for those, shorter rings, then fewer warps.
        [
            (beside && may_copy, (MAX_WARPS / 2, long, true)),
            (may_copy, (MAX_WARPS, long, true)),
            (may_copy, (MAX_WARPS, short, true)),
            (true, (MAX_WARPS, long, false)),
            (true, (MAX_WARPS, short, false)),
            (true, (MAX_WARPS / 2, short, false)),
        ]
        .map(|(allowed, choice)| (allowed, geometry(choice)))
        .into_iter()
        .filter(|(allowed, _)| *allowed)
        .find(fits)
        .map_or(geometry((WARP_STEP, short, false)), |(_, geometry)| geometry)
    }

    /// Grid and block for a shape.
    ///
    /// # Errors
    /// [`Error::Zero`] for an empty dimension, [`Error::NotDivisible`] when the vector does not divide the width,
    /// [`Error::TooLarge`] beyond 2³¹ of anything, and where staged rows do not fit into shared memory,
    /// [`Error::GridTooLarge`] beyond half a million rows, [`Error::UnsupportedTuning`] for a geometry out of bounds.
    pub fn launch(&self, shape: MatvecShape, geometry: Geometry) -> Result<Launch, Error> {
        let MatvecShape { rows, features, width } = shape;
        let Geometry { warps, blocks, slots, copies } = geometry;
        let limit = i32::MAX as u32;
        for (field, value) in [("rows", rows), ("features", features), ("width", width), ("blocks", blocks)] {
            if value == 0 {
                return Err(Error::Zero { kernel: FAMILY, field });
            }
            if value > limit {
                return Err(Error::TooLarge { kernel: FAMILY, field, value, limit });
            }
        }
        let vector = self.spec.vector;
        if !width.is_multiple_of(vector) {
            return Err(Error::NotDivisible { kernel: FAMILY, vector, field: "width", value: width });
        }
        if !warps.is_multiple_of(WARP_STEP) || warps == 0 || warps > MAX_WARPS {
            let (what, bounds) = ("warps of a block", "4, 8, 12 or 16");
            return Err(Error::UnsupportedTuning { kernel: FAMILY, what, bounds });
        }
        if !DEPTHS.contains(&slots) {
            return Err(Error::UnsupportedTuning {
                kernel: FAMILY,
                what: "steps on their way",
                bounds: "2 or 4",
            });
        }
        if copies && !(self.spec.has_ring() && self.spec.input == Input::Direct) {
            let (what, bounds) = ("a copy of x", "rows of the weights' type in loads of 16 bytes");
            return Err(Error::UnsupportedTuning { kernel: FAMILY, what, bounds });
        }
        let shared = self.spec.shared(shape, geometry);
        if shared > u64::from(self.kernel.dynamic_shared) {
            let value = u32::try_from(shared).unwrap_or(u32::MAX);
            let limit = self.kernel.dynamic_shared;
            return Err(Error::TooLarge { kernel: FAMILY, field: "bytes of staged rows", value, limit });
        }
        let grid = [blocks, rows.div_ceil(ROWS), 1];
        if grid[1] > MAX_GRID_YZ {
            let (value, needed) = (rows, grid[1]);
            return Err(Error::GridTooLarge {
                kernel: FAMILY,
                field: "rows",
                value,
                needed,
                limit: MAX_GRID_YZ,
            });
        }
        Ok(Launch { grid, block: [32 * warps, 1, 1], dynamic_shared: shared as u32 })
    }
}
