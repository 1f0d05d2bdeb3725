//! How close is close enough: tolerances derived from the types, and the comparison with the oracle.
//!
//! With `u` the unit roundoff of binary32 and `M` the largest sum of magnitudes that a score was added up from
//! ([`RowReference::magnitude`]):
//! - A dot product of `dim` terms in binary32 has rounding errors of random sign; they add up to about
//!   `√dim · u · M`. We allow four times that, and 8 units more for scale, soft cap and bias:
//!   `δ = (4·√dim + 8) · u · M`. With scores of ±10⁵ this is what decides.
//! - Scores that are wrong by δ change each probability by a factor within `exp(±2δ)` (numerator and
//!   denominator), so an output moves by at most `(exp(2δ) − 1) · Σ p·|v|`.
//! - Exponentials, the sums over `n` keys and their rescaling add `(4·√n + 16) · u` to that factor.
//! - Probabilities rounded to 16 bits for a matrix unit add that type's roundoff, and below its normal numbers an
//!   absolute error each ([`Subject::probability_rounding`](super::Subject::probability_rounding)), which moves an
//!   output by at most so much times `Σ |v|`.
//! - The output is rounded to its own type: `u_out · |out|`, and an absolute error where numbers get tiny.
//!
//! `lse` has the error of the largest score, δ, and the relative error of its sum. A row that sees no key must
//! be exactly 0 and −∞. NaN never passes.

use super::{AttentionData, Buffer, MergeData, ProbabilityRounding, Reference, RowReference};
use crate::DType;

/// What a row's errors may be.
#[derive(Clone, Copy, Debug)]
pub struct Tolerance {
    /// Relative error of every probability, times `Σ p·|v|`.
    probability: f64,
    /// Absolute error of every probability, times `Σ |v|`.
    small_probability: f64,
    /// Absolute error of `lse`.
    lse: f64,
    /// Relative and absolute error of rounding the output.
    rounding: (f64, f64),
}

impl Tolerance {
    /// For a row of attention over heads of `dim` elements.
    pub fn new(dim: usize, q_dtype: DType, rounding: ProbabilityRounding, row: &RowReference) -> Self {
        let u = DType::F32.unit_roundoff();
        let score = (4.0 * (dim as f64).sqrt() + 8.0) * u * row.magnitude;
        let sum = (4.0 * (row.keys as f64).sqrt() + 16.0) * u + 2.0 * rounding.relative;
        // Where numbers get tiny: half the smallest subnormal of f16; the others are as small as the
        // probabilities that binary32 arithmetic may take for 0 (below 10⁻³⁷, for a few hundred keys).
        let tiny = match q_dtype {
            DType::F16 => 2f64.powi(-25),
            _ => 1e-34,
        };
        Self {
            probability: (2.0 * score).exp_m1() + sum,
            small_probability: rounding.absolute,
            lse: score + sum + 2.0 * u * row.lse.abs(),
            rounding: (q_dtype.unit_roundoff(), tiny),
        }
    }

    /// Largest error that an element of the output may have.
    pub fn of_output(&self, reference: f64, weight: f64, reach: f64) -> f64 {
        let before = self.probability * weight + self.small_probability * reach;
        before + self.rounding.0 * (reference.abs() + before) + self.rounding.1
    }
}

/// How well results agree with the oracle.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Agreement {
    /// Largest error as a fraction of its tolerance: at most 1.
    pub worst: f64,
}

impl Agreement {
    fn note(&mut self, error: f64, tolerance: f64) -> bool {
        let ratio = error / tolerance;
        self.worst = self.worst.max(ratio);
        // Written so that NaN fails.
        ratio <= 1.0
    }

    fn row(
        &mut self,
        what: &str,
        row: &RowReference,
        tolerance: &Tolerance,
        out: impl Fn(usize) -> f64,
        lse: Option<f32>,
    ) -> Result<(), String> {
        for (d, ((&expected, &weight), &reach)) in row.out.iter().zip(&row.weight).zip(&row.reach).enumerate()
        {
            let found = out(d);
            let allowed = tolerance.of_output(expected, weight, reach);
            let fine = match row.keys {
                0 => found == 0.0,
                _ => self.note((found - expected).abs(), allowed),
            };
            if !fine {
                return Err(format!(
                    "{what}, element {d}: out is {found}, expected {expected} ± {allowed:.3e}, {} keys",
                    row.keys
                ));
            }
        }
        if let Some(found) = lse.map(f64::from) {
            let fine = match row.keys {
                0 => found == f64::NEG_INFINITY,
                _ => self.note((found - row.lse).abs(), tolerance.lse),
            };
            if !fine {
                return Err(format!(
                    "{what}: lse is {found}, expected {} ± {:.3e}, {} keys",
                    row.lse, tolerance.lse, row.keys
                ));
            }
        }
        Ok(())
    }

    /// Compares the outputs of an attention case with the oracle's, and sees that nothing else was written.
    /// `before` is what the output buffer held.
    ///
    /// # Errors
    /// One line about the first difference.
    pub fn of_attention(
        data: &AttentionData,
        reference: &Reference,
        rounding: ProbabilityRounding,
        before: &Buffer,
        out: &Buffer,
        lse: Option<&[f32]>,
    ) -> Result<Self, String> {
        let (config, strides) = (&data.config, data.out_strides);
        let mut agreement = Self::default();
        let mut written = vec![false; out.len()];
        for (index, row) in reference.rows.iter().enumerate() {
            let (query, head) = (index / config.q_heads, index % config.q_heads);
            let at = query * strides.token as usize + head * strides.head as usize;
            written[at..at + config.head_dim_v].fill(true);
            let tolerance = Tolerance::new(config.head_dim_qk, config.q_dtype, rounding, row);
            let what = format!("query row {query}, head {head}");
            let lse = lse.map(|lse| lse[index]);
            agreement.row(&what, row, &tolerance, |d| out.get(at + d), lse)?;
        }
        unchanged("out", before, out, |i| !written[i])?;
        Ok(agreement)
    }

    /// Compares merged states with the oracle's.
    ///
    /// # Errors
    /// One line about the first difference.
    pub fn of_merge(
        data: &MergeData,
        reference: &Reference,
        out: &Buffer,
        lse: &[f32],
    ) -> Result<Self, String> {
        let mut agreement = Self::default();
        for (index, row) in reference.rows.iter().enumerate() {
            let at = index * data.head_dim;
            // A "score" here is one number, the part's LSE: no sum over a head's elements.
            let tolerance = Tolerance::new(1, out.dtype(), ProbabilityRounding::default(), row);
            let what = format!("row {}, head {}", index / data.heads, index % data.heads);
            agreement.row(&what, row, &tolerance, |d| out.get(at + d), Some(lse[index]))?;
        }
        Ok(agreement)
    }
}

/// Sees that the elements chosen by `keep` have the bits that they had.
pub(super) fn unchanged(
    what: &str,
    before: &Buffer,
    after: &Buffer,
    keep: impl Fn(usize) -> bool,
) -> Result<(), String> {
    match (0..before.len()).find(|&i| keep(i) && before.bits(i) != after.bits(i)) {
        Some(i) => Err(format!("{what}: element {i} was written, which belongs to no result")),
        None => Ok(()),
    }
}
