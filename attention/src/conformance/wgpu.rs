//! The wgpu backend as a subject: copies tensors to the device, runs, copies all of them back.

use ::wgpu::util::{BufferInitDescriptor, DeviceExt};
use ::wgpu::{Buffer, BufferDescriptor, BufferUsages, MapMode, PollType};

use super::subject::{
    AttentionTask, CopyTask, MergeTask, ProbabilityRounding, Refusal, Scale, Subject, SwapTask, WriteTask,
};
use crate::wgpu::shaders::decode::DecodeTuning;
use crate::wgpu::shaders::prefill::PrefillKernel;
use crate::wgpu::{
    AttentionCall, BufferRange, Context, CopyBlocksCall, HeadTerms, KvScale, MergeStatesCall, PlanOptions,
    SwapBlocksCall, SwapSide, WgpuError, WriteKvCall,
};
use crate::{AttentionConfig, DType, HostTensor, HostTensorMut, RowStrides};

/// The wgpu backend on one device.
#[derive(Debug)]
pub struct Wgpu<'a> {
    name: String,
    context: &'a Context,
    /// Makes the plans of the next cases.
    pub options: PlanOptions,
    /// Tunes the kernel, if otherwise than by default.
    pub tuning: Option<DecodeTuning>,
    /// Kernel variants that ran since this was last emptied.
    pub variants: Vec<String>,
    /// Where this thread must not wait for the device.
    readbacks: Option<Readbacks>,
}

/// What one case reads back, by and by: each time it is asked again, it gets one buffer further.
#[derive(Debug, Default)]
struct Readbacks {
    arrived: Vec<Vec<u8>>,
    /// How many of them were given out since the case was last begun.
    given: usize,
    under_way: Option<Buffer>,
}

impl<'a> Wgpu<'a> {
    /// On a context whose device has this name.
    pub fn new(name: impl Into<String>, context: &'a Context) -> Self {
        Self {
            name: name.into(),
            context,
            options: PlanOptions::default(),
            tuning: None,
            variants: Vec::new(),
            readbacks: None,
        }
    }

    /// The same where this thread must not wait for the device. Of a case that [`try_case`](super::try_case) gives no
    /// result of, map [`under_way`](Self::under_way), hand its bytes to [`arrived`](Self::arrived), and try again;
    /// before another case, [`forget`](Self::forget).
    pub fn that_does_not_wait(name: impl Into<String>, context: &'a Context) -> Self {
        Self { readbacks: Some(Readbacks::default()), ..Self::new(name, context) }
    }

    /// The buffer to map for reading.
    pub fn under_way(&self) -> Option<&Buffer> {
        self.readbacks.as_ref()?.under_way.as_ref()
    }

    /// What the buffer under way held.
    pub fn arrived(&mut self, bytes: Vec<u8>) {
        if let Some(readbacks) = &mut self.readbacks {
            readbacks.arrived.push(bytes);
            readbacks.given = 0;
            readbacks.under_way = None;
        }
    }

    /// Begins another case.
    pub fn forget(&mut self) {
        self.readbacks = self.readbacks.take().map(|_| Readbacks::default());
    }

    /// A buffer with these contents, of whole words and at least 16 bytes; what is added is poison.
    fn upload(&self, bytes: &[u8]) -> Buffer {
        let mut contents = bytes.to_vec();
        contents.resize(bytes.len().max(16).next_multiple_of(4), 0xff);
        let usage = BufferUsages::STORAGE | BufferUsages::COPY_SRC | BufferUsages::COPY_DST;
        let descriptor = BufferInitDescriptor { label: None, contents: &contents, usage };
        self.context.device().create_buffer_init(&descriptor)
    }

    fn read(&mut self, buffer: &Buffer) -> Result<Vec<u8>, Refusal> {
        if let Some(Readbacks { arrived, given, .. }) = &mut self.readbacks
            && let Some(bytes) = arrived.get(*given)
        {
            *given += 1;
            return Ok(bytes.clone());
        }
        let usage = BufferUsages::MAP_READ | BufferUsages::COPY_DST;
        let descriptor =
            BufferDescriptor { label: None, size: buffer.size(), usage, mapped_at_creation: false };
        let device = self.context.device();
        let copy = device.create_buffer(&descriptor);
        let mut encoder = device.create_command_encoder(&Default::default());
        encoder.copy_buffer_to_buffer(buffer, 0, &copy, 0, buffer.size());
        self.context.queue().submit([encoder.finish()]);
        if let Some(readbacks) = &mut self.readbacks {
            readbacks.under_way = Some(copy);
            return Err(Refusal::Pending);
        }
        copy.slice(..).map_async(MapMode::Read, |_| {});
        device.poll(PollType::wait_indefinitely()).map_err(failed)?;
        let mapped = copy.slice(..).get_mapped_range().map_err(failed)?;
        Ok(mapped.to_vec())
    }
}

