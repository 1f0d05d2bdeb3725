//! The wgpu backend: WGSL kernels on any GPU that speaks Vulkan, Metal or DX12, and in browsers.
//!
//! It works with what the caller has: the caller's `Device` and `Queue` ([`Context::new`]), the caller's
//! `CommandEncoder` or `ComputePass`, the caller's buffers as `(buffer, offset, size)` ([`BufferRange`]). Nothing
//! is global. wgpu itself is re-exported, so that both sides mean the same version.
//!
//! [`adapters`] says which GPUs are there, whether they can be used, and with which features and limits a device
//! should be made; [`open`] makes one for callers that have none.

mod adapter;
mod attention;
mod buffer;
mod call;
mod context;
mod copy_blocks;
mod dtype;
mod error;
mod merge_states;
mod pipeline_cache;
mod plan;
mod prefill_plan;
mod swap_blocks;
mod variant;
mod write_kv;

pub use ::wgpu;
pub use adapter::{
    AdapterReport, REQUIRED_LIMITS, adapters, check_limits, device_descriptor, matrix_shape, open,
    wanted_features,
};
pub use attention::PreparedAttention;
pub use buffer::BufferRange;
pub use call::{AttentionCall, HeadTerms, KvScale};
pub use context::{Context, UniformOffset};
pub use copy_blocks::CopyBlocksCall;
pub use error::WgpuError;
pub use merge_states::{MergeStatesCall, PreparedMergeStates};
pub use pagewise_shaders as shaders;
pub use plan::{AttentionPlan, PlanBound, PlanOptions, PrefillChoice, StepLimits};
pub use swap_blocks::{SwapBlocksCall, SwapSide};
pub use write_kv::{PreparedWriteKv, WriteKvCall, WriteKvVariant};
