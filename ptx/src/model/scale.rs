//! `scale`: a factor and a soft cap, in place.
//!
//! Owns the variants, the parameter list and the geometry; the kernel is `kernels/model/scale.ptx`.

use minijinja::context;

use super::{ELEMENTWISE_THREADS, Rows, Source, check_types, descriptor, elementwise, param, suffix};
use crate::kernel::{Arg, Launch, ParamType};
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
    params: &{
        use ParamType::{F32, Pointer, U32, U64};
        [
            param("x", Pointer),
            param("x_stride", U64),
            param("rows", U32),
            param("width", U32),
            param("factor", F32),
            param("cap", F32),
        ]
    },
    max_threads: ELEMENTWISE_THREADS,
    static_shared: 0,
    dynamic_shared: 0,
};

impl ScaleArgs {
    /// The values of the parameters, in launch order.
    pub fn values(&self) -> [Arg; 6] {
        [
            Arg::pointer(self.x.address),
            Arg::u64(self.x.stride),
            Arg::u32(self.rows),
            Arg::u32(self.width),
            Arg::f32(self.factor),
            Arg::f32(self.cap),
        ]
    }
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
