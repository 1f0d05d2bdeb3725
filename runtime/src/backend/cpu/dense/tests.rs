//! Dense layers against plain f64 loops, and their bits against themselves.

use super::elementwise::{activate_on, softcap_on};
use super::norm::{layer_norm_on, rms_norm_on};
use super::*;
use crate::model_dir::Activation;
use half::{bf16, f16};
use pagewise_attention::HostTensor;

/// SplitMix64 as a source of inputs.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// Uniform in -1 … 1.
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.unit()).collect()
    }
}

/// Weights in memory, in one of the types that are stored.
#[derive(Debug)]
enum Stored {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Stored {
    fn new(dtype: usize, x: Vec<f32>) -> Self {
        match dtype {
            0 => Self::F32(x),
            1 => Self::F16(x.into_iter().map(f16::from_f32).collect()),
            _ => Self::Bf16(x.into_iter().map(bf16::from_f32).collect()),
        }
    }

    fn view(&self) -> HostTensor<'_> {
        match self {
            Self::F32(x) => HostTensor::F32(x),
            Self::F16(x) => HostTensor::F16(x),
            Self::Bf16(x) => HostTensor::Bf16(x),
        }
    }

    fn get(&self, i: usize) -> f64 {
        match self {
            Self::F32(x) => f64::from(x[i]),
            Self::F16(x) => x[i].to_f64(),
            Self::Bf16(x) => x[i].to_f64(),
        }
    }
}

/// One linear layer, made again from what a failing test prints.
#[derive(Clone, Copy, Debug)]
struct Case {
    seed: u64,
    rows: usize,
    k: usize,
    features: usize,
    dtype: usize,
    bias: Option<usize>,
}

impl Case {
    fn random(seed: u64) -> Self {
        let mut r = Random(seed);
        let (rows, k, features) = match r.below(8) {
            0 => (1 + r.below(3), 1 + r.below(40), 1 + r.below(9)),
            1 => (1 + r.below(300), 16 * (1 + r.below(4)), 1 + r.below(200)),
            _ => (1 + r.below(70), 1 + r.below(600), 1 + r.below(130)),
        };
        Self {
            seed,
            rows,
            k,
            features,
            dtype: r.below(3),
            bias: [None, Some(0), Some(1), Some(2)][r.below(4)],
        }
    }

    fn inputs(self) -> (Vec<f32>, Stored, Option<Stored>) {
        let mut r = Random(!self.seed);
        let x = r.floats(self.rows * self.k);
        let w = Stored::new(self.dtype, r.floats(self.features * self.k));
        let bias = self.bias.map(|d| Stored::new(d, r.floats(self.features)));
        (x, w, bias)
    }

    fn run(self, set: InstructionSet, x: &[f32], weight: &Stored, bias: Option<&Stored>) -> Vec<f32> {
        let rows = x.len() / self.k;
        let mut out = vec![f32::NAN; rows * self.features];
        let projection = Projection { weight: weight.view(), bias: bias.map(Stored::view), out: &mut out };
        linear_many_on(set, x, rows, &mut [projection]).unwrap();
        out
    }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Every partial sum of a lane is rounded once (portable: twice) per step, then four sums over the lanes and
/// the bias: the error is at most (2 K / 16 + 6) · 2⁻²⁴ of Σ|x·w| + |bias|.
#[test]
fn linear_agrees_with_f64() {
    for seed in 0..150 {
        let case = Case::random(seed);
        let (x, w, bias) = case.inputs();
        for set in InstructionSet::available() {
            let out = case.run(*set, &x, &w, bias.as_ref());
            for row in 0..case.rows {
                for o in 0..case.features {
                    let products =
                        (0..case.k).map(|i| f64::from(x[row * case.k + i]) * w.get(o * case.k + i));
                    let b = bias.as_ref().map_or(0.0, |b| b.get(o));
                    let (sum, size) = products.fold((b, b.abs()), |(s, a), p| (s + p, a + p.abs()));
                    let tolerance = (2.0 * case.k as f64 / 16.0 + 6.0) * 2f64.powi(-24) * size + 1e-37;
                    let got = f64::from(out[row * case.features + o]);
                    assert!((got - sum).abs() <= tolerance, "{case:?} {set} [{row}, {o}]: {got}, not {sum}");
                }
            }
        }
    }
}

/// The definition itself: sixteen lanes of fused multiply-adds, zeros to the end, one tree.
fn fused(x: &[f32], w: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0f32; 16];
    for i in 0..x.len().next_multiple_of(16) {
        let (a, b) = if i < x.len() { (x[i], w(i)) } else { (0.0, 0.0) };
        lanes[i % 16] = a.mul_add(b, lanes[i % 16]);
    }
    for half in [8, 4, 2, 1] {
        for l in 0..half {
            lanes[l] += lanes[l + half];
        }
    }
    lanes[0]
}

