//! The dense kernels in WGSL against plain f64, on every adapter that is there: random shapes, rows with gaps, NaN in
//! everything that no kernel may read or leave unwritten.
//!
//! A failure names its seed: `PAGEWISE_SEED=… cargo test -p pagewise-tests --test wgpu_dense NAME` runs it again.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub, reason = "a test")]

#[path = "gpu/random.rs"]
mod random;
#[path = "gpu/wgpu_contexts.rs"]
mod wgpu_contexts;

use half::{bf16, f16};
use pagewise_attention::wgpu::shaders::model::elementwise::{Elementwise, ElementwiseArgs, Function};
use pagewise_attention::wgpu::shaders::model::lookup::{LookupArgs, LookupSpec};
use pagewise_attention::wgpu::shaders::model::norm::{NormArgs, NormKind, NormSpec};
use pagewise_attention::wgpu::shaders::model::product::{Form, ProductArgs, ProductSpec};
use pagewise_attention::wgpu::shaders::model::rotary::{self, RotaryArgs};
use pagewise_attention::wgpu::shaders::model::{PARAM_WORDS, Rows, argmax};
use pagewise_attention::wgpu::shaders::{DType, Shader};
use pagewise_attention::wgpu::wgpu::{
    BindGroupDescriptor, BindGroupEntry, BindingResource, Buffer, BufferBinding, BufferDescriptor,
    BufferUsages, ComputePipeline, MapMode, PollType,
};
use pagewise_attention::wgpu::{Context, UniformOffset, wgpu};
use random::{Random, run_cases, run_seed};
use std::collections::HashMap;
use std::num::NonZeroU64;

/// Cases of each variant that are drawn anew.
const CASES: usize = 4;

/// A device and the kernels that were compiled for it.
struct Machine {
    context: Context,
    pipelines: HashMap<String, (ComputePipeline, wgpu::BindGroupLayout)>,
}

/// Every adapter, with a fresh seed each.
fn machines() -> Vec<(Machine, u64)> {
    let contexts = wgpu_contexts::contexts();
    contexts
        .into_iter()
        .map(|(name, context)| {
            let seed = run_seed();
            eprintln!("{name}: PAGEWISE_SEED={seed}");
            (Machine { context, pipelines: HashMap::new() }, seed)
        })
        .collect()
}

impl Machine {
    fn buffer(&self, words: &[u32]) -> Buffer {
        let buffer = self.context.device().create_buffer(&BufferDescriptor {
            label: None,
            size: (4 * words.len() as u64).next_multiple_of(16),
            usage: BufferUsages::STORAGE
                | BufferUsages::UNIFORM
                | BufferUsages::COPY_SRC
                | BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        self.context.queue().write_buffer(&buffer, 0, bytes(words));
        buffer
    }

    /// Runs a kernel over tensors in the order of its bindings, the last of which is written; returns that one.
    fn run(
        &mut self,
        shader: &Shader,
        uniform: [u32; PARAM_WORDS],
        workgroups: [u32; 3],
        tensors: &[&[u32]],
    ) -> Vec<u32> {
        let device = self.context.device().clone();
        let (pipeline, layout) = self
            .pipelines
            .entry(shader.name().to_owned())
            .or_insert_with(|| self.context.compile(shader, UniformOffset::Dynamic).unwrap())
            .clone();
        let params = self.buffer(&uniform);
        let buffers: Vec<Buffer> = tensors.iter().map(|words| self.buffer(words)).collect();
        let size = NonZeroU64::new(4 * PARAM_WORDS as u64);
        let params = BindingResource::Buffer(BufferBinding { buffer: &params, offset: 0, size });
        let mut entries = vec![BindGroupEntry { binding: 0, resource: params }];
        entries.extend(shader.bindings().iter().skip(1).zip(&buffers).map(|(binding, buffer)| {
            BindGroupEntry { binding: binding.index, resource: buffer.as_entire_binding() }
        }));
        let group = device.create_bind_group(&BindGroupDescriptor {
            label: None,
            layout: &layout,
            entries: &entries,
        });
        let last = buffers.last().unwrap();
        let readback = device.create_buffer(&BufferDescriptor {
            label: None,
            size: last.size(),
            usage: BufferUsages::MAP_READ | BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        let mut encoder = device.create_command_encoder(&Default::default());
        {
            let mut pass = encoder.begin_compute_pass(&Default::default());
            pass.set_pipeline(&pipeline);
            pass.set_bind_group(0, &group, &[0]);
            let [x, y, z] = workgroups;
            pass.dispatch_workgroups(x, y, z);
        }
        encoder.copy_buffer_to_buffer(last, 0, &readback, 0, last.size());
        self.context.queue().submit([encoder.finish()]);
        readback.slice(..).map_async(MapMode::Read, |mapped| mapped.unwrap());
        device.poll(PollType::wait_indefinitely()).unwrap();
        let view = readback.slice(..).get_mapped_range().unwrap();
        let words = view.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap()));
        words.take(tensors.last().unwrap().len()).collect()
    }
}

fn bytes(words: &[u32]) -> &[u8] {
    // SAFETY: every bit pattern of four bytes is four bytes.
    unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), size_of_val(words)) }
}

