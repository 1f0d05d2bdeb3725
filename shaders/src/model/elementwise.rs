//! `elementwise`: activations, with and without a factor, sums, scaling and the soft cap.

use minijinja::context;

use super::{PARAM_WORDS, Rows, WORKGROUP_SIZE, element_workgroups, read, shader, uniform, write};
use crate::shader::Shader;
use crate::{Error, template};

/// Family, template name and entry point.
const FAMILY: &str = "elementwise";

/// A function of one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Function {
    /// `x · sigmoid(x)`
    Silu,
    /// `x · Φ(x)` (Hendrycks and Gimpel 2016)
    Gelu,
    /// Its approximation by the hyperbolic tangent.
    GeluTanh,
    /// `max(x, 0)`
    Relu,
}

/// A variant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Elementwise {
    /// `out = f(x)`
    Activate(Function),
    /// `out = f(x) · y` (Shazeer 2020)
    Gated(Function),
    /// `out += x`
    Add,
    /// `out *= factor`
    Scale,
    /// `out = factor · tanh(out / factor)`
    Softcap,
}

/// What one dispatch works on. A variant without x or y ignores where they are.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ElementwiseArgs {
    /// Rows.
    pub rows: u32,
    /// Elements of a row.
    pub width: u32,
    /// `x`
    pub x: Rows,
    /// `y`
    pub y: Rows,
    /// `out`
    pub out: Rows,
    /// Of scaling and the soft cap.
    pub factor: f32,
}

impl Elementwise {
    /// All variants.
    pub const ALL: [Self; 11] = [
        Self::Activate(Function::Silu),
        Self::Activate(Function::Gelu),
        Self::Activate(Function::GeluTanh),
        Self::Activate(Function::Relu),
        Self::Gated(Function::Silu),
        Self::Gated(Function::Gelu),
        Self::Gated(Function::GeluTanh),
        Self::Gated(Function::Relu),
        Self::Add,
        Self::Scale,
        Self::Softcap,
    ];

    fn op(self) -> &'static str {
        match self {
            Self::Activate(function) | Self::Gated(function) => match function {
                Function::Silu => "silu",
                Function::Gelu => "gelu",
                Function::GeluTanh => "gelu_tanh",
                Function::Relu => "relu",
            },
            Self::Add => "add",
            Self::Scale => "scale",
            Self::Softcap => "softcap",
        }
    }

    fn gated(self) -> bool {
        matches!(self, Self::Gated(_))
    }

    /// The variant's name.
    pub fn name(self) -> String {
        format!("{FAMILY}_{}{}", self.op(), if self.gated() { "_gated" } else { "" })
    }

    /// Renders the variant. Bindings: x (activations and sums), y (gated), out.
    ///
    /// # Errors
    /// [`Error::Template`]: a defect of this crate.
    pub fn shader(self) -> Result<Shader, Error> {
        let op = self.op();
        let formula = match self {
            Self::Activate(_) => format!("out = {op}(x)"),
            Self::Gated(_) => format!("out = {op}(x) * y"),
            Self::Add => "out += x".to_owned(),
            Self::Scale => "out *= factor".to_owned(),
            Self::Softcap => "out = factor * tanh(out / factor)".to_owned(),
        };
        let variables = context! {
            name => self.name(),
            op,
            gated => self.gated(),
            formula,
            workgroup_size => WORKGROUP_SIZE,
        };
        let text = template::render(FAMILY, include_str!("../../kernels/model/elementwise.wgsl"), variables)?;
        let mut bindings = vec![uniform()];
        bindings.extend((!matches!(self, Self::Scale | Self::Softcap)).then(|| read(1, "x", 4)));
        bindings.extend(self.gated().then(|| read(2, "y", 4)));
        bindings.push(write(3, "out"));
        Ok(shader(FAMILY, self.name(), text, bindings))
    }
}

impl ElementwiseArgs {
    /// The contents of the uniform buffer.
    pub fn uniform(&self) -> [u32; PARAM_WORDS] {
        let Self { rows, width, x, y, out, factor } = *self;
        [
            rows,
            width,
            x.offset,
            x.stride,
            y.offset,
            y.stride,
            out.offset,
            out.stride,
            factor.to_bits(),
            0,
            0,
            0,
        ]
    }

    /// Workgroups on a device that allows `per_dimension` of them along one axis.
    ///
    /// # Errors
    /// [`Error::Zero`] for an empty dimension, [`Error::TooManyWorkgroups`] beyond the device's limit.
    pub fn workgroups(&self, per_dimension: u32) -> Result<[u32; 3], Error> {
        for (field, value) in [("rows", self.rows), ("width", self.width)] {
            if value == 0 {
                return Err(Error::Zero { kernel: FAMILY, field });
            }
        }
        element_workgroups(FAMILY, u64::from(self.rows) * u64::from(self.width), per_dimension)
    }
}
