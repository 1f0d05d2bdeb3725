//! Norms against plain f64 loops.

use super::super::norm::{layer_norm_on, rms_norm_on};
use super::*;

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
