//! Pairs of blocks of a copy or a swap, and what makes them independent of their order.

use super::ProblemError;

/// Checks that every pair names blocks that are there, that none is written twice, and, within one cache, that none is
/// both read and written.
pub(crate) fn check_pairs(
    pairs: &[(u32, u32)],
    source_blocks: usize,
    target_blocks: usize,
    one_cache: bool,
) -> Result<(), ProblemError> {
    let wrong = |problem: String| Err(ProblemError::Input { input: "pairs", problem });
    for (i, &(source, target)) in pairs.iter().enumerate() {
        if source as usize >= source_blocks || target as usize >= target_blocks {
            return wrong(format!(
                "pair {i} is ({source}, {target}), but there are {source_blocks} blocks to read and \
                 {target_blocks} to write"
            ));
        }
    }
    let mut written: Vec<u32> = pairs.iter().map(|&(_, target)| target).collect();
    written.sort_unstable();
    if let Some(twice) = written.windows(2).find(|pair| pair[0] == pair[1]) {
        return wrong(format!("block {} is written twice; a block can take one copy a step", twice[0]));
    }
    if one_cache && let Some((both, _)) = pairs.iter().find(|pair| written.binary_search(&pair.0).is_ok()) {
        return wrong(format!("block {both} is read and written; the copies of a step must be independent"));
    }
    Ok(())
}
