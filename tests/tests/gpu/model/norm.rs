//! Norms.

use pagewise_attention::cuda::ptx::model::norm::{Norm, NormArgs, NormKind, NormSpec, Parts};

use super::super::random::Random;
use super::Run;
use super::tensor::{F32, Tensor, dtype, numbers, vector};

/// A norm of a row, in f64: each element, and how far off f32 arithmetic may be.
pub fn normed(kind: NormKind, eps: f32, x: &[f64], weight: &[f32], bias: Option<&[f32]>) -> Vec<(f64, f64)> {
    let count = x.len() as f64;
    let mean = if kind == NormKind::Layer { x.iter().sum::<f64>() / count } else { 0.0 };
    let largest = x.iter().fold(0.0f64, |most, x| most.max(x.abs()));
    // Sums of f32 in many partial sums: at most 64 additions of a part each.
    let mean_error = if kind == NormKind::Layer { largest * 64.0 * F32 } else { 0.0 };
    let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / count;
    let scale = 1.0 / (variance + f64::from(eps)).sqrt();
    x.iter()
        .zip(weight)
        .enumerate()
        .map(|(i, (x, weight))| {
            let (weight, bias) = (f64::from(*weight), bias.map_or(0.0, |bias| f64::from(bias[i])));
            let scaled = (x - mean) * scale * weight;
            let error =
                scaled.abs() * 64.0 * F32 + mean_error * scale * weight.abs() + (scaled + bias).abs() * F32;
            (scaled + bias, error)
        })
        .collect()
}

/// Number, weight and bias of a norm.
pub fn parameters(random: &mut Random, width: usize) -> (NormKind, f32, Vec<f32>, Vec<f32>) {
    let kind = random.pick(&[NormKind::Rms, NormKind::Layer]);
    (kind, random.pick(&[1e-5, 1e-6f32]), numbers(random, width, 1.0, 0.5), numbers(random, width, 0.0, 0.5))
}

pub fn run(run: &mut Run<'_>) {
    for spec in NormSpec::all() {
        let norm = Norm::new(spec).unwrap();
        run.variant(norm.kernel(), |device, random| {
            let unit = spec.vector as usize;
            let (rows, parts) = (random.pick(&[1, 2, 5]), random.pick(&[1, 1, 3, 8]));
            let width = unit * (1 + random.below(random.clone().pick(&[16, 200, 700])));
            let (kind, eps, weight, bias) = parameters(random, width);
            let (x_type, out_type) = (dtype(spec.x), dtype(spec.out));
            let reach = random.pick(&[0.01, 1.0, 50.0]);
            // Parts are rows of a tensor, so that they may have gaps, and rows follow each other.
            let mut x = Tensor::random(random, x_type, rows * parts, width, unit, reach);
            let in_place = x_type == out_type && random.one_in(3);
            let mut out = Tensor::poisoned(
                random,
                out_type,
                rows * parts,
                width,
                unit.max(16 / out_type.size().max(2)),
            );
            if in_place {
                out = x.clone();
            }
            let has_bias = random.one_in(2);
            let view = |rows: pagewise_attention::cuda::ptx::model::Rows| Parts {
                address: rows.address,
                row_stride: rows.stride * parts as u64,
                part_stride: rows.stride,
            };
            let out_rows = out.upload(device);
            let args = NormArgs {
                rows: rows as u32,
                parts: parts as u32,
                width: width as u32,
                kind,
                eps,
                x: if in_place { view(out_rows) } else { view(x.upload(device)) },
                weight: vector(device, &weight),
                bias: if has_bias { vector(device, &bias) } else { 0 },
                out: view(out_rows),
            };
            let launch = norm.launch(args.rows, args.parts, args.width).unwrap();
            device.run(norm.kernel(), launch, &args.values())?;
            let rows: Vec<Vec<(f64, f64)>> = (0..rows * parts)
                .map(|row| {
                    let x: Vec<f64> = (0..width).map(|column| x.get(row, column)).collect();
                    normed(kind, eps, &x, &weight, has_bias.then_some(&bias))
                })
                .collect();
            out.compare(device, |row, column| rows[row][column])
        });
    }
}
