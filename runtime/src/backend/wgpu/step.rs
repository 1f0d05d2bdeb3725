//! A step on the device: its numbers in buffers that all layers read, and the attention calls that are prepared for
//! them. What is prepared is kept for later steps that use the same buffers.

use super::cache::{Sides, no_layer};
use super::device::Gpu;
use super::growing::Growing;
use super::recorder::Recorder;
use super::tensor::WgpuTensor;
use crate::backend::cpu::dense::RopeAngles;
use crate::backend::{AttentionSpec, BackendError, LayerPlace, StepBatch};
use pagewise_attention::wgpu::wgpu::Buffer;
use pagewise_attention::wgpu::{
    AttentionCall, AttentionPlan, BufferRange, HeadTerms, PlanOptions, PreparedAttention, PreparedWriteKv,
    WriteKvCall,
};
use pagewise_attention::{AttentionConfig, CacheLayout, DType, Problem, RowStrides};
use std::collections::HashMap;

/// A step on a GPU.
#[derive(Debug)]
pub struct WgpuStep<'a> {
    pub(super) spec: &'a AttentionSpec,
    pub(super) batch: &'a StepBatch,
    layouts: Vec<CacheLayout>,
}

impl<'a> WgpuStep<'a> {
    pub(super) fn new(spec: &'a AttentionSpec, batch: &'a StepBatch) -> Self {
        let layout = |config| CacheLayout::nhd(spec.num_blocks, spec.block_size, config);
        Self { spec, batch, layouts: spec.groups.iter().map(layout).collect() }
    }

    /// What a layer computes, and where its blocks lie.
    pub(super) fn layer(
        &self,
        layer: usize,
    ) -> Result<(LayerPlace, &'a AttentionConfig, &CacheLayout), BackendError> {
        let place = self.spec.place(layer).ok_or_else(|| no_layer(layer))?;
        let found = self.spec.groups.get(place.group).zip(self.layouts.get(place.group));
        let (config, layout) = found.ok_or_else(|| no_layer(layer))?;
        Ok((place, config, layout))
    }
}

/// Where a tensor lies, as a key.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Place {
    buffer: Buffer,
    offset: usize,
    stride: usize,
}

impl Place {
    fn of(tensor: &WgpuTensor) -> Self {
        Self { buffer: tensor.buffer().clone(), offset: tensor.offset(), stride: tensor.stride() }
    }
}

/// The KV group, its layer's keys, and the tensors and buffers that a prepared call is bound to.
type CallKey = (usize, Buffer, [Place; 2], [Buffer; 2]);

/// Prepared calls that are kept; steps of ever new shapes would make ever more.
const MOST_CALLS: usize = 1 << 14;

/// What is on the device for the step under way.
#[derive(Debug, Default)]
pub(super) struct StepMemory {
    tokens: Growing,
    positions: Growing,
    logit_rows: Growing,
    cos_sin: Growing,
    slots: Vec<Growing>,
    plan_words: Vec<Growing>,
    plans: Vec<Option<AttentionPlan>>,
    workspace: Growing,
    writes: HashMap<CallKey, (PreparedWriteKv, usize)>,
    attentions: HashMap<CallKey, PreparedAttention>,
}

impl StepMemory {
    /// Sends the step's numbers to the device.
    pub(super) fn begin(&mut self, gpu: &Gpu, step: &WgpuStep<'_>) -> Result<(), BackendError> {
        let WgpuStep { spec, batch, .. } = step;
        self.tokens.write(gpu, &batch.tokens)?;
        self.positions.write(gpu, bytemuck::cast_slice(&batch.positions))?;
        let rows: Vec<u32> = batch.logit_rows.iter().map(|&row| row as u32).collect();
        self.logit_rows.write(gpu, &rows)?;
        if let Some(rope) = &spec.rope {
            let angles = RopeAngles::new(rope.frequencies(), &batch.positions).stretched(rope.magnitude());
            self.cos_sin.write(gpu, bytemuck::cast_slice(angles.cos_sin()))?;
        }
        let groups = spec.groups.len();
        self.slots.resize_with(groups, Growing::default);
        self.plan_words.resize_with(groups, Growing::default);
        self.plans.clear();
        self.plans.resize_with(groups, || None);
        for (growing, group) in self.slots.iter_mut().zip(&batch.groups) {
            // A slot that is not there is skipped by the kernel.
            let slots: Vec<u32> =
                group.slots.iter().map(|&slot| u32::try_from(slot).unwrap_or(u32::MAX)).collect();
            growing.write(gpu, &slots)?;
        }
        Ok(())
    }

    pub(super) fn tokens(&self) -> Result<&Buffer, BackendError> {
        self.tokens.get()
    }

    pub(super) fn positions(&self) -> Result<&Buffer, BackendError> {
        self.positions.get()
    }

