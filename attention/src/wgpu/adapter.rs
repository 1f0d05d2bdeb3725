//! Which GPUs are there, what they can do, and how a device for this backend is made. Asks before it creates.

use std::fmt;

use ::wgpu::{
    Adapter, AdapterInfo, Backend, Backends, CooperativeMatrixProperties, CooperativeScalarType, Device,
    DeviceDescriptor, DeviceType, ExperimentalFeatures, Features, Instance, InstanceDescriptor, Limits,
    Queue,
};
use pagewise_shaders::prefill::MatrixShape;

use super::WgpuError;

/// What every kernel can count on, by name: WebGPU's own defaults, so that all conforming devices have it.
pub const REQUIRED_LIMITS: [(&str, u64); 6] = [
    ("max_storage_buffers_per_shader_stage", 8),
    ("max_compute_invocations_per_workgroup", 256),
    ("max_compute_workgroup_size_x", 256),
    ("max_compute_workgroup_storage_size", 16_384),
    ("max_compute_workgroups_per_dimension", 65_535),
    ("max_storage_buffer_binding_size", 128 << 20),
];

/// The value of one of [`REQUIRED_LIMITS`].
fn limit(limits: &Limits, name: &str) -> u64 {
    match name {
        "max_storage_buffers_per_shader_stage" => limits.max_storage_buffers_per_shader_stage.into(),
        "max_compute_invocations_per_workgroup" => limits.max_compute_invocations_per_workgroup.into(),
        "max_compute_workgroup_size_x" => limits.max_compute_workgroup_size_x.into(),
        "max_compute_workgroup_storage_size" => limits.max_compute_workgroup_storage_size.into(),
        "max_compute_workgroups_per_dimension" => limits.max_compute_workgroups_per_dimension.into(),
        "max_storage_buffer_binding_size" => limits.max_storage_buffer_binding_size,
        _ => 0,
    }
}

/// Whether a device with these limits can run the kernels.
///
/// # Errors
/// [`WgpuError::Limit`] names the first limit that is too low.
pub fn check_limits(limits: &Limits) -> Result<(), WgpuError> {
    for (name, needed) in REQUIRED_LIMITS {
        let found = limit(limits, name);
        if found < needed {
            return Err(WgpuError::Limit { limit: name, what: "the wgpu backend".into(), found, needed });
        }
    }
    Ok(())
}

/// The features that kernels make use of where they are: none of them is required.
pub fn wanted_features() -> Features {
    Features::SHADER_F16 | Features::SUBGROUP | Features::TIMESTAMP_QUERY | Features::PIPELINE_CACHE
}

/// What prefill on matrix units takes.
pub(super) fn matrix_features() -> Features {
    Features::EXPERIMENTAL_COOPERATIVE_MATRIX | Features::SHADER_F16 | Features::SUBGROUP
}

/// The matrices of an adapter that prefill can make use of: f16 times f16 added up in f32, square, in subgroups of one
/// size. Through Vulkan only: the kernel's loads of vectors are not what naga writes for Metal.
pub fn matrix_shape(info: &AdapterInfo, properties: &[CooperativeMatrixProperties]) -> Option<MatrixShape> {
    let subgroup = Some(info.subgroup_min_size).filter(|size| *size == info.subgroup_max_size)?;
    if info.backend != Backend::Vulkan {
        return None;
    }
    let fitting = properties.iter().filter(|found| {
        let types = (found.ab_type, found.cr_type);
        types == (CooperativeScalarType::F16, CooperativeScalarType::F32)
            && (found.m_size, found.m_size) == (found.n_size, found.k_size)
            && [8, 16].contains(&found.m_size)
            && subgroup % found.m_size == 0
    });
    let size = fitting.map(|found| found.m_size).max()?;
    Some(MatrixShape { size, subgroup })
}

/// How to make a device of an adapter for this backend: its wanted features, and its own limits, since the
/// defaults allow cache bindings of only 128 MiB.
pub fn device_descriptor(adapter: &Adapter) -> DeviceDescriptor<'static> {
    let matrices = matrix_shape(&adapter.get_info(), &adapter.cooperative_matrix_properties());
    let wanted = match matrices {
        Some(_) => wanted_features() | matrix_features(),
        None => wanted_features(),
    };
    let features = adapter.features() & wanted;
    let experimental_features = match features.intersects(Features::all_experimental_mask()) {
        // SAFETY: the only such feature is cooperative matrices, and the only kernel that makes use of them is our own, which
        // keeps to what wgpu asks for: matrices of a shape that the adapter reports, whole subgroups, uniform control flow.
        true => unsafe { ExperimentalFeatures::enabled() },
        false => ExperimentalFeatures::disabled(),
    };
    DeviceDescriptor {
        label: Some("pagewise"),
        required_features: features,
        required_limits: adapter.limits(),
        experimental_features,
        ..DeviceDescriptor::default()
    }
}