#[test]
fn fused_instruction_sets_have_the_bits_of_the_definition() {
    for seed in 1000..1100 {
        let case = Case::random(seed);
        let (x, w, _) = case.inputs();
        let expected: Vec<f32> = x
            .chunks(case.k)
            .flat_map(|x| {
                (0..case.features).map(|o| fused(x, |i| w.get(o * case.k + i) as f32)).collect::<Vec<_>>()
            })
            .collect();
        for set in InstructionSet::available().iter().filter(|s| s.fused()) {
            let out = case.run(*set, &x, &w, None);
            assert_eq!(bits(&out), bits(&expected), "{case:?} {set}");
        }
    }
}

#[test]
fn a_row_has_the_same_bits_alone_in_any_batch_and_with_any_threads() {
    let pools: Vec<_> =
        [1, 2, 5].map(|n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap()).into();
    for seed in 2000..2030 {
        let case = Case { rows: 1 + Random(seed).below(150), ..Case::random(seed) };
        let (x, w, bias) = case.inputs();
        for set in InstructionSet::available() {
            let alone: Vec<f32> =
                x.chunks(case.k).flat_map(|row| case.run(*set, row, &w, bias.as_ref())).collect();
            for (pool, batch) in pools.iter().zip([2, 17, 64].into_iter().cycle().skip(seed as usize % 3)) {
                let batched: Vec<f32> = pool.install(|| {
                    x.chunks(batch * case.k)
                        .flat_map(|rows| case.run(*set, rows, &w, bias.as_ref()))
                        .collect()
                });
                assert_eq!(bits(&alone), bits(&batched), "{case:?} {set}, batches of {batch}");
            }
            let whole = case.run(*set, &x, &w, bias.as_ref());
            assert_eq!(bits(&alone), bits(&whole), "{case:?} {set}, all rows");
        }
    }
}

#[test]
fn several_projections_have_the_bits_of_each_alone() {
    let mut r = Random(7);
    for (rows, k, sizes) in [(1, 576, [576, 192, 192]), (37, 96, [96, 40, 8]), (3, 20, [5, 0, 1])] {
        let x = r.floats(rows * k);
        let weights: Vec<Stored> = (0..3).map(|i| Stored::new(i, r.floats(sizes[i] * k))).collect();
        let mut outs: Vec<Vec<f32>> = sizes.iter().map(|n| vec![f32::NAN; rows * n]).collect();
        let mut projections: Vec<_> = weights
            .iter()
            .zip(&mut outs)
            .map(|(w, out)| Projection { weight: w.view(), bias: None, out })
            .collect();
        linear_many(&x, rows, &mut projections).unwrap();
        for (w, out) in weights.iter().zip(&outs) {
            let mut alone = vec![f32::NAN; out.len()];
            linear(&x, rows, w.view(), None, &mut alone).unwrap();
            assert_eq!(bits(out), bits(&alone));
            assert!(out.iter().all(|x| x.is_finite()));
        }
    }
}

/// Rows longer than a panel of weights, no features at all, one thread and more threads than features.
#[test]
fn shapes_at_the_edges_agree_with_the_definition() {
    let mut r = Random(10);
    for (rows, k, features) in [(1, 150_001, 2), (3, 140_000, 1), (2, 64, 0), (1, 1, 1), (200, 1, 3)] {
        let (x, w) = (r.floats(rows * k), Stored::new(2, r.floats(features * k)));
        let case = Case { seed: 10, rows, k, features, dtype: 2, bias: None };
        for threads in [1, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            for set in InstructionSet::available().iter().filter(|s| s.fused()) {
                let out = pool.install(|| case.run(*set, &x, &w, None));
                let element = |i: usize| {
                    fused(&x[i / features * k..][..k], |j| w.get(i % features * k + j) as f32).to_bits()
                };
                assert_eq!(
                    bits(&out),
                    (0..rows * features).map(element).collect::<Vec<_>>(),
                    "{case:?} {set}"
                );
            }
        }
    }
}

