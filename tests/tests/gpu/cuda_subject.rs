//! The conformance suite's CUDA subject, and what the tests on a GPU need beside it.
#![allow(dead_code, reason = "not every test needs all of it")]

use pagewise_attention::HostTensor;
use pagewise_attention::conformance::{Cuda, Pinned};
use pagewise_attention::cuda::{AttentionOptions, Context, PlanOptions};

/// The subject on the default stream.
pub fn subject(context: &Context) -> Cuda<'_> {
    Cuda::new(context).expect("the tests' context is cudarc's")
}

/// Pinned memory with these contents.
pub fn pinned(context: &Context, bytes: &[u8]) -> Pinned {
    Pinned::new(context, &subject(context).stream, bytes).expect("pinned memory")
}

/// Every query row by itself, through the decode kernel.
pub fn by_rows(decode: PlanOptions) -> AttentionOptions {
    AttentionOptions { decode, tiles_from: Some(usize::MAX), ..AttentionOptions::default() }
}

/// The elements of a tensor as bytes.
pub fn bytes(tensor: HostTensor<'_>) -> Vec<u8> {
    tensor.to_bytes()
}

/// Pairs of blocks as i32 `[pairs, 2]`.
pub fn pair_bytes(pairs: &[(u32, u32)]) -> Vec<u8> {
    pairs.iter().flat_map(|&(from, to)| [from, to]).flat_map(u32::to_le_bytes).collect()
}
