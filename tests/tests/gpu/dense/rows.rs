//! What is done to rows: norms, rotary embedding, and rows of tables.

use super::super::random::{Random, run_cases};
use super::CASES;
use super::machine::{Machine, Matrix, unit, weight, width};
use pagewise_attention::wgpu::shaders::DType;
use pagewise_attention::wgpu::shaders::model::lookup::{LookupArgs, LookupSpec};
use pagewise_attention::wgpu::shaders::model::norm::{NormArgs, NormKind, NormSpec};
use pagewise_attention::wgpu::shaders::model::rotary::{self, RotaryArgs};

pub fn norms(machine: &mut Machine, seed: u64) {
    let mut random = Random::new(seed);
    for kind in [NormKind::Rms, NormKind::Layer] {
        for in_place in [false, true] {
            let spec = NormSpec { kind, in_place };
            let shader = spec.shader().unwrap();
            for _ in 0..run_cases(2 * CASES) {
                let (rows, parts, width) = (1 + random.below(6), 1 + random.below(4), width(&mut random));
                let shift = if random.one_in(2) { 3.0 } else { 0.0 };
                let x = Matrix::new(&mut random, rows, parts * width, 1, |r| unit(r) + shift);
                let out = match in_place {
                    true => Matrix { words: x.words.clone(), ..x },
                    false => Matrix::poisoned(&mut random, rows, parts * width),
                };
                let vector = |random: &mut Random| (0..width + 3).map(|_| unit(random)).collect::<Vec<f32>>();
                let (weight, bias) = (vector(&mut random), vector(&mut random));
                let eps = 1e-5f32;
                let args = NormArgs {
                    rows: rows as u32,
                    parts: parts as u32,
                    width: width as u32,
                    eps,
                    x: x.place,
                    out: out.place,
                    weight: 3,
                    bias: 2,
                };
                let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<u32>>();
                let (weight_words, bias_words) = (bits(&weight), bits(&bias));
                let mut tensors: Vec<&[u32]> = vec![&weight_words];
                if kind == NormKind::Layer {
                    tensors.push(&bias_words);
                }
                if !in_place {
                    tensors.push(&x.words);
                }
                tensors.push(&out.words);
                let label = format!("PAGEWISE_SEED={seed} {} {args:?}", spec.name());
                let workgroups = args.workgroups(if random.one_in(3) { 5 } else { 65_535 }).unwrap();
                let after = machine.run(&shader, args.uniform(), workgroups, &tensors);
                out.check(&label, &after, |row, column| {
                    let (first, i) = (column / width * width, column % width);
                    let part: Vec<f64> = (0..width).map(|i| x.get(row, first + i)).collect();
                    let mean = match kind {
                        NormKind::Rms => 0.0,
                        NormKind::Layer => part.iter().sum::<f64>() / width as f64,
                    };
                    let variance = part.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width as f64;
                    let factor = 1.0 / (variance + f64::from(eps)).sqrt();
                    let normed = (part[i] - mean) * factor * f64::from(weight[3 + i]);
                    let bias = match kind {
                        NormKind::Rms => 0.0,
                        NormKind::Layer => f64::from(bias[2 + i]),
                    };
                    // The mean rounds by a few units of the largest element; where the variance is small, that
                    // is much of the result. 1 / sqrt is within 2 ulp.
                    let size = (part[i].abs() + mean.abs()) * factor * f64::from(weight[3 + i]).abs();
                    (normed + bias, 64.0 * 2f64.powi(-24) * (size + bias.abs()) + 1e-6)
                });
            }
        }
    }
}

pub fn lookups(machine: &mut Machine, seed: u64) {
    let mut random = Random::new(seed);
    for dtype in DType::ALL {
        for adds in [false, true] {
            let spec = LookupSpec { dtype, adds };
            let shader = spec.shader().unwrap();
            for _ in 0..run_cases(CASES) {
                let (rows, width, places) = (1 + random.below(9), width(&mut random), 3 + random.below(20));
                let (words, numbers, table) = weight(&mut random, dtype, places, width);
                let (first, offset) = (random.below(10), random.below(3));
                let ids: Vec<u32> = (0..rows).map(|_| random.below(first + places + 10) as u32).collect();
                let out = Matrix::new(&mut random, rows, width, 1, unit);
                let args = LookupArgs {
                    rows: rows as u32,
                    width: width as u32,
                    numbers: 1,
                    number_offset: offset as u32,
                    first_row: first as u32,
                    table_rows: places as u32,
                    table,
                    out: out.place,
                };
                let mut listed = vec![u32::MAX];
                listed.extend(&ids);
                let label = format!("PAGEWISE_SEED={seed} {} {args:?}", spec.name());
                let workgroups = args.workgroups(if random.one_in(3) { 6 } else { 65_535 }).unwrap();
                let after = machine.run(&shader, args.uniform(), workgroups, &[&listed, &words, &out.words]);
                out.check(&label, &after, |row, column| {
                    let place = (ids[row] as usize + offset).checked_sub(first).filter(|&p| p < places);
                    let before = out.get(row, column);
                    match place {
                        None => (before, 0.0),
                        Some(place) if adds => (before + numbers[place * width + column], 2f64.powi(-22)),
                        Some(place) => (numbers[place * width + column], 0.0),
                    }
                });
            }
        }
    }
}

pub fn rotations(machine: &mut Machine, seed: u64) {
    let mut random = Random::new(seed);
    let shader = rotary::shader().unwrap();
    for _ in 0..run_cases(3 * CASES) {
        let (rows, heads, half) = (1 + random.below(6), 1 + random.below(5), 1 + random.below(40));
        let head_dim = 2 * half + random.pick(&[0, 0, 1, 8]);
        let x = Matrix::new(&mut random, rows, heads * head_dim, 1, unit);
        let angles: Vec<f64> = (0..rows * half).map(|_| 100.0 * random.unit()).collect();
        let mut cos_sin = Vec::new();
        for row in angles.chunks(half) {
            cos_sin.extend(row.iter().map(|angle| (angle.cos() as f32).to_bits()));
            cos_sin.extend(row.iter().map(|angle| (angle.sin() as f32).to_bits()));
        }
        let args = RotaryArgs {
            rows: rows as u32,
            heads: heads as u32,
            head_dim: head_dim as u32,
            half: half as u32,
            x: x.place,
        };
        let label = format!("PAGEWISE_SEED={seed} rotary {args:?}");
        let workgroups = args.workgroups(if random.one_in(3) { 6 } else { 65_535 }).unwrap();
        let after = machine.run(&shader, args.uniform(), workgroups, &[&cos_sin, &x.words]);
        x.check(&label, &after, |row, column| {
            let (head, i) = (column / head_dim * head_dim, column % head_dim);
            let rotated = |pair: usize| {
                let (a, b) = (x.get(row, head + pair), x.get(row, head + pair + half));
                let (sin, cos) = angles[row * half + pair].sin_cos();
                (a * cos - b * sin, b * cos + a * sin)
            };
            // Two products and a sum of numbers up to 1.
            match i {
                i if i < half => (rotated(i).0, 4.0 * 2f64.powi(-23)),
                i if i < 2 * half => (rotated(i - half).1, 4.0 * 2f64.powi(-23)),
                _ => (x.get(row, column), 0.0),
            }
        });
    }
}
