//! `copy_blocks` and `swap_blocks`: whole blocks from one place of a cache to another, or between two caches.

use super::io::{self, KvPair};
use crate::problem::check_pairs;
use crate::{AttentionConfig, CacheLayout, HostTensor, HostTensorMut, KvStrides, ProblemError};

/// Copies blocks within a cache (copy-on-write): for each pair, block `pair.0` to block `pair.1`.
/// The order of the pairs does not matter: a block is written once, and none is both read and written.
///
/// # Errors
/// [`ProblemError`] if a pair names no block, a block is written twice or read and written, or a buffer is too
/// short or of the wrong dtype; nothing has been written then.
pub fn copy_blocks(
    config: &AttentionConfig,
    layout: &CacheLayout,
    pairs: &[(u32, u32)],
    k: &mut HostTensorMut<'_>,
    v: &mut HostTensorMut<'_>,
) -> Result<(), ProblemError> {
    config.validate()?;
    layout.validate(config)?;
    let needed = io::extents(layout, config);
    io::check_cache("K", k, config, needed.k)?;
    io::check_cache("V", v, config, needed.v)?;
    check_pairs(pairs, layout.num_blocks, layout.num_blocks, true)?;
    for (strides, dim, cache) in
        [(layout.k, config.head_dim_qk, k.reborrow()), (layout.v, config.head_dim_v, v.reborrow())]
    {
        let shape = BlockShape { tokens: layout.block_size, heads: config.kv_heads, dim };
        match cache {
            HostTensorMut::F32(cache) => shape.copy_within(strides, pairs, cache),
            HostTensorMut::F16(cache) => shape.copy_within(strides, pairs, cache),
            HostTensorMut::Bf16(cache) => shape.copy_within(strides, pairs, cache),
            HostTensorMut::F8E4M3(cache) | HostTensorMut::F8E5M2(cache) => {
                shape.copy_within(strides, pairs, cache);
            }
        }
    }
    Ok(())
}

/// Copies blocks from one cache to another (swapping out to a larger, slower memory and back): for each pair,
/// block `pair.0` of `source` to block `pair.1` of `target`. The two may differ in strides and number of
/// blocks, not in block size.
///
/// # Errors
/// [`ProblemError`] if the block sizes differ, a pair names no block, a block is written twice, or a buffer is
/// too short or of the wrong dtype; nothing has been written then.
pub fn swap_blocks(
    config: &AttentionConfig,
    source_layout: &CacheLayout,
    target_layout: &CacheLayout,
    pairs: &[(u32, u32)],
    source: KvPair<HostTensor<'_>>,
    target: KvPair<HostTensorMut<'_>>,
) -> Result<(), ProblemError> {
    config.validate()?;
    source_layout.validate(config)?;
    target_layout.validate(config)?;
    if source_layout.block_size != target_layout.block_size {
        return Err(ProblemError::Input {
            input: "target_layout",
            problem: format!(
                "its blocks hold {} tokens, those of the source {}; blocks can only be moved between caches of \
                 one block size",
                target_layout.block_size, source_layout.block_size
            ),
        });
    }
    let (from, to) = (io::extents(source_layout, config), io::extents(target_layout, config));
    io::check_tensor("source K", source.k.dtype(), config.kv_dtype, source.k.len(), from.k)?;
    io::check_tensor("source V", source.v.dtype(), config.kv_dtype, source.v.len(), from.v)?;
    io::check_cache("target K", &target.k, config, to.k)?;
    io::check_cache("target V", &target.v, config, to.v)?;
    check_pairs(pairs, source_layout.num_blocks, target_layout.num_blocks, false)?;
    for (from, to, dim, source, target) in [
        (source_layout.k, target_layout.k, config.head_dim_qk, source.k, target.k),
        (source_layout.v, target_layout.v, config.head_dim_v, source.v, target.v),
    ] {
        let shape = BlockShape { tokens: source_layout.block_size, heads: config.kv_heads, dim };
        match (source, target) {
            (HostTensor::F32(source), HostTensorMut::F32(target)) => {
                shape.copy_between((from, source), (to, target), pairs);
            }
            (HostTensor::F16(source), HostTensorMut::F16(target)) => {
                shape.copy_between((from, source), (to, target), pairs);
            }
            (HostTensor::Bf16(source), HostTensorMut::Bf16(target)) => {
                shape.copy_between((from, source), (to, target), pairs);
            }
            (HostTensor::F8E4M3(source), HostTensorMut::F8E4M3(target))
            | (HostTensor::F8E5M2(source), HostTensorMut::F8E5M2(target)) => {
                shape.copy_between((from, source), (to, target), pairs);
            }
            // Both have the cache's type, as checked above.
            _ => {}
        }
    }
    Ok(())
}

/// What a block holds.
#[derive(Clone, Copy)]
struct BlockShape {
    tokens: usize,
    heads: usize,
    dim: usize,
}

impl BlockShape {
    /// Calls `f` with the offsets in a block and the lengths of its runs of neighbouring elements, for two
    /// layouts.
    fn for_each_run(self, from: KvStrides, to: KvStrides, mut f: impl FnMut(usize, usize, usize)) {
        let packed = |strides: KvStrides| {
            let (tokens, heads, dim) = (self.tokens as u64, self.heads as u64, self.dim as u64);
            (strides.head == dim && strides.token == heads * dim)
                || (strides.token == dim && strides.head == tokens * dim)
        };
        if (from.token, from.head) == (to.token, to.head) && packed(from) {
            return f(0, 0, self.tokens * self.heads * self.dim);
        }
        for token in 0..self.tokens as u64 {
            for head in 0..self.heads as u64 {
                let at = |strides: KvStrides| (token * strides.token + head * strides.head) as usize;
                f(at(from), at(to), self.dim);
            }
        }
    }

    fn copy_within<T: Copy>(self, strides: KvStrides, pairs: &[(u32, u32)], cache: &mut [T]) {
        for &(source, target) in pairs {
            let at = |block: u32| (u64::from(block) * strides.block) as usize;
            let (source, target) = (at(source), at(target));
            // The checks before have shown that both runs lie in the cache.
            self.for_each_run(strides, strides, |from, to, len| {
                cache.copy_within(source + from..source + from + len, target + to);
            });
        }
    }

    fn copy_between<T: Copy>(
        self,
        (from_strides, source): (KvStrides, &[T]),
        (to_strides, target): (KvStrides, &mut [T]),
        pairs: &[(u32, u32)],
    ) {
        for &(from_block, to_block) in pairs {
            let from_block = (u64::from(from_block) * from_strides.block) as usize;
            let to_block = (u64::from(to_block) * to_strides.block) as usize;
            self.for_each_run(from_strides, to_strides, |from, to, len| {
                let from = source.get(from_block + from..from_block + from + len);
                let to = target.get_mut(to_block + to..to_block + to + len);
                if let (Some(from), Some(to)) = (from, to) {
                    to.copy_from_slice(from);
                }
            });
        }
    }
}
