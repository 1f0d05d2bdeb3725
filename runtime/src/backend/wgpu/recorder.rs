//! The commands of a step: one encoder with one compute pass, submitted once. Owns the pipelines of the dense kernels,
//! their parameters and their bind groups, each made when it is first needed and kept.

use super::device::{ACTIVATIONS, Gpu, Purpose, lock};
use super::tensor::{WgpuTensor, size_class};
use crate::backend::BackendError;
use bytemuck::{AnyBitPattern, NoUninit};
use pagewise_attention::wgpu::wgpu::{
    BindGroup, BindGroupDescriptor, BindGroupEntry, BindGroupLayout, BindingResource, Buffer,
    BufferAsyncError, BufferBinding, BufferUsages, CommandEncoder, CommandEncoderDescriptor, ComputePass,
    ComputePassDescriptor, ComputePipeline, MapMode, SubmissionIndex,
};
use pagewise_attention::wgpu::{UniformOffset, WgpuError};
use pagewise_shaders::model::elementwise::Elementwise;
use pagewise_shaders::model::lookup::LookupSpec;
use pagewise_shaders::model::norm::NormSpec;
use pagewise_shaders::model::product::ProductSpec;
use pagewise_shaders::model::{PARAM_WORDS, argmax, rotary};
use pagewise_shaders::{BindingKind, Shader};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::num::NonZeroU64;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};

/// A dense kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kernel {
    Product(ProductSpec),
    Norm(NormSpec),
    Lookup(LookupSpec),
    Rotary,
    Elementwise(Elementwise),
    Argmax,
}

impl Kernel {
    fn shader(self) -> Result<Shader, pagewise_shaders::Error> {
        match self {
            Self::Product(spec) => spec.shader(),
            Self::Norm(spec) => spec.shader(),
            Self::Lookup(spec) => spec.shader(),
            Self::Rotary => rotary::shader(),
            Self::Elementwise(spec) => spec.shader(),
            Self::Argmax => argmax::shader(),
        }
    }
}

/// One dispatch of a dense kernel.
pub(super) struct Dispatch<'a> {
    pub(super) kernel: Kernel,
    /// In the order of the kernel's bindings, parameters left out.
    pub(super) buffers: &'a [&'a Buffer],
    pub(super) uniform: [u32; PARAM_WORDS],
    pub(super) workgroups: [u32; 3],
}

/// A kernel that is compiled.
#[derive(Debug)]
pub(super) struct Pipeline {
    pipeline: ComputePipeline,
    layout: BindGroupLayout,
    /// Numbers of the bindings behind the parameters.
    bindings: Vec<u32>,
}

/// The dense kernels of a device, which all models on it share.
#[derive(Debug, Default)]
pub(super) struct Pipelines(Mutex<HashMap<Kernel, Arc<Pipeline>>>);

impl Pipelines {
    fn get(&self, gpu: &Gpu, kernel: Kernel) -> Result<Arc<Pipeline>, BackendError> {
        let mut pipelines = lock(&self.0);
        if let Some(pipeline) = pipelines.get(&kernel) {
            return Ok(Arc::clone(pipeline));
        }
        let shader = kernel.shader().map_err(WgpuError::from)?;
        let (pipeline, layout) = gpu.context.compile(&shader, UniformOffset::Dynamic)?;
        let uniform = |kind| matches!(kind, BindingKind::Uniform { .. });
        let bindings =
            shader.bindings().iter().filter(|binding| !uniform(binding.kind)).map(|binding| binding.index);
        let pipeline = Arc::new(Pipeline { pipeline, layout, bindings: bindings.collect() });
        pipelines.insert(kernel, Arc::clone(&pipeline));
        Ok(pipeline)
    }
}

/// Parameters of [`SLOTS`] dispatches, and what the buffer holds of them.
#[derive(Debug)]
struct Page {
    buffer: Buffer,
    words: Vec<u32>,
    changed: bool,
}

/// Dispatches whose parameters share a buffer.
const SLOTS: usize = 256;
/// Bytes from one dispatch's parameters to the next: the largest alignment of WebGPU.
const SLOT_BYTES: usize = 256;
/// Bind groups that are kept; steps of ever new shapes would make ever more.
const MOST_BIND_GROUPS: usize = 1 << 15;
/// Bytes of parameters.
const PARAM_BYTES: Option<NonZeroU64> = NonZeroU64::new(4 * PARAM_WORDS as u64);

const PARAMETERS: Purpose = Purpose { what: "a step's parameters", hint: "--max-batch-tokens" };

type BindKey = (Kernel, usize, Vec<Buffer>);

