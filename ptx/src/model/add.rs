//! `add`: adds a tensor, a bias or both to the residual stream.
//!
//! Owns the variants, the parameter list and the geometry; the kernel is `kernels/model/add.ptx`.

use minijinja::context;

use super::{
    ELEMENTWISE_THREADS, Rows, Source, check_types, descriptor, elementwise, suffix, types_and_vectors,
};
use crate::kernel::{Launch, parameters};
use crate::{DType, Error};

/// Family and template name.
const FAMILY: &str = "add";

/// Which variant: fixed when the text is rendered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AddSpec {
    /// Type of what is added.
    pub dtype: DType,
    /// Elements of a thread: 1, or as many as fit 16 bytes.
    pub vector: u32,
    /// Whether it may start before the kernel before it has ended (programmatic dependent launch, sm_90 on).
    pub dependent: bool,
}

impl AddSpec {
    /// Every variant that exists.
    pub fn all() -> impl Iterator<Item = Self> {
        types_and_vectors().map(|(dtype, vector, dependent)| Self { dtype, vector, dependent })
    }

    /// The entry point: `add_bf16_v8`.
    pub fn entry(self) -> String {
        format!("{FAMILY}_{}_v{}{}", self.dtype, self.vector, suffix(self.dependent))
    }
}

/// What one launch works on: `x += y + bias`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct AddArgs {
    /// Rows.
    pub rows: u32,
    /// Elements of a row.
    pub width: u32,
    /// f32 `[rows, width]`
    pub x: Rows,
    /// `[rows, width]`; address 0 for none.
    pub y: Rows,
    /// Device address of f32 `[width]`; 0 for none.
    pub bias: u64,
}

const SOURCE: Source = Source {
    family: FAMILY,
    text: include_str!("../../kernels/model/add.ptx"),
    params: &PARAMS,
    max_threads: ELEMENTWISE_THREADS,
    static_shared: 0,
    dynamic_shared: 0,
};

parameters! {
    const PARAMS of pub fn AddArgs::values(&self);
    x: Pointer = self.x.address,
    y: Pointer = self.y.address,
    bias: Pointer = self.bias,
    x_stride: U64 = self.x.stride,
    y_stride: U64 = self.y.stride,
    rows: U32 = self.rows,
    width: U32 = self.width,
}

descriptor! {
    /// One variant, rendered.
    Add of AddSpec
}

impl Add {
    /// Renders a variant.
    ///
    /// # Errors
    /// [`Error::UnsupportedTypes`] for an fp8 type, [`Error::UnsupportedVector`] for a vector that is neither 1 nor 16
    /// bytes.
    pub fn new(spec: AddSpec) -> Result<Self, Error> {
        let AddSpec { dtype, vector, dependent } = spec;
        check_types(FAMILY, dtype, vector)?;
        let variables = context! { dtype => dtype.name(), size => dtype.size(), vector };
        Ok(Self { spec, kernel: SOURCE.kernel(spec.entry(), dependent, variables)? })
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
