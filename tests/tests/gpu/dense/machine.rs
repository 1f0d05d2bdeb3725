//! A device on which single kernels run over buffers that are made for them, and rows of numbers to run them over.
//! Owns no case: what is computed, and what must come out, is its neighbours'.

use super::super::random::Random;
use half::{bf16, f16};
use pagewise_attention::wgpu::shaders::model::{PARAM_WORDS, Rows};
use pagewise_attention::wgpu::shaders::{DType, Shader};
use pagewise_attention::wgpu::wgpu::{
    BindGroupDescriptor, BindGroupEntry, BindingResource, Buffer, BufferBinding, BufferDescriptor,
    BufferUsages, ComputePipeline, MapMode, PollType,
};
use pagewise_attention::wgpu::{Context, UniformOffset, wgpu};
use std::collections::HashMap;
use std::num::NonZeroU64;

/// A device and the kernels that were compiled for it.
pub struct Machine {
    context: Context,
    pipelines: HashMap<String, (ComputePipeline, wgpu::BindGroupLayout)>,
}

impl Machine {
    pub fn new(context: Context) -> Self {
        Self { context, pipelines: HashMap::new() }
    }

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
    pub fn run(
        &mut self,
        shader: &Shader,
        uniform: [u32; PARAM_WORDS],
        workgroups: [u32; 3],
        tensors: &[&[u32]],
    ) -> Vec<u32> {
        self.run_all(shader, uniform, workgroups, tensors).pop().unwrap()
    }

    /// The same; returns all tensors.
    pub fn run_all(
        &mut self,
        shader: &Shader,
        uniform: [u32; PARAM_WORDS],
        workgroups: [u32; 3],
        tensors: &[&[u32]],
    ) -> Vec<Vec<u32>> {
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
        let sizes = buffers.iter().map(Buffer::size);
        let readback = device.create_buffer(&BufferDescriptor {
            label: None,
            size: sizes.sum(),
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
        let mut at = 0;
        for buffer in &buffers {
            encoder.copy_buffer_to_buffer(buffer, 0, &readback, at, buffer.size());
            at += buffer.size();
        }
        self.context.queue().submit([encoder.finish()]);
        readback.slice(..).map_async(MapMode::Read, |mapped| mapped.unwrap());
        device.poll(PollType::wait_indefinitely()).unwrap();
        let view = readback.slice(..).get_mapped_range().unwrap();
        let words: Vec<u32> =
            view.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect();
        let mut rest = words.as_slice();
        let tensor = |(tensor, buffer): (&&[u32], &Buffer)| {
            let (this, behind) = rest.split_at(buffer.size() as usize / 4);
            rest = behind;
            this[..tensor.len()].to_vec()
        };
        tensors.iter().zip(&buffers).map(tensor).collect()
    }
}

fn bytes(words: &[u32]) -> &[u8] {
    // SAFETY: every bit pattern of four bytes is four bytes.
    unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), size_of_val(words)) }
}

/// Rows of numbers with gaps between them; what is no element is NaN.
pub struct Matrix {
    pub words: Vec<u32>,
    pub rows: usize,
    pub width: usize,
    pub place: Rows,
}

impl Matrix {
    /// Offset and stride are multiples of `unit`.
    pub fn new(
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
    pub fn poisoned(random: &mut Random, rows: usize, width: usize) -> Self {
        Self::new(random, rows, width, 1, |_| f32::NAN)
    }

    pub fn index(&self, row: usize, column: usize) -> usize {
        self.place.offset as usize + row * self.place.stride as usize + column
    }

    pub fn get(&self, row: usize, column: usize) -> f64 {
        f64::from(f32::from_bits(self.words[self.index(row, column)]))
    }

    /// `after` holds `want(row, column)` within `allowed` of it, and everything between is as it was.
    pub fn check(&self, label: &str, after: &[u32], want: impl Fn(usize, usize) -> (f64, f64)) {
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
pub fn weight(random: &mut Random, dtype: DType, rows: usize, width: usize) -> (Vec<u32>, Vec<f64>, Rows) {
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

pub fn unit(random: &mut Random) -> f32 {
    random.unit() as f32
}

/// A width that is small, odd, or that of a model.
pub fn width(random: &mut Random) -> usize {
    match random.below(4) {
        0 => 1 + random.below(9),
        1 => 1 + random.below(300),
        2 => 8 * (1 + random.below(40)),
        _ => random.pick(&[64, 80, 96, 128, 576]),
    }
}
