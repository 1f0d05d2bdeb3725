//! PagedAttention for engines written in Rust: one description of a problem, checked once, and one module
//! per backend with that backend's own native types.
//!
//! One operation covers decode, prefill, chunked prefill and mixtures of them: ragged queries over a key-value
//! cache that lives in fixed-size blocks found through block tables ("Efficient Memory Management for Large
//! Language Model Serving with PagedAttention", SOSP 2023, section 4.1).
//!
//! - [`AttentionConfig`] says what a layer computes, [`CacheLayout`] where blocks lie in memory,
//!   [`PagedBatch`] what a step asks for. [`Problem::new`] checks all three; backends trust it.
//! - [`cpu`] is the multi-threaded reference backend, [`wgpu`](mod@wgpu) runs on any GPU that speaks Vulkan,
//!   Metal or DX12, [`cuda`] on NVIDIA GPUs from sm_80 on. Each is a feature of this crate.
//! - [`conformance`] holds the oracle and the case table that every backend is checked with.
//!
//! The crate knows nothing of models, schedulers or cache policies: block tables are plain integers.

mod dtype;
mod host;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
mod plan;
mod problem;

#[cfg(feature = "conformance")]
pub mod conformance;
#[cfg(feature = "cpu")]
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(feature = "wgpu")]
pub mod wgpu;

pub use dtype::{DType, ParseDTypeError};
pub use host::{HostTensor, HostTensorMut};
pub use problem::{
    AttentionConfig, BlockTables, CacheLayout, KvStrides, MAX_BLOCK_SIZE, MAX_HEAD_DIM, Mask, MaskBits,
    PagedBatch, Problem, ProblemError, RowStrides, SequenceView, WriteKv, check_block_pairs,
};
