//! `top_candidates`: the largest logits of rows, in their order: beams and log-probabilities of the likeliest tokens.
//!
//! Owns the variants and the parameter list; the kernel is `kernels/model/top_candidates.ptx`.

use minijinja::context;

use super::select::{BATCH, SHARED, THREADS, blocks_of_rows};
use super::{Rows, Source, check_types, descriptor, suffix};
use crate::kernel::{Launch, parameters};
use crate::{DType, Error};

/// Family and template name.
const FAMILY: &str = "top_candidates";

/// The most candidates of a row.
pub const MOST: u32 = THREADS;

/// Which variant: fixed when the text is rendered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TopCandidatesSpec {
    /// Logits of a load: 1 or 4.
    pub vector: u32,
    /// Whether it may start before the kernel before it has ended (programmatic dependent launch, sm_90 on).
    pub dependent: bool,
}

impl TopCandidatesSpec {
    /// Every variant that exists.
    pub fn all() -> impl Iterator<Item = Self> {
        [4, 1].into_iter().flat_map(|vector| [false, true].map(|dependent| Self { vector, dependent }))
    }

    /// The entry point: `top_candidates_v4`.
    pub fn entry(self) -> String {
        format!("{FAMILY}_v{}{}", self.vector, suffix(self.dependent))
    }
}

/// What one launch works on. Lower tokens come first among equal logits; NaN and −∞ are no candidates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct TopCandidatesArgs {
    /// f32 `[rows, vocab]`
    pub logits: Rows,
    /// Logits of a row.
    pub vocab: u32,
    /// Device address of (row, how many), u32 `[count, 2]`; more than `most` are cut to it.
    pub wanted: u64,
    /// Tokens of a row of the result, at most [`MOST`].
    pub most: u32,
    /// Device address of the tokens, u32 `[count, most]`; [`NO_TOKEN`](super::argmax::NO_TOKEN) behind the last one.
    pub tokens: u64,
    /// Device address of their logits, f32 `[count, most]`; −∞ behind the last one.
    pub values: u64,
}

const SOURCE: Source = Source {
    family: FAMILY,
    text: include_str!("../../kernels/model/top_candidates.ptx"),
    params: &PARAMS,
    max_threads: THREADS,
    static_shared: SHARED + 4,
    dynamic_shared: 0,
};

parameters! {
    const PARAMS of pub fn TopCandidatesArgs::values(&self);
    logits: Pointer = self.logits.address,
    wanted: Pointer = self.wanted,
    tokens: Pointer = self.tokens,
    values: Pointer = self.values,
    stride: U64 = self.logits.stride,
    vocab: U32 = self.vocab,
    most: U32 = self.most,
}

descriptor! {
    /// One variant, rendered.
    TopCandidates of TopCandidatesSpec
}

impl TopCandidates {
    /// Renders a variant.
    ///
    /// # Errors
    /// [`Error::UnsupportedVector`] for a vector that is neither 1 nor 4.
    pub fn new(spec: TopCandidatesSpec) -> Result<Self, Error> {
        let TopCandidatesSpec { vector, dependent } = spec;
        check_types(FAMILY, DType::F32, vector)?;
        let variables = context! { vector, batch => BATCH / vector };
        Ok(Self { spec, kernel: SOURCE.kernel(spec.entry(), dependent, variables)? })
    }

    /// Grid and block for so many rows of so many logits, of which at most `most` are wanted.
    ///
    /// # Errors
    /// [`Error::Zero`] for an empty dimension, [`Error::NotDivisible`] when the vector does not divide the vocabulary,
    /// [`Error::TooLarge`] beyond [`MAX_VOCAB`](super::select::MAX_VOCAB) logits, 65535 rows or [`MOST`] candidates.
    pub fn launch(&self, count: u32, vocab: u32, most: u32) -> Result<Launch, Error> {
        if most > MOST {
            return Err(Error::TooLarge { kernel: FAMILY, field: "most", value: most, limit: MOST });
        }
        if most == 0 {
            return Err(Error::Zero { kernel: FAMILY, field: "most" });
        }
        blocks_of_rows(FAMILY, count, vocab, self.spec.vector)
    }
}
