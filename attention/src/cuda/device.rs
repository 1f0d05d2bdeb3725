//! Which GPUs and which driver are there, asked without creating anything and without ever panicking.

use std::fmt;

use cudarc::driver::{result, sys};

use pagewise_ptx::prefill::{Form, PrefillSpec};

use super::CudaError;

/// The oldest GPU generation that the kernels are written for: Ampere, for `cp.async` and bf16 `mma`.
pub const MIN_COMPUTE_CAPABILITY: ComputeCapability = ComputeCapability { major: 8, minor: 0 };

/// The oldest driver that loads the kernels, by the CUDA version that it supports: PTX 8.0.
pub const MIN_CUDA_VERSION: CudaVersion = CudaVersion { major: 12, minor: 0 };

/// From this generation on kernels can be launched before the one before them has ended, and from this CUDA version on
/// also in a graph.
const DEPENDENT_LAUNCH_SINCE: (u32, CudaVersion) = (9, CudaVersion { major: 12, minor: 3 });

/// The same of conversions from fp8 in PTX.
const FP8_SINCE: (ComputeCapability, CudaVersion) =
    (ComputeCapability::from_sm(89), CudaVersion { major: 12, minor: 1 });

/// A GPU generation: 8.0 is Ampere, 8.9 Ada, 9.0 Hopper, 10.0 and 12.0 Blackwell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ComputeCapability {
    /// Generation.
    pub major: u32,
    /// Variant within it.
    pub minor: u32,
}

impl ComputeCapability {
    /// From the number in `sm_89`.
    pub(super) const fn from_sm(sm: u32) -> Self {
        Self { major: sm / 10, minor: sm % 10 }
    }
}

impl fmt::Display for ComputeCapability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// A CUDA version, as drivers state the newest that they support.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CudaVersion {
    /// Before the dot.
    pub major: u32,
    /// After it.
    pub minor: u32,
}

impl CudaVersion {
    /// From the driver's number: 12040 is 12.4.
    pub(super) const fn from_number(number: u32) -> Self {
        Self { major: number / 1000, minor: number % 1000 / 10 }
    }
}

impl fmt::Display for CudaVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// One GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its number, as CUDA counts.
    pub ordinal: usize,
    /// Its name: `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// Its generation.
    pub compute_capability: ComputeCapability,
    /// Bytes of its memory.
    pub memory: u64,
    /// Bytes a second that its memory moves at most, as the driver states clock and width; 0 if it does not.
    pub memory_bandwidth: u64,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of shared memory that a thread block can have when it asks for it.
    pub shared_memory_per_block: u32,
    /// CUDA version that the driver supports.
    pub driver: CudaVersion,
}

impl Device {
    /// What an H100 (SXM) with a driver of CUDA 13.0 says of itself: plans are host arithmetic, and can be made and looked at
    /// where there is no GPU.
    pub fn h100() -> Self {
        Self {
            ordinal: 0,
            name: "NVIDIA H100 80GB HBM3".to_owned(),
            compute_capability: ComputeCapability { major: 9, minor: 0 },
            memory: 80 << 30,
            memory_bandwidth: 3_352_320_000_000,
            multiprocessors: 132,
            shared_memory_per_block: 232_448,
            driver: CudaVersion { major: 13, minor: 0 },
        }
    }

    /// The same for an H200: an H100 with more and faster memory.
    pub fn h200() -> Self {
        Self {
            name: "NVIDIA H200".to_owned(),
            memory: 141 << 30,
            memory_bandwidth: 4_916_736_000_000,
            ..Self::h100()
        }
    }

    /// Whether the kernels run on this GPU with this driver.
    ///
    /// # Errors
    /// [`CudaError::GpuTooOld`] or [`CudaError::DriverTooOld`], naming what is there and what is needed.
    pub fn check(&self) -> Result<(), CudaError> {
        self.check_for("the CUDA backend", MIN_COMPUTE_CAPABILITY, MIN_CUDA_VERSION)
    }

