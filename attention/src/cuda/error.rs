//! What can go wrong on the way to a GPU: what is there, what is needed, and what to do.

use std::ffi::CStr;
use std::mem::MaybeUninit;

use cudarc::driver::sys;

use super::{ComputeCapability, CudaVersion};
use crate::{DType, ProblemError};

/// Why the CUDA backend refuses or failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// No driver library on this machine.
    #[error(
        "no NVIDIA driver: libcuda was not found; install the driver for this GPU, or use another backend"
    )]
    NoDriver,
    /// A driver, but no GPU that this process may use.
    #[error(
        "the NVIDIA driver (CUDA {driver}) sees no GPU; is CUDA_VISIBLE_DEVICES set, or the GPU handed to another machine or container?"
    )]
    NoDevice {
        /// CUDA version that the driver supports.
        driver: CudaVersion,
    },
    /// A device number past the last.
    #[error("there is no CUDA device {ordinal}: this machine has {count}, counted from 0")]
    NoSuchDevice {
        /// Device asked for.
        ordinal: usize,
        /// Devices there.
        count: usize,
    },
    /// The driver cannot load the kernels.
    #[error("the NVIDIA driver supports CUDA {found}, but {what} needs {needed} or newer: update the driver")]
    DriverTooOld {
        /// What needs it: this backend, or a kernel.
        what: String,
        /// CUDA version that the driver supports.
        found: CudaVersion,
        /// CUDA version that is needed.
        needed: CudaVersion,
    },
    /// The GPU cannot run the kernels.
    #[error("{gpu} has compute capability {found}, but {what} needs {needed} or newer")]
    GpuTooOld {
        /// What needs it: this backend, or a kernel.
        what: String,
        /// The GPU's name.
        gpu: String,
        /// Its compute capability.
        found: ComputeCapability,
        /// What is needed.
        needed: ComputeCapability,
    },
    /// [`Context::current`](super::Context::current) on a thread without a context.
    #[error("no CUDA context is current on this thread: make one current first, or use Context::primary")]
    NoCurrentContext,
    /// A cudarc stream of another context.
    #[error("the stream belongs to another CUDA context than the kernels: use a stream of the same context")]
    OtherContext,
    /// The driver's compiler refused a kernel: a defect of this crate, or of the driver.
    #[error("the driver could not compile {kernel} for {gpu} (please report this): {message}\n{log}")]
    Jit {
        /// Kernel variant.
        kernel: String,
        /// The GPU's name.
        gpu: String,
        /// The driver's error.
        message: String,
        /// The compiler's log.
        log: String,
    },
    /// The GPU gives a thread block less shared memory than a kernel takes.
    #[error(
        "{kernel} takes {needed} bytes of shared memory a thread block, {gpu} has {found}: use a tuning with fewer warps or stages"
    )]
    SharedMemory {
        /// Kernel variant.
        kernel: String,
        /// The GPU's name.
        gpu: String,
        /// Bytes that it has.
        found: u32,
        /// Bytes that are needed.
        needed: u32,
    },
    /// A driver call failed.
    #[error("{call} failed{}: {name} ({message})", kernel.as_ref().map(|k| format!(" for {k}")).unwrap_or_default())]
    Driver {
        /// The driver call.
        call: &'static str,
        /// The kernel it was for, if for one.
        kernel: Option<String>,
        /// The error's name, such as `CUDA_ERROR_OUT_OF_MEMORY`.
        name: String,
        /// What the driver says about it.
        message: String,
    },
    /// The problem itself is wrong.
    #[error(transparent)]
    Problem(#[from] ProblemError),
    /// Element types that no kernel takes.
    #[error("{what} cannot be {dtype}; use f32, f16 or bf16 (fp8 is for the cache)")]
    UnsupportedDType {
        /// Which tensor.
        what: &'static str,
        /// Its type.
        dtype: DType,
    },
    /// A kernel does not do what is asked of it.
    #[error("the CUDA {kernel} kernel does not take {what}; {advice}")]
    Unsupported {
        /// Kernel family.
        kernel: &'static str,
        /// What was asked.
        what: String,
        /// What to do.
        advice: &'static str,
    },
    /// An address that is not a multiple of its element's size, or of what the kernel reads at once.
    #[error("{tensor} starts at {address:#x}, which is not a multiple of {size} bytes")]
    Misaligned {
        /// Which tensor.
        tensor: &'static str,
        /// Its address.
        address: u64,
        /// Bytes.
        size: u64,
    },
    /// Host memory that the GPU cannot reach.
    #[error(
        "the host memory at {address:#x} is not pinned: allocate it with cuMemHostAlloc (cudarc's alloc_pinned), or register it with cuMemHostRegister"
    )]
    NotPinned {
        /// Its address.
        address: u64,
    },
    /// An input that the configuration asks for.
    #[error("the configuration uses {what}, but the call gives no address for them")]
    Missing {
        /// Which input.
        what: &'static str,
    },
    /// A size beyond what a kernel's 32-bit indices hold.
    #[error("{what} is {value}; the CUDA kernels count it with 32 bits (at most {max})")]
    TooLarge {
        /// Which size.
        what: &'static str,
        /// Its value.
        value: u64,
        /// Largest allowed.
        max: u64,
    },
    /// No kernel variant for this call.
    #[error(transparent)]
    Kernel(#[from] pagewise_ptx::Error),
}

