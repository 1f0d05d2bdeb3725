//! `argmax`: the likeliest token, whatever else is in the row.

use super::super::random::{Random, run_cases};
use super::CASES;
use super::machine::{Machine, Matrix, width};
use pagewise_attention::wgpu::shaders::model::argmax;

pub fn likeliest_tokens(machine: &mut Machine, seed: u64) {
    let mut random = Random::new(seed);
    let shader = argmax::shader().unwrap();
    for _ in 0..run_cases(3 * CASES) {
        let (rows, width) = (1 + random.below(9), width(&mut random) * random.pick(&[1, 1, 17]));
        // Few different numbers, so that there are ties; NaN and infinities among them.
        let kinds = random.pick(&[1, 3, 9]);
        let x = Matrix::new(&mut random, rows, width, 1, |r| match r.below(kinds + 3) {
            0 => f32::NAN,
            1 => -0.0,
            2 => f32::NEG_INFINITY,
            3 => 0.0,
            4 => -f32::NAN,
            kind => kind as f32 - 6.5,
        });
        let args = argmax::ArgmaxArgs { rows: rows as u32, width: width as u32, x: x.place, out: 1 };
        let label = format!("PAGEWISE_SEED={seed} argmax {args:?}");
        let workgroups = args.workgroups(if random.one_in(3) { 3 } else { 65_535 }).unwrap();
        let before = vec![77u32; rows + 2];
        let after = machine.run(&shader, args.uniform(), workgroups, &[&x.words, &before]);
        let mut want = before;
        for (row, want) in want[1..=rows].iter_mut().enumerate() {
            let mut best: Option<(usize, f64)> = None;
            for column in 0..width {
                let value = x.get(row, column);
                if value > f64::NEG_INFINITY && best.is_none_or(|(_, other)| value > other) {
                    best = Some((column, value));
                }
            }
            *want = best.map_or(argmax::NO_TOKEN, |(column, _)| column as u32);
        }
        assert_eq!(after, want, "{label}");
    }
}
