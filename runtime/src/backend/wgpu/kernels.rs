//! Which dense kernels there are, each compiled when it is first needed and kept for all models of a device.

use super::device::{Gpu, lock};
use crate::backend::BackendError;
use pagewise_attention::wgpu::wgpu::{BindGroupLayout, ComputePipeline};
use pagewise_attention::wgpu::{UniformOffset, WgpuError};
use pagewise_shaders::model::elementwise::Elementwise;
use pagewise_shaders::model::fill_weights::FillWeightsSpec;
use pagewise_shaders::model::lookup::LookupSpec;
use pagewise_shaders::model::norm::NormSpec;
use pagewise_shaders::model::product::ProductSpec;
use pagewise_shaders::model::{argmax, candidates, log_softmax, penalties, rotary, sample};
use pagewise_shaders::{BindingKind, Shader};
use std::collections::HashMap;
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
    Sample,
    Penalties,
    LogSoftmax,
    Candidates,
    FillWeights(FillWeightsSpec),
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
            Self::Sample => sample::shader(),
            Self::Penalties => penalties::shader(),
            Self::LogSoftmax => log_softmax::shader(),
            Self::Candidates => candidates::shader(),
            Self::FillWeights(spec) => spec.shader(),
        }
    }
}

/// A kernel that is compiled.
#[derive(Debug)]
pub(super) struct Pipeline {
    pub(super) pipeline: ComputePipeline,
    pub(super) layout: BindGroupLayout,
    /// Numbers of the bindings behind the parameters.
    pub(super) bindings: Vec<u32>,
}

/// The dense kernels of a device, which all models on it share.
#[derive(Debug, Default)]
pub(super) struct Pipelines(Mutex<HashMap<Kernel, Arc<Pipeline>>>);

impl Pipelines {
    pub(super) fn get(&self, gpu: &Gpu, kernel: Kernel) -> Result<Arc<Pipeline>, BackendError> {
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
