//! The scheduler's rules, step by step on the real cache manager, without a model.

use crate::support::cache_config;
use pagewise_kvcache::{CacheConfig, CacheManager, KvCacheManager};
use pagewise_runtime::plan::LogitRows;
use pagewise_runtime::request::{RequestId, Urgency};
use pagewise_runtime::scheduler::{NewGroup, Preemption, Schedule, Scheduler, SchedulerConfig};
use std::time::Duration;

fn group(id: u64, length: usize, width: usize) -> NewGroup {
    NewGroup {
        id: RequestId(id),
        prompt: vec![id as u32; length],
        width,
        beams: false,
        prompt_logits: false,
        urgency: Urgency::default(),
    }
}

struct Bench {
    scheduler: Scheduler,
    cache: KvCacheManager,
    next_token: u32,
    /// Requests whose next tokens the test pushes itself.
    branching: Vec<u64>,
}

impl Bench {
    fn new(max_num_seqs: usize, max_batch_tokens: usize, block_size: usize, blocks: usize) -> Self {
        Self::preempting(
            max_num_seqs,
            max_batch_tokens,
            cache_config(block_size, blocks),
            Preemption::Recompute,
        )
    }

    fn preempting(
        max_num_seqs: usize,
        max_batch_tokens: usize,
        cache: CacheConfig,
        preemption: Preemption,
    ) -> Self {
        let config = SchedulerConfig {
            max_num_seqs,
            max_batch_tokens,
            max_model_len: 1000,
            max_prompt_logit_rows: 3,
            preemption,
        };
        let cache = KvCacheManager::new(CacheConfig { prefix_cache: false, ..cache }).unwrap();
        Self { scheduler: Scheduler::new(config), cache, next_token: 0, branching: vec![] }
    }

    fn add(&mut self, id: u64, length: usize, width: usize) {
        self.scheduler.add(group(id, length, width), &self.cache).unwrap();
    }

    /// One step in which every row samples a new token. Returns (request, tokens) of each chunk.
    fn step(&mut self) -> (Vec<(u64, usize)>, Schedule) {
        let schedule = self.scheduler.schedule(&mut self.cache).unwrap();
        self.cache.confirm_block_ops().unwrap();
        self.scheduler.commit(&schedule, &mut self.cache).unwrap();
        for (chunk, of) in schedule.plan.chunks.iter().zip(&schedule.chunks) {
            assert_eq!(chunk.logits == LogitRows::None, !of.next_token);
            if of.next_token && !self.branching.contains(&of.request.0) {
                self.next_token += 1;
                self.scheduler.push_token(of.request, of.index, self.next_token);
            }
        }
        let chunks = schedule.plan.chunks.iter().zip(&schedule.chunks);
        (chunks.map(|(chunk, of)| (of.request.0, chunk.tokens.len())).collect(), schedule)
    }

    fn chunks(&mut self) -> Vec<(u64, usize)> {
        self.step().0
    }

    fn finish(&mut self, id: u64) {
        self.scheduler.finish_sequence(RequestId(id), 0, &mut self.cache).unwrap().unwrap();
    }
}

#[test]
fn decodes_come_first_and_prompts_share_what_is_left_in_order() {
    let mut bench = Bench::new(8, 10, 4, 100);
    bench.add(0, 3, 1);
    bench.add(1, 12, 1);
    bench.add(2, 9, 1);
    assert_eq!(bench.chunks(), [(0, 3), (1, 7)]);
    assert_eq!(bench.chunks(), [(0, 1), (1, 5), (2, 4)]);
    bench.add(3, 2, 1);
    assert_eq!(bench.chunks(), [(0, 1), (1, 1), (2, 5), (3, 2)]);
    assert_eq!(bench.chunks(), [(0, 1), (1, 1), (2, 1), (3, 1)]);
}

