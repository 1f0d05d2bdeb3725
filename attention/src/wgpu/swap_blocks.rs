//! `swap_blocks` through wgpu: moves blocks between a cache on the GPU and a staging buffer that the host can map.
//!
//! Copies of the command encoder, no kernel: WebGPU lets none write a buffer that the host maps. Owns the checks and which
//! runs of bytes lie together on both sides.

use ::wgpu::{BufferUsages, CommandEncoder};

use super::{BufferRange, Context, WgpuError};
use crate::problem::{check_block_pairs, check_block_sizes};
use crate::{AttentionConfig, CacheLayout, KvStrides, ProblemError};

/// One side of a swap: a cache, on the GPU or in a staging buffer.
#[derive(Clone, Copy, Debug)]
pub struct SwapSide<'a> {
    /// Where blocks lie.
    pub layout: &'a CacheLayout,
    /// Keys.
    pub k: BufferRange<'a>,
    /// Values; may lie in the keys' buffer.
    pub v: BufferRange<'a>,
}

/// Moving blocks from one cache into another. A staging buffer for blocks that leave the GPU is made with
/// `MAP_READ | COPY_DST`, one for those that come back with `MAP_WRITE | COPY_SRC`; caches with `COPY_SRC` and
/// `COPY_DST` beside `STORAGE`.
#[derive(Clone, Copy, Debug)]
pub struct SwapBlocksCall<'a> {
    /// KV heads, head dimensions and the caches' type.
    pub config: &'a AttentionConfig,
    /// What is read.
    pub from: SwapSide<'a>,
    /// What is written: other buffers.
    pub to: SwapSide<'a>,
    /// Block to read, block to write. No block may be written twice.
    pub pairs: &'a [(u32, u32)],
}

/// Where K or V lies on both sides, in bytes.
#[derive(Clone, Copy, Debug)]
struct Tensor<'a> {
    name: &'static str,
    from: (BufferRange<'a>, KvStrides),
    to: (BufferRange<'a>, KvStrides),
    dim: usize,
}

/// A run of elements of a block that lies together on both sides, and how often it is repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Runs {
    len: u64,
    /// Repetitions and the steps between them, on both sides; the outer first.
    loops: [(u64, u64, u64); 2],
}

impl Runs {
    /// Of a block of `tokens` tokens and `heads` heads with rows of `dim` elements.
    fn new(tokens: u64, heads: u64, dim: u64, from: KvStrides, to: KvStrides) -> Self {
        let tokens = (tokens, from.token, to.token);
        let heads = (heads, from.head, to.head);
        // The inner loop is the one with the smaller steps.
        let (outer, inner) = if from.head <= from.token { (tokens, heads) } else { (heads, tokens) };
        let mut runs = Self { len: dim, loops: [outer, inner] };
        for index in [1, 0] {
            let (count, step, other) = runs.loops[index];
            let inner_done = index == 1 || runs.loops[1].0 == 1;
            if count == 1 || (inner_done && step == runs.len && other == runs.len) {
                runs.len *= count;
                runs.loops[index] = (1, 0, 0);
            }
        }
        runs
    }
}

