//! The device under measurement: memory with known contents, the time of a pass, and the fastest plain read.

use std::time::Instant;

use pagewise_attention::wgpu::Context;
use pagewise_attention::wgpu::wgpu::{
    Buffer, BufferDescriptor, BufferUsages, ComputePass, ComputePassDescriptor, ComputePassTimestampWrites,
    ComputePipeline, ComputePipelineDescriptor, Features, MapMode, PollType, QuerySetDescriptor, QueryType,
    ShaderModuleDescriptor, ShaderSource,
};

/// Bytes that a run of one shape cycles through, ten times an L2.
const ROTATION: u64 = 512 << 20;

/// Words with two f16 each, by their index; `element` below says the same on the host.
const FILL: &str = "
@group(0) @binding(0) var<storage, read_write> words: array<u32>;
fn f16_of(code: u32) -> u32 {
    // code / 128 - 1 is exact in f16, whose numbers pack2x16float then need not round.
    return pack2x16float(vec2<f32>(f32(code) / 128.0 - 1.0, 0.0)) & 0xffffu;
}
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let stride = groups.x * 256u;
    for (var i = id.x; i < arrayLength(&words); i += stride) {
        var hash = (i ^ (i >> 15u)) * 0x2c1b3c6du;
        hash = (hash ^ (hash >> 12u)) * 0x297a2d39u;
        hash ^= hash >> 15u;
        words[i] = f16_of(hash & 0xffu) | (f16_of((hash >> 8u) & 0xffu) << 16u);
    }
}
";

/// Reads everything once, 16 bytes at a time, four loads on their way for each invocation.
const READ: &str = "
@group(0) @binding(0) var<storage, read> source: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read_write> sums: array<u32>;
@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32,
        @builtin(num_workgroups) groups: vec3<u32>) {
    let first = (group.y * groups.x + group.x) * 1024u + lane;
    let a = source[first];
    let b = source[first + 256u];
    let c = source[first + 512u];
    let d = source[first + 768u];
    let x = (a ^ b) ^ (c ^ d);
    let word = x.x ^ x.y ^ x.z ^ x.w;
    if (word == 0x9e3779b9u) {
        sums[0] = word;
    }
}
";

pub struct Gpu<'a> {
    pub context: &'a Context,
    pub software: bool,
    fill: ComputePipeline,
}

impl<'a> Gpu<'a> {
    pub fn new(context: &'a Context, software: bool) -> Self {
        let fill = pipeline(context, FILL);
        Self { context, software, fill }
    }

    /// The largest buffer that a kernel can see whole.
    pub fn most_bytes(&self) -> u64 {
        let limits = self.context.limits();
        limits.max_storage_buffer_binding_size.min(limits.max_buffer_size) / 16 * 16
    }

    pub fn rotation(&self) -> u64 {
        if self.software { 1 << 20 } else { ROTATION }
    }

    pub fn buffer(&self, bytes: u64) -> Buffer {
        let usage = BufferUsages::STORAGE | BufferUsages::COPY_SRC | BufferUsages::COPY_DST;
        let size = bytes.max(16).next_multiple_of(16);
        self.context.device().create_buffer(&BufferDescriptor {
            label: None,
            size,
            usage,
            mapped_at_creation: false,
        })
    }

    pub fn upload(&self, bytes: &[u8]) -> Buffer {
        let buffer = self.buffer(bytes.len() as u64);
        self.context.queue().write_buffer(&buffer, 0, bytes);
        buffer
    }

    /// A buffer of f16 elements as `element` says.
    pub fn filled(&self, bytes: u64) -> Buffer {
        let buffer = self.buffer(bytes);
        let group = self.group(&self.fill, &[&buffer]);
        self.submit(|pass| {
            pass.set_pipeline(&self.fill);
            pass.set_bind_group(0, &group, &[]);
            pass.dispatch_workgroups(4096.min(buffer.size().div_ceil(1024)) as u32, 1, 1);
        });
        buffer
    }

    fn group(
        &self,
        pipeline: &ComputePipeline,
        buffers: &[&Buffer],
    ) -> pagewise_attention::wgpu::wgpu::BindGroup {
        use pagewise_attention::wgpu::wgpu::{BindGroupDescriptor, BindGroupEntry};
        let mut entries = Vec::new();
        for (binding, buffer) in (0..).zip(buffers) {
            entries.push(BindGroupEntry { binding, resource: buffer.as_entire_binding() });
        }
        let layout = pipeline.get_bind_group_layout(0);
        let device = self.context.device();
        device.create_bind_group(&BindGroupDescriptor { label: None, layout: &layout, entries: &entries })
    }