/// Rounding: K/16 sums of squares in a lane, a square root, a division, two products: all in all at most
/// K/16 + 12 units of 2⁻²⁴ (half of those of the sum, which stands under a root; the portable path rounds twice).
#[test]
fn rms_norm_agrees_with_f64_and_rows_with_themselves() {
    let mut r = Random(11);
    for width in [1, 7, 16, 96, 576, 1537] {
        for dtype in 0..3 {
            let (rows, eps) = (1 + r.below(90), 1e-5f32);
            let x: Vec<f32> = r.floats(rows * width).iter().map(|x| x * 30.0).collect();
            let weight = Stored::new(dtype, r.floats(width));
            for set in InstructionSet::available() {
                let mut out = vec![f32::NAN; x.len()];
                rms_norm_on(*set, &x, weight.view(), eps, &mut out).unwrap();
                for (i, got) in out.iter().enumerate() {
                    let row = &x[i / width * width..][..width];
                    let mean = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / width as f64;
                    let expected = weight.get(i % width) * f64::from(x[i]) / (mean + f64::from(eps)).sqrt();
                    let tolerance = (width as f64 / 16.0 + 12.0) * 2f64.powi(-24) * expected.abs();
                    assert!((f64::from(*got) - expected).abs() <= tolerance, "{set} {width} [{i}]: {got}");
                }
                let mut alone = vec![f32::NAN; width];
                rms_norm_on(*set, &x[..width], weight.view(), eps, &mut alone).unwrap();
                assert_eq!(bits(&alone), bits(&out[..width]), "{set} {width}");
            }
        }
    }
}

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

/// Mean and deviations are rounded sums of K / 16 numbers and a tree; what is left of a row far from 0 is small, so the
/// bound is one of its largest number.
#[test]
fn layer_norm_agrees_with_f64() {
    let mut r = Random(23);
    for (rows, width, shift) in
        [(1, 1, 0.0), (3, 7, 2.0), (40, 64, 0.0), (9, 160, 5.0), (70, 768, 0.5), (2, 5000, 0.0)]
    {
        let x: Vec<f32> = r.floats(rows * width).iter().map(|x| x + shift).collect();
        let (weight_type, bias_type) = (r.below(3), r.below(3));
        let weight = Stored::new(weight_type, r.floats(width));
        let bias = Stored::new(bias_type, r.floats(width));
        let mut before: Option<Vec<f32>> = None;
        for set in InstructionSet::available() {
            let mut out = vec![f32::NAN; rows * width];
            layer_norm_on(*set, &x, weight.view(), bias.view(), 1e-5, &mut out).unwrap();
            for (row, (x, out)) in x.chunks(width).zip(out.chunks(width)).enumerate() {
                let x: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
                let mean = x.iter().sum::<f64>() / width as f64;
                let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width as f64;
                let deviation = (variance + 1e-5).sqrt();
                let largest = x.iter().fold(0.0f64, |largest, x| largest.max(x.abs()));
                for (i, got) in out.iter().enumerate() {
                    let normed = (x[i] - mean) / deviation;
                    let expected = normed * weight.get(i) + bias.get(i);
                    let size = (largest / deviation + normed.abs()) * weight.get(i).abs() + bias.get(i).abs();
                    let tolerance = (width as f64 / 16.0 + 12.0) * 2f64.powi(-24) * size;
                    assert!(
                        (f64::from(*got) - expected).abs() <= tolerance,
                        "{set}: {rows} x {width} + {shift} [{row}, {i}]: {got}, not {expected}"
                    );
                }
            }
            let mut alone = vec![f32::NAN; width];
            let last = (rows - 1) * width;
            layer_norm_on(*set, &x[last..], weight.view(), bias.view(), 1e-5, &mut alone).unwrap();
            assert_eq!(bits(&alone), bits(&out[last..]), "{set}");
            if set.fused() {
                assert_eq!(bits(before.get_or_insert_with(|| out.clone())), bits(&out), "{set}");
            }
        }
    }
}

