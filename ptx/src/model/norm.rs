//! `norm`: RMS norm and layer norm of rows, or of the heads within rows.
//!
//! Owns the variants, the parameter list and the geometry; the kernel is `kernels/model/norm.ptx`.

use minijinja::context;

use super::{Source, check_types, descriptor, suffix};
use crate::kernel::{Launch, parameters};
use crate::{DType, Error};

/// Family and template name.
const FAMILY: &str = "norm";

/// The most threads of a block.
const MAX_THREADS: u32 = 512;

/// Which variant: fixed when the text is rendered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NormSpec {
    /// Type of the input.
    pub x: DType,
    /// Type of the output: any for an f32 input, otherwise that of the input.
    pub out: DType,
    /// Elements that a thread moves at once: 1, or as many as fit 16 bytes of the input.
    pub vector: u32,
    /// Whether it may start before the kernel before it has ended (programmatic dependent launch, sm_90 on).
    pub dependent: bool,
}

impl NormSpec {
    /// Every variant that exists.
    pub fn all() -> impl Iterator<Item = Self> {
        use DType::{Bf16, F16, F32};
        let types = [(F32, F32), (F32, F16), (F32, Bf16), (F16, F16), (Bf16, Bf16)].into_iter();
        types
            .flat_map(|(x, out)| [16 / x.size(), 1].map(|vector| (x, out, vector)))
            .flat_map(|(x, out, vector)| [false, true].map(|dependent| Self { x, out, vector, dependent }))
    }

    /// The entry point: `norm_f32_bf16_v4`.
    pub fn entry(self) -> String {
        format!("{FAMILY}_{}_{}_v{}{}", self.x, self.out, self.vector, suffix(self.dependent))
    }
}

/// Where the parts of rows lie: `[rows, parts, width]`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Parts {
    /// Device address of the first element.
    pub address: u64,
    /// Elements from a row to the next.
    pub row_stride: u64,
    /// Elements from a part (a head) to the next.
    pub part_stride: u64,
}

/// Which norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NormKind {
    /// `x / sqrt(mean(x²) + eps) · weight`
    Rms,
    /// `(x - mean(x)) / sqrt(variance(x) + eps) · weight + bias`
    Layer,
}

/// What one launch works on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormArgs {
    /// Rows.
    pub rows: u32,
    /// Norms in a row: 1, or the heads.
    pub parts: u32,
    /// Elements of a norm.
    pub width: u32,
    /// Which norm.
    pub kind: NormKind,
    /// Added to the mean of the squares.
    pub eps: f32,
    /// Input.
    pub x: Parts,
    /// Device address of the weight, f32 `[width]`.
    pub weight: u64,
    /// Device address of the bias, f32 `[width]`; 0 for none.
    pub bias: u64,
    /// Output; may be the input.
    pub out: Parts,
}

const SOURCE: Source = Source {
    family: FAMILY,
    text: include_str!("../../kernels/model/norm.ptx"),
    params: &PARAMS,
    max_threads: MAX_THREADS,
    static_shared: 256,
    dynamic_shared: 0,
};

parameters! {
    const PARAMS of pub fn NormArgs::values(&self);
    x: Pointer = self.x.address,
    weight: Pointer = self.weight,
    bias: Pointer = self.bias,
    out: Pointer = self.out.address,
    x_row_stride: U64 = self.x.row_stride,
    x_part_stride: U64 = self.x.part_stride,
    out_row_stride: U64 = self.out.row_stride,
    out_part_stride: U64 = self.out.part_stride,
    rows: U32 = self.rows,
    parts: U32 = self.parts,
    width: U32 = self.width,
    layer: U32 = u32::from(self.kind == NormKind::Layer),
    eps: F32 = self.eps,
}

descriptor! {
    /// One variant, rendered.
    Norm of NormSpec
}

impl Norm {
    /// Renders a variant.
    ///
    /// # Errors
    /// [`Error::UnsupportedTypes`] for types that do not go together, [`Error::UnsupportedVector`] for a vector that is
    /// neither 1 nor 16 bytes of the input.
    pub fn new(spec: NormSpec) -> Result<Self, Error> {
        let NormSpec { x, out, vector, dependent } = spec;
        check_types(FAMILY, x, vector)?;
        if out.is_fp8() || (x != DType::F32 && x != out) {
            return Err(Error::UnsupportedTypes { kernel: FAMILY, source_dtype: x, cache: out });
        }
        let variables = context! {
            x_dtype => x.name(),
            x_size => x.size(),
            out_dtype => out.name(),
            out_size => out.size(),
            vector,
        };
        Ok(Self { spec, kernel: SOURCE.kernel(spec.entry(), dependent, variables)? })
    }

    /// Grid and block for so many rows of so many norms of so many elements: a warp each for short ones.
    ///
    /// # Errors
    /// [`Error::Zero`] for an empty dimension, [`Error::NotDivisible`] when the vector does not divide the width,
    /// [`Error::TooLarge`] for 2³¹ norms and more.
    pub fn launch(&self, rows: u32, parts: u32, width: u32) -> Result<Launch, Error> {
        let vector = self.spec.vector;
        for (field, value) in [("rows", rows), ("parts", parts), ("width", width)] {
            if value == 0 {
                return Err(Error::Zero { kernel: FAMILY, field });
            }
        }
        if !width.is_multiple_of(vector) {
            return Err(Error::NotDivisible { kernel: FAMILY, vector, field: "width", value: width });
        }
        let limit = i32::MAX as u32;
        let items = u64::from(rows) * u64::from(parts);
        for (field, value) in [("rows", items), ("width", u64::from(width))] {
            if value > u64::from(limit) {
                let value = u32::try_from(value).unwrap_or(u32::MAX);
                return Err(Error::TooLarge { kernel: FAMILY, field, value, limit });
            }
        }
        let items = items as u32;
        let vectors = width / vector;
        // Up to four vectors a lane a warp does alone; a block's barrier costs as much.
        if vectors <= 4 * 32 && parts > 1 {
            let together = items.min(8);
            return Ok(Launch {
                grid: [items.div_ceil(together), 1, 1],
                block: [32, together, 1],
                dynamic_shared: 0,
            });
        }
        let threads = vectors.next_multiple_of(32).min(MAX_THREADS);
        Ok(Launch { grid: [items, 1, 1], block: [threads, 1, 1], dynamic_shared: 0 })
    }
}
