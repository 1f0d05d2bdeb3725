//! What a step leaves in the engine's figures: its own, those of the requests in it, and how fast the machine is.

use super::Engine;
use super::metrics::StepMetrics;
use crate::executor::Executor;
use crate::scheduler::{PreemptionCosts, Schedule};
use pagewise_kvcache::CacheManager;
use std::time::Duration;

impl Engine {
    /// Who came in, and who made room.
    pub(super) fn note_schedule(&mut self, schedule: &Schedule, now: Duration) {
        for &(id, cached_tokens) in &schedule.admitted {
            if let Some(state) = self.requests.get_mut(&id) {
                state.metrics.cached_tokens = cached_tokens;
                state.metrics.admitted = Some(now);
                self.metrics.stats.cached_tokens += cached_tokens as u64;
            }
        }
        for id in &schedule.preempted {
            if let Some(state) = self.requests.get_mut(id) {
                state.metrics.preemptions += 1;
            }
        }
    }

    /// A step that is done.
    pub(super) fn note_step(
        &mut self,
        schedule: &Schedule,
        [started, scheduled, executed, ended]: [Duration; 4],
    ) {
        let plan = &schedule.plan;
        let tokens = plan.num_tokens();
        let decode_tokens = plan.chunks.iter().filter(|chunk| chunk.tokens.len() == 1).count();
        let prefill_tokens = tokens - decode_tokens;
        let step = StepMetrics {
            id: plan.id,
            started,
            schedule: scheduled.saturating_sub(started),
            execute: executed.saturating_sub(scheduled),
            sample: ended.saturating_sub(executed),
            sequences: plan.chunks.len(),
            prefill_tokens,
            decode_tokens,
            preempted: schedule.preempted.len(),
            swapped_out_blocks: plan.block_ops.swap_out.len(),
            swapped_in_blocks: plan.block_ops.swap_in.len(),
            copied_blocks: plan.block_ops.copy.len(),
        };
        self.metrics.step = step;
        self.metrics.stats.steps += 1;
        self.metrics.stats.computed_tokens += tokens as u64;
        // A step that is mostly prefill says how fast prefill is; the last ones count most.
        let seconds = step.execute.as_secs_f64();
        if prefill_tokens >= 8 && prefill_tokens >= decode_tokens && seconds > 0.0 {
            let rate = tokens as f64 / seconds;
            let known = &mut self.costs.prefill_tokens_per_second;
            *known = if *known > 0.0 { 0.8 * *known + 0.2 * rate } else { rate };
            self.scheduler.set_costs(self.costs);
        }
    }
}

/// What the executor knows of the link to the host.
pub(super) fn measure_link(cache: &dyn CacheManager, executor: &mut dyn Executor) -> PreemptionCosts {
    let mut costs = PreemptionCosts::default();
    if cache.host_usage().total > 0
        && let Some(link) = executor.measure_link()
    {
        costs.block_bytes = link.block_bytes;
        costs.link_bytes_per_second = link.bytes_per_second;
    }
    costs
}
