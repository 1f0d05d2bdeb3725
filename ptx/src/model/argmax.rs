//! `argmax`: the largest logit of each row: greedy decoding.
//!
//! Owns the variants and the parameter list; the kernel is `kernels/model/argmax.ptx`.

use minijinja::context;

use super::vocab::{BATCH, PER_BLOCK, THREADS, stretches};
use super::{Rows, Source, check_types, descriptor, suffix};
use crate::kernel::{Launch, parameters};
use crate::{DType, Error};

/// Family and template name.
const FAMILY: &str = "argmax";

/// The token of a row without a candidate: every logit is NaN or −∞.
pub const NO_TOKEN: u32 = u32::MAX;

/// Which variant: fixed when the text is rendered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ArgmaxSpec {
    /// Logits of a load: 1 or 4.
    pub vector: u32,
    /// Whether it may start before the kernel before it has ended (programmatic dependent launch, sm_90 on).
    pub dependent: bool,
}

impl ArgmaxSpec {
    /// Every variant that exists.
    pub fn all() -> impl Iterator<Item = Self> {
        [4, 1].into_iter().flat_map(|vector| [false, true].map(|dependent| Self { vector, dependent }))
    }

    /// The entry point: `argmax_v4`.
    pub fn entry(self) -> String {
        format!("{FAMILY}_v{}{}", self.vector, suffix(self.dependent))
    }
}

/// What one launch works on. The lowest of equal logits wins; NaN and −∞ never do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ArgmaxArgs {
    /// f32 `[rows, vocab]`
    pub logits: Rows,
    /// Logits of a row.
    pub vocab: u32,
    /// Device address of u64 `[rows]`: zero before the first launch, and zero again after each.
    pub keys: u64,
    /// Device address of u32 `[rows]`: the same.
    pub tickets: u64,
    /// Device address of the tokens, u32 `[rows]`; [`NO_TOKEN`] where there is none.
    pub tokens: u64,
    /// Device address of their logits, f32 `[rows]`; 0 for none.
    pub best: u64,
}

const SOURCE: Source = Source {
    family: FAMILY,
    text: include_str!("../../kernels/model/argmax.ptx"),
    params: &PARAMS,
    max_threads: THREADS,
    static_shared: THREADS / 4 + 4,
    dynamic_shared: 0,
};

parameters! {
    const PARAMS of pub fn ArgmaxArgs::values(&self);
    logits: Pointer = self.logits.address,
    keys: Pointer = self.keys,
    tickets: Pointer = self.tickets,
    tokens: Pointer = self.tokens,
    best: Pointer = self.best,
    stride: U64 = self.logits.stride,
    vocab: U32 = self.vocab,
    per_block: U32 = PER_BLOCK,
}

descriptor! {
    /// One variant, rendered.
    Argmax of ArgmaxSpec
}

impl Argmax {
    /// Renders a variant.
    ///
    /// # Errors
    /// [`Error::UnsupportedVector`] for a vector that is neither 1 nor 4.
    pub fn new(spec: ArgmaxSpec) -> Result<Self, Error> {
        let ArgmaxSpec { vector, dependent } = spec;
        check_types(FAMILY, DType::F32, vector)?;
        let variables = context! { vector, batch => BATCH / vector };
        Ok(Self { spec, kernel: SOURCE.kernel(spec.entry(), dependent, variables)? })
    }

    /// Grid and block for so many rows of so many logits.
    ///
    /// # Errors
    /// [`Error::Zero`] for an empty dimension, [`Error::NotDivisible`] when the vector does not divide the vocabulary,
    /// [`Error::GridTooLarge`] beyond 65535 rows.
    pub fn launch(&self, rows: u32, vocab: u32) -> Result<Launch, Error> {
        stretches(FAMILY, rows, vocab, self.spec.vector)
    }
}
