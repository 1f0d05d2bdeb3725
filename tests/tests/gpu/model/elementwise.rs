//! The kernels that work element by element.

use pagewise_attention::DType;
use pagewise_attention::cuda::ptx::model::Activation;
use pagewise_attention::cuda::ptx::model::activate::{Activate, ActivateArgs, ActivateSpec};
use pagewise_attention::cuda::ptx::model::add::{Add, AddArgs, AddSpec};
use pagewise_attention::cuda::ptx::model::embed::{Embed, EmbedArgs, EmbedSpec};
use pagewise_attention::cuda::ptx::model::fill_weights::{
    FillWeights, FillWeightsArgs, FillWeightsSpec, uniform,
};
use pagewise_attention::cuda::ptx::model::gather_rows::{GatherRows, GatherRowsArgs, GatherRowsSpec};
use pagewise_attention::cuda::ptx::model::scale::{Scale, ScaleArgs, ScaleSpec};

use super::super::encode::encode;
use super::super::random::Random;
use super::Run;
use super::tensor::{F32, Tensor, dtype, numbers, vector, words};

/// The function, in f64.
pub fn apply(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::None => x,
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::GeluTanh => {
            let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
            0.5 * x * (1.0 + u.tanh())
        }
        Activation::Gelu => x * normal_below(x),
        Activation::Relu => x.max(0.0),
    }
}

/// How far f(x) may be off where x is off by `error`. No function here is steeper than 1.13; each is computed in a few
/// steps of f32, of which the exponential has an argument of up to 100 in magnitude.
pub fn apply_error(activation: Activation, x: f64, error: f64) -> f64 {
    match activation {
        Activation::None => error,
        Activation::Relu => error,
        _ => {
            1.13 * error
                + apply(activation, x).abs() * F32 * (16.0 + 4.0 * x.abs().min(100.0) * x.abs().min(100.0))
                + 1e-37
        }
    }
}

