//! `scale`: a factor and a soft cap, in place.
//!
//! Owns the variants, the parameter list and the geometry; the kernel is `kernels/model/scale.ptx`.

use minijinja::context;

use super::{ELEMENTWISE_THREADS, Rows, Source, check_types, descriptor, elementwise, suffix};
use crate::kernel::{Launch, parameters};
use crate::{DType, Error};

/// Family and template name.
const FAMILY: &str = "scale";

/// Which variant: fixed when the text is rendered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ScaleSpec {
    /// Elements of a thread: 1 or 4.
    pub vector: u32,
    /// Whether it may start before the kernel before it has ended (programmatic dependent launch, sm_90 on).
    pub dependent: bool,
}

impl ScaleSpec {
    /// Every variant that exists.
    pub fn all() -> impl Iterator<Item = Self> {
        [4, 1].into_iter().flat_map(|vector| [false, true].map(|dependent| Self { vector, dependent }))
    }

    /// The entry point: `scale_f32_v4`.
    pub fn entry(self) -> String {
        format!("{FAMILY}_f32_v{}{}", self.vector, suffix(self.dependent))
    }
}

/// What one launch works on: `x = cap · tanh(x · factor / cap)`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ScaleArgs {
    /// Rows.
    pub rows: u32,
    /// Elements of a row.
    pub width: u32,
    /// f32 `[rows, width]`
    pub x: Rows,
    /// Factor.
    pub factor: f32,
    /// Soft cap; 0 for none.
    pub cap: f32,
}

const SOURCE: Source = Source {
    family: FAMILY,
    text: include_str!("../../kernels/model/scale.ptx"),
    params: &PARAMS,
    max_threads: ELEMENTWISE_THREADS,
    static_shared: 0,
    dynamic_shared: 0,
};

parameters! {
    const PARAMS of pub fn ScaleArgs::values(&self);
    x: Pointer = self.x.address,
    x_stride: U64 = self.x.stride,
    rows: U32 = self.rows,
    width: U32 = self.width,
    factor: F32 = self.factor,
    cap: F32 = self.cap,
}

descriptor! {
    /// One variant, rendered.
    Scale of ScaleSpec
}

impl Scale {
    /// Renders a variant.
    ///
    /// # Errors
    /// [`Error::UnsupportedVector`] for a vector that is neither 1 nor 4.
    pub fn new(spec: ScaleSpec) -> Result<Self, Error> {
        let ScaleSpec { vector, dependent } = spec;
        check_types(FAMILY, DType::F32, vector)?;
        Ok(Self { spec, kernel: SOURCE.kernel(spec.entry(), dependent, context! { vector })? })
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
