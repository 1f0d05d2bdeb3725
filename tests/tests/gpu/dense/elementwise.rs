//! Activations, sums, scaling and the soft cap, element by element.

use super::super::random::{Random, run_cases};
use super::CASES;
use super::machine::{Machine, Matrix, unit, width};
use pagewise_attention::wgpu::shaders::model::elementwise::{Elementwise, ElementwiseArgs, Function};

/// erfc by its continued fraction and series: slow, and good to f64.
fn erfc(z: f64) -> f64 {
    if z < 3.0 {
        let (mut term, mut sum, mut n) = (z, z, 0.0);
        while f64::abs(term) > 1e-18 {
            n += 1.0;
            term *= -z * z / n;
            sum += term / (2.0 * n + 1.0);
        }
        return 1.0 - 2.0 / std::f64::consts::PI.sqrt() * sum;
    }
    let fraction = (1..60).rev().fold(0.0, |fraction, n| f64::from(n) / 2.0 / (z + fraction));
    (-z * z).exp() / std::f64::consts::PI.sqrt() / (z + fraction)
}

fn activated(function: Function, x: f64) -> f64 {
    match function {
        Function::Silu => x / (1.0 + (-x).exp()),
        Function::Relu => x.max(0.0),
        Function::Gelu => {
            let tail = 0.5 * erfc(x.abs() / 2f64.sqrt());
            x * if x < 0.0 { tail } else { 1.0 - tail }
        }
        Function::GeluTanh => {
            let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            0.5 * x * (1.0 + u.tanh())
        }
    }
}

pub fn element_by_element(machine: &mut Machine, seed: u64) {
    let mut random = Random::new(seed);
    for op in Elementwise::ALL {
        let shader = op.shader().unwrap();
        for _ in 0..run_cases(CASES) {
            let (rows, width) = (1 + random.below(6), width(&mut random));
            let number = |r: &mut Random| match r.below(8) {
                0 => 300.0 * unit(r),
                1 => 0.01 * unit(r),
                _ => 8.0 * unit(r),
            };
            let x = Matrix::new(&mut random, rows, width, 1, number);
            let y = Matrix::new(&mut random, rows, width, 1, unit);
            let reads_out = matches!(op, Elementwise::Add | Elementwise::Scale | Elementwise::Softcap);
            let out = match reads_out {
                true => Matrix::new(&mut random, rows, width, 1, number),
                false => Matrix::poisoned(&mut random, rows, width),
            };
            let factor = random.pick(&[30.0f32, 50.0, 2.0]);
            let args = ElementwiseArgs {
                rows: rows as u32,
                width: width as u32,
                x: x.place,
                y: y.place,
                out: out.place,
                factor,
            };
            let tensors: Vec<&[u32]> = match op {
                Elementwise::Activate(_) | Elementwise::Add => vec![&x.words, &out.words],
                Elementwise::Gated(_) => vec![&x.words, &y.words, &out.words],
                Elementwise::Scale | Elementwise::Softcap => vec![&out.words],
            };
            let label = format!("PAGEWISE_SEED={seed} {} {args:?}", op.name());
            let workgroups = args.workgroups(if random.one_in(3) { 4 } else { 65_535 }).unwrap();
            let after = machine.run(&shader, args.uniform(), workgroups, &tensors);
            out.check(&label, &after, |row, column| {
                let (x, y) = (x.get(row, column), y.get(row, column));
                let (before, factor) = (out.get(row, column), f64::from(factor));
                // WGSL's exp is within 3 + 2 |x| ulp of f32, where |x| is up to 88: 2^-16 of the result.
                let (want, size) = match op {
                    Elementwise::Activate(f) => (activated(f, x), x.abs()),
                    Elementwise::Gated(f) => (activated(f, x) * y, (x * y).abs()),
                    Elementwise::Add => (before + x, before.abs() + x.abs()),
                    Elementwise::Scale => (before * factor, (before * factor).abs()),
                    Elementwise::Softcap => (factor * (before / factor).tanh(), before.abs()),
                };
                (want, 2f64.powi(-20) * size + 2f64.powi(-16) * want.abs() + 1e-30)
            });
        }
    }
}
