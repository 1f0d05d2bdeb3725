//! `swap_blocks` on CUDA: moves blocks of all layers between device memory and pinned host memory.
//!
//! Two ways: the kernel of `copy_blocks`, which reads or writes the host's memory over the link itself, or the GPU's copy
//! engines, which take no multiprocessor. Owns the choice, and what runs of bytes the engines are given.

use super::block_rows::BlockShapes;
use super::copy_engine::{CopyRun, copy_runs};
use super::{BlockNumberType, BlockPairs, CacheBlocks, Context, CopyBlocksCall, CudaError, RawStream};
use crate::{AttentionConfig, check_block_pairs};

/// What moves the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SwapMethod {
    /// The GPU's copy engines: no multiprocessor is taken from work on other streams. Costs the host some work for each
    /// run of bytes that lies together on both sides; with blocks of 16 tokens those are short, and the engines reach
    /// less than half of the link.
    CopyEngines,
    /// One launch of a kernel, the default. Costs the host next to nothing, however scattered the blocks are.
    Kernel {
        /// The most thread blocks that it may take; `None` for what fills the link.
        thread_blocks: Option<u32>,
    },
}

/// Thread blocks that fill the link in either direction; more only take multiprocessors and memory from other work
/// (`docs/kernel-notes.md`).
const LINK_THREAD_BLOCKS: u32 = 32;

impl Default for SwapMethod {
    fn default() -> Self {
        Self::Kernel { thread_blocks: None }
    }
}

/// Moving blocks between two sets of caches, of which one is in pinned host memory.
#[derive(Clone, Copy, Debug)]
pub struct SwapBlocksCall<'a> {
    /// KV heads, head dimensions and the cache's type.
    pub config: &'a AttentionConfig,
    /// What is read. Host memory by its device address, see [`Context::pinned_address`].
    pub from: CacheBlocks<'a>,
    /// What is written.
    pub to: CacheBlocks<'a>,
    /// Block to read, block to write.
    pub pairs: &'a [(u32, u32)],
    /// Device address of the same pairs, i32 `[pairs, 2]`; only the kernel needs it.
    pub device_pairs: u64,
    /// What moves the bytes.
    pub method: SwapMethod,
}

impl SwapBlocksCall<'_> {
    /// The kernel's call.
    fn kernel_call(&self, thread_blocks: Option<u32>) -> CopyBlocksCall<'_> {
        CopyBlocksCall {
            config: self.config,
            from: self.from,
            to: self.to,
            pairs: BlockPairs {
                address: self.device_pairs,
                number_type: BlockNumberType::I32,
                count: self.pairs.len(),
                count_at: 0,
            },
            thread_blocks: Some(thread_blocks.unwrap_or(LINK_THREAD_BLOCKS)),
            tuning: None,
        }
    }

    /// What the copy engines are asked to move: runs of bytes that lie together on both sides, each as long as can be.
    fn runs(&self, shapes: &BlockShapes) -> Vec<CopyRun> {
        let mut runs = Vec::new();
        for (is_value, rows) in [(false, shapes.key), (true, shapes.value)] {
            for (from, to) in self.from.layers.of(is_value).zip(self.to.layers.of(is_value)) {
                for &(source, target) in self.pairs {
                    let from = from.wrapping_add(u64::from(source).wrapping_mul(rows.from.block));
                    let to = to.wrapping_add(u64::from(target).wrapping_mul(rows.to.block));
                    for (outer, inner) in (0..u64::from(rows.outer))
                        .flat_map(|outer| (0..u64::from(rows.inner)).map(move |inner| (outer, inner)))
                    {
                        runs.push(CopyRun {
                            from: from + outer * rows.from.outer + inner * rows.from.inner,
                            to: to + outer * rows.to.outer + inner * rows.to.inner,
                            bytes: u64::from(rows.row_bytes),
                        });
                    }
                }
            }
        }
        runs.sort_unstable_by_key(|run| run.from);
        runs.dedup_by(|next, run| {
            let follows = next.from == run.from + run.bytes && next.to == run.to + run.bytes;
            if follows {
                run.bytes += next.bytes;
            }
            // K and V that are the same memory.
            follows || next == run
        });
        runs
    }
}

impl Context {
    /// The device address of pinned host memory (`cuMemHostAlloc`, `cuMemHostRegister` and what is built upon them).
    ///
    /// # Errors
    /// [`CudaError::NotPinned`] for other memory.
    pub fn pinned_address(&self, host: *const u8) -> Result<u64, CudaError> {
        let _entered = self.enter()?;
        super::copy_engine::device_address(host)
    }

    /// Compiles and loads what a call takes.
    ///
    /// # Errors
    /// As [`Context::swap_blocks_raw`].
    pub fn prepare_swap_blocks(&self, call: &SwapBlocksCall<'_>) -> Result<(), CudaError> {
        if let SwapMethod::Kernel { thread_blocks } = call.method {
            self.prepare_copy_blocks(&call.kernel_call(thread_blocks))?;
        }
        Ok(())
    }

    /// Puts a swap on a stream: all pairs, all layers, K and V, byte for byte. The host waits for nothing; how to overlap
    /// it with computing is said at [`Context::copy_blocks_raw`].
    ///
    /// # Safety
    /// - Every address can be reached by this context's GPU and is valid for what shape and strides reach, until the work
    ///   has completed. With [`SwapMethod::Kernel`] the tables hold the addresses in
    ///   [`LayerAddresses`](super::LayerAddresses), and `device_pairs` the same pairs.
    /// - Caches that are read and written do not overlap.
    /// - Nothing else writes what is read, or touches the blocks written, meanwhile; the host too must wait for an event
    ///   before it reads or reuses them.
    /// - The stream belongs to this context.
    ///
    /// # Errors
    /// [`ProblemError::Input`](crate::ProblemError::Input) for a pair that names no block, for a block that is written twice,
    /// for different block sizes or numbers of layers, before anything is moved; else as [`Context::copy_blocks_raw`].
    pub unsafe fn swap_blocks_raw(
        &self,
        call: &SwapBlocksCall<'_>,
        stream: RawStream,
    ) -> Result<(), CudaError> {
        let shapes = BlockShapes::new(call.config, &call.from, &call.to)?;
        check_block_pairs(call.pairs, call.from.layout.num_blocks, Some(call.to.layout.num_blocks))?;
        match call.method {
            SwapMethod::Kernel { thread_blocks } => {
                // SAFETY: promised by the caller; the pairs were checked.
                unsafe { self.copy_blocks_raw(&call.kernel_call(thread_blocks), stream) }?;
            }
            SwapMethod::CopyEngines => {
                let _entered = self.enter()?;
                // SAFETY: runs lie within the blocks of the pairs, for which the caller answers.
                unsafe { copy_runs(&call.runs(&shapes), stream) }?;
            }
        }
        Ok(())
    }
}
