//! Arithmetic of positions and blocks: how many blocks tokens fill, and which of them a window still sees.
//! It knows no block ids and no sequences.

use crate::{CacheConfig, KvGroup};

/// Block size and KV groups of a cache.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Geometry {
    /// log2 of the block size.
    shift: u32,
    groups: Vec<KvGroup>,
}

impl Geometry {
    /// Of a validated configuration (the block size is a power of two).
    pub(crate) fn new(config: &CacheConfig) -> Self {
        Self { shift: config.block_size.trailing_zeros(), groups: config.groups.clone() }
    }

    /// Tokens a block holds.
    pub(crate) fn block_size(&self) -> usize {
        1 << self.shift
    }

    /// Number of KV groups.
    pub(crate) fn groups(&self) -> usize {
        self.groups.len()
    }

    /// The sliding window of a group.
    pub(crate) fn window(&self, group: usize) -> Option<usize> {
        self.groups[group].window
    }

    /// Blocks that `tokens` tokens occupy, the last one possibly in part.
    pub(crate) fn blocks_for(&self, tokens: usize) -> usize {
        (tokens >> self.shift) + usize::from(self.offset(tokens) != 0)
    }

    /// Index of the block that holds `position`; also the number of blocks that `position` tokens fill.
    pub(crate) fn block_of(&self, position: usize) -> usize {
        position >> self.shift
    }

    /// Place of `position` within its block.
    pub(crate) fn offset(&self, position: usize) -> usize {
        position & (self.block_size() - 1)
    }

    /// Tokens in `blocks` full blocks.
    pub(crate) fn tokens_in(&self, blocks: usize) -> usize {
        blocks << self.shift
    }

    /// Index of the first block that the query at `position`, or any later one, can see in this group.
    ///
    /// A window of `w` keys, its own included, reaches from `position + 1 - w` to `position`.
    pub(crate) fn first_visible(&self, group: usize, position: usize) -> usize {
        self.window(group).map_or(0, |window| self.block_of((position + 1).saturating_sub(window)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(block_size: usize, window: Option<usize>) -> Geometry {
        Geometry { shift: block_size.trailing_zeros(), groups: vec![KvGroup { window }] }
    }

    #[test]
    fn first_visible_agrees_with_the_definition_of_a_window() {
        for block_size in [1, 2, 16] {
            for window in 1..40 {
                let geometry = geometry(block_size, Some(window));
                for position in 0..100 {
                    let first_key = (0..=position).find(|key| position - key < window).unwrap_or(position);
                    assert_eq!(geometry.first_visible(0, position), first_key / block_size);
                }
            }
        }
    }

    #[test]
    fn blocks_are_counted_by_rounding_up() {
        for block_size in [1, 16, 256] {
            let geometry = geometry(block_size, None);
            for tokens in 0..600 {
                assert_eq!(geometry.blocks_for(tokens), tokens.div_ceil(block_size));
                assert_eq!(geometry.block_of(tokens), tokens / block_size);
                assert_eq!(geometry.offset(tokens), tokens % block_size);
            }
        }
    }
}
