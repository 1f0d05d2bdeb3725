//! `penalize`: bias and penalties on single logits of rows, in place.
//!
//! Owns the variants, the parameter list and the layout of a change; the kernel is `kernels/model/penalize.ptx`.

use minijinja::context;

use super::{Rows, Source, descriptor, suffix};
use crate::Error;
use crate::kernel::{Launch, parameters};

/// Family and template name.
const FAMILY: &str = "penalize";

/// Threads of a block.
const THREADS: u32 = 256;

/// A token that neither prompt nor completion holds.
pub const NOT_HELD: u32 = u32::MAX;

/// Which variant: fixed when the text is rendered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PenalizeSpec {
    /// Whether it may start before the kernel before it has ended (programmatic dependent launch, sm_90 on).
    pub dependent: bool,
}

impl PenalizeSpec {
    /// Every variant that exists.
    pub fn all() -> impl Iterator<Item = Self> {
        [false, true].into_iter().map(|dependent| Self { dependent })
    }

    /// The entry point: `penalize_pdl`.
    pub fn entry(self) -> String {
        format!("{FAMILY}{}", suffix(self.dependent))
    }
}

/// Whether changes are made or taken back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Changes the logits and saves what they were.
    #[default]
    Forth,
    /// Puts back what was saved.
    Back,
}

/// What one launch works on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PenalizeArgs {
    /// f32 `[rows, vocab]`
    pub logits: Rows,
    /// Rows.
    pub rows: u32,
    /// Logits of a row.
    pub vocab: u32,
    /// Device address of the changes, u32 `[count, 4]`: row, token, the bits of the bias, and how often the completion
    /// holds the token or [`NOT_HELD`]. No token of a row twice; what is outside is skipped.
    pub changes: u64,
    /// Changes.
    pub count: u32,
    /// Device address of the penalties of each row, f32 `[rows, 3]`: repetition, presence, frequency.
    pub factors: u64,
    /// Device address of the logits as they were, f32 `[count]`; 0 for none.
    pub saved: u64,
    /// Forth or back.
    pub direction: Direction,
}

const SOURCE: Source = Source {
    family: FAMILY,
    text: include_str!("../../kernels/model/penalize.ptx"),
    params: &PARAMS,
    max_threads: THREADS,
    static_shared: 0,
    dynamic_shared: 0,
};

parameters! {
    const PARAMS of pub fn PenalizeArgs::values(&self);
    logits: Pointer = self.logits.address,
    changes: Pointer = self.changes,
    factors: Pointer = self.factors,
    saved: Pointer = self.saved,
    stride: U64 = self.logits.stride,
    rows: U32 = self.rows,
    vocab: U32 = self.vocab,
    count: U32 = self.count,
    back: U32 = u32::from(self.direction == Direction::Back),
}

descriptor! {
    /// One variant, rendered.
    Penalize of PenalizeSpec
}

impl Penalize {
    /// Renders a variant.
    ///
    /// # Errors
    /// [`Error::Template`], which is a defect of this crate.
    pub fn new(spec: PenalizeSpec) -> Result<Self, Error> {
        Ok(Self { spec, kernel: SOURCE.kernel(spec.entry(), spec.dependent, context! {})? })
    }

    /// Grid and block for so many changes.
    ///
    /// # Errors
    /// [`Error::Zero`] for none, [`Error::TooLarge`] beyond 2^31.
    pub fn launch(&self, count: u32) -> Result<Launch, Error> {
        if count == 0 {
            return Err(Error::Zero { kernel: FAMILY, field: "count" });
        }
        let limit = i32::MAX as u32;
        if count > limit {
            return Err(Error::TooLarge { kernel: FAMILY, field: "count", value: count, limit });
        }
        Ok(Launch { grid: [count.div_ceil(THREADS), 1, 1], block: [THREADS, 1, 1], dynamic_shared: 0 })
    }
}
