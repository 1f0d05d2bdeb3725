//! The commands of a step: one encoder with one compute pass, submitted once. Owns the parameters of the dense kernels and
//! their bind groups, made when they are first needed and kept.

use super::device::{ACTIVATIONS, Gpu, Purpose};
use super::kernels::{Kernel, Pipeline};
use super::reading::{Piece, Reading};
use super::tensor::size_class;
use crate::backend::BackendError;
use pagewise_attention::wgpu::WgpuError;
use pagewise_attention::wgpu::wgpu::{
    BindGroup, BindGroupDescriptor, BindGroupEntry, BindingResource, Buffer, BufferBinding, BufferUsages,
    CommandEncoder, CommandEncoderDescriptor, ComputePass, ComputePassDescriptor,
};
use pagewise_shaders::model::PARAM_WORDS;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::num::NonZeroU64;
use std::sync::Arc;

/// One dispatch of a dense kernel.
pub(super) struct Dispatch<'a> {
    pub(super) kernel: Kernel,
    /// In the order of the kernel's bindings, parameters left out.
    pub(super) buffers: &'a [&'a Buffer],
    pub(super) uniform: [u32; PARAM_WORDS],
    /// How many, or why they cannot be had.
    pub(super) workgroups: Result<[u32; 3], pagewise_shaders::Error>,
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

impl Open {
    fn behind(gpu: &Gpu, commands: impl FnOnce(&mut CommandEncoder)) -> Self {
        let descriptor = CommandEncoderDescriptor { label: Some("step") };
        let mut encoder = gpu.context.device().create_command_encoder(&descriptor);
        commands(&mut encoder);
        let descriptor = ComputePassDescriptor { label: Some("step"), timestamp_writes: None };
        let pass = encoder.begin_compute_pass(&descriptor).forget_lifetime();
        Self { pass, encoder }
    }
}

#[derive(Debug, Default)]
pub(super) struct Recorder {
    open: Option<Open>,
    used: usize,
    pages: Vec<Page>,
    pipelines: HashMap<Kernel, Arc<Pipeline>>,
    bind_groups: HashMap<BindKey, BindGroup>,
    /// Buffers that are mapped when a step is read; two steps may be under way.
    readbacks: Vec<Buffer>,
}

/// Readbacks that are kept.
const MOST_READBACKS: usize = 3;

impl Recorder {
    /// Forgets what a step that failed has left.
    pub(super) fn restart(&mut self) {
        self.open = None;
        self.used = 0;
    }

    /// The pass of this step.
    pub(super) fn pass(&mut self, gpu: &Gpu) -> &mut ComputePass<'static> {
        &mut self.open.get_or_insert_with(|| Open::behind(gpu, |_| {})).pass
    }

    /// Opens the step with commands that come before its pass.
    pub(super) fn open(&mut self, gpu: &Gpu, commands: impl FnOnce(&mut CommandEncoder)) {
        self.open = Some(Open::behind(gpu, commands));
    }

    /// Forgets the bind groups, and with them buffers that nobody else has.
    pub(super) fn forget_bindings(&mut self) {
        self.bind_groups.clear();
    }

    /// Records a dispatch.
    pub(super) fn dispatch(&mut self, gpu: &Gpu, dispatch: Dispatch<'_>) -> Result<(), BackendError> {
        let Dispatch { kernel, buffers, uniform, workgroups } = dispatch;
        let [x, y, z] = workgroups.map_err(WgpuError::from)?;
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
        let readback = match bytes {
            0 => None,
            _ => Some(self.readback(gpu, bytes)?),
        };
        self.used = 0;
        let mut encoder = match self.open.take() {
            Some(Open { pass, encoder }) => {
                drop(pass);
                encoder
            }
            None => gpu.context.device().create_command_encoder(&CommandEncoderDescriptor::default()),
        };
        if let Some(readback) = &readback {
            let mut at = 0;
            for &Piece { buffer, start, bytes } in pieces {
                encoder.copy_buffer_to_buffer(buffer, start, readback, at, bytes);
                at += bytes;
            }
        }
        Reading::start(gpu, encoder, readback, bytes)
    }

    fn readback(&mut self, gpu: &Gpu, bytes: u64) -> Result<Buffer, BackendError> {
        match self.readbacks.iter().position(|buffer| buffer.size() >= bytes) {
            Some(index) => Ok(self.readbacks.swap_remove(index)),
            None => {
                let usage = BufferUsages::MAP_READ | BufferUsages::COPY_DST;
                gpu.buffer(ACTIVATIONS, size_class(bytes), usage)
            }
        }
    }

    /// Waits for what was submitted; the buffer is kept for later steps, the smaller ones give way to larger.
    pub(super) fn receive(&mut self, gpu: &Gpu, reading: Reading) -> Result<Vec<u32>, BackendError> {
        let (words, readback) = reading.finish(gpu)?;
        self.readbacks.extend(readback);
        self.readbacks.sort_by_key(Buffer::size);
        let surplus = self.readbacks.len().saturating_sub(MOST_READBACKS);
        self.readbacks.drain(..surplus);
        Ok(words)
    }
}