/// Rows of numbers with gaps between them; what is no element is NaN.
struct Matrix {
    words: Vec<u32>,
    rows: usize,
    width: usize,
    place: Rows,
}

impl Matrix {
    /// Offset and stride are multiples of `unit`.
    fn new(
        random: &mut Random,
        rows: usize,
        width: usize,
        unit: usize,
        number: impl Fn(&mut Random) -> f32,
    ) -> Self {
        let offset = unit * random.below(4);
        let stride = (width + unit * random.below(3)).next_multiple_of(unit);
        let length = (offset + rows * stride).next_multiple_of(4);
        let mut words = vec![f32::NAN.to_bits(); length];
        for row in 0..rows {
            for column in 0..width {
                words[offset + row * stride + column] = number(random).to_bits();
            }
        }
        Self { words, rows, width, place: Rows { offset: offset as u32, stride: stride as u32 } }
    }

    /// All NaN.
    fn poisoned(random: &mut Random, rows: usize, width: usize) -> Self {
        Self::new(random, rows, width, 1, |_| f32::NAN)
    }

    fn index(&self, row: usize, column: usize) -> usize {
        self.place.offset as usize + row * self.place.stride as usize + column
    }

    fn get(&self, row: usize, column: usize) -> f64 {
        f64::from(f32::from_bits(self.words[self.index(row, column)]))
    }

    /// `after` holds `want(row, column)` within `allowed` of it, and everything between is as it was.
    fn check(&self, label: &str, after: &[u32], want: impl Fn(usize, usize) -> (f64, f64)) {
        let mut expected = self.words.clone();
        for row in 0..self.rows {
            for column in 0..self.width {
                let at = self.index(row, column);
                let (got, (want, allowed)) = (f64::from(f32::from_bits(after[at])), want(row, column));
                // Not the other way round: NaN must not pass.
                assert!(
                    (got - want).abs() <= allowed,
                    "{label}: row {row}, column {column} is {got}, not {want} (within {allowed:e})"
                );
                expected[at] = after[at];
            }
        }
        assert!(expected == after, "{label}: something beside the rows was written");
    }
}

/// A weight as it lies on the device, `unit` elements of which a row is whole multiples, filled up with zeros; and its
/// numbers.
fn weight(random: &mut Random, dtype: DType, rows: usize, width: usize) -> (Vec<u32>, Vec<f64>, Rows) {
    let (stride, offset) = (width.next_multiple_of(8), 8 * random.below(3));
    let mut elements = vec![0.0f32; offset + rows * stride];
    let mut numbers = Vec::with_capacity(rows * width);
    for row in 0..rows {
        for column in 0..width {
            let x = random.unit() as f32;
            let x = match dtype {
                DType::F32 => x,
                DType::F16 => f16::from_f32(x).to_f32(),
                DType::Bf16 => bf16::from_f32(x).to_f32(),
            };
            elements[offset + row * stride + column] = x;
            numbers.push(x.into());
        }
    }
    let pairs = |narrow: fn(f32) -> u16| {
        let pair = |pair: &[f32]| u32::from(narrow(pair[0])) | u32::from(narrow(pair[1])) << 16;
        elements.chunks_exact(2).map(pair).collect()
    };
    let words = match dtype {
        DType::F32 => elements.iter().map(|x| x.to_bits()).collect(),
        DType::F16 => pairs(|x| f16::from_f32(x).to_bits()),
        DType::Bf16 => pairs(|x| bf16::from_f32(x).to_bits()),
    };
    (words, numbers, Rows { offset: offset as u32, stride: stride as u32 })
}

fn unit(random: &mut Random) -> f32 {
    random.unit() as f32
}

/// A width that is small, odd, or that of a model.
fn width(random: &mut Random) -> usize {
    match random.below(4) {
        0 => 1 + random.below(9),
        1 => 1 + random.below(300),
        2 => 8 * (1 + random.below(40)),
        _ => random.pick(&[64, 80, 96, 128, 576]),
    }
}

#[test]
fn products() {
    for (mut machine, seed) in machines() {
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
}

#[test]
fn norms() {
    for (mut machine, seed) in machines() {
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
                    let vector =
                        |random: &mut Random| (0..width + 3).map(|_| unit(random)).collect::<Vec<f32>>();
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
}

#[test]
fn lookups() {
    for (mut machine, seed) in machines() {
        let mut random = Random::new(seed);
        for dtype in DType::ALL {
            for adds in [false, true] {
                let spec = LookupSpec { dtype, adds };
                let shader = spec.shader().unwrap();
                for _ in 0..run_cases(CASES) {
                    let (rows, width, places) =
                        (1 + random.below(9), width(&mut random), 3 + random.below(20));
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
                    let after =
                        machine.run(&shader, args.uniform(), workgroups, &[&listed, &words, &out.words]);
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
}

#[test]
fn rotations() {
    for (mut machine, seed) in machines() {
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
}

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

#[test]
fn element_by_element() {
    for (mut machine, seed) in machines() {
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
}

#[test]
fn likeliest_tokens() {
    for (mut machine, seed) in machines() {
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
}