fn failed(error: impl std::fmt::Display) -> Refusal {
    Refusal::Failed(error.to_string())
}

fn refusal(error: WgpuError) -> Refusal {
    match error {
        WgpuError::UnsupportedDType { .. } | WgpuError::Alignment { .. } => {
            Refusal::Unsupported(error.to_string())
        }
        other => failed(other),
    }
}

fn unsupported<T>(what: &str) -> Result<T, Refusal> {
    Err(Refusal::Unsupported(what.to_owned()))
}

impl<'a> From<Scale<'a>> for KvScale<'a> {
    fn from(scale: Scale<'a>) -> Self {
        match scale {
            Scale::One => Self::One,
            Scale::PerTensor(scale) => Self::PerTensor(scale),
            Scale::PerHead(scales) => Self::PerHead(scales),
        }
    }
}

impl Subject for Wgpu<'_> {
    fn name(&self) -> String {
        format!("wgpu ({})", self.name)
    }

    fn probability_rounding(&self, config: &AttentionConfig) -> ProbabilityRounding {
        match self.context.prefill_kernel(config, self.options.prefill) {
            // f16, relative to a maximum of at least 2^4: half its smallest number is 2^-25.
            Ok(PrefillKernel::Matrix(_)) => {
                ProbabilityRounding { relative: DType::F16.unit_roundoff(), absolute: 2f64.powi(-29) }
            }
            _ => ProbabilityRounding::default(),
        }
    }

    fn attention(
        &mut self,
        task: &AttentionTask<'_>,
        mut out: HostTensorMut<'_>,
        lse: Option<&mut [f32]>,
    ) -> Result<(), Refusal> {
        let problem = &task.problem;
        let context = self.context;
        let plan = context.plan_attention(problem, self.options).map_err(refusal)?;
        let q = self.upload(&task.q.to_bytes());
        let k = self.upload(&task.k.to_bytes());
        let v = self.upload(&task.v.to_bytes());
        let device_out = self.upload(&out.as_ref().to_bytes());
        let device_lse = self.upload(&HostTensor::F32(lse.as_deref().unwrap_or(&[])).to_bytes());
        let words: Vec<u8> = plan.words().iter().flat_map(|word| word.to_le_bytes()).collect();
        let plan_buffer = self.upload(&words);
        let workspace = self.upload(&vec![0xff; plan.workspace_bytes() as usize]);
        let call = AttentionCall {
            config: problem.config(),
            layout: problem.layout(),
            rows: problem.total_queries(),
            q: BufferRange::whole(&q),
            q_strides: problem.q_strides(),
            k_cache: BufferRange::whole(&k),
            v_cache: BufferRange::whole(&v),
            terms: HeadTerms {
                alibi_slopes: task.alibi_slopes,
                sinks: task.sinks,
                k_scale: task.k_scale.into(),
                v_scale: task.v_scale.into(),
            },
            out: BufferRange::whole(&device_out),
            out_strides: problem.out_strides(),
            lse: lse.is_some().then(|| BufferRange::whole(&device_lse)),
            plan: BufferRange::whole(&plan_buffer),
            workspace: BufferRange::whole(&workspace),
            tuning: self.tuning,
        };
        let prepared = context.prepare_attention(&call).map_err(refusal)?;
        let mut encoder = context.device().create_command_encoder(&Default::default());
        prepared.encode(&mut encoder.begin_compute_pass(&Default::default()), &plan).map_err(refusal)?;
        context.queue().submit([encoder.finish()]);
        self.variants.push(prepared.variant());
        self.variants.extend(plan.prefill_variant());
        out.set_bytes(&self.read(&device_out)?);
        if let Some(lse) = lse {
            HostTensorMut::F32(lse).set_bytes(&self.read(&device_lse)?);
        }
        Ok(())
    }

    fn write_kv(
        &mut self,
        task: &WriteTask<'_>,
        mut k: HostTensorMut<'_>,
        mut v: HostTensorMut<'_>,
    ) -> Result<(), Refusal> {
        if task.k_scale != Scale::One || task.v_scale != Scale::One {
            return unsupported("scales of a cache that is not fp8");
        }
        // Slots in WGSL are 32 bits; negative ones stay negative.
        let slots: Vec<u8> = task
            .write
            .slots
            .iter()
            .flat_map(|&slot| i32::try_from(slot.max(-1)).unwrap_or(i32::MAX).to_le_bytes())
            .collect();
        let slots = self.upload(&slots);
        let (new_k, new_v) = (self.upload(&task.k.to_bytes()), self.upload(&task.v.to_bytes()));
        let (k_cache, v_cache) = (self.upload(&k.as_ref().to_bytes()), self.upload(&v.as_ref().to_bytes()));
        let call = WriteKvCall {
            config: task.config,
            layout: &task.layout,
            source: task.k.dtype(),
            tokens: task.write.slots.len(),
            slots: BufferRange::whole(&slots),
            k: BufferRange::whole(&new_k),
            k_strides: task.write.k,
            v: BufferRange::whole(&new_v),
            v_strides: task.write.v,
            k_cache: BufferRange::whole(&k_cache),
            v_cache: BufferRange::whole(&v_cache),
        };
        let mut encoder = self.context.device().create_command_encoder(&Default::default());
        let variant = self.context.write_kv(&mut encoder, &call).map_err(refusal)?;
        self.context.queue().submit([encoder.finish()]);
        self.variants.push(variant.name());
        k.set_bytes(&self.read(&k_cache)?);
        v.set_bytes(&self.read(&v_cache)?);
        Ok(())
    }

    fn copy_blocks(
        &mut self,
        task: &CopyTask<'_>,
        mut k: HostTensorMut<'_>,
        mut v: HostTensorMut<'_>,
    ) -> Result<(), Refusal> {
        let (k_cache, v_cache) = (self.upload(&k.as_ref().to_bytes()), self.upload(&v.as_ref().to_bytes()));
        let call = CopyBlocksCall {
            config: task.config,
            layout: &task.layout,
            pairs: task.pairs,
            k_cache: BufferRange::whole(&k_cache),
            v_cache: BufferRange::whole(&v_cache),
        };
        let mut encoder = self.context.device().create_command_encoder(&Default::default());
        self.context.copy_blocks(&mut encoder, &call).map_err(refusal)?;
        self.context.queue().submit([encoder.finish()]);
        k.set_bytes(&self.read(&k_cache)?);
        v.set_bytes(&self.read(&v_cache)?);
        Ok(())
    }

    fn swap_blocks(
        &mut self,
        task: &SwapTask<'_>,
        mut k: HostTensorMut<'_>,
        mut v: HostTensorMut<'_>,
    ) -> Result<(), Refusal> {
        let (from_k, from_v) = (self.upload(&task.k.to_bytes()), self.upload(&task.v.to_bytes()));
        let (to_k, to_v) = (self.upload(&k.as_ref().to_bytes()), self.upload(&v.as_ref().to_bytes()));
        let [from_k, from_v, to_k_range, to_v_range] =
            [&from_k, &from_v, &to_k, &to_v].map(BufferRange::whole);
        let call = SwapBlocksCall {
            config: task.config,
            from: SwapSide { layout: &task.source_layout, k: from_k, v: from_v },
            to: SwapSide { layout: &task.target_layout, k: to_k_range, v: to_v_range },
            pairs: task.pairs,
        };
        let mut encoder = self.context.device().create_command_encoder(&Default::default());
        self.context.swap_blocks(&mut encoder, &call).map_err(refusal)?;
        self.context.queue().submit([encoder.finish()]);
        k.set_bytes(&self.read(&to_k)?);
        v.set_bytes(&self.read(&to_v)?);
        Ok(())
    }

    fn merge_states(
        &mut self,
        task: &MergeTask<'_>,
        mut out: HostTensorMut<'_>,
        lse: &mut [f32],
    ) -> Result<(), Refusal> {
        let MergeTask { rows, heads, head_dim, parts } = *task;
        let part_out: Vec<u8> = parts.iter().flat_map(|part| part.out.to_bytes()).collect();
        let part_lse: Vec<u8> = parts.iter().flat_map(|part| HostTensor::F32(part.lse).to_bytes()).collect();
        let (part_out, part_lse) = (self.upload(&part_out), self.upload(&part_lse));
        let device_out = self.upload(&out.as_ref().to_bytes());
        let device_lse = self.upload(&HostTensor::F32(lse).to_bytes());
        let strides = RowStrides::packed(heads, head_dim);
        let lse_strides = RowStrides::packed(heads, 1);
        let call = MergeStatesCall {
            parts: parts.len(),
            rows,
            heads,
            head_dim,
            part_dtype: out.as_ref().dtype(),
            part_out: BufferRange::whole(&part_out),
            part_out_strides: strides,
            part_out_stride: (rows * heads * head_dim) as u64,
            part_lse: BufferRange::whole(&part_lse),
            part_lse_strides: lse_strides,
            part_lse_stride: (rows * heads) as u64,
            out_dtype: out.as_ref().dtype(),
            out: BufferRange::whole(&device_out),
            out_strides: strides,
            lse: Some(BufferRange::whole(&device_lse)),
            lse_strides,
        };
        let mut encoder = self.context.device().create_command_encoder(&Default::default());
        let prepared = self.context.merge_states(&mut encoder, &call).map_err(refusal)?;
        self.context.queue().submit([encoder.finish()]);
        self.variants.push(prepared.variant().to_owned());
        out.set_bytes(&self.read(&device_out)?);
        HostTensorMut::F32(lse).set_bytes(&self.read(&device_lse)?);
        Ok(())
    }
}
