//! `copy_blocks` on CUDA: copies blocks of all layers, within their caches or from one set of caches to another, in one
//! launch.
//!
//! Owns the checks, the choice of variant and the launch; the kernel and its geometry are
//! [`pagewise_ptx::copy_blocks`]'s. Swapping, which is the same between device and host, is `swap_blocks.rs`.

use std::sync::Arc;

use pagewise_ptx::copy_blocks::{
    CopyBlocks, CopyBlocksArgs, CopyBlocksShape, CopyBlocksSpec, CopyBlocksTuning,
};

use super::block_rows::{BlockShapes, CacheBlocks};
use super::checks::{check_addresses, small};
use super::context::Entry;
use super::{Context, CudaError, RawStream};
use crate::AttentionConfig;

/// The type of block numbers in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockNumberType {
    /// i32
    I32,
    /// i64, as vLLM's block mappings are.
    I64,
}

impl BlockNumberType {
    const fn size(self) -> u32 {
        match self {
            Self::I32 => 4,
            Self::I64 => 8,
        }
    }
}

/// Pairs of blocks in device memory: the first is copied to the second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockPairs {
    /// Device address of the pairs, `[count, 2]`. A pair with a number outside of its cache is skipped, a negative one
    /// above all. No block may be written twice, nor be both written and read: [`check_block_pairs`](crate::check_block_pairs)
    /// says whether that holds.
    pub address: u64,
    /// Type of the numbers.
    pub number_type: BlockNumberType,
    /// Pairs; where `count_at` is given, the most that there can be.
    pub count: usize,
    /// Device address of the number of pairs, u32, or 0: a graph that was captured with the largest `count` then copies as
    /// many as stand there when it is replayed.
    pub count_at: u64,
}

/// A copy of blocks over raw device addresses. Within one cache `from` and `to` are the same.
#[derive(Clone, Copy, Debug)]
pub struct CopyBlocksCall<'a> {
    /// KV heads, head dimensions and the cache's type.
    pub config: &'a AttentionConfig,
    /// What is read.
    pub from: CacheBlocks<'a>,
    /// What is written.
    pub to: CacheBlocks<'a>,
    /// Which blocks.
    pub pairs: BlockPairs,
    /// The most thread blocks to launch, so that work on other streams keeps its multiprocessors; `None` for as many as
    /// there is work for.
    pub thread_blocks: Option<u32>,
    /// Instead of the usual tuning.
    pub tuning: Option<CopyBlocksTuning>,
}

/// The kernel variant that a call takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyBlocksVariant(CopyBlocksSpec);

impl CopyBlocksVariant {
    /// The kernel's name, as in `pagewise_ptx`: `copy_blocks_b16`.
    pub fn name(&self) -> String {
        self.0.entry()
    }

    /// What was rendered for it.
    pub fn spec(&self) -> CopyBlocksSpec {
        self.0
    }
}

