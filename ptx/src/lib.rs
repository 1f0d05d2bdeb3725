//! Hand-written CUDA PTX kernels for PagedAttention, as text, with a typed description of each.
//!
//! This crate owns the kernels' text (`kernels/*.ptx`, templates that are rendered once per
//! variant) and what a host must know to launch them: parameters, target, launch geometry, shared
//! memory. It makes no CUDA calls and needs neither a GPU nor NVIDIA's tools, so that any host code
//! which can load PTX can use it.
//!
//! ```
//! use pagewise_ptx::{DType, write_kv::{WriteKv, WriteKvShape, WriteKvSpec}};
//!
//! let write_kv = WriteKv::new(WriteKvSpec::vectorised(DType::Bf16, DType::Bf16))?;
//! assert_eq!(write_kv.kernel().entry(), "write_kv_bf16_bf16_v8");
//! assert!(write_kv.kernel().text().contains(".target sm_80"));
//!
//! // 512 tokens with 8 KV heads of 128 elements: eight tokens to a thread block.
//! let shape = WriteKvShape { tokens: 512, kv_heads: 8, head_dim_k: 128, head_dim_v: 128, q_heads: 0 };
//! let launch = write_kv.launch(shape)?;
//! assert_eq!((launch.grid, launch.block), ([64, 1, 1], [8, 8, 4]));
//! # Ok::<(), pagewise_ptx::Error>(())
//! ```
//!
//! | module | kernel |
//! |---|---|
//! | [`mod@copy_blocks`] | copies blocks of all layers within a cache or between two, of which one may be host memory |
//! | [`mod@counter`] | fills memory with numbers that a host can recompute: for tests |
//! | [`mod@decode`] | one query row a sequence over a paged cache, keys split over thread blocks |
//! | [`mod@merge_states`] | puts attention over parts of the keys together, by their log-sum-exp |
//! | [`mod@model`] | the dense layers of a decoding engine, and the choice of tokens |
//! | [`mod@page_read`] | reads pages through a table: the yardstick of benches |
//! | [`mod@prefill`] | tiles of query rows over a paged cache: prefill, chunked prefill |
//! | [`mod@write_kv`] | stores new K and V rows into cache blocks, given by a slot mapping; turns K and queries on the way |

pub mod copy_blocks;
pub mod counter;
pub mod decode;
mod dtype;
mod error;
mod kernel;
pub mod merge_states;
pub mod model;
pub mod page_read;
pub mod prefill;
pub mod receipt;
mod template;
pub mod write_kv;

pub use dtype::DType;
pub use error::Error;
pub use kernel::{Arg, Kernel, Launch, Param, ParamType, Target};

/// Every variant of every kernel, rendered: what the tests assemble and the receipts cover.
///
/// # Errors
/// [`Error::Template`] when a template does not render, which is a defect of this crate.
pub fn all_kernels() -> Result<Vec<Kernel>, Error> {
    let write_kv = write_kv::WriteKvSpec::all().map(|spec| Ok(write_kv::WriteKv::new(spec)?.into_kernel()));
    let merge_states = merge_states::MergeStatesSpec::all()
        .map(|spec| Ok(merge_states::MergeStates::new(spec)?.into_kernel()));
    let copy_blocks =
        copy_blocks::CopyBlocksSpec::all().map(|spec| Ok(copy_blocks::CopyBlocks::new(spec)?.into_kernel()));
    let counter =
        counter::Counter::TYPES.into_iter().map(|dtype| Ok(counter::Counter::new(dtype)?.into_kernel()));
    let decode = decode::DecodeSpec::all().map(|spec| Ok(decode::Decode::new(spec)?.into_kernel()));
    let page_read =
        [false, true].into_iter().map(|merges| Ok(page_read::PageRead::new(merges)?.into_kernel()));
    let prefill = prefill::PrefillSpec::all().map(|spec| Ok(prefill::Prefill::new(spec)?.into_kernel()));
    let prefill_merge =
        prefill::PrefillMerge::all().map(|spec| Ok(prefill::PrefillMerge::new(spec)?.into_kernel()));
    let attention = decode.chain(prefill).chain(prefill_merge);
    let caches = write_kv.chain(merge_states).chain(copy_blocks);
    caches.chain(counter).chain(attention).chain(page_read).chain(model::all_kernels()).collect()
}