    /// Runs a pass to its end.
    pub fn submit(&self, record: impl FnOnce(&mut ComputePass<'_>)) {
        let mut encoder = self.context.device().create_command_encoder(&Default::default());
        record(&mut encoder.begin_compute_pass(&Default::default()));
        self.context.queue().submit([encoder.finish()]);
        self.context.device().poll(PollType::wait_indefinitely()).unwrap();
    }

    pub fn read(&self, buffer: &Buffer) -> Vec<u8> {
        let usage = BufferUsages::MAP_READ | BufferUsages::COPY_DST;
        let device = self.context.device();
        let size = buffer.size();
        let copy =
            device.create_buffer(&BufferDescriptor { label: None, size, usage, mapped_at_creation: false });
        let mut encoder = device.create_command_encoder(&Default::default());
        encoder.copy_buffer_to_buffer(buffer, 0, &copy, 0, size);
        self.context.queue().submit([encoder.finish()]);
        copy.slice(..).map_async(MapMode::Read, Result::unwrap);
        device.poll(PollType::wait_indefinitely()).unwrap();
        copy.slice(..).get_mapped_range().unwrap().to_vec()
    }

    /// µs of a call of `record`, the median of several passes of `count` calls each.
    pub fn time(&self, count: usize, mut record: impl FnMut(&mut ComputePass<'_>, usize)) -> f64 {
        let runs = if self.software { 1 } else { 7 };
        let mut times: Vec<f64> = (0..runs)
            .map(|_| self.time_pass(|pass| (0..count).for_each(|i| record(pass, i))) / count as f64)
            .collect();
        times.sort_by(f64::total_cmp);
        times[runs / 2]
    }

    /// µs of a pass, by the device's clock where it has one.
    fn time_pass(&self, record: impl FnOnce(&mut ComputePass<'_>)) -> f64 {
        let (device, queue) = (self.context.device(), self.context.queue());
        let mut encoder = device.create_command_encoder(&Default::default());
        if !self.context.features().contains(Features::TIMESTAMP_QUERY) {
            let started = Instant::now();
            record(&mut encoder.begin_compute_pass(&Default::default()));
            queue.submit([encoder.finish()]);
            device.poll(PollType::wait_indefinitely()).unwrap();
            return started.elapsed().as_secs_f64() * 1e6;
        }
        let queries =
            device.create_query_set(&QuerySetDescriptor { label: None, ty: QueryType::Timestamp, count: 2 });
        let writes = ComputePassTimestampWrites {
            query_set: &queries,
            beginning_of_pass_write_index: Some(0),
            end_of_pass_write_index: Some(1),
        };
        let descriptor = ComputePassDescriptor { label: None, timestamp_writes: Some(writes) };
        record(&mut encoder.begin_compute_pass(&descriptor));
        let resolved = device.create_buffer(&BufferDescriptor {
            label: None,
            size: 16,
            usage: BufferUsages::QUERY_RESOLVE | BufferUsages::COPY_SRC,
            mapped_at_creation: false,
        });
        encoder.resolve_query_set(&queries, 0..2, &resolved, 0);
        queue.submit([encoder.finish()]);
        device.poll(PollType::wait_indefinitely()).unwrap();
        let ticks: Vec<u64> =
            self.read(&resolved).as_chunks().0.iter().map(|b| u64::from_le_bytes(*b)).collect();
        (ticks[1] - ticks[0]) as f64 * f64::from(queue.get_timestamp_period()) / 1e3
    }

    /// GB/s of the fastest plain read of a large buffer.
    pub fn read_ceiling(&self) -> f64 {
        let most = if self.software { 32 << 20 } else { 1900 << 20 };
        let bytes = self.most_bytes().min(most) / (16 * 1024) * (16 * 1024);
        let source = self.filled(bytes);
        let sums = self.buffer(16);
        let read = pipeline(self.context, READ);
        let group = self.group(&read, &[&source, &sums]);
        let groups = (bytes / (16 * 1024)) as u32;
        let x = groups.min(32_768);
        let us = self.time(4, |pass, _| {
            pass.set_pipeline(&read);
            pass.set_bind_group(0, &group, &[]);
            pass.dispatch_workgroups(x, groups / x, 1);
        });
        (u64::from(groups / x * x) * 16 * 1024) as f64 / us / 1e3
    }
}

fn pipeline(context: &Context, text: &str) -> ComputePipeline {
    let device = context.device();
    let module = device.create_shader_module(ShaderModuleDescriptor {
        label: None,
        source: ShaderSource::Wgsl(text.into()),
    });
    device.create_compute_pipeline(&ComputePipelineDescriptor {
        label: None,
        layout: None,
        module: &module,
        entry_point: Some("main"),
        compilation_options: Default::default(),
        cache: None,
    })
}

/// Element `index` of a buffer that the device filled.
pub fn element(index: usize) -> f64 {
    let i = (index / 2) as u32;
    let mut hash = (i ^ (i >> 15)).wrapping_mul(0x2c1b_3c6d);
    hash = (hash ^ (hash >> 12)).wrapping_mul(0x297a_2d39);
    hash ^= hash >> 15;
    f64::from((hash >> (8 * (index % 2))) & 0xff) / 128.0 - 1.0
}

/// Random numbers for queries and for the order of blocks: splitmix64 (Steele, Lea, Flood 2014).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Numbers below `count` in random order.
    pub fn permutation(&mut self, count: usize) -> Vec<i32> {
        let mut order: Vec<i32> = (0..count as i32).collect();
        for i in (1..count).rev() {
            order.swap(i, self.next() as usize % (i + 1));
        }
        order
    }
}
