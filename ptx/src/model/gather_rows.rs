//! `gather_rows`: rows of an f32 tensor, by number or all of them, rounded to another type where that is wanted.
//!
//! Owns the variants, the parameter list and the geometry; the kernel is `kernels/model/gather_rows.ptx`.

use minijinja::context;

use super::{COMPUTE_TYPES, ELEMENTWISE_THREADS, Rows, Source, check_types, descriptor, elementwise, suffix};
use crate::kernel::{Launch, parameters};
use crate::{DType, Error};

/// Family and template name.
const FAMILY: &str = "gather_rows";

/// Which variant: fixed when the text is rendered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GatherRowsSpec {
    /// Type of the result.
    pub out: DType,
    /// Elements of a thread: 1 or 4.
    pub vector: u32,
    /// Whether it may start before the kernel before it has ended (programmatic dependent launch, sm_90 on).
    pub dependent: bool,
}

impl GatherRowsSpec {
    /// Every variant that exists.
    pub fn all() -> impl Iterator<Item = Self> {
        COMPUTE_TYPES
            .into_iter()
            .flat_map(|out| [4, 1].map(|vector| (out, vector)))
            .flat_map(|(out, vector)| [false, true].map(|dependent| Self { out, vector, dependent }))
    }

    /// The entry point: `gather_rows_f32_bf16_v4`.
    pub fn entry(self) -> String {
        format!("{FAMILY}_f32_{}_v{}{}", self.out, self.vector, suffix(self.dependent))
    }
}

/// What one launch works on: `out[i] = x[index i]`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct GatherRowsArgs {
    /// Rows of the result.
    pub rows: u32,
    /// Elements of a row.
    pub width: u32,
    /// f32 `[x_rows, width]`
    pub x: Rows,
    /// Rows of `x`.
    pub x_rows: u32,
    /// Device address of the numbers, i32 `[rows]`; one outside of `x` gives a row of NaN. 0: row `i` is that of `x`.
    pub index: u64,
    /// `[rows, width]`
    pub out: Rows,
}

const SOURCE: Source = Source {
    family: FAMILY,
    text: include_str!("../../kernels/model/gather_rows.ptx"),
    params: &PARAMS,
    max_threads: ELEMENTWISE_THREADS,
    static_shared: 0,
    dynamic_shared: 0,
};

parameters! {
    const PARAMS of pub fn GatherRowsArgs::values(&self);
    x: Pointer = self.x.address,
    index: Pointer = self.index,
    out: Pointer = self.out.address,
    x_stride: U64 = self.x.stride,
    out_stride: U64 = self.out.stride,
    rows: U32 = self.rows,
    width: U32 = self.width,
    x_rows: U32 = self.x_rows,
}

descriptor! {
    /// One variant, rendered.
    GatherRows of GatherRowsSpec
}

impl GatherRows {
    /// Renders a variant.
    ///
    /// # Errors
    /// [`Error::UnsupportedTypes`] for an fp8 type, [`Error::UnsupportedVector`] for a vector that is neither 1 nor 4.
    pub fn new(spec: GatherRowsSpec) -> Result<Self, Error> {
        let GatherRowsSpec { out, vector, dependent } = spec;
        check_types(FAMILY, out, 1)?;
        check_types(FAMILY, DType::F32, vector)?;
        Ok(Self {
            spec,
            kernel: SOURCE.kernel(
                spec.entry(),
                dependent,
                context! { dtype => out.name(), size => out.size(), vector },
            )?,
        })
    }

    /// Grid and block for so many rows of so many elements.
    ///
    /// # Errors
    /// [`Error::Zero`] for an empty dimension, [`Error::NotDivisible`] when the vector does not divide the width,
    /// [`Error::TooLarge`] and [`Error::GridTooLarge`] beyond what 32-bit numbers and CUDA allow.
    pub fn launch(&self, rows: u32, width: u32) -> Result<Launch, Error> {
        elementwise(FAMILY, rows, width, self.spec.vector)
    }
}