impl CudaError {
    /// Turns the driver's result into one of ours.
    ///
    /// # Errors
    /// [`CudaError::Driver`] unless the call succeeded.
    pub fn check(call: &'static str, result: sys::CUresult) -> Result<(), Self> {
        match result {
            sys::CUresult::CUDA_SUCCESS => Ok(()),
            code => Err(Self::Driver { call, kernel: None, name: name(code), message: message(code) }),
        }
    }

    /// The same error, said of a kernel.
    pub(super) fn of_kernel(self, entry: &str) -> Self {
        match self {
            Self::Driver { call, name, message, .. } => {
                Self::Driver { call, kernel: Some(entry.to_owned()), name, message }
            }
            other => other,
        }
    }
}

impl From<cudarc::driver::DriverError> for CudaError {
    fn from(error: cudarc::driver::DriverError) -> Self {
        Self::Driver { call: "a cudarc call", kernel: None, name: name(error.0), message: message(error.0) }
    }
}

/// `CUDA_ERROR_…`.
fn name(code: sys::CUresult) -> String {
    text(code, |code, text| {
        // SAFETY: writes a pointer to a static string, or null, through a valid pointer.
        unsafe { sys::cuGetErrorName(code, text) }
    })
}

/// What the driver says about an error.
pub(super) fn message(code: sys::CUresult) -> String {
    text(code, |code, text| {
        // SAFETY: writes a pointer to a static string, or null, through a valid pointer.
        unsafe { sys::cuGetErrorString(code, text) }
    })
}

fn text(
    code: sys::CUresult,
    ask: impl FnOnce(sys::CUresult, *mut *const std::ffi::c_char) -> sys::CUresult,
) -> String {
    let mut text = MaybeUninit::new(std::ptr::null());
    if ask(code, text.as_mut_ptr()) == sys::CUresult::CUDA_SUCCESS {
        // SAFETY: initialised above, and perhaps overwritten by the driver.
        let text = unsafe { text.assume_init() };
        if !text.is_null() {
            // SAFETY: the driver gives a static string that ends in a zero.
            return unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned();
        }
    }
    format!("error {}", code as i32)
}

impl From<crate::plan::TooLarge> for CudaError {
    fn from(error: crate::plan::TooLarge) -> Self {
        let crate::plan::TooLarge { what, value, max } = error;
        Self::TooLarge { what, value, max }
    }
}