    pub(super) fn logit_rows(&self) -> Result<&Buffer, BackendError> {
        self.logit_rows.get()
    }

    pub(super) fn cos_sin(&self) -> Result<&Buffer, BackendError> {
        self.cos_sin.get()
    }

    /// Records the write of keys and values into a layer's blocks.
    pub(super) fn write_kv(
        &mut self,
        gpu: &Gpu,
        recorder: &mut Recorder,
        step: &WgpuStep<'_>,
        layer: (usize, &Sides<Buffer>),
        k: &WgpuTensor,
        v: &WgpuTensor,
    ) -> Result<(), BackendError> {
        let (index, caches) = layer;
        let (place, config, layout) = step.layer(index)?;
        let slots = self.slots.get(place.group).ok_or_else(|| no_layer(index))?.get()?;
        let key =
            (place.group, caches.k.clone(), [Place::of(k), Place::of(v)], [slots.clone(), slots.clone()]);
        if !self.writes.contains_key(&key) {
            if self.writes.len() >= MOST_CALLS {
                self.writes.clear();
            }
            let tokens = k.capacity().min(v.capacity()).min(slots.size() as usize / 4);
            let call = WriteKvCall {
                config,
                layout,
                source: DType::F32,
                tokens,
                slots: BufferRange::whole(slots),
                k: range(k),
                k_strides: strides(k, config.head_dim_qk),
                v: range(v),
                v_strides: strides(v, config.head_dim_v),
                k_cache: BufferRange::whole(&caches.k),
                v_cache: BufferRange::whole(&caches.v),
            };
            self.writes.insert(key.clone(), (gpu.context.prepare_write_kv(&call)?, tokens));
        }
        if let Some((prepared, tokens)) = self.writes.get_mut(&key) {
            if *tokens != step.batch.rows() {
                *tokens = step.batch.rows();
                prepared.set_tokens(gpu.context.queue(), *tokens)?;
            }
            prepared.encode(recorder.pass(gpu));
        }
        Ok(())
    }

    /// Records attention of a layer.
    pub(super) fn attention(
        &mut self,
        gpu: &Gpu,
        recorder: &mut Recorder,
        step: &WgpuStep<'_>,
        layer: (usize, &Sides<Buffer>),
        q: &WgpuTensor,
        out: &WgpuTensor,
    ) -> Result<(), BackendError> {
        let (index, caches) = layer;
        let (LayerPlace { group, .. }, config, layout) = step.layer(index)?;
        let (q_strides, out_strides) = (strides(q, config.head_dim_qk), strides(out, config.head_dim_v));
        let (Some(plan), Some(words)) = (self.plans.get_mut(group), self.plan_words.get_mut(group)) else {
            return Err(no_layer(index));
        };
        let plan = match plan {
            Some(plan) => plan,
            None => {
                let tables = step.batch.groups.get(group).ok_or_else(|| no_layer(index))?;
                let batch = step.batch.paged(tables);
                let problem = Problem::with_strides(config, *layout, q_strides, out_strides, batch)?;
                let made = gpu.context.plan_attention(&problem, PlanOptions::default())?;
                words.write(gpu, made.words())?;
                plan.insert(made)
            }
        };
        let (words, workspace) = (words.get()?, self.workspace.with_room(gpu, plan.workspace_bytes())?);
        let key =
            (group, caches.k.clone(), [Place::of(q), Place::of(out)], [words.clone(), workspace.clone()]);
        if !self.attentions.contains_key(&key) {
            if self.attentions.len() >= MOST_CALLS {
                self.attentions.clear();
            }
            let call = AttentionCall {
                config,
                layout,
                rows: q.capacity().min(out.capacity()),
                q: range(q),
                q_strides,
                k_cache: BufferRange::whole(&caches.k),
                v_cache: BufferRange::whole(&caches.v),
                terms: HeadTerms::default(),
                out: range(out),
                out_strides,
                lse: None,
                plan: BufferRange::whole(words),
                workspace: BufferRange::whole(workspace),
                tuning: None,
            };
            self.attentions.insert(key.clone(), gpu.context.prepare_attention(&call)?);
        }
        if let Some(prepared) = self.attentions.get(&key) {
            prepared.encode(recorder.pass(gpu), plan)?;
        }
        Ok(())
    }
}

/// A tensor with all rows that its buffer has room for.
fn range(tensor: &WgpuTensor) -> BufferRange<'_> {
    let offset = 4 * tensor.offset() as u64;
    BufferRange { buffer: tensor.buffer(), offset, size: tensor.buffer().size() - offset }
}

fn strides(tensor: &WgpuTensor, head_dim: usize) -> RowStrides {
    RowStrides { token: tensor.stride() as u64, head: head_dim as u64 }
}
