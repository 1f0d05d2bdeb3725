//! Pairs of blocks that are copied: from which to which, and what no call may ask for.

use super::{CacheLayout, ProblemError};

/// Checks pairs of blocks that are copied, the first to the second: within one cache of `source_blocks` blocks, or
/// into another of `target_blocks`. Pairs that pass may be copied in any order, or all at once.
///
/// # Errors
/// [`ProblemError::Input`] if a pair names no block, if a block is written twice, or, within one cache, if one is both read
/// and written.
pub fn check_block_pairs(
    pairs: &[(u32, u32)],
    source_blocks: usize,
    target_blocks: Option<usize>,
) -> Result<(), ProblemError> {
    let wrong = |problem: String| Err(ProblemError::Input { input: "pairs", problem });
    let writable = target_blocks.unwrap_or(source_blocks);
    for (i, &(source, target)) in pairs.iter().enumerate() {
        if source as usize >= source_blocks || target as usize >= writable {
            return wrong(format!(
                "pair {i} is ({source}, {target}), but there are {source_blocks} blocks to read and {writable} to \
                 write"
            ));
        }
    }
    let mut written: Vec<u32> = pairs.iter().map(|&(_, target)| target).collect();
    written.sort_unstable();
    if let Some([twice, _]) = written.windows(2).find(|pair| pair[0] == pair[1]) {
        return wrong(format!("block {twice} is written twice; a block can take one copy a step"));
    }
    let both = pairs.iter().find(|pair| target_blocks.is_none() && written.binary_search(&pair.0).is_ok());
    match both {
        Some((both, _)) => {
            wrong(format!("block {both} is read and written; the copies of a step must be independent"))
        }
        None => Ok(()),
    }
}

/// Blocks can only be moved between caches whose blocks hold as many tokens.
#[cfg(any(feature = "cpu", feature = "cuda", feature = "wgpu"))]
pub(crate) fn check_block_sizes(source: &CacheLayout, target: &CacheLayout) -> Result<(), ProblemError> {
    let (from, to) = (source.block_size, target.block_size);
    if from == to {
        return Ok(());
    }
    let problem = format!(
        "its blocks hold {to} tokens, those of the source {from}; blocks can only be moved between caches of one \
         block size"
    );
    Err(ProblemError::Input { input: "target_layout", problem })
}
