//! The sharing inside a group, made again after its blocks were given up.
//!
//! The group's sequences form a tree by their tokens: each but the first parts from an earlier one somewhere. The
//! first is computed up to the place where the next one parts from it; there that one is forked, and both go on.
//! What several sequences share is computed once and lies in the cache once.

use super::group::{Group, Origin, Sequence};
use pagewise_kvcache::{CacheError, CacheManager, Prompt};

/// Frees all blocks of a group that will be recomputed, and notes how its sequences share.
pub(super) fn give_up(group: &mut Group, cache: &mut dyn CacheManager) -> Result<(), CacheError> {
    let released = group.release(cache);
    plan(group);
    released
}

/// Finds for each sequence but the first the earlier one with which it shares most tokens.
///
/// The last token of either is never shared: each computes its own, and so gets its own logits.
pub(super) fn plan(group: &mut Group) {
    for index in 0..group.sequences.len() {
        let (earlier, rest) = group.sequences.split_at_mut(index);
        let Some(sequence) = rest.first_mut() else { return };
        sequence.origin = None;
        for (parent, other) in earlier.iter().enumerate().filter(|(_, other)| !other.finished) {
            let most = (other.len() - 1).min(sequence.len() - 1);
            let skip = group.prompt_len.min(most);
            let tails =
                [&sequence.tokens, &other.tokens].map(|tokens| tokens.get(skip..).unwrap_or_default());
            let common = tails[0].iter().zip(tails[1]).take_while(|(a, b)| a == b).count();
            let tokens = (skip + common).min(most);
            // Of equally near ones the first, which stands there first.
            if sequence.origin.is_none_or(|origin| tokens > origin.tokens) {
                sequence.origin = Some(Origin { parent, tokens });
            }
        }
    }
}

/// Tokens that a sequence shares with an earlier one by the plan.
pub(super) fn shared(sequence: &Sequence) -> usize {
    sequence.origin.map_or(0, |origin| origin.tokens)
}

/// Forks every waiting sequence that parts from `parent` where that one stands now.
pub(super) fn fork_waiting(
    group: &mut Group,
    parent: usize,
    salt: u64,
    cache: &mut dyn CacheManager,
) -> Result<(), CacheError> {
    let Some((from, at)) = group.sequences.get(parent).map(|parent| (parent.id, parent.planned)) else {
        return Ok(());
    };
    for index in 0..group.sequences.len() {
        let goal = group.goal(index);
        let Some(child) = group.sequences.get_mut(index) else { return Ok(()) };
        if child.finished || child.slots > 0 || child.origin != Some(Origin { parent, tokens: at }) {
            continue;
        }
        // The prefix cache may still know more of it than what the two share.
        let tokens = child.tokens.get(..goal.min(child.tokens.len())).unwrap_or_default();
        let prompt = Prompt { tokens, salt, use_prefix_cache: true };
        let found =
            if cache.cached_tokens(&prompt) > at { cache.allocate(child.id, prompt).ok() } else { None };
        (child.slots, child.planned) = match found {
            Some(allocation) => (tokens.len(), allocation.cached_tokens),
            None => {
                cache.fork(from, child.id)?;
                (at, at)
            }
        };
    }
    Ok(())
}