#[test]
fn no_more_sequences_are_resident_than_the_budget_has_tokens() {
    let mut bench = Bench::new(100, 3, 4, 100);
    for id in 0..5 {
        bench.add(id, 2, 1);
    }
    assert_eq!(bench.chunks(), [(0, 2), (1, 1)]);
    assert_eq!(bench.chunks(), [(0, 1), (1, 1), (2, 1)]);
    for _ in 0..5 {
        assert_eq!(bench.chunks(), [(0, 1), (1, 1), (2, 1)]);
    }
    bench.finish(1);
    assert_eq!(bench.chunks(), [(0, 1), (2, 1), (3, 1)]);
}

#[test]
fn nobody_overtakes_a_head_that_must_wait() {
    let mut bench = Bench::new(8, 100, 4, 10);
    bench.add(0, 24, 1);
    bench.add(1, 20, 1);
    bench.add(2, 1, 1);
    assert_eq!(bench.chunks(), [(0, 24)]);
    assert_eq!(bench.chunks(), [(0, 1)], "2 would fit, but came after 1");
    bench.finish(0);
    assert_eq!(bench.chunks(), [(1, 20), (2, 1)]);
}

#[test]
fn the_latest_goes_first_comes_back_first_and_nobody_new_before_it() {
    // Three sequences of one block each and room for one more.
    let mut bench = Bench::new(8, 100, 4, 4);
    bench.add(0, 3, 1);
    bench.add(1, 3, 1);
    bench.add(2, 3, 1);
    assert_eq!(bench.chunks(), [(0, 3), (1, 3), (2, 3)]);
    bench.add(3, 1, 1);
    // The fourth token of each fills its block.
    assert_eq!(bench.chunks(), [(0, 1), (1, 1), (2, 1), (3, 1)]);
    // The fifth needs a block for each: 3 goes for 0's, 2 for 1's.
    assert_eq!(bench.chunks(), [(0, 1), (1, 1)]);
    assert_eq!(bench.scheduler.stats().preemptions, 2);
    assert_eq!(bench.scheduler.stats().waiting, 2);
    bench.add(4, 1, 1);
    for _ in 0..2 {
        assert_eq!(bench.chunks(), [(0, 1), (1, 1)], "3 and 4 would fit, but 2 is not back");
    }
    bench.finish(0);
    // Its tokens so far, 3 + 2, are its prompt now; two blocks are free, so 3 has to wait on.
    assert_eq!(bench.chunks().last(), Some(&(2, 5)));
    assert_eq!(bench.scheduler.stats().waiting, 2);
}

#[test]
fn a_deadline_does_not_overtake_the_preempted() {
    let mut bench = Bench::new(8, 100, 4, 4);
    for id in 0..3 {
        bench.add(id, 3, 1);
    }
    for chunks in [[(0, 3), (1, 3), (2, 3)], [(0, 1), (1, 1), (2, 1)]] {
        assert_eq!(bench.chunks(), chunks);
    }
    assert_eq!(bench.chunks(), [(0, 1), (1, 1)], "2 had to go");
    let urgency = Urgency { deadline: Some(Duration::from_secs(1)), ..Urgency::default() };
    bench.scheduler.add(NewGroup { urgency, ..group(3, 1, 1) }, &bench.cache).unwrap();
    bench.finish(0);
    assert_eq!(bench.chunks(), [(1, 1), (2, 5)]);
    let urgency = Urgency { priority: -1, ..Urgency::default() };
    bench.scheduler.add(NewGroup { urgency, ..group(4, 1, 1) }, &bench.cache).unwrap();
    bench.finish(1);
    assert_eq!(bench.chunks(), [(2, 1), (4, 1), (3, 1)], "the more urgent, then the earlier deadline");
}

