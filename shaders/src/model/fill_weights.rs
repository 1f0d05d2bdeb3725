//! `fill_weights`: random weights made on the device, for engines that are measured without a model.

use minijinja::context;

use super::{PARAM_WORDS, Rows, WORKGROUP_SIZE, element_workgroups, uniform, write};
use crate::shader::Shader;
use crate::{DType, Error, template};

/// Family, template name and entry point.
const FAMILY: &str = "fill_weights";

/// A variant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FillWeightsSpec {
    /// Element type of the weights.
    pub dtype: DType,
}

/// What one dispatch makes: `out[r, c] = center + spread · u(seed, first + r · width + c)`, and zeros behind each row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FillWeightsArgs {
    /// Rows.
    pub rows: u32,
    /// Elements of a row.
    pub width: u32,
    /// Where rows lie, in elements; of 16 bits, both even.
    pub out: Rows,
    /// Number of the first element within its tensor.
    pub first: u64,
    /// Seed; another one for each tensor.
    pub seed: u64,
    /// Middle of the range.
    pub center: f32,
    /// Half of the range. Where the middle is not 0, a power of two: its product is exact then, so that it is the same
    /// on devices that round it and on those that do not.
    pub spread: f32,
}

impl FillWeightsSpec {
    /// The variant's name.
    pub fn name(&self) -> String {
        format!("{FAMILY}_{}", self.dtype)
    }

    /// Renders the variant. Binding: out.
    ///
    /// # Errors
    /// [`Error::Template`]: a defect of this crate.
    pub fn shader(&self) -> Result<Shader, Error> {
        let variables =
            context! { name => self.name(), dtype => self.dtype.name(), workgroup_size => WORKGROUP_SIZE };
        let text =
            template::render(FAMILY, include_str!("../../kernels/model/fill_weights.wgsl"), variables)?;
        Ok(super::shader(FAMILY, self.name(), text, vec![uniform(), write(1, "out")]))
    }

    fn per_word(&self) -> u32 {
        4 / self.dtype.size()
    }

    fn words(&self, args: &FillWeightsArgs) -> u64 {
        (u64::from(args.rows) * u64::from(args.out.stride)).div_ceil(self.per_word().into())
    }

    /// The contents of the uniform buffer.
    ///
    /// # Errors
    /// [`Error::NotDivisible`] if rows do not begin at words.
    pub fn uniform(&self, args: &FillWeightsArgs) -> Result<[u32; PARAM_WORDS], Error> {
        let FillWeightsArgs { width, out, first, seed, center, spread, .. } = *args;
        let unit = match args.rows {
            1 => 1,
            _ => self.per_word(),
        };
        if !out.stride.is_multiple_of(unit) {
            let value = out.stride.into();
            return Err(Error::NotDivisible { kernel: FAMILY, field: "out.stride", value, unit });
        }
        if !out.offset.is_multiple_of(self.per_word()) {
            let (value, unit) = (out.offset.into(), self.per_word());
            return Err(Error::NotDivisible { kernel: FAMILY, field: "out.offset", value, unit });
        }
        let words = u32::try_from(self.words(args)).unwrap_or(u32::MAX);
        Ok([
            words,
            width,
            out.stride,
            out.offset / self.per_word(),
            first as u32,
            (first >> 32) as u32,
            seed as u32,
            (seed >> 32) as u32,
            center.to_bits(),
            spread.to_bits(),
            0,
            0,
        ])
    }

    /// Workgroups on a device that allows `per_dimension` of them along one axis.
    ///
    /// # Errors
    /// [`Error::Zero`] for an empty dimension, [`Error::TooManyWorkgroups`] beyond the device's limit,
    /// [`Error::TooLarge`] beyond 32-bit indices.
    pub fn workgroups(&self, args: &FillWeightsArgs, per_dimension: u32) -> Result<[u32; 3], Error> {
        for (field, value) in [("rows", args.rows), ("width", args.width)] {
            if value == 0 {
                return Err(Error::Zero { kernel: FAMILY, field });
            }
        }
        element_workgroups(FAMILY, self.words(args), per_dimension)
    }
}
