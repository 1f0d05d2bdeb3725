//! `norm`: RMSNorm and LayerNorm over rows or parts of rows, such as heads.

use minijinja::context;

use super::{PARAM_WORDS, Rows, WORKGROUP_SIZE, read, shader, uniform, write};
use crate::dispatch::workgroups;
use crate::shader::Shader;
use crate::{Error, template};

/// Family, template name and entry point.
const FAMILY: &str = "norm";

/// Which norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NormKind {
    /// `x / sqrt(mean(x²) + eps) · weight` (Zhang and Sennrich 2019).
    Rms,
    /// `(x - mean(x)) / sqrt(variance(x) + eps) · weight + bias` (Ba et al. 2016).
    Layer,
}

/// A variant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NormSpec {
    /// Which norm.
    pub kind: NormKind,
    /// Into the tensor itself: then there is no binding x.
    pub in_place: bool,
}

/// What one dispatch norms.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormArgs {
    /// Rows.
    pub rows: u32,
    /// Parts of a row, one behind the other, each normed by itself.
    pub parts: u32,
    /// Elements of a part.
    pub width: u32,
    /// Keeps a row without variance finite.
    pub eps: f32,
    /// `x`; ignored in place.
    pub x: Rows,
    /// `out`.
    pub out: Rows,
    /// First element of the weight.
    pub weight: u32,
    /// First element of the bias, which LayerNorm has.
    pub bias: u32,
}

impl NormSpec {
    /// The variant's name.
    pub fn name(&self) -> String {
        let kind = match self.kind {
            NormKind::Rms => "rms",
            NormKind::Layer => "layer",
        };
        format!("{FAMILY}_{kind}{}", if self.in_place { "_in_place" } else { "" })
    }

    /// Renders the variant. Bindings: weight, bias (LayerNorm), x (not in place), out.
    ///
    /// # Errors
    /// [`Error::Template`]: a defect of this crate.
    pub fn shader(&self) -> Result<Shader, Error> {
        let kind = match self.kind {
            NormKind::Rms => "rms",
            NormKind::Layer => "layer",
        };
        let variables = context! {
            name => self.name(),
            kind,
            in_place => self.in_place,
            workgroup_size => WORKGROUP_SIZE,
        };
        let text = template::render(FAMILY, include_str!("../../kernels/model/norm.wgsl"), variables)?;
        let mut bindings = vec![uniform(), read(1, "weight", 4)];
        bindings.extend((self.kind == NormKind::Layer).then(|| read(2, "bias", 4)));
        bindings.extend((!self.in_place).then(|| read(3, "x", 4)));
        bindings.push(write(4, "out"));
        Ok(shader(FAMILY, self.name(), text, bindings))
    }
}

impl NormArgs {
    /// The contents of the uniform buffer.
    pub fn uniform(&self) -> [u32; PARAM_WORDS] {
        let Self { rows, parts, width, eps, x, out, weight, bias } = *self;
        let count = rows.saturating_mul(parts);
        [count, parts, width, eps.to_bits(), x.offset, x.stride, out.offset, out.stride, weight, bias, 0, 0]
    }

    /// Workgroups on a device that allows `per_dimension` of them along one axis.
    ///
    /// # Errors
    /// [`Error::Zero`] for an empty dimension, [`Error::TooManyWorkgroups`] beyond the device's limit.
    pub fn workgroups(&self, per_dimension: u32) -> Result<[u32; 3], Error> {
        for (field, value) in [("rows", self.rows), ("parts", self.parts), ("width", self.width)] {
            if value == 0 {
                return Err(Error::Zero { kernel: FAMILY, field });
            }
        }
        workgroups(FAMILY, u64::from(self.rows) * u64::from(self.parts), per_dimension)
    }
}
