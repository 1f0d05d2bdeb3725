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
    /// Blocks it stands on in all, those found included: the least that an otherwise empty pool must have.
    pub(super) alone: usize,
}

impl KvCacheManager {
    pub(super) fn admit(&self, prompts: &[Prompt<'_>]) -> Admission {
        let groups = self.geometry.groups();
        let mut new = 0;
        // A cached block that several of the prompts find is counted once.
        let mut found = FxHashSet::default();
        for prompt in prompts {
            let hit = self.find_prefix(prompt);
            new += (self.geometry.blocks_for(prompt.tokens.len() + 1) - hit.blocks()) * groups;
            for group in 0..groups {
                found.extend(self.memory.hit_blocks(&self.geometry, &hit, group));
            }
        }
        let found_free = found.iter().filter(|&&block| self.memory.device.refs(block) == 0).count();
        self.answer(&Demand { now: new + found_free, alone: new + found.len() })
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
