//! Making room: every resident sequence gets slots for its tokens, and where blocks run out the last in the order
//! gives its own back.

use super::admission::demand;
use super::group::{Group, Sequence};
use super::order::Rank;
use super::{Schedule, Scheduler, rebuild};
use crate::request::RequestId;
use pagewise_kvcache::{CacheError, CacheManager};
use std::ops::Bound;

/// How a group makes room for others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preemption {
    /// Whichever costs less by what was measured: [`PreemptionCosts`].
    #[default]
    Auto,
    /// Its blocks are freed; later its tokens are computed again.
    Recompute,
    /// Its blocks are copied to the host, and back later. Where the host has no room for them, or they are being
    /// copied at that moment, it is recomputed nevertheless.
    Swap,
}

/// What preemption costs on this machine, as measured. Zero is not known: then groups are recomputed.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PreemptionCosts {
    /// Bytes of a block in all layers.
    pub block_bytes: f64,
    /// Bytes a second between device and host.
    pub link_bytes_per_second: f64,
    /// Tokens a second of prefill.
    pub prefill_tokens_per_second: f64,
}

impl PreemptionCosts {
    /// Whether moving `blocks` out and back takes less time than computing `tokens` again (paper, section 7.3).
    fn favour_swap(&self, blocks: usize, tokens: usize) -> bool {
        let swap = 2.0 * blocks as f64 * self.block_bytes / self.link_bytes_per_second;
        let recompute = tokens as f64 / self.prefill_tokens_per_second;
        // False where either is not a number.
        swap < recompute && recompute.is_finite()
    }
}

/// How making room ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reserved {
    /// Everybody has slots.
    All,
    /// Somebody was preempted or refused, or waits for blocks that are being copied.
    Short,
}

/// Device blocks that this step's swap-outs free for the next one.
#[derive(Debug, Default)]
struct Coming {
    blocks: usize,
    promised: usize,
}

impl Coming {
    /// Promises so many of them, if there are as many left.
    fn promise(&mut self, blocks: usize) -> bool {
        let covered = self.promised + blocks <= self.blocks;
        if covered {
            self.promised += blocks;
        }
        covered
    }
}

impl Scheduler {
    /// Gives every resident sequence slots for its tokens, in order. Groups that wait for blocks being copied stay
    /// resident and skip the step.
    pub(super) fn reserve(
        &mut self,
        schedule: &mut Schedule,
        cache: &mut dyn CacheManager,
    ) -> Result<Reserved, CacheError> {
        let mut outcome = Reserved::All;
        let mut coming = Coming::default();
        let mut after = Bound::Unbounded;
        while let Some((rank, mut wanted)) = self.append_all(after, cache)? {
            outcome = Reserved::Short;
            after = Bound::Excluded(rank);
            // The last in the order go until this one has its slots; it may itself be the last.
            while wanted > 0 && !coming.promise(wanted) {
                if self.resident.len() > 1 {
                    coming.blocks += self.preempt_last(schedule, cache)?;
                } else if cache.device_usage().pending > 0 || self.guesses(rank.id()) {
                    break;
                } else if !self.reclaim(cache)? {
                    self.refuse(rank.id(), schedule, cache)?;
                }
                let Some(group) = self.resident_mut(rank.id()) else { break };
                wanted = append_missing(group, cache)?;
            }
        }
        Ok(outcome)
    }

    /// Whether a group wants slots for tokens that are still being sampled, and may be its last.
    fn guesses(&self, id: RequestId) -> bool {
        let group = self.groups.get(&id);
        group.is_some_and(|group| group.unfinished().any(|sequence| sequence.placeholder.is_some()))
    }

    /// Gives slots to the residents from some place in the order on, until one cannot have all of its own. Returns that
    /// one's rank, and the blocks that it wants.
    fn append_all(
        &mut self,
        after: Bound<Rank>,
        cache: &mut dyn CacheManager,
    ) -> Result<Option<(Rank, usize)>, CacheError> {
        for &rank in self.resident.range((after, Bound::Unbounded)) {
            let Some(group) = self.groups.get_mut(&rank.id()) else { continue };
            let wanted = append_missing(group, cache)?;
            if wanted > 0 {
                return Ok(Some((rank, wanted)));
            }
        }
        Ok(None)
    }

