//! The CUDA backend: hand-written PTX kernels on NVIDIA GPUs from sm_80 on.
//!
//! Needs the NVIDIA driver and nothing else: libcuda is found at run time, and the driver's own compiler loads
//! the kernels. A machine without one is a typed error ([`CudaError::NoDriver`]), never a panic.
//!
//! Two ways in, over the same kernels:
//! - raw: device addresses as `u64` and a raw stream, in any context that exists ([`Context::current`]); this
//!   is what engines with their own CUDA bindings use, and the API that stays stable;
//! - cudarc: checked slices and streams of the `cudarc` crate, which is re-exported.
//!
//! [`devices`] says which GPUs are there and whether they can be used; a [`Context`] loads each kernel once and
//! keeps it. Nothing is global: dropping the context unloads its kernels.

mod attention;
mod balance;
mod block_rows;
mod block_slices;
mod call;
mod checks;
mod context;
mod copy_blocks;
mod copy_engine;
mod decode;
mod device;
mod error;
mod launch;
mod merge_states;
mod own_kernel;
mod plan;
mod prefill;
mod prefill_plan;
mod rotary;
mod slices;
mod split;
mod swap_blocks;
mod tensor_map;
mod write_kv;

pub use attention::{AttentionOptions, AttentionPlan, PlannedLaunch};
pub use block_rows::{CacheBlocks, LayerAddresses};
pub use block_slices::{
    BlocksWorkspace, CopyBlocksSlices, HostCache, LayerSlices, SwapBlocksSlices, SwapDirection,
};
pub use call::{AttentionCall, CacheScales};
pub use context::Context;
pub use copy_blocks::{BlockNumberType, BlockPairs, CopyBlocksCall, CopyBlocksVariant};
pub use cudarc;
pub use decode::ptx_type;

pub use device::{
    ComputeCapability, CudaVersion, Device, MIN_COMPUTE_CAPABILITY, MIN_CUDA_VERSION, devices,
    driver_release, driver_version,
};
pub use error::CudaError;
pub use launch::{Order, RawStream};
pub use merge_states::{MergeStatesCall, MergeStatesVariant};
pub use own_kernel::OwnKernel;
pub use pagewise_ptx as ptx;
pub use plan::{DecodePlan, GridHeads, PlanBound, PlanOptions, StepLimits};
pub use rotary::{PositionType, Rotary, RotaryQueries, RotaryTables};
pub use slices::{AttentionSlices, AttentionWorkspace};
pub use split::Shrink;
pub use swap_blocks::{SwapBlocksCall, SwapMethod};
pub use write_kv::{Element, KvScales, WriteKvCall, WriteKvSlices, WriteKvVariant};
