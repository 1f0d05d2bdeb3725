//! Whether prompts may come in: counts, never takes.
//!
//! The watermark keeps a share of the device free, so that running sequences can grow for a while before
//! one has to be preempted (paper, section 4.5). A request so large that it cannot leave the watermark free
//! even in an empty cache is held to what it can leave; otherwise it would wait forever.

use super::KvCacheManager;
use crate::memory::Hit;
use crate::pool::NodeId;
use crate::{Admission, Prompt};

/// Device blocks that something needs in order to come in.
pub(super) struct Demand {
    /// Free blocks it takes now, cached ones that it finds included.
    pub(super) now: usize,
    /// Blocks it stands on in all, those found included: the least that an otherwise empty pool must have.
    pub(super) alone: usize,
}

impl KvCacheManager {
    /// The first prompt finds what is cached now. Its new blocks may evict what the others would have found,
    /// so these count on no more than what the first one holds by then, or running sequences hold already;
    /// with sliding windows on nothing, because there the loss of one block can cost a whole hit.
    pub(super) fn admit(&self, prompts: &[Prompt<'_>]) -> Admission {
        let Some((first, others)) = prompts.split_first() else { return Admission::Now };
        let (memory, geometry) = (&self.memory, &self.geometry);
        let groups = geometry.groups();
        let blocks_for = |prompt: &Prompt<'_>| geometry.blocks_for(prompt.tokens.len() + 1);
        let hit = self.find_prefix(first);
        let new = (blocks_for(first) - hit.blocks()) * groups;
        let mut demand = Demand { now: new, alone: new };
        for group in 0..groups {
            for block in memory.hit_blocks(geometry, &hit, group) {
                demand.now += usize::from(memory.device.refs(block) == 0);
                demand.alone += 1;
            }
        }
        let windows = (0..groups).any(|group| geometry.window(group).is_some());
        let held =
            |node: NodeId| (0..groups).all(|group| memory.device.refs(memory.tree.block(node, group)) > 0);
        for prompt in others {
            let other = if windows { Hit::default() } else { self.find_prefix(prompt) };
            let common = other.nodes.iter().zip(&hit.nodes).take_while(|(one, two)| one == two).count();
            let held = other.nodes[common..].iter().take_while(|&&node| held(node)).count();
            demand.now += (blocks_for(prompt) - common - held) * groups;
            demand.alone += (blocks_for(prompt) - common) * groups;
        }
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