impl CopyBlocksCall<'_> {
    /// Checks the call and says which kernel variant it takes.
    ///
    /// # Errors
    /// [`CudaError`] names the field, its value and what it must be.
    pub fn variant(&self) -> Result<CopyBlocksVariant, CudaError> {
        let shapes = BlockShapes::new(self.config, &self.from, &self.to)?;
        check_addresses([
            ("the layers' addresses to read", self.from.table, 8),
            ("the layers' addresses to write", self.to.table, 8),
            ("the pairs of blocks", self.pairs.address, u64::from(self.pairs.number_type.size())),
            ("the number of pairs", self.pairs.count_at, 4),
        ])?;
        let spec = CopyBlocksSpec::for_alignment(shapes.alignment(self.from.layers, self.to.layers));
        Ok(CopyBlocksVariant(CopyBlocksSpec { tuning: self.tuning.unwrap_or(spec.tuning), ..spec }))
    }

    /// The kernel's arguments.
    ///
    /// # Errors
    /// As [`CopyBlocksCall::variant`]; [`CudaError::TooLarge`] for a size that the kernel's integers do not hold.
    pub fn args(&self) -> Result<CopyBlocksArgs, CudaError> {
        let BlockShapes { key, value } = BlockShapes::new(self.config, &self.from, &self.to)?;
        // The sign of a block number of 32 bits must show.
        let blocks = |side: &CacheBlocks<'_>| {
            let (value, max) = (side.layout.num_blocks as u64, i32::MAX as u64);
            let what = "the number of blocks";
            if value > max {
                return Err(CudaError::TooLarge { what, value, max });
            }
            small(what, value)
        };
        Ok(CopyBlocksArgs {
            shape: CopyBlocksShape {
                pairs: small("the number of pairs", self.pairs.count as u64)?,
                layers: small("the number of layers", self.from.layers.layers() as u64)?,
                key,
                value,
            },
            from: self.from.table,
            to: self.to.table,
            pairs: self.pairs.address,
            pair_bytes: self.pairs.number_type.size(),
            count: self.pairs.count_at,
            from_blocks: blocks(&self.from)?,
            to_blocks: blocks(&self.to)?,
        })
    }

    /// Whether there is nothing to copy.
    pub(super) fn is_empty(&self) -> bool {
        self.pairs.count == 0 || self.from.layers.layers() == 0
    }
}

impl Context {
    /// Compiles and loads what a call takes, so that the call itself, which may be captured in a CUDA graph, loads
    /// nothing.
    ///
    /// # Errors
    /// As [`CopyBlocksCall::variant`]; [`CudaError::Jit`] when the driver's compiler fails.
    pub fn prepare_copy_blocks(&self, call: &CopyBlocksCall<'_>) -> Result<CopyBlocksVariant, CudaError> {
        let variant = call.variant()?;
        let _entered = self.enter()?;
        self.copy_blocks_kernel(variant)?;
        Ok(variant)
    }

    /// Puts a copy of blocks on a stream: all pairs, all layers, K and V in one launch, byte for byte.
    ///
    /// It only touches the blocks of the pairs, so it may run beside attention over other blocks on another stream. To
    /// overlap: record an event on the computing stream after what last wrote the blocks read and last used the blocks
    /// written, let the copying stream wait for it, copy, record an event there, and let the computing stream wait for that
    /// one before it uses the blocks written or lets others write the blocks read. The host waits for nothing.
    ///
    /// # Safety
    /// - Every address can be reached by this context's GPU (device memory, or pinned host memory by its device address,
    ///   see [`Context::pinned_address`]) and is valid, until the launch has completed, for what shape and strides reach.
    ///   The tables hold the addresses in [`LayerAddresses`](super::LayerAddresses).
    /// - The pairs on the device write no block twice and none that they read.
    /// - Nothing else writes what is read, or touches the blocks written, meanwhile.
    /// - The stream belongs to this context.
    ///
    /// # Errors
    /// As [`Context::prepare_copy_blocks`]; [`CudaError::Driver`] when the launch fails.
    pub unsafe fn copy_blocks_raw(
        &self,
        call: &CopyBlocksCall<'_>,
        stream: RawStream,
    ) -> Result<CopyBlocksVariant, CudaError> {
        let variant = call.variant()?;
        if call.is_empty() {
            return Ok(variant);
        }
        let args = call.args()?;
        let _entered = self.enter()?;
        let entry = self.copy_blocks_kernel(variant)?;
        let launch = entry.descriptor.launch(args.shape, call.thread_blocks)?;
        // SAFETY: the arguments are in the descriptor's order; the caller answers for addresses and stream.
        unsafe { entry.kernel.launch(launch, &args.values(), stream) }?;
        Ok(variant)
    }

    fn copy_blocks_kernel(&self, variant: CopyBlocksVariant) -> Result<Arc<Entry<CopyBlocks>>, CudaError> {
        self.loaded(&self.copy_blocks, variant.0, || CopyBlocks::new(variant.0), CopyBlocks::kernel)
    }
}
