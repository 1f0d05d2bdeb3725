//! The caller's device, and the pipelines that were built for it.

use std::borrow::Cow;
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};

use ::wgpu::{
    BindGroup, BindGroupDescriptor, BindGroupEntry, BindGroupLayout, BindGroupLayoutDescriptor,
    BindGroupLayoutEntry, BindingResource, BindingType, Buffer, BufferBindingType, BufferDescriptor,
    BufferUsages, ComputePipeline, ComputePipelineDescriptor, CooperativeMatrixProperties, Device,
    ErrorFilter, Features, Limits, PipelineCache, PipelineCacheDescriptor, PipelineCompilationOptions,
    PipelineLayoutDescriptor, Queue, ShaderModuleDescriptor, ShaderRuntimeChecks, ShaderSource, ShaderStages,
};
use pagewise_shaders::copy_blocks::{CopyBlocks, CopyUnit};
use pagewise_shaders::decode::{Decode, DecodeMerge, DecodeSpec};
use pagewise_shaders::merge_states::{MergeStates, MergeStatesSpec};
use pagewise_shaders::prefill::{MatrixShape, Prefill, PrefillKernel};
use pagewise_shaders::write_kv::{WriteKv, WriteKvSpec};
use pagewise_shaders::{BindingKind, Shader};

use super::adapter::{matrix_features, matrix_shape};
use super::pipeline_cache::{seal, unseal};
use super::{WgpuError, check_limits};

/// Kernels for one device, which stays the caller's. Each pipeline is built when it is first asked for, and kept.
#[derive(Debug)]
pub struct Context {
    device: Device,
    queue: Queue,
    limits: Limits,
    features: Features,
    matrices: Option<MatrixShape>,
    cache: Option<PipelineCache>,
    pub(super) write_kv: Pipelines<WriteKvSpec, WriteKv>,
    pub(super) copy_blocks: Pipelines<CopyUnit, CopyBlocks>,
    pub(super) decode: Pipelines<DecodeSpec, Decode>,
    pub(super) decode_merge: Pipelines<pagewise_shaders::DType, DecodeMerge>,
    pub(super) prefill: Pipelines<PrefillKernel, Prefill>,
    pub(super) merge_states: Pipelines<MergeStatesSpec, MergeStates>,
    #[cfg(feature = "conformance")]
    alteration: Option<crate::conformance::Alteration>,
}

impl Context {
    /// Over a device and queue of the caller.
    ///
    /// # Errors
    /// [`WgpuError::Limit`] when the device was made with limits that are too low; see
    /// [`device_descriptor`](super::device_descriptor).
    pub fn new(device: Device, queue: Queue) -> Result<Self, WgpuError> {
        // SAFETY: there is no data.
        unsafe { Self::with_pipeline_cache(device, queue, None) }
    }

    /// The same, with what [`Context::pipeline_cache_data`] gave in an earlier run: where the device has the feature
    /// `PIPELINE_CACHE`, pipelines are then not compiled again. Data of another device or driver is of no use and does
    /// no harm; nor do data that were cut or damaged on their way, which a checksum shows.
    ///
    /// # Safety
    /// The data come from [`Context::pipeline_cache_data`]: nobody made them up to look like it.
    ///
    /// # Errors
    /// As [`Context::new`].
    pub unsafe fn with_pipeline_cache(
        device: Device,
        queue: Queue,
        data: Option<&[u8]>,
    ) -> Result<Self, WgpuError> {
        let (limits, features) = (device.limits(), device.features());
        check_limits(&limits)?;
        let whole = data.and_then(unseal);
        if data.is_some() && whole.is_none() {
            tracing::warn!("the stored pipeline cache is damaged and left out: pipelines are compiled again");
        }
        let data = whole;
        let descriptor = PipelineCacheDescriptor { label: Some("pagewise"), data, fallback: true };
        let cache = features.contains(Features::PIPELINE_CACHE).then(|| {
            // SAFETY: the caller says that the data come from a pipeline cache, and they are as they were.
            unsafe { device.create_pipeline_cache(&descriptor) }
        });
        Ok(Self {
            cache,
            device,
            queue,
            limits,
            features,
            matrices: None,
            write_kv: Pipelines::default(),
            copy_blocks: Pipelines::default(),
            decode: Pipelines::default(),
            decode_merge: Pipelines::default(),
            prefill: Pipelines::default(),
            merge_states: Pipelines::default(),
            #[cfg(feature = "conformance")]
            alteration: None,
        })
    }