    /// Preempts the last resident; returns the blocks that come free when its copies are done.
    fn preempt_last(
        &mut self,
        schedule: &mut Schedule,
        cache: &mut dyn CacheManager,
    ) -> Result<usize, CacheError> {
        let Some(rank) = self.resident.pop_last() else { return Ok(0) };
        let Some(mut group) = self.groups.remove(&rank.id()) else { return Ok(0) };
        group.resident = false;
        // While it is being rebuilt, who waits for whom must stay as it is.
        if !group.rebuilding() {
            rebuild::plan(&mut group);
        }
        let before = cache.stats().swapped_out_blocks;
        let swapped = self.should_swap(&group, cache) && swap_out(&group, cache)?;
        let released = if swapped { Ok(()) } else { rebuild::give_up(&mut group, cache) };
        let moved = (cache.stats().swapped_out_blocks - before) as usize;
        let how = if swapped { "swapped out" } else { "to be recomputed" };
        tracing::debug!(request = group.id().0, blocks = moved, "preempted, the cache is full: {how}");
        self.preemptions += 1;
        self.swaps += u64::from(swapped);
        self.resident_sequences -= group.seats;
        schedule.preempted.push(group.id());
        self.waiting.insert(rank);
        self.groups.insert(rank.id(), group);
        released.map(|()| moved)
    }

    fn should_swap(&self, group: &Group, cache: &dyn CacheManager) -> bool {
        match self.config.preemption {
            _ if cache.host_usage().total == 0 => false,
            Preemption::Recompute => false,
            Preemption::Swap => true,
            Preemption::Auto => {
                let own = |s: &Sequence| s.planned.saturating_sub(rebuild::shared(s));
                self.costs.favour_swap(demand(group, cache), group.unfinished().map(own).sum())
            }
        }
    }
}

/// Moves a group to the host; `false` where that cannot be done now.
fn swap_out(group: &Group, cache: &mut dyn CacheManager) -> Result<bool, CacheError> {
    match cache.swap_out(&group.held()) {
        Ok(()) => Ok(true),
        Err(CacheError::OutOfHostBlocks { .. } | CacheError::Pending(_)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Gives a group's sequences slots for the tokens that they can compute next. Returns how many blocks are still
/// wanted where they ran out on the way, at most.
pub(super) fn append_missing(group: &mut Group, cache: &mut dyn CacheManager) -> Result<usize, CacheError> {
    let kv_groups = cache.config().groups.len();
    let rebuilding = group.rebuilding();
    let mut wanted = 0;
    for index in 0..group.sequences.len() {
        let goal = if rebuilding { Some(group.goal(index)) } else { None };
        let Some(sequence) = group.sequences.get_mut(index) else { break };
        let goal = goal.unwrap_or_else(|| sequence.len());
        let missing = goal.saturating_sub(sequence.slots);
        if sequence.finished || sequence.slots == 0 || missing == 0 {
            continue;
        }
        if wanted > 0 {
            wanted += kv_groups;
            continue;
        }
        match cache.append(sequence.id, missing) {
            Ok(()) => sequence.slots += missing,
            Err(CacheError::OutOfBlocks { wanted: short, .. }) => wanted = short,
            Err(error) => return Err(error),
        }
    }
    Ok(wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_compares_measured_times_and_recomputes_what_was_not_measured() {
        // 1 MB a block: 10 blocks out and back at 1 GB/s are 20 ms; 40 tokens at 1,000 a second are 40 ms.
        let costs =
            PreemptionCosts { block_bytes: 1e6, link_bytes_per_second: 1e9, prefill_tokens_per_second: 1e3 };
        assert!(costs.favour_swap(10, 40));
        assert!(!costs.favour_swap(10, 19));
        assert!(!costs.favour_swap(0, 0));
        assert!(!PreemptionCosts::default().favour_swap(10, 1000));
        assert!(!PreemptionCosts { prefill_tokens_per_second: 0.0, ..costs }.favour_swap(1, 1000));
        assert!(!PreemptionCosts { link_bytes_per_second: 0.0, ..costs }.favour_swap(1, 1000));
    }
}
