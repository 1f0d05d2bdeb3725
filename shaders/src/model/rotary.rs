//! `rotary`: rotary position embedding of heads in place.

use minijinja::context;

use super::{PARAM_WORDS, Rows, WORKGROUP_SIZE, element_workgroups, read, uniform, write};
use crate::shader::Shader;
use crate::{Error, template};

/// Family, template name and entry point.
const FAMILY: &str = "rotary";

/// What one dispatch rotates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RotaryArgs {
    /// Rows.
    pub rows: u32,
    /// Heads of a row.
    pub heads: u32,
    /// Elements of a head.
    pub head_dim: u32,
    /// Pairs of a head that are rotated.
    pub half: u32,
    /// The heads.
    pub x: Rows,
}

/// Renders the kernel. Bindings: cos_sin, x.
///
/// # Errors
/// [`Error::Template`]: a defect of this crate.
pub fn shader() -> Result<Shader, Error> {
    let variables = context! { name => FAMILY, workgroup_size => WORKGROUP_SIZE };
    let text = template::render(FAMILY, include_str!("../../kernels/model/rotary.wgsl"), variables)?;
    let bindings = vec![uniform(), read(1, "cos_sin", 4), write(2, "x")];
    Ok(super::shader(FAMILY, FAMILY.to_owned(), text, bindings))
}

impl RotaryArgs {
    /// The contents of the uniform buffer.
    pub fn uniform(&self) -> [u32; PARAM_WORDS] {
        let Self { rows, heads, head_dim, half, x } = *self;
        [rows, heads, head_dim, half, x.offset, x.stride, 0, 0, 0, 0, 0, 0]
    }

    /// Workgroups on a device that allows `per_dimension` of them along one axis.
    ///
    /// # Errors
    /// [`Error::Zero`] for an empty dimension, [`Error::TooManyWorkgroups`] beyond the device's limit.
    pub fn workgroups(&self, per_dimension: u32) -> Result<[u32; 3], Error> {
        for (field, value) in [("rows", self.rows), ("heads", self.heads), ("half", self.half)] {
            if value == 0 {
                return Err(Error::Zero { kernel: FAMILY, field });
            }
        }
        let pairs = u64::from(self.rows) * u64::from(self.heads) * u64::from(self.half);
        element_workgroups(FAMILY, pairs, per_dimension)
    }
}