    /// Tells of the matrix units that the device's adapter has
    /// ([`Adapter::cooperative_matrix_properties`](::wgpu::Adapter::cooperative_matrix_properties)), which a device cannot
    /// be asked for. Prefill makes use of them where they fit ([`matrix_shape`]) and the device was
    /// made with the features that they take, as [`device_descriptor`](super::device_descriptor) says.
    #[must_use]
    pub fn with_matrices(self, properties: &[CooperativeMatrixProperties]) -> Self {
        let there = self.features.contains(matrix_features());
        let matrices = matrix_shape(&self.device.adapter_info(), properties).filter(|_| there);
        Self { matrices, ..self }
    }

    /// The matrices that prefill makes use of.
    pub fn matrices(&self) -> Option<MatrixShape> {
        self.matrices
    }

    /// The same context, whose kernels are compiled with the text that `alter` makes of each entry point and text, which
    /// must have the same bindings: for tests that plant faults. Kernels compiled before are forgotten.
    #[cfg(feature = "conformance")]
    #[must_use]
    pub fn with_altered_kernels(self, alter: impl Fn(&str, &str) -> String + Send + Sync + 'static) -> Self {
        Self {
            alteration: Some(crate::conformance::Alteration::new(alter)),
            write_kv: Pipelines::default(),
            copy_blocks: Pipelines::default(),
            decode: Pipelines::default(),
            decode_merge: Pipelines::default(),
            prefill: Pipelines::default(),
            merge_states: Pipelines::default(),
            ..self
        }
    }

    /// What the device keeps of the pipelines that were built so far, to be stored and given to
    /// [`Context::with_pipeline_cache`]; `None` on devices without the feature `PIPELINE_CACHE`.
    pub fn pipeline_cache_data(&self) -> Option<Vec<u8>> {
        self.cache.as_ref()?.get_data().map(seal)
    }

    /// Builds the pipeline of any kernel of [`pagewise_shaders`], with the layout of its bind group 0. Nothing is kept:
    /// that is the caller's.
    ///
    /// # Errors
    /// [`WgpuError::Compile`] when the device refuses it.
    pub fn compile(
        &self,
        shader: &Shader,
        uniform: UniformOffset,
    ) -> Result<(ComputePipeline, BindGroupLayout), WgpuError> {
        build(self.builder(), shader, uniform)
    }

    /// What pipelines are built with.
    pub(super) fn builder(&self) -> Builder<'_> {
        Builder {
            device: &self.device,
            cache: self.cache.as_ref(),
            #[cfg(feature = "conformance")]
            alteration: self.alteration.as_ref(),
        }
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Its queue.
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// A small buffer of our own with these contents.
    pub(super) fn buffer(&self, label: &'static str, words: &[u32], usage: BufferUsages) -> Buffer {
        let buffer = self.device().create_buffer(&BufferDescriptor {
            label: Some(label),
            size: size_of_val(words) as u64,
            usage: usage | BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        self.queue().write_buffer(&buffer, 0, bytemuck::cast_slice(words));
        buffer
    }

    /// A bind group of resources in the order of their bindings.
    pub(super) fn group<const N: usize>(
        &self,
        label: &'static str,
        layout: &BindGroupLayout,
        resources: [BindingResource<'_>; N],
    ) -> BindGroup {
        let entry = |(binding, resource)| BindGroupEntry { binding, resource };
        let entries: Vec<BindGroupEntry<'_>> = (0..).zip(resources).map(entry).collect();
        let descriptor = BindGroupDescriptor { label: Some(label), layout, entries: &entries };
        self.device().create_bind_group(&descriptor)
    }

    /// Its limits.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Its features.
    pub fn features(&self) -> Features {
        self.features
    }
}

/// What pipelines are built with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Builder<'a> {
    device: &'a Device,
    cache: Option<&'a PipelineCache>,
    #[cfg(feature = "conformance")]
    alteration: Option<&'a crate::conformance::Alteration>,
}

impl Builder<'_> {
    /// The text to compile.
    fn text<'s>(self, shader: &'s Shader) -> Cow<'s, str> {
        #[cfg(feature = "conformance")]
        if let Some(alteration) = self.alteration {
            return alteration.text(shader.entry(), shader.text()).into();
        }
        shader.text().into()
    }
}

/// A kernel, ready to be bound and dispatched.
#[derive(Debug)]
pub(super) struct Pipeline<D> {
    pub(super) descriptor: D,
    pub(super) pipeline: ComputePipeline,
    pub(super) layout: BindGroupLayout,
}