/// The same shortage as above, by swapping: blocks come free a step later, and each is promised once.
#[test]
fn swapped_groups_make_room_for_the_next_step_and_go_on_where_they_were() {
    let cache = CacheConfig { host_blocks: 4, ..cache_config(4, 4) };
    let mut bench = Bench::preempting(8, 100, cache, Preemption::Swap);
    for id in 0..3 {
        bench.add(id, 3, 1);
    }
    assert_eq!(bench.chunks(), [(0, 3), (1, 3), (2, 3)]);
    bench.add(3, 1, 1);
    assert_eq!(bench.chunks(), [(0, 1), (1, 1), (2, 1), (3, 1)]);
    // 3's block is for 0 and 2's for 1; both wait for the copies.
    let (chunks, schedule) = bench.step();
    assert_eq!((chunks.len(), schedule.plan.block_ops.swap_out.len()), (0, 2));
    assert_eq!(schedule.preempted, [RequestId(3), RequestId(2)]);
    assert_eq!(bench.scheduler.stats().swaps, 2);
    assert_eq!(bench.chunks(), [(0, 1), (1, 1)]);
    bench.finish(0);
    let (chunks, schedule) = bench.step();
    assert_eq!(chunks, [(1, 1), (2, 1)], "nothing of 2 is computed again");
    assert_eq!(schedule.plan.block_ops.swap_in.len(), 1);
    assert_eq!(bench.cache.host_usage().used, 1, "3 waits for its turn");
}

#[test]
fn where_the_host_is_full_a_group_is_recomputed() {
    let cache = CacheConfig { host_blocks: 1, ..cache_config(4, 4) };
    let mut bench = Bench::preempting(8, 100, cache, Preemption::Swap);
    for id in 0..2 {
        bench.add(id, 7, 1);
    }
    assert_eq!(bench.chunks(), [(0, 7), (1, 7)]);
    assert_eq!(bench.chunks(), [(0, 1), (1, 1)]);
    assert_eq!(bench.chunks(), [(0, 1)], "1's two blocks are free at once");
    let stats = bench.scheduler.stats();
    assert_eq!((stats.preemptions, stats.swaps), (1, 0));
}

#[test]
fn a_group_is_admitted_and_preempted_whole() {
    let mut bench = Bench::new(4, 100, 4, 6);
    bench.add(0, 4, 1);
    bench.add(1, 6, 3);
    bench.add(2, 1, 1);
    bench.branching = vec![1];
    // 1's prompt, and a block of its own for each of its samples: 1 + 3, besides 0's two.
    assert_eq!(bench.chunks(), [(0, 4), (1, 6)], "2 would be a fifth sequence");
    bench.scheduler.branch(RequestId(1), &[0, 0, 0], &mut bench.cache).unwrap();
    for sample in 0..3 {
        bench.scheduler.push_token(RequestId(1), sample, 7 + sample as u32);
    }
    bench.branching.clear();
    let (chunks, schedule) = bench.step();
    assert_eq!(chunks, [(0, 1), (1, 1), (1, 1), (1, 1)]);
    assert_eq!(schedule.plan.block_ops.copy.len(), 2, "the last owner writes in place");
    assert_eq!(bench.chunks().len(), 4);
    // Every sample has 8 tokens; the ninth needs a block, and there is none.
    assert_eq!(bench.chunks(), [(0, 1)]);
    assert_eq!(bench.scheduler.stats().running_sequences, 1);
    bench.finish(0);
    // Back: the shared prompt once, then each sample's own tokens. There are blocks for 2 at this moment, but
    // the samples will need them.
    assert_eq!(bench.chunks(), [(1, 6)]);
    assert_eq!(bench.scheduler.stats().running_sequences, 3);
}

#[test]
fn prompt_logits_stay_within_their_rows() {
    let mut bench = Bench::new(8, 100, 4, 100);
    let new = NewGroup { prompt_logits: true, ..group(0, 8, 1) };
    bench.scheduler.add(new, &bench.cache).unwrap();
    let mut rows = Vec::new();
    for _ in 0..4 {
        let schedule = bench.scheduler.schedule(&mut bench.cache).unwrap();
        bench.cache.confirm_block_ops().unwrap();
        bench.scheduler.commit(&schedule, &mut bench.cache).unwrap();
        rows.extend(schedule.plan.chunks.iter().map(|chunk| (chunk.start, chunk.logits)));
    }
    assert_eq!(rows, [(0, LogitRows::All), (3, LogitRows::All), (6, LogitRows::All)]);
}
