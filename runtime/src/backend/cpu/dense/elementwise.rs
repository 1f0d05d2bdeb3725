//! Element by element: the residual sum, activations, scaling and the soft cap.

use super::DenseError;
use super::check_len;
use super::instruction_set::{InstructionSet, dispatch};
use super::lanes::Lanes;
use super::share::share_rows;
use crate::model_dir::Activation;

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

/// `out[i] = f(x[i])`, the activation of a plain MLP.
///
/// # Errors
/// Lengths that differ.
pub fn activate(activation: Activation, x: &[f32], out: &mut [f32]) -> Result<(), DenseError> {
    activate_on(InstructionSet::best(), activation, x, None, out)
}

/// `out[i] = f(gate[i]) · up[i]`, the activation of a gated MLP (Shazeer 2020).
///
/// # Errors
/// Lengths that differ.
pub fn gated_activation(
    activation: Activation,
    gate: &[f32],
    up: &[f32],
    out: &mut [f32],
) -> Result<(), DenseError> {
    activate_on(InstructionSet::best(), activation, gate, Some(up), out)
}

/// `x[i] = cap · tanh(x[i] / cap)`, which keeps logits between `-cap` and `cap` (Gemma 2, section 2).
pub fn softcap(cap: f32, x: &mut [f32]) {
    softcap_on(InstructionSet::best(), cap, x);
}

/// `x[i] *= factor`.
pub fn scale(factor: f32, x: &mut [f32]) {
    share_rows(x, 1, |_, x| x.iter_mut().for_each(|x| *x *= factor));
}

pub(super) fn softcap_on(set: InstructionSet, cap: f32, x: &mut [f32]) {
    share_rows(x, 1, |_, x| {
        // SAFETY: the dispatch's instruction set is there; all else is slices.
        unsafe { dispatch!(set, softcap_block::<>(cap: f32, x: &mut [f32])) }
    });
}

pub(super) fn activate_on(
    set: InstructionSet,
    activation: Activation,
    x: &[f32],
    factor: Option<&[f32]>,
    out: &mut [f32],
) -> Result<(), DenseError> {
    check_len("the activation's input", x.len(), out.len())?;
    if let Some(factor) = factor {
        check_len("the up projection", factor.len(), out.len())?;
    }
    match activation {
        Activation::Silu => share_activation::<Silu>(set, x, factor, out),
        Activation::Relu => share_activation::<Relu>(set, x, factor, out),
        Activation::Gelu => share_activation::<Gelu>(set, x, factor, out),
        Activation::GeluTanh => share_activation::<GeluTanh>(set, x, factor, out),
    }
    Ok(())
}

fn share_activation<F: Function>(set: InstructionSet, x: &[f32], factor: Option<&[f32]>, out: &mut [f32]) {
    share_rows(out, 1, |start, out| {
        let x = &x[start..start + out.len()];
        match factor {
            Some(factor) => {
                let factor = &factor[start..start + out.len()];
                // SAFETY: the dispatch's instruction set is there; all else is slices.
                unsafe {
                    dispatch!(set, gated_block::<F: Function>(x: &[f32], factor: &[f32], out: &mut [f32]));
                }
            }
            None => {
                // SAFETY: the dispatch's instruction set is there; all else is slices.
                unsafe { dispatch!(set, plain_block::<F: Function>(x: &[f32], out: &mut [f32])) }
            }
        }
    });
}

/// # Safety
/// That of [`Lanes`].
#[inline(always)]
unsafe fn gated_block<L: Lanes, F: Function>(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
        *out = F::of::<L>(*gate) * up;
    }
}

/// # Safety
/// That of [`Lanes`].
#[inline(always)]
unsafe fn plain_block<L: Lanes, F: Function>(x: &[f32], out: &mut [f32]) {
    for (out, x) in out.iter_mut().zip(x) {
        *out = F::of::<L>(*x);
    }
}

/// # Safety
/// That of [`Lanes`].
#[inline(always)]
unsafe fn softcap_block<L: Lanes>(cap: f32, x: &mut [f32]) {
    for x in x {
        *x = cap * tanh::<L>(*x / cap);
    }
}

/// A function of one number, without branches, so that loops over it become vector code.
pub(super) trait Function: 'static {
    fn of<L: Lanes>(x: f32) -> f32;
}

/// `x / (1 + exp(-x))`
pub(super) struct Silu;
/// `max(x, 0)`; NaN stays NaN.
pub(super) struct Relu;
/// `x · Φ(x)` with the normal distribution's Φ (Hendrycks and Gimpel 2016).
pub(super) struct Gelu;
/// Its approximation `x / 2 · (1 + tanh(u))`, `u = sqrt(2 / π) · (x + 0.044715 x³)`, by
/// `(1 + tanh(u)) / 2 = 1 / (1 + exp(-2u))`.
pub(super) struct GeluTanh;

impl Function for Silu {
    #[inline(always)]
    fn of<L: Lanes>(x: f32) -> f32 {
        x / (1.0 + exp::<L>(-x))
    }
}

impl Function for Relu {
    #[inline(always)]
    fn of<L: Lanes>(x: f32) -> f32 {
        if x < 0.0 { 0.0 } else { x }
    }
}

impl Function for Gelu {
    #[inline(always)]
    fn of<L: Lanes>(x: f32) -> f32 {
        let z = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
        let tail = 0.5 * erfc::<L>(z);
        x * if x < 0.0 { tail } else { 1.0 - tail }
    }
}

impl Function for GeluTanh {
    #[inline(always)]
    fn of<L: Lanes>(x: f32) -> f32 {
        /// 2 · sqrt(2 / π)
        const FACTOR: f32 = 1.595_769;
        let cubic = L::multiply_add_scalar(0.044_715 * x * x, x, x);
        x / (1.0 + exp::<L>(-FACTOR * cubic))
    }
}

/// The hyperbolic tangent within 2⁻²² absolutely and 2⁻²⁰ relatively: near 0 by its series, elsewhere by `exp`.
#[inline(always)]
fn tanh<L: Lanes>(x: f32) -> f32 {
    let fma = L::multiply_add_scalar;
    let square = x * x;
    let mut series = 62.0 / 2835.0;
    for c in [-17.0 / 315.0, 2.0 / 15.0, -1.0 / 3.0] {
        series = fma(series, square, c);
    }
    let near = fma(series * square, x, x);
    let far = 1.0 - 2.0 / (exp::<L>(2.0 * x) + 1.0);
    if x.abs() < 0.25 { near } else { far }
}

/// The complementary error function of a number that is not negative, within 2⁻²⁰ relatively up to 3:
/// `t · exp(-z²) · P(t)` with `t = 1 / (1 + z / 2)`, P fitted to the least relative error for z up to 10.
#[inline(always)]
fn erfc<L: Lanes>(z: f32) -> f32 {
    const P: [f32; 9] = [
        -0.059_066_35,
        0.284_563_2,
        -0.487_177_6,
        0.278_043_96,
        -0.026_611_252,
        0.202_681_4,
        0.243_104_98,
        0.282_375_16,
        0.282_086_43,
    ];
    let t = 1.0 / (1.0 + 0.5 * z);
    let mut p = 0.0;
    for c in P {
        p = L::multiply_add_scalar(p, t, c);
    }
    t * exp::<L>(-z * z) * p
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
