//! `argmax`: the likeliest token of each row of logits.

use minijinja::context;

use super::{PARAM_WORDS, Rows, WORKGROUP_SIZE, read, uniform, write};
use crate::dispatch::workgroups;
use crate::shader::Shader;
use crate::{Error, template};

/// Family, template name and entry point.
const FAMILY: &str = "argmax";

/// The answer for a row in which there is nothing but NaN and −∞.
pub const NO_TOKEN: u32 = u32::MAX;

/// What one dispatch searches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ArgmaxArgs {
    /// Rows.
    pub rows: u32,
    /// Logits of a row.
    pub width: u32,
    /// The logits.
    pub x: Rows,
    /// First id in the output.
    pub out: u32,
}

/// Renders the kernel. Bindings: x, out.
///
/// # Errors
/// [`Error::Template`]: a defect of this crate.
pub fn shader() -> Result<Shader, Error> {
    let variables = context! { name => FAMILY, workgroup_size => WORKGROUP_SIZE };
    let text = template::render(FAMILY, include_str!("../../kernels/model/argmax.wgsl"), variables)?;
    Ok(super::shader(FAMILY, FAMILY.to_owned(), text, vec![uniform(), read(1, "x", 4), write(2, "out")]))
}

impl ArgmaxArgs {
    /// The contents of the uniform buffer.
    pub fn uniform(&self) -> [u32; PARAM_WORDS] {
        let Self { rows, width, x, out } = *self;
        [rows, width, x.offset, x.stride, out, 0, 0, 0, 0, 0, 0, 0]
    }

    /// Workgroups on a device that allows `per_dimension` of them along one axis.
    ///
    /// # Errors
    /// [`Error::Zero`] without rows, [`Error::TooManyWorkgroups`] beyond the device's limit.
    pub fn workgroups(&self, per_dimension: u32) -> Result<[u32; 3], Error> {
        match self.rows {
            0 => Err(Error::Zero { kernel: FAMILY, field: "rows" }),
            rows => workgroups(FAMILY, rows.into(), per_dimension),
        }
    }
}