/// What has been recorded of a step. The pass must go before its encoder ends.
#[derive(Debug)]
struct Open {
    pass: ComputePass<'static>,
    encoder: CommandEncoder,
}

#[derive(Debug, Default)]
pub(super) struct Recorder {
    open: Option<Open>,
    used: usize,
    pages: Vec<Page>,
    pipelines: HashMap<Kernel, Arc<Pipeline>>,
    bind_groups: HashMap<BindKey, BindGroup>,
    readback: Option<Buffer>,
}

impl Recorder {
    /// Forgets what a step that failed has left.
    pub(super) fn restart(&mut self) {
        self.open = None;
        self.used = 0;
    }

    /// The pass of this step.
    pub(super) fn pass(&mut self, gpu: &Gpu) -> &mut ComputePass<'static> {
        let open = self.open.get_or_insert_with(|| {
            let descriptor = CommandEncoderDescriptor { label: Some("step") };
            let mut encoder = gpu.context.device().create_command_encoder(&descriptor);
            let descriptor = ComputePassDescriptor { label: Some("step"), timestamp_writes: None };
            let pass = encoder.begin_compute_pass(&descriptor).forget_lifetime();
            Open { pass, encoder }
        });
        &mut open.pass
    }

    /// Records a dispatch.
    pub(super) fn dispatch(&mut self, gpu: &Gpu, dispatch: &Dispatch<'_>) -> Result<(), BackendError> {
        let Dispatch { kernel, buffers, uniform, workgroups: [x, y, z] } = *dispatch;
        self.build(gpu, kernel)?;
        let (page, offset) = self.place(gpu, uniform)?;
        let key = (kernel, page, buffers.iter().map(|&buffer| buffer.clone()).collect::<Vec<_>>());
        if !self.bind_groups.contains_key(&key) {
            if self.bind_groups.len() >= MOST_BIND_GROUPS {
                self.bind_groups.clear();
            }
            if let Some(group) = self.bind(gpu, kernel, page, buffers) {
                self.bind_groups.insert(key.clone(), group);
            }
        }
        self.pass(gpu);
        let Self { open: Some(open), pipelines, bind_groups, .. } = self else { return Ok(()) };
        if let (Some(pipeline), Some(group)) = (pipelines.get(&kernel), bind_groups.get(&key)) {
            open.pass.set_pipeline(&pipeline.pipeline);
            open.pass.set_bind_group(0, group, &[offset]);
            open.pass.dispatch_workgroups(x, y, z);
        }
        Ok(())
    }

    fn build(&mut self, gpu: &Gpu, kernel: Kernel) -> Result<(), BackendError> {
        if let Entry::Vacant(entry) = self.pipelines.entry(kernel) {
            entry.insert(gpu.pipelines.get(gpu, kernel)?);
        }
        Ok(())
    }

    /// Puts parameters into the next slot: its page, and its offset there.
    fn place(&mut self, gpu: &Gpu, uniform: [u32; PARAM_WORDS]) -> Result<(usize, u32), BackendError> {
        let (page, slot) = (self.used / SLOTS, self.used % SLOTS);
        if page >= self.pages.len() {
            let usage = BufferUsages::UNIFORM | BufferUsages::COPY_DST;
            let buffer = gpu.buffer(PARAMETERS, (SLOTS * SLOT_BYTES) as u64, usage)?;
            self.pages.push(Page { buffer, words: vec![0; SLOTS * SLOT_BYTES / 4], changed: true });
        }
        self.used += 1;
        let offset = slot * SLOT_BYTES;
        if let Some(page) = self.pages.get_mut(page)
            && let Some(words) = page.words.get_mut(offset / 4..offset / 4 + PARAM_WORDS)
            && *words != uniform
        {
            words.copy_from_slice(&uniform);
            page.changed = true;
        }
        Ok((page, offset as u32))
    }

    fn bind(&self, gpu: &Gpu, kernel: Kernel, page: usize, buffers: &[&Buffer]) -> Option<BindGroup> {
        let (pipeline, page) = (self.pipelines.get(&kernel)?, self.pages.get(page)?);
        let params = BufferBinding { buffer: &page.buffer, offset: 0, size: PARAM_BYTES };
        let mut entries = vec![BindGroupEntry { binding: 0, resource: BindingResource::Buffer(params) }];
        entries.extend(
            pipeline
                .bindings
                .iter()
                .zip(buffers)
                .map(|(&binding, buffer)| BindGroupEntry { binding, resource: buffer.as_entire_binding() }),
        );
        let descriptor =
            BindGroupDescriptor { label: Some("dense layer"), layout: &pipeline.layout, entries: &entries };
        Some(gpu.context.device().create_bind_group(&descriptor))
    }

    /// Submits what is recorded; pieces of buffers start their way to the host, one behind the other.
    pub(super) fn submit(&mut self, gpu: &Gpu, pieces: &[Piece<'_>]) -> Result<Reading, BackendError> {
        for page in self.pages.iter_mut().filter(|page| page.changed) {
            gpu.context.queue().write_buffer(&page.buffer, 0, bytemuck::cast_slice(&page.words));
            page.changed = false;
        }
        let bytes = pieces.iter().map(|piece| piece.bytes).sum();
        let readback = match self.readback.take() {
            Some(buffer) if buffer.size() >= bytes => buffer,
            _ => {
                let usage = BufferUsages::MAP_READ | BufferUsages::COPY_DST;
                gpu.buffer(ACTIVATIONS, size_class(bytes), usage)?
            }
        };
        self.used = 0;
        let mut encoder = match self.open.take() {
            Some(Open { pass, encoder }) => {
                drop(pass);
                encoder
            }
            None => gpu.context.device().create_command_encoder(&CommandEncoderDescriptor::default()),
        };
        let mut at = 0;
        for &Piece { buffer, start, bytes } in pieces {
            encoder.copy_buffer_to_buffer(buffer, start, &readback, at, bytes);
            at += bytes;
        }
        Reading::start(gpu, encoder, readback, bytes)
    }

    /// Waits for what was submitted; the buffer is kept for the next step.
    pub(super) fn receive(&mut self, gpu: &Gpu, reading: Reading) -> Result<Vec<u32>, BackendError> {
        let (words, readback) = reading.finish(gpu)?;
        self.readback = Some(readback);
        Ok(words)
    }

    /// Records the choice of the likeliest token of each row, [`argmax::NO_TOKEN`] where there is none.
    pub(super) fn argmax(&mut self, gpu: &Gpu, x: &WgpuTensor, ids: &Buffer) -> Result<(), BackendError> {
        let args =
            argmax::ArgmaxArgs { rows: x.rows() as u32, width: x.width() as u32, x: x.place(), out: 0 };
        let per_dimension = gpu.context.limits().max_compute_workgroups_per_dimension;
        let workgroups = args.workgroups(per_dimension).map_err(WgpuError::from)?;
        let buffers = [x.buffer(), ids];
        let uniform = args.uniform();
        self.dispatch(gpu, &Dispatch { kernel: Kernel::Argmax, buffers: &buffers, uniform, workgroups })
    }
}

