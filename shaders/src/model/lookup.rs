//! `lookup`: rows of a table by their numbers: embeddings, learned positions, the rows whose logits are wanted.

use minijinja::context;

use super::{PARAM_WORDS, Rows, WORKGROUP_SIZE, element_workgroups, read, shader, uniform, write};
use crate::shader::Shader;
use crate::{DType, Error, template};

/// Family, template name and entry point.
const FAMILY: &str = "lookup";

/// A variant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LookupSpec {
    /// Element type of the table.
    pub dtype: DType,
    /// Whether rows are added to what is there.
    pub adds: bool,
}

/// What one dispatch looks up: `out[r] = table[numbers[r] + number_offset - first_row]` where that row is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LookupArgs {
    /// Rows of `out`.
    pub rows: u32,
    /// Elements of a row.
    pub width: u32,
    /// First of the numbers.
    pub numbers: u32,
    /// Added to each number.
    pub number_offset: u32,
    /// The table's first row is this one of a larger table.
    pub first_row: u32,
    /// Rows of the table.
    pub table_rows: u32,
    /// The table.
    pub table: Rows,
    /// `out`.
    pub out: Rows,
}

impl LookupSpec {
    /// The variant's name.
    pub fn name(&self) -> String {
        format!("{FAMILY}{}_{}", if self.adds { "_add" } else { "" }, self.dtype)
    }

    /// Renders the variant. Bindings: numbers, table, out.
    ///
    /// # Errors
    /// [`Error::Template`]: a defect of this crate.
    pub fn shader(&self) -> Result<Shader, Error> {
        let variables = context! {
            name => self.name(),
            dtype => self.dtype.name(),
            adds => self.adds,
            workgroup_size => WORKGROUP_SIZE,
        };
        let text = template::render(FAMILY, include_str!("../../kernels/model/lookup.wgsl"), variables)?;
        let bindings = vec![uniform(), read(1, "numbers", 4), read(2, "table", 4), write(3, "out")];
        Ok(shader(FAMILY, self.name(), text, bindings))
    }
}

impl LookupArgs {
    /// The contents of the uniform buffer.
    pub fn uniform(&self) -> [u32; PARAM_WORDS] {
        let Self { rows, width, numbers, number_offset, first_row, table_rows, table, out } = *self;
        [
            rows,
            width,
            numbers,
            number_offset,
            first_row,
            table_rows,
            table.offset,
            table.stride,
            out.offset,
            out.stride,
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
