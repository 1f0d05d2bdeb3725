//! What can go wrong: which limit, feature or buffer, what is there, what is needed.

use crate::{DType, ProblemError};

/// Why the wgpu backend refuses or failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WgpuError {
    /// No GPU and no software driver.
    #[error(
        "no GPU adapter for Vulkan, Metal or DX12 on this machine; install the GPU's driver, or a software one (Debian, Ubuntu: apt-get install mesa-vulkan-drivers libvulkan1)"
    )]
    NoAdapter,
    /// An adapter number past the last.
    #[error("there is no adapter {index}: this machine has {count}, counted from 0")]
    NoSuchAdapter {
        /// Adapter asked for.
        index: usize,
        /// Adapters there.
        count: usize,
    },
    /// No adapter is what was asked for.
    #[error("no adapter of this machine is {wanted}; there are: {known}")]
    NoMatch {
        /// What was asked for.
        wanted: String,
        /// All adapters.
        known: String,
    },
    /// The adapter gave no device.
    #[error("adapter {adapter} gave no device: {reason}")]
    Device {
        /// The adapter's name.
        adapter: String,
        /// What wgpu says.
        reason: String,
    },
    /// A limit of the device is too low.
    #[error("{what} needs {limit} = {needed}, but this device has {found}")]
    Limit {
        /// Name of the limit, as in `wgpu::Limits`.
        limit: &'static str,
        /// What needs it.
        what: String,
        /// What is there.
        found: u64,
        /// What is needed.
        needed: u64,
    },
    /// A tensor lies where no kernel variant of this device can reach it.
    #[error("{reason}; {advice}")]
    Alignment {
        /// Which offset, stride or size, and what divides it not.
        reason: pagewise_shaders::Error,
        /// What to do.
        advice: &'static str,
    },
    /// A buffer lacks a usage.
    #[error("{tensor}: its buffer was made without {usage}; add it to the buffer's usages")]
    Usage {
        /// Which tensor.
        tensor: &'static str,
        /// The missing usage.
        usage: &'static str,
    },
    /// A range past the end of its buffer, or at an odd place.
    #[error("{tensor}: {reason}")]
    Range {
        /// Which tensor.
        tensor: &'static str,
        /// What is wrong with the range.
        reason: String,
    },
    /// One buffer is read and written by the same dispatch.
    #[error(
        "{read} and {written} lie in the same buffer; WebGPU does not let one dispatch read and write a buffer, so put them into two"
    )]
    SharedBuffer {
        /// The tensor that is read.
        read: &'static str,
        /// The tensor that is written.
        written: &'static str,
    },
    /// Element types that no kernel takes.
    #[error("{what} cannot be {dtype} in WGSL, which has no fp8; use f32, f16 or bf16")]
    UnsupportedDType {
        /// Which tensor.
        what: &'static str,
        /// Its type.
        dtype: DType,
    },
    /// More tokens than a prepared call was made for.
    #[error("{tokens} tokens, but the call was prepared for at most {prepared}: prepare it for more")]
    TooManyTokens {
        /// Tokens asked for.
        tokens: usize,
        /// Tokens that the call was prepared for.
        prepared: usize,
    },
    /// Keys of a work item out of their bounds.
    #[error("item_keys = {keys}: {reason}")]
    ItemKeys {
        /// Keys asked for.
        keys: u32,
        /// What is wrong with them.
        reason: &'static str,
    },
    /// A plan made for something else than the prepared call.
    #[error("the plan was made for another {what} than the call was prepared for: plan with the same one")]
    OtherPlan {
        /// What differs.
        what: &'static str,
    },
    /// An input that the configuration needs.
    #[error("the configuration asks for {what}, but the call has none")]
    Missing {
        /// Which input.
        what: &'static str,
    },
    /// No variant of a kernel, whatever the buffers.
    #[error("{kernel} has no variant for this configuration on this device")]
    NoVariant {
        /// Kernel family.
        kernel: &'static str,
    },
    /// The device refused a kernel: a defect of this crate, or of the driver.
    #[error("the device could not compile {kernel} (please report this): {reason}")]
    Compile {
        /// Kernel variant.
        kernel: String,
        /// What wgpu says.
        reason: String,
    },
    /// The problem itself is wrong.
    #[error(transparent)]
    Problem(#[from] ProblemError),
    /// No kernel variant for this call.
    #[error(transparent)]
    Kernel(#[from] pagewise_shaders::Error),
}

impl From<crate::plan::TooLarge> for WgpuError {
    fn from(error: crate::plan::TooLarge) -> Self {
        let crate::plan::TooLarge { what, value, .. } = error;
        Self::Kernel(pagewise_shaders::Error::TooLarge { kernel: "decode", field: what, value })
    }
}
