//! Products of few rows with a matrix.

use pagewise_attention::DType;
use pagewise_attention::cuda::ptx::model::Activation;
use pagewise_attention::cuda::ptx::model::matvec::{
    Geometry, Input, Matvec, MatvecArgs, MatvecNorm, MatvecShape, MatvecSpec, Store,
};

use super::super::encode::{decode, encode};
use super::Run;
use super::elementwise::{apply, apply_error};
use super::norm::{normed, parameters};
use super::tensor::{F32, Tensor, dtype, numbers, vector};

pub fn run(run: &mut Run<'_>) {
    let small = run.small;
    let shared = run.device.shared_memory();
    for spec in MatvecSpec::all() {
        let small_matvec = Matvec::new(spec).unwrap();
        let matvec = small_matvec.clone().with_shared(shared);
        run.variant(small_matvec.kernel(), |device, random| {
            let (unit, weight_type) = (spec.vector as usize, dtype(spec.dtype));
            let staged = spec.input == Input::Staged;
            let rows = random.pick(&[1, 1, 2, 3, 7, 8, 11]);
            let features = 1 + random.below(random.clone().pick(&if small { [20, 40] } else { [40, 700] }));
            // Eight staged rows and the sums of many warps must fit 96 KiB of shared memory.
            let most = match (small, staged) {
                (true, _) => [60, 90],
                (false, true) => [100, 350],
                (false, false) => [100, 500],
            };
            let width = unit * (1 + random.below(random.clone().pick(&most)));
            let halves = if spec.gated { 2 } else { 1 };
            let reach = (3.0 / width as f64).sqrt();
            let mut weight = Tensor::random(random, weight_type, halves * features, width, unit, reach);
            let x_type = if staged { DType::F32 } else { weight_type };
            let x_unit = if staged && unit > 1 { 4 } else { unit };
            let mut x =
                Tensor::random(random, x_type, rows, width, x_unit, random.clone().pick(&[1.0, 20.0]));
            let bias = numbers(random, halves * features, 0.0, 1.0);
            let has_bias = random.one_in(2);
            let (kind, eps, norm_weight, norm_bias) = parameters(random, width);
            let (has_norm, has_norm_bias) = (staged && !random.one_in(3), random.one_in(2));
            let activation = random.pick(&Activation::ALL);
            let store = random.pick(&[Store::Compute, Store::F32, Store::Add]);
            let out_type = if store == Store::Compute { weight_type } else { DType::F32 };
            let mut out = Tensor::poisoned(random, out_type, rows, features, 1);
            if store == Store::Add {
                out = out.filled(|_, _| random.unit() * 4.0);
            }
            let shape = MatvecShape { rows: rows as u32, features: features as u32, width: width as u32 };
            let norm = MatvecNorm {
                kind,
                eps,
                weight: vector(device, &norm_weight),
                bias: if has_norm_bias { vector(device, &norm_bias) } else { 0 },
            };
            let args = MatvecArgs {
                shape,
                x: x.upload(device),
                norm: has_norm.then_some(norm),
                weight: weight.upload(device),
                bias: if has_bias { vector(device, &bias) } else { 0 },
                activation,
                store,
                out: out.upload(device),
            };
            // As it is launched on a GPU with much shared memory or little, and with any other geometry.
            let chooses = random.pick(&[&matvec, &small_matvec]);
            let mut geometry = chooses.geometry(shape, random.pick(&[1, 3, 132]), random.one_in(2));
            if random.one_in(2) {
                let other = Geometry {
                    warps: if small { 4 } else { random.pick(&[4, 8, 12, 16]) },
                    blocks: 1 + random.below(5) as u32,
                    slots: random.pick(&[2, 3, 4]),
                    copies: spec.input == Input::Direct && spec.vector > 1 && random.one_in(2),
                };
                // Staged rows may leave no room for that.
                if matvec.launch(shape, other).is_ok() {
                    geometry = other;
                }
            }
            let launch = matvec.launch(shape, geometry).map_err(|error| error.to_string())?;
            device.run(matvec.kernel(), launch, &args.values(geometry))?;

            let rounded = |value: f64| decode(weight_type, &encode(weight_type, value as f32));
            // The rows as the products see them, and how far off an element may be that lies between two numbers.
            let inputs: Vec<Vec<(f64, f64)>> = (0..rows)
                .map(|row| {
                    let x: Vec<f64> = (0..width).map(|column| x.get(row, column)).collect();
                    let y = match has_norm {
                        true => normed(kind, eps, &x, &norm_weight, has_norm_bias.then_some(&norm_bias)),
                        false => x.into_iter().map(|x| (x, 0.0)).collect(),
                    };
                    let between = |(y, error): (f64, f64)| {
                        (
                            rounded(y),
                            (rounded(y + error) - rounded(y))
                                .abs()
                                .max((rounded(y - error) - rounded(y)).abs()),
                        )
                    };
                    if staged { y.into_iter().map(between).collect() } else { y }
                })
                .collect();
            let product = |row: usize, feature: usize| {
                let bias = if has_bias { f64::from(bias[feature]) } else { 0.0 };
                let (mut sum, mut size, mut error) = (bias, bias.abs(), 0.0);
                for (column, (y, between)) in inputs[row].iter().enumerate() {
                    let w = weight.get(feature, column);
                    sum += y * w;
                    size += (y * w).abs();
                    error += between * w.abs();
                }
                // Each addition of f32 loses at most two units of 2^-24 of what has been summed, and tensor cores
                // truncate; a number goes through at most an eighth of them, and those of the warps and lanes.
                (sum, error + size * 2.0 * F32 * (width as f64 / 8.0 + 32.0))
            };
            out.compare(device, |row, feature| {
                let (v, v_error) = product(row, feature);
                let (mut value, mut error) = (apply(activation, v), apply_error(activation, v, v_error));
                if spec.gated {
                    let (up, up_error) = product(row, features + feature);
                    error = error * (up.abs() + up_error) + value.abs() * up_error;
                    value *= up;
                    error += value.abs() * F32;
                }
                if store == Store::Add {
                    value += out.get(row, feature);
                    error += value.abs() * F32;
                }
                (value, error)
            })
        });
    }
}
