//! `matvec` and `linear`: products of rows with a matrix, for few rows and for many.
//!
//! Owns the variants, which of them suits how many rows, the parameters and the number of workgroups; the kernels are
//! `kernels/model/matvec.wgsl` and `kernels/model/linear.wgsl`.

use minijinja::context;

use super::{PARAM_WORDS, Rows, WORKGROUP_SIZE, read, shader, uniform, write};
use crate::shader::Shader;
use crate::{DType, Error, template};

/// Lanes of `matvec` that share a feature.
const LANES: u32 = 32;
/// Features that they compute side by side: what they read of `x` serves all of them.
const TEAM_FEATURES: u32 = 4;
/// Features of a tile of `linear`.
const TILE_FEATURES: u32 = 64;

/// The form of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// `matvec` with so many rows a workgroup: 1, 2, 4 or 8.
    Few(u32),
    /// `linear` in tiles of so many rows: 16, 32 or 64.
    Tiled(u32),
}

impl Form {
    /// All forms.
    pub const ALL: [Self; 7] = [
        Self::Few(1),
        Self::Few(2),
        Self::Few(4),
        Self::Few(8),
        Self::Tiled(16),
        Self::Tiled(32),
        Self::Tiled(64),
    ];

    /// The form for so many rows: the smallest that holds them at once, else the largest.
    pub fn for_rows(rows: u32) -> Self {
        match rows {
            ..=8 => Self::Few(rows.max(1).next_power_of_two()),
            9..=16 => Self::Tiled(16),
            17..=32 => Self::Tiled(32),
            _ => Self::Tiled(64),
        }
    }

    /// Rows of a workgroup.
    fn rows(self) -> u32 {
        match self {
            Self::Few(rows) | Self::Tiled(rows) => rows,
        }
    }

    /// Features of a workgroup.
    fn features(self) -> u32 {
        match self {
            Self::Few(_) => TEAM_FEATURES * WORKGROUP_SIZE / LANES,
            Self::Tiled(_) => TILE_FEATURES,
        }
    }

    fn family(self) -> &'static str {
        match self {
            Self::Few(_) => "matvec",
            Self::Tiled(_) => "linear",
        }
    }
}

/// A variant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ProductSpec {
    /// Element type of the weight.
    pub dtype: DType,
    /// Few rows or tiles.
    pub form: Form,
}

/// What one dispatch computes: `out = x · transpose(weight) + bias`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ProductArgs {
    /// Rows of `x`.
    pub rows: u32,
    /// Width of `x`.
    pub in_features: u32,
    /// Width of `out`.
    pub out_features: u32,
    /// `x`: offset and stride are multiples of 8 elements, and a row's vectors are there to its end.
    pub x: Rows,
    /// The weight: offset and stride are multiples of 8 elements; a row is filled up with zeros to such a multiple.
    pub weight: Rows,
    /// First element of the bias, if there is one.
    pub bias: Option<u32>,
    /// `out`.
    pub out: Rows,
    /// Add to what is in `out`.
    pub accumulate: bool,
}

impl ProductSpec {
    /// The variant's name.
    pub fn name(&self) -> String {
        format!("{}_{}_{}", self.form.family(), self.dtype, self.form.rows())
    }

    /// Renders the variant. Bindings: x, weight, bias, out.
    ///
    /// # Errors
    /// [`Error::NoSuchVariant`] for a form that is not among [`Form::ALL`].
    pub fn shader(&self) -> Result<Shader, Error> {
        let family = self.form.family();
        if !Form::ALL.contains(&self.form) {
            return Err(Error::NoSuchVariant { kernel: family, name: self.name() });
        }
        let (text, weight_size) = match self.form {
            Form::Few(rows) => {
                let variables = context! {
                    name => self.name(),
                    dtype => self.dtype.name(),
                    rows,
                    features => TEAM_FEATURES,
                    lanes => LANES,
                    teams => WORKGROUP_SIZE / LANES,
                    workgroup_size => WORKGROUP_SIZE,
                };
                (template::render(family, include_str!("../../kernels/model/matvec.wgsl"), variables)?, 16)
            }
            Form::Tiled(tile_rows) => {
                let variables = context! {
                    name => self.name(),
                    dtype => self.dtype.name(),
                    tile_rows,
                    tile_features => TILE_FEATURES,
                    workgroup_size => WORKGROUP_SIZE,
                };
                let text = include_str!("../../kernels/model/linear.wgsl");
                (template::render(family, text, variables)?, 4 * self.dtype.size())
            }
        };
        let bindings = vec![
            uniform(),
            read(1, "x", 16),
            read(2, "weight", weight_size),
            read(3, "bias", 4),
            write(4, "out"),
        ];
        Ok(shader(family, self.name(), text, bindings))
    }

    /// The contents of the uniform buffer.
    ///
    /// # Errors
    /// [`Error::NotDivisible`] for an offset or stride that is not whole vectors.
    pub fn uniform(&self, args: &ProductArgs) -> Result<[u32; PARAM_WORDS], Error> {
        let family = self.form.family();
        let unit = match self.form {
            Form::Few(_) => 16 / self.dtype.size(),
            Form::Tiled(_) => 4,
        };
        let [x_offset, x_stride] = args.x.in_units(family, ["x.offset", "x.stride"], 4)?;
        let [weight_offset, weight_stride] =
            args.weight.in_units(family, ["weight.offset", "weight.stride"], unit)?;
        let flags = u32::from(args.bias.is_some()) | u32::from(args.accumulate) << 1;
        Ok([
            args.rows,
            args.in_features,
            args.out_features,
            x_offset,
            x_stride,
            weight_offset,
            weight_stride,
            args.bias.unwrap_or(0),
            args.out.offset,
            args.out.stride,
            flags,
            0,
        ])
    }

    /// Workgroups on a device that allows `per_dimension` of them along one axis.
    ///
    /// # Errors
    /// [`Error::Zero`] for an empty dimension, [`Error::TooManyWorkgroups`] beyond the device's limit.
    pub fn workgroups(&self, args: &ProductArgs, per_dimension: u32) -> Result<[u32; 3], Error> {
        let kernel = self.form.family();
        for (field, value) in
            [("rows", args.rows), ("in_features", args.in_features), ("out_features", args.out_features)]
        {
            if value == 0 {
                return Err(Error::Zero { kernel, field });
            }
        }
        let x = args.out_features.div_ceil(self.form.features());
        let y = args.rows.div_ceil(self.form.rows());
        match x.max(y) {
            most if most > per_dimension => {
                Err(Error::TooManyWorkgroups { kernel, needed: most.into(), limit: per_dimension })
            }
            _ => Ok([x, y, 1]),
        }
    }
}