    /// Whether kernels can be launched before the one before them has ended ([`Order::Dependent`](super::Order)), in
    /// graphs too.
    pub fn launches_dependently(&self) -> bool {
        let (generation, cuda) = DEPENDENT_LAUNCH_SINCE;
        self.compute_capability.major >= generation && self.driver >= cuda
    }

    /// Whether kernels can convert fp8 numbers: from Ada on, with a driver that knows how they are named.
    pub fn converts_fp8(&self) -> bool {
        let (gpu, cuda) = FP8_SINCE;
        self.compute_capability >= gpu && self.driver >= cuda
    }

    /// How many thread blocks of a kernel fit a multiprocessor at once, as far as shared memory goes.
    pub(super) fn blocks_that_fit(&self, shared: u32) -> u32 {
        // The system takes 1 KiB of each thread block's, and of the multiprocessor's memory one of them can have all
        // but that.
        (self.shared_memory_per_block.saturating_add(1024) / shared.saturating_add(1024)).max(1)
    }

    /// The form of the prefill kernel for this GPU, where blocks, heads and mask allow it (see [`Form`]): where Hopper's own
    /// does not do, the large one stands in.
    pub fn prefill_form(&self) -> Form {
        let major = self.compute_capability.major;
        let dtype = pagewise_ptx::DType::Bf16;
        let large = PrefillSpec { dtype, kv_dtype: dtype, head_dim: 128, form: Form::Large, bits: false };
        let fits = self.blocks_that_fit(large.shared_bytes()) >= large.blocks_per_multiprocessor();
        match () {
            () if Form::Hopper.runs_on(major) => Form::Hopper,
            () if Form::Large.runs_on(major) && fits => Form::Large,
            () => Form::Small,
        }
    }

    /// Whether a kernel runs on this GPU with this driver.
    pub(super) fn check_kernel(&self, kernel: &pagewise_ptx::Kernel) -> Result<(), CudaError> {
        let target = kernel.target();
        let gpu = ComputeCapability::from_sm(target.sm);
        if target.only && self.compute_capability > gpu {
            return Err(CudaError::Unsupported {
                kernel: kernel.family(),
                what: format!("{} on {}, which is not {}", kernel.entry(), self.name, target.name()),
                advice: "leave the choice of the form to the plan",
            });
        }
        self.check_for(kernel.entry(), gpu, CudaVersion::from_number(target.cuda_version()))?;
        let (found, needed) =
            (self.shared_memory_per_block, kernel.static_shared() + kernel.dynamic_shared());
        if found < needed {
            let (kernel, gpu) = (kernel.entry().to_owned(), self.name.clone());
            return Err(CudaError::SharedMemory { kernel, gpu, found, needed });
        }
        Ok(())
    }

    fn check_for(&self, what: &str, gpu: ComputeCapability, cuda: CudaVersion) -> Result<(), CudaError> {
        if self.compute_capability < gpu {
            return Err(CudaError::GpuTooOld {
                what: what.to_owned(),
                gpu: self.name.clone(),
                found: self.compute_capability,
                needed: gpu,
            });
        }
        if self.driver < cuda {
            return Err(CudaError::DriverTooOld { what: what.to_owned(), found: self.driver, needed: cuda });
        }
        Ok(())
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} (device {}, compute capability {}, {:.1} GiB, CUDA {})",
            self.name,
            self.ordinal,
            self.compute_capability,
            self.memory as f64 / f64::from(1u32 << 30),
            self.driver
        )
    }
}

