//! Where the layers' caches lie, and what runs of bytes their blocks are made of.

use pagewise_ptx::copy_blocks::{BlockRows, BlockStrides};

use super::CudaError;
use super::checks::small;
use crate::problem::check_block_sizes;
use crate::{AttentionConfig, CacheLayout, KvStrides};

/// Where K and V of every layer begin: device addresses of their block 0, token 0, head 0. Layers may be allocations of
/// their own or lie in one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LayerAddresses {
    addresses: Vec<u64>,
}

impl LayerAddresses {
    /// From K's and V's address of each layer.
    pub fn new(layers: impl IntoIterator<Item = (u64, u64)>) -> Self {
        Self { addresses: layers.into_iter().flat_map(|(k, v)| [k, v]).collect() }
    }

    /// Number of layers.
    pub fn layers(&self) -> usize {
        self.addresses.len() / 2
    }

    /// What the kernel reads, to be copied into device memory once: `[layers, 2]`.
    pub fn words(&self) -> &[u64] {
        &self.addresses
    }

    /// Addresses of K, or of V, of each layer.
    pub(super) fn of(&self, is_value: bool) -> impl Iterator<Item = u64> {
        self.addresses.iter().copied().skip(usize::from(is_value)).step_by(2)
    }
}

/// The caches of all layers, on one side of a copy.
#[derive(Clone, Copy, Debug)]
pub struct CacheBlocks<'a> {
    /// Where blocks lie in each layer's cache.
    pub layout: &'a CacheLayout,
    /// Where the layers' caches begin.
    pub layers: &'a LayerAddresses,
    /// Device address of a copy of [`LayerAddresses::words`]; only what the kernel does needs it.
    pub table: u64,
}

/// Blocks of K and of V, as rows of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BlockShapes {
    pub(super) key: BlockRows,
    pub(super) value: BlockRows,
}

impl BlockShapes {
    /// Checks both sides and finds the longest runs of bytes that lie together in both.
    pub(super) fn new(
        config: &AttentionConfig,
        from: &CacheBlocks<'_>,
        to: &CacheBlocks<'_>,
    ) -> Result<Self, CudaError> {
        config.validate()?;
        from.layout.validate(config)?;
        to.layout.validate(config)?;
        check_block_sizes(from.layout, to.layout)?;
        let (ours, theirs) = (from.layers.layers(), to.layers.layers());
        if ours != theirs {
            let problem = format!("{ours} layers are read and {theirs} written; there must be as many");
            return Err(crate::ProblemError::Input { input: "layers", problem }.into());
        }
        let rows =
            |strides: [KvStrides; 2], dim: usize| block_rows(config, [from.layout, to.layout], strides, dim);
        Ok(Self {
            key: rows([from.layout.k, to.layout.k], config.head_dim_qk)?,
            value: rows([from.layout.v, to.layout.v], config.head_dim_v)?,
        })
    }

    /// A number that is a multiple of 16, 4 or 2 if all addresses, strides and rows are.
    pub(super) fn alignment(&self, from: &LayerAddresses, to: &LayerAddresses) -> u64 {
        let addresses = from.addresses.iter().chain(&to.addresses).fold(0, |all, address| all | address);
        [self.key, self.value].into_iter().fold(addresses, |all, rows| {
            let strides = |strides: BlockStrides| strides.block | strides.outer | strides.inner;
            all | u64::from(rows.row_bytes) | strides(rows.from) | strides(rows.to)
        })
    }
}

fn block_rows(
    config: &AttentionConfig,
    layouts: [&CacheLayout; 2],
    strides: [KvStrides; 2],
    dim: usize,
) -> Result<BlockRows, CudaError> {
    let size = config.kv_dtype.size() as u64;
    let bytes = |stride: u64| stride.wrapping_mul(size);
    let mut row = bytes(dim as u64);
    // Tokens and heads: how many, and bytes from one to the next on each side.
    let mut dims = vec![
        (layouts[0].block_size as u64, strides.map(|strides| bytes(strides.token))),
        (config.kv_heads as u64, strides.map(|strides| bytes(strides.head))),
    ];
    while let Some(at) = dims.iter().position(|&(count, steps)| count == 1 || steps == [row, row]) {
        row = row.saturating_mul(dims.remove(at).0);
    }
    // Writes go through memory in order.
    dims.sort_by_key(|&(_, [_, to])| std::cmp::Reverse(to));
    let inner = dims.pop().unwrap_or((1, [0, 0]));
    let outer = dims.pop().unwrap_or((1, [0, 0]));
    let side = |side: usize| {
        let block = if layouts[side].num_blocks > 1 { bytes(strides[side].block) } else { 0 };
        BlockStrides { block, outer: outer.1[side], inner: inner.1[side] }
    };
    Ok(BlockRows {
        outer: small("the tokens or heads of a block", outer.0)?,
        inner: small("the tokens or heads of a block", inner.0)?,
        row_bytes: small("the bytes of a row of a block", row)?,
        from: side(0),
        to: side(1),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;

    fn shapes(config: &AttentionConfig, from: &CacheLayout, to: &CacheLayout) -> BlockShapes {
        let layers = LayerAddresses::default();
        let side = |layout| CacheBlocks { layout, layers: &layers, table: 0 };
        BlockShapes::new(config, &side(from), &side(to)).unwrap()
    }

    #[test]
    fn what_lies_together_on_both_sides_is_one_row() {
        let config = AttentionConfig::new(32, 8, 128, DType::Bf16);
        let nhd = CacheLayout::nhd(10, 16, &config);
        let hnd = CacheLayout::hnd(10, 16, &config);
        for whole in [nhd, hnd, nhd.interleaved(), hnd.interleaved()] {
            let BlockRows { outer, inner, row_bytes, .. } = shapes(&config, &whole, &whole).key;
            assert_eq!((outer, inner, row_bytes), (1, 1, 16 * 8 * 128 * 2));
        }
        let key = shapes(&config, &nhd, &hnd).key;
        assert_eq!((key.outer, key.inner, key.row_bytes), (8, 16, 256));
        assert_eq!((key.from.outer, key.from.inner), (256, 2048));
        assert_eq!((key.to.outer, key.to.inner), (4096, 256));
        // Gaps between tokens: a row is a token's heads.
        let gaps = CacheLayout { k: KvStrides { block: 20_000, token: 1032, ..nhd.k }, ..nhd };
        let key = shapes(&config, &gaps, &nhd).key;
        assert_eq!((key.outer, key.inner, key.row_bytes, key.from.inner), (1, 16, 2048, 2064));
    }
}
