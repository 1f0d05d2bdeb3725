//! Linear layers against plain f64 loops, and their bits against the definition.

use super::*;

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