/// Heads of which a part is rotated: that part as heads of its own, the rest as it was; and both lengthened.
#[test]
fn rope_leaves_the_rest_of_a_head_alone() {
    let mut r = Random(24);
    let (heads, head_dim, half) = (3, 20, 7);
    let frequencies: Vec<f32> = r.floats(half);
    let positions: Vec<i32> = (0..5000).collect();
    let x = r.floats(positions.len() * heads * head_dim);
    let angles = RopeAngles::new(&frequencies, &positions);
    let mut out = x.clone();
    rope(&mut out, heads, &angles.clone().in_heads_of(head_dim)).unwrap();
    let rotated =
        |x: &[f32]| -> Vec<f32> { x.chunks(head_dim).flat_map(|head| &head[..2 * half]).copied().collect() };
    let mut alone = rotated(&x);
    rope(&mut alone, heads, &angles.clone()).unwrap();
    assert_eq!(bits(&alone), bits(&rotated(&out)));
    for (before, after) in x.chunks(head_dim).zip(out.chunks(head_dim)) {
        assert_eq!(bits(&before[2 * half..]), bits(&after[2 * half..]));
    }
    let mut longer = rotated(&x);
    rope(&mut longer, heads, &angles.stretched(2.0)).unwrap();
    assert!(longer.iter().zip(&alone).all(|(longer, x)| *longer == 2.0 * x));
}

#[test]
fn positions_are_added_from_their_rows_and_refused_outside() {
    let mut r = Random(25);
    let (places, width) = (9, 5);
    for dtype in 0..3 {
        let table = Stored::new(dtype, r.floats(places * width));
        let positions = [0, 6, 3, 3];
        let x = r.floats(positions.len() * width);
        let mut out = x.clone();
        add_positions(table.view(), &positions, 2, &mut out).unwrap();
        for (i, got) in out.iter().enumerate() {
            let place = positions[i / width] as usize + 2;
            assert_eq!(*got, x[i] + table.get(place * width + i % width) as f32);
        }
        for outside in [7, -1, i32::MAX, i32::MIN] {
            let error = add_positions(table.view(), &[0, outside], 2, &mut out[..2 * width]).unwrap_err();
            assert_eq!(error, DenseError::Position { position: outside, places, offset: 2 });
        }
        assert!(add_positions(table.view(), &[0, 1, 2], 0, &mut out[..7]).is_err());
        assert!(add_positions(HostTensor::F8E4M3(&[0; 10]), &[0], 0, &mut out[..5]).is_err());
        assert!(add_positions(table.view(), &[], 0, &mut []).is_ok());
    }
    let mut x = vec![3.0; 40_000];
    scale(0.5, &mut x);
    assert!(x.iter().all(|x| *x == 1.5));
}