/// The CUDA version that the driver supports.
///
/// # Errors
/// [`CudaError::NoDriver`] without one.
pub fn driver_version() -> Result<CudaVersion, CudaError> {
    // SAFETY: opens the driver's library, whose initialisers the driver's maker answers for.
    if !unsafe { sys::is_culib_present() } {
        return Err(CudaError::NoDriver);
    }
    let mut number = 0;
    // SAFETY: writes an integer through a valid pointer; allowed before cuInit.
    CudaError::check("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&raw mut number) })?;
    Ok(CudaVersion::from_number(u32::try_from(number).unwrap_or(0)))
}

/// The driver's own release (`580.65.06`), where the system says it. For reports.
pub fn driver_release() -> Option<String> {
    let text = std::fs::read_to_string("/proc/driver/nvidia/version").ok()?;
    let line = text.lines().find(|line| line.starts_with("NVRM version"))?;
    let is_release = |word: &&str| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.');
    line.split_whitespace().find(is_release).map(str::to_owned)
}

/// All GPUs that this process may use, usable or not: [`Device::check`] says. Creates no context.
///
/// # Errors
/// [`CudaError::NoDriver`] without a driver, [`CudaError::NoDevice`] without a GPU, [`CudaError::Driver`] when
/// the driver does not answer.
pub fn devices() -> Result<Vec<Device>, CudaError> {
    let driver = driver_version()?;
    // SAFETY: no arguments to get wrong; may be called any number of times.
    match unsafe { sys::cuInit(0) } {
        sys::CUresult::CUDA_ERROR_NO_DEVICE => return Err(CudaError::NoDevice { driver }),
        code => CudaError::check("cuInit", code)?,
    }
    let count = result::device::get_count()?;
    if count <= 0 {
        return Err(CudaError::NoDevice { driver });
    }
    (0..count).map(|ordinal| describe(result::device::get(ordinal)?, ordinal as usize, driver)).collect()
}

/// Asks the driver about one GPU.
pub(super) fn describe(
    device: sys::CUdevice,
    ordinal: usize,
    driver: CudaVersion,
) -> Result<Device, CudaError> {
    use sys::CUdevice_attribute as A;
    let attribute = |attribute| -> Result<u32, CudaError> {
        // SAFETY: `device` came from the driver.
        let value = unsafe { result::device::get_attribute(device, attribute) }?;
        Ok(u32::try_from(value).unwrap_or(0))
    };
    Ok(Device {
        ordinal,
        name: result::device::get_name(device)?,
        compute_capability: ComputeCapability {
            major: attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            minor: attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        },
        // SAFETY: `device` came from the driver.
        memory: unsafe { result::device::total_mem(device) }? as u64,
        // Two transfers a clock, as all memory has done since long before the GPUs that the kernels run on.
        memory_bandwidth: 2_000
            * u64::from(attribute(A::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE).unwrap_or(0))
            * u64::from(attribute(A::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH).unwrap_or(0))
            / 8,
        multiprocessors: attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_memory_per_block: attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        driver,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(major: u32, minor: u32, driver: u32) -> Device {
        Device {
            ordinal: 0,
            name: "A GPU".into(),
            compute_capability: ComputeCapability { major, minor },
            memory: 24 << 30,
            memory_bandwidth: 760_000_000_000,
            multiprocessors: 68,
            shared_memory_per_block: 101_376,
            driver: CudaVersion::from_number(driver),
        }
    }

    #[test]
    fn refusals_name_what_is_there_and_what_is_needed() {
        let old_gpu = device(7, 5, 13_000).check().unwrap_err().to_string();
        assert_eq!(old_gpu, "A GPU has compute capability 7.5, but the CUDA backend needs 8.0 or newer");
        let old_driver = device(8, 6, 11_080).check().unwrap_err().to_string();
        assert_eq!(
            old_driver,
            "the NVIDIA driver supports CUDA 11.8, but the CUDA backend needs 12.0 or newer: update the driver"
        );
        assert!(device(8, 0, 12_000).check().is_ok());
        assert!(device(12, 0, 13_000).check().is_ok());
    }

    #[test]
    fn probing_never_panics() {
        // With a GPU this lists it, without one it says why not; both are answers.
        match devices() {
            Ok(devices) => assert!(!devices.is_empty()),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
}
