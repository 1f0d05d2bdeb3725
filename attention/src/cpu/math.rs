//! Exponential and hyperbolic tangent over lanes, the same arithmetic for every instruction set.

use super::lanes::Lanes;

/// `exp(x)` for `x ≤ 0`, within 2 units in the last place; 0 below −87.3, where the result would leave the
/// normal range; NaN stays NaN.
///
/// Cody and Waite's reduction `x = n·ln 2 + r`, `|r| ≤ ln 2 / 2`, with ln 2 in two parts, and the polynomial of
/// Cephes' `expf`.
#[inline(always)]
pub(super) fn exp<L: Lanes>(x: L) -> L {
    let n = x.mul(L::splat(std::f32::consts::LOG2_E)).round();
    let r = n.fma(L::splat(-0.693_359_4), x);
    let r = n.fma(L::splat(2.121_944_4e-4), r);
    let mut p = L::splat(1.987_569_1e-4);
    for coefficient in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p.fma(r, L::splat(coefficient));
    }
    let p = p.fma(r.mul(r), r.add(L::splat(1.0)));
    L::select_less(x, L::splat(-87.3), L::splat(0.0), p.mul(n.pow2()))
}

/// [`exp`] of one number.
#[inline(always)]
pub(super) fn exp1<L: Lanes>(x: f32) -> f32 {
    exp(L::splat(x)).first()
}

/// `tanh(x)`, within 4 units in the last place: an odd polynomial (Cephes' `tanhf`) below 0.625, and
/// `1 − 2 / (exp(2|x|) + 1)` with the sign of `x` above.
#[inline(always)]
pub(super) fn tanh<L: Lanes>(x: L) -> L {
    let (zero, one) = (L::splat(0.0), L::splat(1.0));
    let negated = zero.sub(x);
    let magnitude = L::select_less(x, zero, negated, x);
    // exp(−2|x|) never overflows: tanh = (1 − e) / (1 + e).
    let e = exp(magnitude.mul(L::splat(-2.0)));
    let large = one.sub(e).div(one.add(e));
    let large = L::select_less(x, zero, zero.sub(large), large);
    let square = x.mul(x);
    let mut p = L::splat(-5.704_988_7e-3);
    for coefficient in [2.063_909e-2, -5.373_971_6e-2, 1.333_144_2e-1, -0.333_332_8] {
        p = p.fma(square, L::splat(coefficient));
    }
    let small = p.mul(square).fma(x, x);
    L::select_less(magnitude, L::splat(0.625), small, large)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::lanes::{Portable, Vector};

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        for i in 0..200_000 {
            let x = -87.2 * (i as f32 / 200_000.0);
            let (found, exact) = (f64::from(exp1::<Portable>(x)), f64::from(x).exp());
            assert!((found - exact).abs() <= 2.0 * f64::from(f32::EPSILON) * exact, "exp({x}) = {found}");
        }
        assert_eq!(exp1::<Portable>(0.0), 1.0);
        assert_eq!(exp1::<Portable>(-0.0), 1.0);
        assert_eq!(exp1::<Portable>(-88.0), 0.0);
        assert_eq!(exp1::<Portable>(f32::NEG_INFINITY), 0.0);
        assert!(exp1::<Portable>(f32::NAN).is_nan());
    }

    #[test]
    fn tanh_is_within_four_units_in_the_last_place() {
        for i in -100_000..100_000 {
            let x = i as f32 / 10_000.0;
            let (found, exact) = (f64::from(tanh(Portable::splat(x)).first()), f64::from(x).tanh());
            assert!(
                (found - exact).abs() <= 4.0 * f64::from(f32::EPSILON) * exact.abs(),
                "tanh({x}) = {found}"
            );
        }
        assert_eq!(tanh(Portable::splat(1e30)).first(), 1.0);
        assert_eq!(tanh(Portable::splat(-1e30)).first(), -1.0);
    }
}
