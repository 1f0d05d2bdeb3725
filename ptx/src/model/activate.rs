//! `activate`: a bias, an activation and a factor, element by element: activations, gated activations, biases.
//!
//! Owns the variants, the parameter list and the geometry; the kernel is `kernels/model/activate.ptx`.

use minijinja::context;

use super::{
    Activation, ELEMENTWISE_THREADS, Rows, Source, check_types, descriptor, elementwise, suffix,
    types_and_vectors,
};
use crate::kernel::{Launch, parameters};
use crate::{DType, Error};

/// Family and template name.
const FAMILY: &str = "activate";

/// Which variant: fixed when the text is rendered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ActivateSpec {
    /// Type of all tensors but the bias.
    pub dtype: DType,
    /// Elements of a thread: 1, or as many as fit 16 bytes.
    pub vector: u32,
    /// Whether it may start before the kernel before it has ended (programmatic dependent launch, sm_90 on).
    pub dependent: bool,
}

impl ActivateSpec {
    /// Every variant that exists.
    pub fn all() -> impl Iterator<Item = Self> {
        types_and_vectors().map(|(dtype, vector, dependent)| Self { dtype, vector, dependent })
    }

    /// The entry point: `activate_bf16_v8`.
    pub fn entry(self) -> String {
        format!("{FAMILY}_{}_v{}{}", self.dtype, self.vector, suffix(self.dependent))
    }
}

/// What one launch works on: `out = f(x + bias) · up`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ActivateArgs {
    /// Rows.
    pub rows: u32,
    /// Elements of a row.
    pub width: u32,
    /// The function.
    pub activation: Activation,
    /// `[rows, width]`
    pub x: Rows,
    /// Device address of f32 `[width]`; 0 for none.
    pub bias: u64,
    /// `[rows, width]`; address 0 for none.
    pub up: Rows,
    /// `[rows, width]`; may be `x` or `up`.
    pub out: Rows,
}

const SOURCE: Source = Source {
    family: FAMILY,
    text: include_str!("../../kernels/model/activate.ptx"),
    params: &PARAMS,
    max_threads: ELEMENTWISE_THREADS,
    static_shared: 0,
    dynamic_shared: 0,
};

parameters! {
    const PARAMS of pub fn ActivateArgs::values(&self);
    x: Pointer = self.x.address,
    bias: Pointer = self.bias,
    up: Pointer = self.up.address,
    out: Pointer = self.out.address,
    x_stride: U64 = self.x.stride,
    up_stride: U64 = self.up.stride,
    out_stride: U64 = self.out.stride,
    rows: U32 = self.rows,
    width: U32 = self.width,
    activation: U32 = self.activation.code(),
}

descriptor! {
    /// One variant, rendered.
    Activate of ActivateSpec
}

impl Activate {
    /// Renders a variant.
    ///
    /// # Errors
    /// [`Error::UnsupportedTypes`] for an fp8 type, [`Error::UnsupportedVector`] for a vector that is neither 1 nor 16
    /// bytes.
    pub fn new(spec: ActivateSpec) -> Result<Self, Error> {
        let ActivateSpec { dtype, vector, dependent } = spec;
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
