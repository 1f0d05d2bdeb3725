//! `embed`: rows of a table by token or position: embeddings, and learned positions added to them.
//!
//! Owns the variants, the parameter list and the geometry; the kernel is `kernels/model/embed.ptx`.

use minijinja::context;

use super::{
    ELEMENTWISE_THREADS, Rows, Source, check_types, descriptor, elementwise, suffix, types_and_vectors,
};
use crate::kernel::{Launch, parameters};
use crate::{DType, Error};

/// Family and template name.
const FAMILY: &str = "embed";

/// Which variant: fixed when the text is rendered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EmbedSpec {
    /// Type of the table.
    pub dtype: DType,
    /// Elements of a thread: 1, or as many as fit 16 bytes.
    pub vector: u32,
    /// Whether it may start before the kernel before it has ended (programmatic dependent launch, sm_90 on).
    pub dependent: bool,
}

impl EmbedSpec {
    /// Every variant that exists.
    pub fn all() -> impl Iterator<Item = Self> {
        types_and_vectors().map(|(dtype, vector, dependent)| Self { dtype, vector, dependent })
    }

    /// The entry point: `embed_bf16_v8`.
    pub fn entry(self) -> String {
        format!("{FAMILY}_{}_v{}{}", self.dtype, self.vector, suffix(self.dependent))
    }
}

/// What one launch works on: `out[t] = table[offset + id t] · scale`, or `out[t] +=` that.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct EmbedArgs {
    /// Rows of the result.
    pub rows: u32,
    /// Elements of a row.
    pub width: u32,
    /// Device address of the ids, i32 or i64 `[rows]`. One that is not in the table counts as a row of zeros.
    pub ids: u64,
    /// Bytes of an id: 4 or 8.
    pub id_bytes: u32,
    /// Added to each id.
    pub offset: u64,
    /// `[table_rows, width]`
    pub table: Rows,
    /// Rows of the table.
    pub table_rows: u32,
    /// Factor.
    pub scale: f32,
    /// Whether to add to `out`.
    pub adds: bool,
    /// f32 `[rows, width]`
    pub out: Rows,
}

const SOURCE: Source = Source {
    family: FAMILY,
    text: include_str!("../../kernels/model/embed.ptx"),
    params: &PARAMS,
    max_threads: ELEMENTWISE_THREADS,
    static_shared: 0,
    dynamic_shared: 0,
};

parameters! {
    const PARAMS of pub fn EmbedArgs::values(&self);
    ids: Pointer = self.ids,
    table: Pointer = self.table.address,
    out: Pointer = self.out.address,
    table_stride: U64 = self.table.stride,
    out_stride: U64 = self.out.stride,
    offset: U64 = self.offset,
    rows: U32 = self.rows,
    width: U32 = self.width,
    table_rows: U32 = self.table_rows,
    id_bytes: U32 = self.id_bytes,
    adds: U32 = u32::from(self.adds),
    scale: F32 = self.scale,
}

descriptor! {
    /// One variant, rendered.
    Embed of EmbedSpec
}

impl Embed {
    /// Renders a variant.
    ///
    /// # Errors
    /// [`Error::UnsupportedTypes`] for an fp8 type, [`Error::UnsupportedVector`] for a vector that is neither 1 nor 16
    /// bytes.
    pub fn new(spec: EmbedSpec) -> Result<Self, Error> {
        let EmbedSpec { dtype, vector, dependent } = spec;
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
