//! `carry_tokens`: puts tokens that a step chose to where the next step reads its tokens, without the host.
//!
//! Owns the variants, the parameter list and the geometry; the kernel is `kernels/model/carry_tokens.ptx`.

use minijinja::context;

use super::{Source, descriptor, suffix};
use crate::Error;
use crate::kernel::{Launch, parameters};

/// Family and template name.
const FAMILY: &str = "carry_tokens";

/// Threads of the only block.
const THREADS: u32 = 256;

/// Which variant: fixed when the text is rendered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CarryTokensSpec {
    /// Whether it may start before the kernel before it has ended (programmatic dependent launch, sm_90 on).
    pub dependent: bool,
}

impl CarryTokensSpec {
    /// Every variant that exists.
    pub fn all() -> impl Iterator<Item = Self> {
        [false, true].into_iter().map(|dependent| Self { dependent })
    }

    /// The entry point: `carry_tokens_pdl`.
    pub fn entry(self) -> String {
        format!("{FAMILY}{}", suffix(self.dependent))
    }
}

/// What one launch works on: `ids[row] = tokens[from]` for each pair.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct CarryTokensArgs {
    /// Device address of (row, from), u32 `[count, 2]`; pairs that are outside are skipped.
    pub pairs: u64,
    /// Pairs.
    pub count: u32,
    /// Device address of the tokens that were chosen, u32 `[chosen]`.
    pub tokens: u64,
    /// Tokens that were chosen.
    pub chosen: u32,
    /// Device address of the tokens of the next step, u32 `[rows]`.
    pub ids: u64,
    /// Rows of the next step.
    pub rows: u32,
}

const SOURCE: Source = Source {
    family: FAMILY,
    text: include_str!("../../kernels/model/carry_tokens.ptx"),
    params: &PARAMS,
    max_threads: THREADS,
    static_shared: 0,
    dynamic_shared: 0,
};

parameters! {
    const PARAMS of pub fn CarryTokensArgs::values(&self);
    pairs: Pointer = self.pairs,
    tokens: Pointer = self.tokens,
    ids: Pointer = self.ids,
    count: U32 = self.count,
    chosen: U32 = self.chosen,
    rows: U32 = self.rows,
}

descriptor! {
    /// One variant, rendered.
    CarryTokens of CarryTokensSpec
}

impl CarryTokens {
    /// Renders a variant.
    ///
    /// # Errors
    /// [`Error::Template`], which is a defect of this crate.
    pub fn new(spec: CarryTokensSpec) -> Result<Self, Error> {
        Ok(Self { spec, kernel: SOURCE.kernel(spec.entry(), spec.dependent, context! {})? })
    }

    /// Grid and block for any number of pairs.
    pub fn launch(&self) -> Launch {
        Launch { grid: [1, 1, 1], block: [THREADS, 1, 1], dynamic_shared: 0 }
    }
}
