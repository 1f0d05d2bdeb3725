//! Element by element: the residual sum and the gated MLP's SiLU.

use super::DenseError;
use super::check_len;
use super::instruction_set::{InstructionSet, dispatch};
use super::lanes::Lanes;
use super::share::share_rows;

/// `sum[i] += x[i]`, the residual connection.
///
/// # Errors
/// Lengths that differ.
pub fn add(x: &[f32], sum: &mut [f32]) -> Result<(), DenseError> {
    check_len("the summand x", x.len(), sum.len())?;
    share_rows(sum, 1, |start, sum| {
        for (sum, x) in sum.iter_mut().zip(&x[start..]) {
            *sum += x;
        }
    });
    Ok(())
}

/// `out[i] = silu(gate[i]) · up[i]` with `silu(g) = g / (1 + exp(-g))`.
///
/// # Errors
/// Lengths that differ.
pub fn silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) -> Result<(), DenseError> {
    silu_mul_on(InstructionSet::best(), gate, up, out)
}

pub(super) fn silu_mul_on(
    set: InstructionSet,
    gate: &[f32],
    up: &[f32],
    out: &mut [f32],
) -> Result<(), DenseError> {
    check_len("the gate", gate.len(), out.len())?;
    check_len("the up projection", up.len(), out.len())?;
    share_rows(out, 1, |start, out| {
        let (gate, up) = (&gate[start..start + out.len()], &up[start..start + out.len()]);
        // SAFETY: the dispatch's instruction set is there; all else is slices.
        unsafe { dispatch!(set, silu_mul_block::<>(gate: &[f32], up: &[f32], out: &mut [f32])) }
    });
    Ok(())
}

/// # Safety
/// That of [`Lanes`].
#[inline(always)]
unsafe fn silu_mul_block<L: Lanes>(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
        *out = gate / (1.0 + exp::<L>(-gate)) * up;
    }
}

/// `e^x` within 2 ulp, infinite above 88.8 and 0 below -104; NaN stays NaN. Without branches, so that loops
/// over it become vector code, whose bits equal those of the single number.
///
/// `x = n · ln 2 + r` with `|r| ≤ ln 2 / 2` (Cody and Waite 1980), a Taylor polynomial of degree 7 in r, and
/// `2^n` as two factors, so that neither overflows before the result does.
#[inline(always)]
fn exp<L: Lanes>(x: f32) -> f32 {
    /// 1.5 · 2²³: adding it rounds to an integer, which then stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    /// The leading bits of ln 2, few enough that n · LN2_HIGH is exact, and the rest.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Written so that NaN passes both comparisons unchanged.
    let x = if x > 130.0 { 130.0 } else { x };
    let x = if x < -130.0 { -130.0 } else { x };
    let fma = L::multiply_add_scalar;
    let shifted = fma(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = fma(n, -LN2_LOW, fma(n, -LN2_HIGH, x));
    let mut p = 1.0 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = fma(p, r, c);
    }
    let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let power = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
    let half = n >> 1;
    p * power(half) * power(n.wrapping_sub(half))
}
