//! Whether prompts may come in: counts, never takes.
//!
//! The watermark keeps a share of the device free, so that running sequences can grow for a while before
//! one has to be preempted (paper, section 4.5). A request so large that it cannot leave the watermark free
//! even in an empty cache is held to what it can leave; otherwise it would wait forever.

use rustc_hash::FxHashSet;

use super::KvCacheManager;
use crate::{Admission, Prompt};

/// Device blocks that something needs in order to come in.
pub(super) struct Demand {
    /// Free blocks it takes now, cached ones that it finds included.
    pub(super) now: usize,
    /// Blocks it stands on in all, nothing shared with anyone.
    pub(super) alone: usize,
}

impl KvCacheManager {
    pub(super) fn admit(&self, prompts: &[Prompt<'_>]) -> Admission {
        let groups = self.geometry.groups();
        let mut demand = Demand { now: 0, alone: 0 };
        let mut found_free = FxHashSet::default();
        for prompt in prompts {
            let blocks = self.geometry.blocks_for(prompt.tokens.len() + 1);
            let hit = self.find_prefix(prompt);
            demand.alone += blocks * groups;
            demand.now += (blocks - hit.blocks()) * groups;
            for group in 0..groups {
                let found = self.memory.hit_blocks(&self.geometry, &hit, group);
                found_free.extend(found.filter(|&block| self.memory.device.refs(block) == 0));
            }
        }
        demand.now += found_free.len();
        self.answer(&demand)
    }

    pub(super) fn answer(&self, demand: &Demand) -> Admission {
        let device = &self.memory.device;
        let reserve = self.watermark_blocks.min(device.total().saturating_sub(demand.alone));
        if demand.now + reserve <= device.free() {
            Admission::Now
        } else if demand.alone <= device.total() {
            Admission::Later
        } else {
            Admission::Never
        }
    }
}