/// A part of a buffer that is wanted on the host.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece<'a> {
    pub(super) buffer: &'a Buffer,
    pub(super) start: u64,
    pub(super) bytes: u64,
}

/// Bytes on their way to the host.
#[derive(Debug)]
pub(super) struct Reading {
    submission: SubmissionIndex,
    mapped: Option<Receiver<Result<(), BufferAsyncError>>>,
    readback: Buffer,
    bytes: u64,
}

impl Reading {
    /// Submits an encoder whose last commands copy to `readback`.
    pub(super) fn start(
        gpu: &Gpu,
        encoder: CommandEncoder,
        readback: Buffer,
        bytes: u64,
    ) -> Result<Self, BackendError> {
        let submission = gpu.context.queue().submit([encoder.finish()]);
        gpu.check()?;
        let mapped = (bytes > 0).then(|| {
            let (sender, receiver) = channel();
            readback.slice(..bytes).map_async(MapMode::Read, move |mapped| {
                // Nobody listens where waiting failed.
                let _ = sender.send(mapped);
            });
            receiver
        });
        Ok(Self { submission, mapped, readback, bytes })
    }

    /// Waits, and gives the buffer back with what was in it.
    pub(super) fn finish<T: AnyBitPattern + NoUninit>(
        self,
        gpu: &Gpu,
    ) -> Result<(Vec<T>, Buffer), BackendError> {
        let Self { submission, mapped, readback, bytes } = self;
        gpu.wait(Some(submission))?;
        let Some(mapped) = mapped else { return Ok((Vec::new(), readback)) };
        let failed = |reason: String| BackendError::Device { reason };
        match mapped.try_recv() {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(failed(error.to_string())),
            Err(_) => return Err(failed("a buffer was not mapped in time".to_owned())),
        }
        let words = match readback.slice(..bytes).get_mapped_range() {
            Ok(view) => bytemuck::pod_collect_to_vec(&view),
            Err(error) => return Err(failed(error.to_string())),
        };
        readback.unmap();
        gpu.check()?;
        Ok((words, readback))
    }
}