/// One adapter: a GPU as one graphics API shows it.
#[derive(Clone, Debug)]
pub struct AdapterReport {
    /// Its place in [`adapters`]' list.
    pub index: usize,
    /// Its name.
    pub name: String,
    /// Graphics API.
    pub backend: Backend,
    /// Discrete, integrated, software …
    pub device_type: DeviceType,
    /// The driver's name and version.
    pub driver: String,
    /// Those of [`wanted_features`] that it has.
    pub features: Features,
    /// Its limits.
    pub limits: Limits,
    /// Its matrix units, for [`Context::with_matrices`](super::Context::with_matrices).
    pub matrices: Vec<CooperativeMatrixProperties>,
    adapter: Adapter,
}

impl AdapterReport {
    /// Describes an adapter.
    pub fn new(index: usize, adapter: Adapter) -> Self {
        let info = adapter.get_info();
        Self {
            index,
            // Browsers give none away.
            name: if info.name.is_empty() { "an unnamed adapter".to_owned() } else { info.name },
            backend: info.backend,
            device_type: info.device_type,
            driver: format!("{} {}", info.driver, info.driver_info).trim().to_owned(),
            features: adapter.features() & wanted_features(),
            limits: adapter.limits(),
            matrices: adapter.cooperative_matrix_properties(),
            adapter,
        }
    }

    /// The adapter itself.
    pub fn adapter(&self) -> &Adapter {
        &self.adapter
    }

    /// Whether the kernels run on it.
    ///
    /// # Errors
    /// [`WgpuError::Limit`] names the first limit that is too low.
    pub fn check(&self) -> Result<(), WgpuError> {
        check_limits(&self.limits)
    }
}

impl fmt::Display for AdapterReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.device_type {
            DeviceType::DiscreteGpu => "discrete GPU",
            DeviceType::IntegratedGpu => "integrated GPU",
            DeviceType::VirtualGpu => "virtual GPU",
            DeviceType::Cpu => "software",
            DeviceType::Other => "other",
        };
        write!(f, "{} (adapter {}, {:?}, {kind}, {})", self.name, self.index, self.backend, self.driver)
    }
}

/// All adapters that Vulkan, Metal, DX12 or the browser show, real GPUs first. Empty on a machine without any.
pub async fn adapters() -> Vec<AdapterReport> {
    if Instance::enabled_backend_features().is_empty() {
        return Vec::new();
    }
    let backends = Backends::VULKAN | Backends::METAL | Backends::DX12 | Backends::BROWSER_WEBGPU;
    let descriptor = InstanceDescriptor { backends, ..InstanceDescriptor::new_without_display_handle() };
    let mut adapters = Instance::new(descriptor).enumerate_adapters(backends).await;
    adapters.sort_by_key(|adapter| match adapter.get_info().device_type {
        DeviceType::DiscreteGpu => 0,
        DeviceType::IntegratedGpu => 1,
        DeviceType::VirtualGpu => 2,
        DeviceType::Other => 3,
        DeviceType::Cpu => 4,
    });
    adapters.into_iter().enumerate().map(|(index, adapter)| AdapterReport::new(index, adapter)).collect()
}

/// Makes a device of an adapter, for callers that have none of their own.
///
/// # Errors
/// [`WgpuError::NoAdapter`], [`WgpuError::NoSuchAdapter`], [`WgpuError::Limit`], [`WgpuError::Device`].
pub async fn open(index: usize) -> Result<(Device, Queue), WgpuError> {
    let reports = adapters().await;
    let count = reports.len();
    if count == 0 {
        return Err(WgpuError::NoAdapter);
    }
    let report = reports.into_iter().nth(index).ok_or(WgpuError::NoSuchAdapter { index, count })?;
    report.check()?;
    let opened = report.adapter.request_device(&device_descriptor(&report.adapter)).await;
    opened.map_err(|error| WgpuError::Device { adapter: report.name, reason: error.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn webgpu_defaults_suffice_and_less_is_named() {
        assert!(check_limits(&Limits::default()).is_ok());
        let low = Limits { max_compute_invocations_per_workgroup: 128, ..Limits::default() };
        let message = check_limits(&low).unwrap_err().to_string();
        assert_eq!(
            message,
            "the wgpu backend needs max_compute_invocations_per_workgroup = 256, but this device has 128"
        );
    }
}