/// The pipelines of one family, by variant.
#[derive(Debug)]
pub(super) struct Pipelines<K, D>(Mutex<HashMap<K, Arc<Pipeline<D>>>>);

impl<K, D> Default for Pipelines<K, D> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Copy + Eq + Hash, D> Pipelines<K, D> {
    /// The pipeline for a variant; built from `descriptor` and its shader the first time.
    pub(super) fn get(
        &self,
        key: K,
        builder: Builder<'_>,
        descriptor: impl FnOnce() -> Result<D, WgpuError>,
        shader: impl FnOnce(&D) -> &Shader,
    ) -> Result<Arc<Pipeline<D>>, WgpuError> {
        // A thread that panicked cannot have left the map half changed: inserting is the only change.
        let mut pipelines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pipeline) = pipelines.get(&key) {
            return Ok(Arc::clone(pipeline));
        }
        let descriptor = descriptor()?;
        let (pipeline, layout) = build(builder, shader(&descriptor), UniformOffset::Fixed)?;
        let pipeline = Arc::new(Pipeline { descriptor, pipeline, layout });
        pipelines.insert(key, Arc::clone(&pipeline));
        Ok(pipeline)
    }
}

/// Where a kernel's uniform buffer begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UniformOffset {
    /// As the bind group says.
    Fixed,
    /// As each `set_bind_group` says: one bind group serves calls with different parameters.
    Dynamic,
}

fn build(
    builder: Builder<'_>,
    shader: &Shader,
    uniform: UniformOffset,
) -> Result<(ComputePipeline, BindGroupLayout), WgpuError> {
    let Builder { device, cache, .. } = builder;
    let scope = device.push_error_scope(ErrorFilter::Validation);
    let name = Some(shader.name());
    let descriptor = ShaderModuleDescriptor { label: name, source: ShaderSource::Wgsl(builder.text(shader)) };
    // Bounds stay checked. What goes is a counter in every loop that ends those that do not end by themselves.
    let mut checks = ShaderRuntimeChecks::checked();
    checks.force_loop_bounding = false;
    // SAFETY: the loops of our kernels end whatever lies in the buffers: a variable rises by a constant to a bound that
    // is so far from the largest number that it cannot wrap around.
    let module = unsafe { device.create_shader_module_trusted(descriptor, checks) };
    let entries: Vec<BindGroupLayoutEntry> = shader
        .bindings()
        .iter()
        .map(|binding| BindGroupLayoutEntry {
            binding: binding.index,
            visibility: ShaderStages::COMPUTE,
            ty: BindingType::Buffer {
                ty: match binding.kind {
                    BindingKind::Uniform { .. } => BufferBindingType::Uniform,
                    BindingKind::ReadOnly => BufferBindingType::Storage { read_only: true },
                    BindingKind::ReadWrite => BufferBindingType::Storage { read_only: false },
                },
                has_dynamic_offset: uniform == UniformOffset::Dynamic
                    && matches!(binding.kind, BindingKind::Uniform { .. }),
                min_binding_size: None,
            },
            count: None,
        })
        .collect();
    let layout =
        device.create_bind_group_layout(&BindGroupLayoutDescriptor { label: name, entries: &entries });
    let pipeline_layout = device.create_pipeline_layout(&PipelineLayoutDescriptor {
        label: name,
        bind_group_layouts: &[Some(&layout)],
        immediate_size: 0,
    });
    let pipeline = device.create_compute_pipeline(&ComputePipelineDescriptor {
        label: name,
        layout: Some(&pipeline_layout),
        module: &module,
        entry_point: Some(shader.entry()),
        // Every kernel writes its workgroup memory before it reads it.
        compilation_options: PipelineCompilationOptions {
            zero_initialize_workgroup_memory: false,
            ..PipelineCompilationOptions::default()
        },
        cache,
    });
    // In a browser the answer would come later than now, and waiting is not possible: errors show on its console.
    let error = if cfg!(target_family = "wasm") {
        drop(scope);
        None
    } else {
        pollster::block_on(scope.pop())
    };
    match error {
        Some(error) => {
            Err(WgpuError::Compile { kernel: shader.name().to_owned(), reason: error.to_string() })
        }
        None => {
            tracing::debug!(kernel = shader.name(), "built a compute pipeline");
            Ok((pipeline, layout))
        }
    }
}
