//! `log_softmax`: log-probabilities of listed tokens, and each row's maximum and log-sum-exp.
//!
//! Owns the variants and the parameter list; the kernel is `kernels/model/log_softmax.ptx`.

use minijinja::context;

use super::vocab::{BATCH, PER_BLOCK, THREADS, stretches};
use super::{Rows, Source, check_types, descriptor, suffix};
use crate::kernel::{Launch, parameters};
use crate::{DType, Error};

/// Family and template name.
const FAMILY: &str = "log_softmax";

/// Which variant: fixed when the text is rendered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LogSoftmaxSpec {
    /// Logits of a load: 1 or 4.
    pub vector: u32,
    /// Whether it may start before the kernel before it has ended (programmatic dependent launch, sm_90 on).
    pub dependent: bool,
}

impl LogSoftmaxSpec {
    /// Every variant that exists.
    pub fn all() -> impl Iterator<Item = Self> {
        [4, 1].into_iter().flat_map(|vector| [false, true].map(|dependent| Self { vector, dependent }))
    }

    /// The entry point: `log_softmax_v4`.
    pub fn entry(self) -> String {
        format!("{FAMILY}_v{}{}", self.vector, suffix(self.dependent))
    }
}

/// What one launch works on. NaN counts as −∞; logits of +∞ share all of the probability.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct LogSoftmaxArgs {
    /// f32 `[rows, vocab]`
    pub logits: Rows,
    /// Logits of a row.
    pub vocab: u32,
    /// Device address of scratch memory, f32 `[rows, blocks, 2]`; [`blocks`](super::vocab::blocks) says how many.
    pub partial: u64,
    /// Device address of u32 `[rows]`: zero before the first launch, and zero again after each.
    pub tickets: u64,
    /// Device address of the tokens, i32 `[rows, count]`. One outside of the vocabulary gets −∞.
    pub ids: u64,
    /// Tokens of a row; may be 0.
    pub count: u32,
    /// Device address of their log-probabilities, f32 `[rows, count]`.
    pub out: u64,
    /// Device address of maximum and ln Σ exp(logit − maximum), f32 `[rows, 2]`; 0 for none.
    pub stats: u64,
}

const SOURCE: Source = Source {
    family: FAMILY,
    text: include_str!("../../kernels/model/log_softmax.ptx"),
    params: &PARAMS,
    max_threads: THREADS,
    static_shared: THREADS / 4 + 4,
    dynamic_shared: 0,
};

parameters! {
    const PARAMS of pub fn LogSoftmaxArgs::values(&self);
    logits: Pointer = self.logits.address,
    partial: Pointer = self.partial,
    tickets: Pointer = self.tickets,
    ids: Pointer = self.ids,
    out: Pointer = self.out,
    stats: Pointer = self.stats,
    stride: U64 = self.logits.stride,
    vocab: U32 = self.vocab,
    per_block: U32 = PER_BLOCK,
    count: U32 = self.count,
}

descriptor! {
    /// One variant, rendered.
    LogSoftmax of LogSoftmaxSpec
}

impl LogSoftmax {
    /// Renders a variant.
    ///
    /// # Errors
    /// [`Error::UnsupportedVector`] for a vector that is neither 1 nor 4.
    pub fn new(spec: LogSoftmaxSpec) -> Result<Self, Error> {
        let LogSoftmaxSpec { vector, dependent } = spec;
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
