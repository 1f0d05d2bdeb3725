//! `matvec` and `linear` against sums in f64.

use super::super::random::{Random, run_cases};
use super::CASES;
use super::machine::{Machine, Matrix, unit, weight, width};
use pagewise_attention::wgpu::shaders::DType;
use pagewise_attention::wgpu::shaders::model::product::{Form, ProductArgs, ProductSpec};

pub fn products(machine: &mut Machine, seed: u64) {
    let mut random = Random::new(seed);
    for dtype in DType::ALL {
        for form in Form::ALL {
            let spec = ProductSpec { dtype, form };
            let shader = spec.shader().unwrap();
            for _ in 0..run_cases(CASES) {
                let rows = match form {
                    Form::Few(rows) | Form::Tiled(rows) => 1 + random.below(2 * rows as usize),
                };
                let (k, n) = (width(&mut random), width(&mut random));
                let x = Matrix::new(&mut random, rows, k, 8, unit);
                let (weight_words, numbers, weight) = weight(&mut random, dtype, n, k);
                let bias: Vec<f32> = (0..n + 5).map(|_| unit(&mut random)).collect();
                let (has_bias, accumulate) = (random.one_in(2), random.one_in(2));
                let out = match accumulate {
                    true => Matrix::new(&mut random, rows, n, 1, unit),
                    false => Matrix::poisoned(&mut random, rows, n),
                };
                let args = ProductArgs {
                    rows: rows as u32,
                    in_features: k as u32,
                    out_features: n as u32,
                    x: x.place,
                    weight,
                    bias: has_bias.then_some(5),
                    out: out.place,
                    accumulate,
                };
                let label = format!("PAGEWISE_SEED={seed} {} {args:?}", spec.name());
                let bias_words: Vec<u32> = bias.iter().map(|x| x.to_bits()).collect();
                let after = machine.run(
                    &shader,
                    spec.uniform(&args).unwrap(),
                    spec.workgroups(&args, 65_535).unwrap(),
                    &[&x.words, &weight_words, &bias_words, &out.words],
                );
                out.check(&label, &after, |row, column| {
                    let terms = (0..k).map(|i| x.get(row, i) * numbers[column * k + i]);
                    let (sum, sizes) = terms.fold((0.0, 0.0), |(s, a), t| (s + t, a + t.abs()));
                    let bias = if has_bias { f64::from(bias[5 + column]) } else { 0.0 };
                    let before = if accumulate { out.get(row, column) } else { 0.0 };
                    // Each of k products and sums rounds by half a unit of 2^-23 of what is there, in any order.
                    let allowed = (k + 4) as f64 * 2f64.powi(-24) * (sizes + bias.abs() + before.abs());
                    (sum + bias + before, allowed)
                });
            }
        }
    }
}
