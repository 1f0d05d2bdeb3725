//! Activations, soft caps and sums against plain f64.

use super::super::elementwise::{activate_on, softcap_on};
use super::*;

/// The exponential within 2 units of 2⁻²⁴·2, the sum, the division and the product one half each.
#[test]
fn silu_agrees_with_f64_at_any_size_of_its_argument() {
    let mut r = Random(12);
    let mut gate: Vec<f32> = r.floats(5000).iter().map(|x| x * 20.0).collect();
    gate.extend([0.0, -0.0, 1e-30, -1e-30, 88.0, -88.0, -103.0, 200.0, -200.0, 3e38, -3e38, f32::INFINITY]);
    let up = r.floats(gate.len());
    let mut before: Option<Vec<f32>> = None;
    for set in InstructionSet::available() {
        let mut out = vec![f32::NAN; gate.len()];
        activate_on(*set, Activation::Silu, &gate, Some(&up), &mut out).unwrap();
        for ((g, u), got) in gate.iter().zip(&up).zip(&out) {
            let (g, u) = (f64::from(*g), f64::from(*u));
            let expected = g / (1.0 + (-g).exp()) * u;
            let tolerance = 6.0 * 2f64.powi(-24) * expected.abs() + 1e-36;
            let near = (f64::from(*got) - expected).abs() <= tolerance || f64::from(*got) == expected;
            assert!(near, "{set}: silu({g}) · {u} = {got}, not {expected}");
        }
        for i in [0, 1, 17, 4999] {
            let mut alone = [f32::NAN];
            activate_on(*set, Activation::Silu, &gate[i..=i], Some(&up[i..=i]), &mut alone).unwrap();
            assert_eq!(alone[0].to_bits(), out[i].to_bits(), "{set} [{i}]");
        }
        if set.fused() {
            assert_eq!(bits(before.get_or_insert_with(|| out.clone())), bits(&out), "{set}");
        }
        let mut out = [0.0];
        activate_on(*set, Activation::Silu, &[f32::NAN], Some(&[1.0]), &mut out).unwrap();
        assert!(out[0].is_nan(), "{set}");
    }
}

/// The f64 of each activation; Φ by its series and continued fraction, written without the code's own approximation.
fn activation_f64(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Relu => x.max(0.0),
        Activation::Gelu => x * normal(x),
        Activation::GeluTanh => {
            let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
            // (1 + tanh u) / 2, without cancellation.
            x / (1.0 + (-2.0 * u).exp())
        }
    }
}

/// The normal distribution's Φ: a Taylor series near 0, else Laplace's continued fraction of its tail.
fn normal(x: f64) -> f64 {
    let density = (-x * x / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
    if x.abs() < 3.0 {
        let (mut term, mut sum) = (x, x);
        for n in 1..100 {
            term *= x * x / f64::from(2 * n + 1);
            sum += term;
        }
        return 0.5 + density * sum;
    }
    let z = x.abs();
    let fraction = (1..200).rev().fold(z, |fraction, n| z + f64::from(n) / fraction);
    let tail = density / fraction;
    if x < 0.0 { tail } else { 1.0 - tail }
}

/// A plain and a gated activation are the same function; neighbours, threads and instruction sets change no bit.
/// `exp` of a rounded argument `a` is `a · 2⁻²⁴` off, `a` up to 2u or z², and where it matters at all 20.
#[test]
fn activations_agree_with_f64() {
    let mut r = Random(21);
    let mut x: Vec<f32> = r.floats(70_000).iter().map(|x| x * 8.0).collect();
    x.extend([0.0, -0.0, 1e-30, -1e-30, 12.0, -12.0, 300.0, -300.0, 1e20, -1e20, 3e38, -3e38, f32::INFINITY]);
    let up = r.floats(x.len());
    for activation in [Activation::Silu, Activation::Relu, Activation::Gelu, Activation::GeluTanh] {
        let mut before: Option<Vec<f32>> = None;
        for set in InstructionSet::available() {
            let mut out = vec![f32::NAN; x.len()];
            activate_on(*set, activation, &x, None, &mut out).unwrap();
            for (x, got) in x.iter().zip(&out) {
                let (got, expected) = (f64::from(*got), activation_f64(activation, f64::from(*x)));
                let argument = f64::from(*x).powi(2).min(40.0);
                let tolerance = (12.0 + 2.0 * argument) * 2f64.powi(-24) * expected.abs() + 1e-9;
                assert!(
                    (got - expected).abs() <= tolerance || got == expected,
                    "{set}: {activation:?}({x:?}) = {got}, not {expected}"
                );
            }
            let mut gated = vec![f32::NAN; x.len()];
            activate_on(*set, activation, &x, Some(&up), &mut gated).unwrap();
            assert!(
                gated
                    .iter()
                    .zip(out.iter().zip(&up))
                    .all(|(gated, (out, up))| (*gated).to_bits() == (out * up).to_bits()
                        || gated.is_nan() && (out * up).is_nan()),
                "{set}: {activation:?}"
            );
            for i in [0, 1, 17, 69_999] {
                let mut alone = [f32::NAN];
                activate_on(*set, activation, &x[i..=i], None, &mut alone).unwrap();
                assert_eq!(alone[0].to_bits(), out[i].to_bits(), "{set} {activation:?} [{i}]");
            }
            if set.fused() {
                assert_eq!(
                    bits(before.get_or_insert_with(|| out.clone())),
                    bits(&out),
                    "{set} {activation:?}"
                );
            }
            let mut out = [0.0];
            activate_on(*set, activation, &[f32::NAN], None, &mut out).unwrap();
            assert!(out[0].is_nan(), "{set} {activation:?}");
        }
    }
}

/// The bound of `tanh`, a division and a product.
#[test]
fn soft_caps_agree_with_f64() {
    let mut r = Random(22);
    for cap in [1.0f32, 30.0, 50.0] {
        let mut x: Vec<f32> = r.floats(40_000).iter().map(|x| x * 4.0 * cap).collect();
        x.extend([
            0.0,
            -0.0,
            1e-20,
            0.249 * cap,
            -0.251 * cap,
            1e4 * cap,
            -3e38,
            f32::INFINITY,
            f32::NEG_INFINITY,
        ]);
        let mut before: Option<Vec<f32>> = None;
        for set in InstructionSet::available() {
            let mut out = x.clone();
            softcap_on(*set, cap, &mut out);
            for (x, got) in x.iter().zip(&out) {
                let expected = f64::from(cap) * (f64::from(*x) / f64::from(cap)).tanh();
                let tolerance =
                    (2f64.powi(-20) * expected.abs()).min(4.0 * 2f64.powi(-24) * f64::from(cap)) + 1e-37;
                assert!(
                    (f64::from(*got) - expected).abs() <= tolerance,
                    "{set}: {cap}, {x:?}: {got}, not {expected}"
                );
            }
            if set.fused() {
                assert_eq!(bits(before.get_or_insert_with(|| out.clone())), bits(&out), "{set}");
            }
            let mut nan = [f32::NAN];
            softcap_on(*set, cap, &mut nan);
            assert!(nan[0].is_nan());
        }
    }
}

#[test]
fn add_adds_every_element_once() {
    let mut r = Random(14);
    for n in [0, 1, 100, 100_003] {
        let (x, y) = (r.floats(n), r.floats(n));
        let mut sum = y.clone();
        add(&x, &mut sum).unwrap();
        assert!(sum.iter().zip(x.iter().zip(&y)).all(|(sum, (x, y))| *sum == x + y));
    }
}