/// One product and one sum or difference: 2 roundings of |a cos| + |b sin|; the angle is rounded to f32, which
/// the oracle repeats, and cosine and sine once more.
#[test]
fn rope_rotates_halves_by_position() {
    let mut r = Random(13);
    for (heads, half) in [(1, 1), (9, 32), (3, 40), (32, 64)] {
        let frequencies: Vec<f32> = (0..half).map(|i| 10_000f32.powf(-(i as f32) / half as f32)).collect();
        let positions: Vec<i32> = (0..40).map(|_| r.below(100_000) as i32).collect();
        let x = r.floats(positions.len() * heads * 2 * half);
        let mut out = x.clone();
        rope(&mut out, heads, &RopeAngles::new(&frequencies, &positions)).unwrap();
        for (i, got) in out.iter().enumerate() {
            let (row, d) = (i / (heads * 2 * half), i % (2 * half));
            let angle = f64::from(positions[row] as f32 * frequencies[d % half]);
            let (other, sin) =
                if d < half { (x[i + half], -angle.sin()) } else { (x[i - half], angle.sin()) };
            let (own, other) = (f64::from(x[i]) * angle.cos(), f64::from(other) * sin);
            let tolerance = 3.0 * 2f64.powi(-24) * (own.abs() + other.abs());
            assert!((f64::from(*got) - own - other).abs() <= tolerance, "{heads} {half} [{i}]: {got}");
        }
        let width = heads * 2 * half;
        let mut alone = x[..width].to_vec();
        rope(&mut alone, heads, &RopeAngles::new(&frequencies, &positions[..1])).unwrap();
        assert_eq!(bits(&alone), bits(&out[..width]));
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

#[test]
fn embed_widens_rows_and_refuses_what_is_not_there() {
    let mut r = Random(15);
    for dtype in 0..3 {
        let table = Stored::new(dtype, r.floats(50 * 24));
        let ids = [0, 49, 7, 7];
        let mut out = vec![f32::NAN; ids.len() * 24];
        embed(table.view(), &ids, &mut out).unwrap();
        for (i, got) in out.iter().enumerate() {
            assert_eq!(f64::from(*got), table.get(ids[i / 24] as usize * 24 + i % 24));
        }
        let error = embed(table.view(), &[50], &mut out[..24]).unwrap_err();
        assert_eq!(error, DenseError::TokenId { id: 50, vocabulary: 50 });
    }
}

#[test]
fn argmax_takes_the_first_of_equals_and_never_nan() {
    assert_eq!(argmax(&[]), None);
    assert_eq!(argmax(&[f32::NAN; 20]), None);
    assert_eq!(argmax(&[f32::NEG_INFINITY, f32::NAN]), Some(0));
    let mut r = Random(16);
    for n in [1, 15, 16, 17, 1000] {
        let mut x = r.floats(n);
        let at = r.below(n);
        x[at] = 2.0;
        x[n - 1] = 2.0;
        x[0] = f32::NAN;
        let expected = if at == 0 { n - 1 } else { at };
        assert_eq!(argmax(&x), if n == 1 { None } else { Some(expected) }, "{n}");
    }
}

#[test]
fn what_does_not_fit_is_refused_and_nothing_written() {
    let (x, w) = ([1.0f32; 12], [1.0f32; 8]);
    let mut out = [f32::NAN; 6];
    let weight = HostTensor::F32(&w);
    let refused = |rows, weight, bias, out: &mut [f32]| linear(&x, rows, weight, bias, out).unwrap_err();
    assert!(matches!(refused(5, weight, None, &mut out), DenseError::Rows { .. }));
    assert!(matches!(refused(3, HostTensor::F32(&w[1..]), None, &mut out), DenseError::Length { .. }));
    assert!(matches!(refused(3, weight, Some(weight), &mut out), DenseError::Length { .. }));
    assert!(matches!(refused(3, weight, None, &mut out[1..]), DenseError::Rows { .. }));
    assert!(matches!(refused(3, HostTensor::F8E4M3(&[0; 8]), None, &mut out), DenseError::DType { .. }));
    assert!(out.iter().all(|x| x.is_nan()));
    assert!(linear(&x, 3, weight, None, &mut out).is_ok());
    assert!(linear(&[], 0, weight, None, &mut []).is_ok());
    // Rows of no inputs: sums of nothing, and the bias.
    let mut out = [f32::NAN; 4];
    linear(&[], 2, HostTensor::F32(&[]), Some(HostTensor::F32(&[3.0, 4.0])), &mut out).unwrap();
    assert_eq!(out, [3.0, 4.0, 3.0, 4.0]);
    assert!(rms_norm(&x, HostTensor::F32(&w[..5]), 1e-5, &mut [0.0; 12]).is_err());
    assert!(gated_activation(Activation::Silu, &x, &w, &mut [0.0; 12]).is_err());
    assert!(activate(Activation::Relu, &x, &mut [0.0; 11]).is_err());
    assert!(
        layer_norm(&x, HostTensor::F32(&w[..4]), HostTensor::F32(&w[..3]), 1e-5, &mut [0.0; 12]).is_err()
    );
    assert!(add(&x, &mut [0.0; 11]).is_err());
    assert!(rope(&mut [0.0; 12], 1, &RopeAngles::new(&[1.0], &[0])).is_err());
}