impl Context {
    /// Puts the copies into an encoder, outside of any pass. One copy for each run of bytes that lies together on both
    /// sides: with NHD or HND caches without gaps, one a block for K and one for V.
    ///
    /// # Errors
    /// [`WgpuError`] names the pair, field or buffer, what is there and what is needed: usages of the buffers, the same
    /// block size on both sides, runs of whole words.
    pub fn swap_blocks(
        &self,
        encoder: &mut CommandEncoder,
        call: &SwapBlocksCall<'_>,
    ) -> Result<(), WgpuError> {
        let SwapBlocksCall { config, from, to, pairs } = *call;
        config.validate()?;
        from.layout.validate(config)?;
        to.layout.validate(config)?;
        check_block_sizes(from.layout, to.layout)?;
        check_block_pairs(pairs, from.layout.num_blocks, Some(to.layout.num_blocks))?;
        let tensors = [
            Tensor {
                name: "the K cache",
                from: (from.k, from.layout.k),
                to: (to.k, to.layout.k),
                dim: config.head_dim_qk,
            },
            Tensor {
                name: "the V cache",
                from: (from.v, from.layout.v),
                to: (to.v, to.layout.v),
                dim: config.head_dim_v,
            },
        ];
        let extents = |layout: &CacheLayout| [layout.k_extent(config), layout.v_extent(config)];
        let element = config.kv_dtype.size() as u64;
        let mut runs = Vec::with_capacity(2);
        for ((tensor, source), target) in tensors.iter().zip(extents(from.layout)).zip(extents(to.layout)) {
            check_range(tensor.name, tensor.from.0, source, element, BufferUsages::COPY_SRC)?;
            check_range(tensor.name, tensor.to.0, target, element, BufferUsages::COPY_DST)?;
            for written in [to.k, to.v] {
                if written.buffer == tensor.from.0.buffer {
                    return Err(WgpuError::SharedBuffer { read: tensor.name, written: "the other cache" });
                }
            }
            let (tokens, heads) = (from.layout.block_size as u64, config.kv_heads as u64);
            let run = Runs::new(tokens, heads, tensor.dim as u64, tensor.from.1, tensor.to.1);
            let steps = run.loops.iter().flat_map(|&(_, from, to)| [from, to]);
            let blocks = [tensor.from.1.block, tensor.to.1.block];
            for elements in steps.chain(blocks).chain([run.len]) {
                if !(elements * element).is_multiple_of(4) {
                    let (kernel, field, value, unit) = ("swap_blocks", "a run", elements, 4 / element as u32);
                    let reason = pagewise_shaders::Error::NotDivisible { kernel, field, value, unit };
                    let advice = "WebGPU copies whole words of 4 bytes";
                    return Err(WgpuError::Alignment { reason, advice });
                }
            }
            runs.push(run);
        }
        for &(source, target) in pairs {
            for (tensor, run) in tensors.iter().zip(&runs) {
                let ((from, from_strides), (to, to_strides)) = (tensor.from, tensor.to);
                let [(outer, from_outer, to_outer), (inner, from_inner, to_inner)] = run.loops;
                for (i, j) in (0..outer).flat_map(|i| (0..inner).map(move |j| (i, j))) {
                    let at = |block: u32, stride, outer, inner| {
                        (u64::from(block) * stride + i * outer + j * inner) * element
                    };
                    encoder.copy_buffer_to_buffer(
                        from.buffer,
                        from.offset + at(source, from_strides.block, from_outer, from_inner),
                        to.buffer,
                        to.offset + at(target, to_strides.block, to_outer, to_inner),
                        run.len * element,
                    );
                }
            }
        }
        Ok(())
    }
}

/// Checks that a range holds so many elements and that its buffer can be copied.
fn check_range(
    tensor: &'static str,
    range: BufferRange<'_>,
    extent: u64,
    element: u64,
    usage: BufferUsages,
) -> Result<(), WgpuError> {
    let BufferRange { buffer, offset, size } = range;
    if !buffer.usage().contains(usage) {
        let usage = if usage == BufferUsages::COPY_SRC { "COPY_SRC" } else { "COPY_DST" };
        return Err(WgpuError::Usage { tensor, usage });
    }
    if offset.checked_add(size).is_none_or(|end| end > buffer.size()) {
        let there = buffer.size();
        let reason = format!("bytes {offset}.. with size {size} pass the end of its buffer of {there} bytes");
        return Err(WgpuError::Range { tensor, reason });
    }
    if !offset.is_multiple_of(4) {
        let reason = format!("offset {offset} is not a multiple of 4, as WebGPU's copies want it");
        return Err(WgpuError::Range { tensor, reason });
    }
    let len = size / element;
    if len < extent {
        return Err(ProblemError::BufferTooShort { tensor, len, needed: extent }.into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strides(token: u64, head: u64) -> KvStrides {
        KvStrides { block: 1 << 20, token, head }
    }

    #[test]
    fn what_lies_together_on_both_sides_is_one_run() {
        let (nhd, hnd) = (strides(2 * 64, 64), strides(64, 16 * 64));
        let whole = Runs { len: 16 * 2 * 64, loops: [(1, 0, 0); 2] };
        assert_eq!(Runs::new(16, 2, 64, nhd, nhd), whole);
        assert_eq!(Runs::new(16, 2, 64, hnd, hnd), whole);
        // One in the other's order: row by row.
        let rows = Runs { len: 64, loops: [(16, 128, 64), (2, 64, 1024)] };
        assert_eq!(Runs::new(16, 2, 64, nhd, hnd), rows);
        // Gaps behind every token.
        let gaps = Runs { len: 128, loops: [(16, 130, 128), (1, 0, 0)] };
        assert_eq!(Runs::new(16, 2, 64, strides(130, 64), nhd), gaps);
        // A single head or token.
        let one = Runs { len: 16 * 64, loops: [(1, 0, 0); 2] };
        assert_eq!(Runs::new(16, 1, 64, strides(64, 999), strides(64, 5)), one);
    }
}