/// Φ: by the series of the error function near 0, by the continued fraction of its complement beyond.
fn normal_below(x: f64) -> f64 {
    let z = x.abs() / std::f64::consts::SQRT_2;
    let above = if z < 2.5 {
        let (mut term, mut sum) = (z, z);
        for n in 1..80u32 {
            term *= -z * z / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        0.5 - sum / std::f64::consts::PI.sqrt()
    } else {
        let fraction = (1..200u32).rev().fold(z, |below, n| z + 0.5 * f64::from(n) / below);
        0.5 * (-z * z).exp() / (fraction * std::f64::consts::PI.sqrt())
    };
    if x < 0.0 { above } else { 1.0 - above }
}

/// Rows and width, which `vector` divides.
fn shape(random: &mut Random, vector: u32) -> (usize, usize) {
    let vector = vector as usize;
    let rows = random.pick(&[1, 1, 2, 3, 8, 17]);
    (rows, vector * (1 + random.below(random.clone().pick(&[3, 40, 300]))))
}

pub fn run(run: &mut Run<'_>) {
    for spec in ActivateSpec::all() {
        let activate = Activate::new(spec).unwrap();
        run.variant(activate.kernel(), |device, random| {
            let (rows, width) = shape(random, spec.vector);
            let (unit, dtype) = (spec.vector as usize, dtype(spec.dtype));
            let activation = random.pick(&Activation::ALL);
            let mut x = Tensor::random(random, dtype, rows, width, unit, 8.0);
            let mut up = Tensor::random(random, dtype, rows, width, unit, 2.0);
            let (has_bias, has_up, in_place) = (random.one_in(2), random.one_in(2), random.one_in(3));
            let bias = numbers(random, width, 0.0, 1.0);
            let mut out = Tensor::poisoned(random, dtype, rows, width, unit);
            if in_place {
                out = x.clone();
            }
            let out_rows = out.upload(device);
            let args = ActivateArgs {
                rows: rows as u32,
                width: width as u32,
                activation,
                x: if in_place { out_rows } else { x.upload(device) },
                bias: if has_bias { vector(device, &bias) } else { 0 },
                up: if has_up { up.upload(device) } else { Default::default() },
                out: out_rows,
            };
            device.run(activate.kernel(), activate.launch(args.rows, args.width).unwrap(), &args.values())?;
            out.compare(device, |row, column| {
                let bias = if has_bias { f64::from(bias[column]) } else { 0.0 };
                let v = x.get(row, column) + bias;
                let up = if has_up { up.get(row, column) } else { 1.0 };
                let error = apply_error(activation, v, v.abs() * F32);
                let value = apply(activation, v) * up;
                (value, error * up.abs() + value.abs() * F32)
            })
        });
    }
    for spec in AddSpec::all() {
        let add = Add::new(spec).unwrap();
        run.variant(add.kernel(), |device, random| {
            let (rows, width) = shape(random, spec.vector);
            let unit = spec.vector as usize;
            let mut x = Tensor::random(random, DType::F32, rows, width, unit, 8.0);
            let mut y = Tensor::random(random, dtype(spec.dtype), rows, width, unit, 2.0);
            let (has_bias, has_y) = (random.one_in(2), !random.one_in(4));
            let bias = numbers(random, width, 0.0, 1.0);
            let args = AddArgs {
                rows: rows as u32,
                width: width as u32,
                x: x.upload(device),
                y: if has_y { y.upload(device) } else { Default::default() },
                bias: if has_bias { vector(device, &bias) } else { 0 },
            };
            device.run(add.kernel(), add.launch(args.rows, args.width).unwrap(), &args.values())?;
            x.compare(device, |row, column| {
                let bias = if has_bias { f64::from(bias[column]) } else { 0.0 };
                let y = if has_y { y.get(row, column) } else { 0.0 };
                let value = x.get(row, column) + y + bias;
                (value, (value.abs() + y.abs() + bias.abs()) * 2.0 * F32)
            })
        });
    }
    for spec in ScaleSpec::all() {
        let scale = Scale::new(spec).unwrap();
        run.variant(scale.kernel(), |device, random| {
            let (rows, width) = shape(random, spec.vector);
            let reach = random.pick(&[1e-3, 1.0, 100.0]);
            let mut x = Tensor::random(random, DType::F32, rows, width, spec.vector as usize, reach);
            let (factor, cap) = (random.pick(&[1.0, 0.25, 22.6f32]), random.pick(&[0.0, 0.0, 5.0, 30.0f32]));
            let args = ScaleArgs { rows: rows as u32, width: width as u32, x: x.upload(device), factor, cap };
            device.run(scale.kernel(), scale.launch(args.rows, args.width).unwrap(), &args.values())?;
            x.compare(device, |row, column| {
                let value = x.get(row, column) * f64::from(factor);
                let capped = if cap > 0.0 { f64::from(cap) * (value / f64::from(cap)).tanh() } else { value };
                // 1 - exp(-2 u) loses four bits at the smallest u for which it is used, 1 / 16.
                (capped, capped.abs() * 64.0 * F32)
            })
        });
    }
    for spec in GatherRowsSpec::all() {
        let gather = GatherRows::new(spec).unwrap();
        run.variant(gather.kernel(), |device, random| {
            let (rows, width) = shape(random, spec.vector);
            let x_rows = 1 + random.below(9);
            let mut x = Tensor::random(random, DType::F32, x_rows, width, spec.vector as usize, 1.0);
            let unit = if spec.vector > 1 { 16 / dtype(spec.out).size() } else { 1 };
            let mut out = Tensor::poisoned(random, dtype(spec.out), rows, width, unit);
            let listed = !random.one_in(3);
            let index: Vec<u32> = (0..rows)
                .map(|row| match random.below(8) {
                    _ if !listed => row as u32,
                    0 => random.pick(&[u32::MAX, x_rows as u32]),
                    _ => random.below(x_rows) as u32,
                })
                .collect();
            let args = GatherRowsArgs {
                rows: rows as u32,
                width: width as u32,
                x: x.upload(device),
                x_rows: x_rows as u32,
                index: if listed { words(device, &index) } else { 0 },
                out: out.upload(device),
            };
            device.run(gather.kernel(), gather.launch(args.rows, args.width).unwrap(), &args.values())?;
            out.compare(device, |row, column| {
                let from = index[row] as usize;
                (if from < x_rows { x.get(from, column) } else { f64::NAN }, 0.0)
            })
        });
    }
    for spec in EmbedSpec::all() {
        let embed = Embed::new(spec).unwrap();
        run.variant(embed.kernel(), |device, random| {
            let (rows, width) = shape(random, spec.vector);
            let unit = spec.vector as usize;
            let (table_rows, offset) = (1 + random.below(20), random.pick(&[0, 0, 2]));
            let mut table = Tensor::random(random, dtype(spec.dtype), table_rows, width, unit, 1.0);
            let adds = random.one_in(2);
            let mut out = Tensor::poisoned(random, DType::F32, rows, width, unit);
            if adds {
                out = out.filled(|_, _| random.unit());
            }
            let wide = random.one_in(2);
            let ids: Vec<i64> = (0..rows)
                .map(|_| match random.below(10) {
                    0 => random.pick(&[-1, i64::from(i32::MIN), table_rows as i64]),
                    1 if wide => random.pick(&[1 << 32, i64::MIN, i64::MAX]),
                    _ => random.below(table_rows) as i64,
                })
                .collect();
            let bytes: Vec<u8> = ids
                .iter()
                .flat_map(
                    |id| if wide { id.to_le_bytes().to_vec() } else { (*id as i32).to_le_bytes().to_vec() },
                )
                .collect();
            let scale = random.pick(&[1.0, 45.25f32]);
            let args = EmbedArgs {
                rows: rows as u32,
                width: width as u32,
                ids: device.upload(&bytes),
                id_bytes: if wide { 8 } else { 4 },
                offset,
                table: table.upload(device),
                table_rows: table_rows as u32,
                scale,
                adds,
                out: out.upload(device),
            };
            device.run(embed.kernel(), embed.launch(args.rows, args.width).unwrap(), &args.values())?;
            out.compare(device, |row, column| {
                let from = ids[row].saturating_add(offset as i64);
                let there = ids[row] >= 0 && from < table_rows as i64;
                let value = if there { table.get(from as usize, column) * f64::from(scale) } else { 0.0 };
                let value = if adds { value + out.get(row, column) } else { value };
                (value, value.abs() * F32)
            })
        });
    }
    for spec in FillWeightsSpec::all() {
        let fill = FillWeights::new(spec).unwrap();
        run.variant(fill.kernel(), |device, random| {
            let count = 1 + random.below(3000);
            let (seed, first) = (random.next(), random.pick(&[0, 77, 1 << 33]));
            let (center, spread) = random.pick(&[(0.0, 0.02f32), (1.0, 0.1)]);
            let mut out = Tensor::poisoned(random, dtype(spec.dtype), 1, count, 1);
            let args = FillWeightsArgs {
                out: out.upload(device).address,
                count: count as u64,
                first,
                seed,
                center,
                spread,
            };
            device.run(fill.kernel(), fill.launch(args.count).unwrap(), &args.values())?;
            out.compare(device, |_, column| {
                let exact = uniform(seed, first + column as u64).mul_add(spread, center);
                // Rounded as the type's numbers are, to the bit.
                assert!(encode(out.dtype, exact).len() == out.dtype.size());
                (f64::from(exact), 0.0)
            })
        });
    }
}
