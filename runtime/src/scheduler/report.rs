//! Where every group stands, in words: for the error that says that none of them can go on.

use super::admission::demand;
use super::group::{Group, Sequence};
use super::order::Rank;
use super::{Scheduler, rebuild};
use pagewise_kvcache::{CacheManager, PoolUsage};
use std::fmt::{self, Write};

/// Waiting groups that are described one by one; the others only wait behind them.
const MOST_WAITING: usize = 16;

impl Scheduler {
    /// What is in the cache's pools, and of each group its phase, the blocks that it wants and its sequences.
    pub(crate) fn report(&self, cache: &dyn CacheManager) -> String {
        let mut text = String::new();
        // A string takes whatever is written.
        _ = self.write_report(cache, &mut text);
        text
    }

    fn write_report(&self, cache: &dyn CacheManager, text: &mut String) -> fmt::Result {
        let pool = |usage: PoolUsage| {
            let PoolUsage { total, used, pending, .. } = usage;
            format!("{used} used and {pending} pending of {total}")
        };
        let (device, host) = (cache.device_usage(), cache.host_usage());
        write!(text, "device blocks: {}, {} free; host blocks: {}; ", pool(device), device.free, pool(host))?;
        let (seats, most) = (self.resident_sequences, self.most_sequences());
        write!(text, "{seats} of {most} seats taken; {} cancelled groups to free", self.cancelled.len())?;
        let ranks = self.resident.iter().chain(self.waiting.iter().take(MOST_WAITING));
        for group in ranks.filter_map(|rank: &Rank| self.groups.get(&rank.id())) {
            group.describe(cache, text)?;
        }
        match self.waiting.len().saturating_sub(MOST_WAITING) {
            0 => Ok(()),
            more => write!(text, "; and {more} more wait"),
        }
    }
}

impl Group {
    fn describe(&self, cache: &dyn CacheManager, text: &mut String) -> fmt::Result {
        let phase = match (self.resident, self.held().is_empty(), self.rebuilding()) {
            (true, _, true) if self.admitted_before && self.sequences.len() > 1 => "resident, being rebuilt",
            (true, ..) => "resident",
            (false, false, _) => "swapped out",
            (false, true, _) if self.admitted_before => "to be recomputed",
            (false, true, _) => "new",
        };
        let (seats, blocks) = (self.seats, demand(self, cache));
        write!(
            text,
            "; request {} is {phase}, {seats} seats, {blocks} blocks with its next tokens:",
            self.id().0
        )?;
        for (index, sequence) in self.sequences.iter().enumerate().filter(|(_, s)| !s.finished) {
            sequence.describe(index, self.goal(index), cache, text)?;
        }
        Ok(())
    }
}

impl Sequence {
    fn describe(
        &self,
        index: usize,
        goal: usize,
        cache: &dyn CacheManager,
        text: &mut String,
    ) -> fmt::Result {
        let Self { id, slots, planned, .. } = self;
        let tokens = self.tokens.len();
        write!(text, " [{index}: sequence {}, {tokens} tokens", id.0)?;
        if let Some(place) = self.placeholder {
            write!(text, " and row {} of step {}", place.row, place.step)?;
        }
        match (slots, self.origin) {
            (0, Some(origin)) => {
                write!(text, ", to be forked from {} at {}", origin.parent, rebuild::shared(self))?;
            }
            (0, None) => write!(text, ", not in the cache")?,
            _ => {
                let place = if cache.block_table(*id, 0).is_some() { "device" } else { "host" };
                let computed = cache.computed(*id).unwrap_or(0);
                write!(
                    text,
                    ", {slots} slots on the {place}, {planned} planned, {computed} computed, to {goal}"
                )?;
            }
        }
        write!(text, "]")
    }
}

#[cfg(test)]
mod tests {
    use super::super::{NewGroup, Preemption, SchedulerConfig};
    use super::*;
    use crate::request::{RequestId, Urgency};
    use pagewise_kvcache::{CacheConfig, KvCacheManager, KvGroup};

    #[test]
    fn a_report_says_of_every_group_where_it_stands() {
        let mut cache = KvCacheManager::new(CacheConfig {
            block_size: 4,
            device_blocks: 3,
            host_blocks: 0,
            groups: vec![KvGroup { window: None }],
            watermark: 0.0,
            prefix_cache: false,
        })
        .unwrap();
        let mut scheduler = Scheduler::new(SchedulerConfig {
            max_num_seqs: 4,
            max_batch_tokens: 5,
            max_model_len: 100,
            max_prompt_logit_rows: 1,
            preemption: Preemption::Recompute,
        });
        for id in 0..20 {
            let urgency = Urgency::default();
            let id = RequestId(id);
            let new =
                NewGroup { id, prompt: vec![7; 6], width: 2, beams: false, prompt_logits: false, urgency };
            scheduler.add(new, &cache).unwrap();
        }
        scheduler.schedule(&mut cache).unwrap();
        let report = scheduler.report(&cache);
        let expected = [
            "device blocks: 2 used and 0 pending of 3, 1 free; host blocks: 0 used and 0 pending of 0",
            "2 of 4 seats taken; 0 cancelled groups to free",
            "request 0 is resident, 2 seats, 3 blocks with its next tokens: \
             [0: sequence 0, 6 tokens, 6 slots on the device, 5 planned, 0 computed, to 6]",
            "request 1 is new, 2 seats, 3 blocks with its next tokens: [0: sequence 1, 6 tokens, not in the cache]",
        ];
        assert!(report.starts_with(&expected.join("; ")), "{report}");
        assert!(report.ends_with("; and 3 more wait"), "{report}");
    }
}
