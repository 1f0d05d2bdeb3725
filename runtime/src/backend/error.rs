//! What a device can fail with.

use pagewise_attention::ProblemError;

/// What a device can fail with.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackendError {
    /// The attention problem was refused.
    #[error(transparent)]
    Attention(#[from] ProblemError),
    /// A dense layer was refused.
    #[error(transparent)]
    Dense(#[from] super::cpu::dense::DenseError),
    /// Memory for weights or cache could not be had.
    #[error("{wanted} bytes for {what} could not be allocated; ask for less with {hint}")]
    OutOfMemory {
        /// What it was for.
        what: &'static str,
        /// How much.
        wanted: usize,
        /// The option that asks for less.
        hint: &'static str,
    },
    /// The device has too little memory left.
    #[error("{what} of {wanted} bytes do not fit the GPU, which has {free} free; ask for less with {hint}")]
    DeviceMemory {
        /// What it was for.
        what: &'static str,
        /// How much.
        wanted: usize,
        /// How much there was.
        free: usize,
        /// The option that asks for less.
        hint: &'static str,
    },
    /// The CUDA driver, or a kernel of ours.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Cuda(#[from] pagewise_attention::cuda::CudaError),
    /// A library that the device needs is missing or fails.
    #[error("{0}")]
    Library(String),
    /// A tensor does not fit what is done with it: a defect of the model or of the backend.
    #[error("{what} has the shape {found:?} where {needed:?} is needed")]
    Shape {
        /// Which.
        what: &'static str,
        /// Its shape.
        found: Vec<usize>,
        /// What was needed.
        needed: Vec<usize>,
    },
    /// The device cannot do what an option asks for.
    #[error("{option}: {problem}")]
    Option {
        /// Which, as it is written on the command line.
        option: &'static str,
        /// What is wrong and what can be had.
        problem: String,
    },
    /// A device did not keep all weights that were sent to it.
    #[error("{sent} weights were sent to the device and {left} are there; this is a defect of the backend")]
    LostWeights {
        /// How many were sent.
        sent: usize,
        /// How many it gave back.
        left: usize,
    },
    /// The GPU cannot do it, or there is none.
    #[cfg(feature = "wgpu")]
    #[error(transparent)]
    Wgpu(#[from] pagewise_attention::wgpu::WgpuError),
    /// The GPU is gone: its driver was reset, or it was taken away.
    #[error("the GPU is lost and nothing more can be computed on it: {reason}; load the model again")]
    DeviceLost {
        /// What the driver says.
        reason: String,
    },
    /// The GPU failed in a way that its interface does not foresee.
    #[error("the GPU failed (please report this): {reason}")]
    Device {
        /// What its interface says.
        reason: String,
    },
    /// The device's threads could not be started.
    #[error("--threads: the CPU's threads could not be started: {0}")]
    Threads(String),
}
