//! `sample`: draws tokens from rows of logits by temperature, top-k, top-p and min-p.
//!
//! Owns the variants, the parameter list and the layout of a draw; the kernel is `kernels/model/sample.ptx`.

use minijinja::context;

use super::select::{BATCH, SHARED, THREADS, blocks_of_rows};
use super::{Rows, Source, check_types, descriptor, suffix};
use crate::kernel::{Launch, parameters};
use crate::{DType, Error};

/// Family and template name.
const FAMILY: &str = "sample";

/// Which variant: fixed when the text is rendered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SampleSpec {
    /// Logits of a load: 1 or 4.
    pub vector: u32,
    /// Whether it may start before the kernel before it has ended (programmatic dependent launch, sm_90 on).
    pub dependent: bool,
}

impl SampleSpec {
    /// Every variant that exists.
    pub fn all() -> impl Iterator<Item = Self> {
        [4, 1].into_iter().flat_map(|vector| [false, true].map(|dependent| Self { vector, dependent }))
    }

    /// The entry point: `sample_v4`.
    pub fn entry(self) -> String {
        format!("{FAMILY}_v{}{}", self.vector, suffix(self.dependent))
    }
}

/// How a token is drawn from a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowDraw {
    /// Which row of logits.
    pub row: u32,
    /// Divides the logits; above 0.
    pub temperature: f32,
    /// Keeps so many of the likeliest tokens, lower ones first among equals; 0 keeps all.
    pub top_k: u32,
    /// Keeps the fewest of the likeliest that have this share of what is left; 1 keeps all.
    pub top_p: f32,
    /// Keeps those that are at least this part as likely as the likeliest.
    pub min_p: f32,
    /// In [0, 1).
    pub uniform: f64,
}

impl RowDraw {
    /// Bytes in the kernel's list.
    pub const BYTES: usize = 32;

    /// Its place in the kernel's list.
    pub fn bytes(&self) -> [u8; Self::BYTES] {
        const WHOLE: f64 = 18_446_744_073_709_551_616.0;
        // A share below 2^-64 is that of the best one alone, as is 2^-64; one of 53 bits is exact.
        let share = |part: f64| (part * WHOLE) as u64;
        let top_p = if self.top_p < 1.0 { share(f64::from(self.top_p)).max(1) } else { 0 };
        let words: [[u8; 8]; 4] = [
            pair(self.row, (1.0 / self.temperature).to_bits()),
            pair(self.min_p.to_bits(), self.top_k),
            top_p.to_le_bytes(),
            share(self.uniform).to_le_bytes(),
        ];
        let mut bytes = [0; Self::BYTES];
        for (to, from) in bytes.iter_mut().zip(words.into_iter().flatten()) {
            *to = from;
        }
        bytes
    }
}

fn pair(low: u32, high: u32) -> [u8; 8] {
    (u64::from(low) | u64::from(high) << 32).to_le_bytes()
}

/// What one launch works on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SampleArgs {
    /// f32 `[rows, vocab]`
    pub logits: Rows,
    /// Logits of a row.
    pub vocab: u32,
    /// Device address of the draws, [`RowDraw::bytes`] `[count]`, 8-byte aligned.
    pub draws: u64,
    /// Device address of the tokens, u32 `[rows]`: those of rows that are drawn from are written,
    /// [`NO_TOKEN`](super::argmax::NO_TOKEN) where there is no candidate.
    pub tokens: u64,
}

const SOURCE: Source = Source {
    family: FAMILY,
    text: include_str!("../../kernels/model/sample.ptx"),
    params: &PARAMS,
    max_threads: THREADS,
    static_shared: SHARED,
    dynamic_shared: 0,
};

parameters! {
    const PARAMS of pub fn SampleArgs::values(&self);
    logits: Pointer = self.logits.address,
    draws: Pointer = self.draws,
    tokens: Pointer = self.tokens,
    stride: U64 = self.logits.stride,
    vocab: U32 = self.vocab,
}

descriptor! {
    /// One variant, rendered.
    Sample of SampleSpec
}

impl Sample {
    /// Renders a variant.
    ///
    /// # Errors
    /// [`Error::UnsupportedVector`] for a vector that is neither 1 nor 4.
    pub fn new(spec: SampleSpec) -> Result<Self, Error> {
        let SampleSpec { vector, dependent } = spec;
        check_types(FAMILY, DType::F32, vector)?;
        let variables = context! { vector, batch => BATCH / vector };
        Ok(Self { spec, kernel: SOURCE.kernel(spec.entry(), dependent, variables)? })
    }

    /// Grid and block for so many draws from rows of so many logits.
    ///
    /// # Errors
    /// [`Error::Zero`] for an empty dimension, [`Error::NotDivisible`] when the vector does not divide the vocabulary,
    /// [`Error::TooLarge`] beyond [`MAX_VOCAB`](super::select::MAX_VOCAB) logits or 65535 draws.
    pub fn launch(&self, count: u32, vocab: u32) -> Result<Launch, Error> {
        blocks_of_rows(FAMILY, count, vocab, self.spec.vector)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_draw_is_laid_out_as_the_kernel_reads_it() {
        let draw = RowDraw { row: 7, temperature: 0.5, top_k: 40, top_p: 0.75, min_p: 0.25, uniform: 0.5 };
        let bytes = draw.bytes();
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        assert_eq!([word(0), word(4), word(8), word(12)], [7, 2f32.to_bits(), 0.25f32.to_bits(), 40]);
        assert_eq!([word(16), word(20), word(24), word(28)], [0, 0xc000_0000, 0, 0x8000_0000]);
        let all = RowDraw { top_p: 1.0, ..draw }.bytes();
        assert!(all[16..24].iter().all(|&byte| byte == 0));
        let one = RowDraw { top_p: f32::MIN_POSITIVE, ..draw }.bytes();
        assert_eq!(one[16], 1);
    }
}
