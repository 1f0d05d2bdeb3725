//! KV groups with sliding windows: what is freed behind them, what a hit needs, how far back one can go.

#![allow(clippy::unwrap_used, reason = "a helper that fails should fail the test that called it")]

mod common;

use common::*;
use pagewise_kvcache::{CacheConfig, CacheError, CacheManager, KvCacheManager, KvGroup, NO_BLOCK};

fn windowed(block_size: usize, blocks: usize, windows: &[Option<usize>]) -> KvCacheManager {
    let groups = windows.iter().map(|&window| KvGroup { window }).collect();
    KvCacheManager::new(CacheConfig { groups, ..config(block_size, blocks, blocks) }).unwrap()
}

#[test]
fn a_window_holds_a_bounded_number_of_blocks() {
    for block_size in [1, 2, 4, 16] {
        for window in [1, 2, 3, 4, 5, 15, 16, 17, 33] {
            let mut cache = windowed(block_size, 1024, &[Some(window), None]);
            cache.allocate(id(1), prompt(&[0])).unwrap();
            cache.mark_computed(id(1), &[0]).unwrap();
            for len in 2..150 {
                cache.append(id(1), 1).unwrap();
                assert!(held(&cache, 1, 0) <= window / block_size + 3, "window {window}, block {block_size}");
                cache.mark_computed(id(1), &[len as u32]).unwrap();
                assert!(held(&cache, 1, 0) <= window / block_size + 3, "window {window}, block {block_size}");
                assert_eq!(
                    held(&cache, 1, 1),
                    (len as usize).div_ceil(block_size),
                    "full attention keeps all"
                );
                // What the query at `len` sees is there.
                let first = (len as usize + 1).saturating_sub(window) / block_size;
                assert!(cache.block_table(id(1), 0).unwrap()[first..].iter().all(|&block| block != NO_BLOCK));
            }
            cache.audit().unwrap();
            free(&mut cache, 1);
            assert_eq!(cache.device_usage().free, 1024);
        }
    }
}

#[test]
fn a_long_prompt_lets_go_as_it_is_computed() {
    let mut cache = windowed(4, 64, &[Some(8)]);
    let tokens = tokens(0, 100);
    cache.allocate(id(1), prompt(&tokens)).unwrap();
    assert_eq!(held(&cache, 1, 0), 25);
    for (chunk, tokens) in tokens.chunks(10).enumerate() {
        cache.mark_computed(id(1), tokens).unwrap();
        let computed = 10 * (chunk + 1);
        assert!(held(&cache, 1, 0) <= 8 / 4 + 3 + (100 - computed) / 4);
        cache.audit().unwrap();
    }
    assert!(held(&cache, 1, 0) <= 5);
}

#[test]
fn a_hit_needs_only_what_the_window_still_sees() {
    let mut cache = windowed(4, 64, &[Some(6), None]);
    fill(&mut cache, 1, &tokens(0, 32));
    free(&mut cache, 1);
    let allocation = cache.allocate(id(2), prompt(&tokens(0, 33))).unwrap();
    assert_eq!(allocation.cached_tokens, 32);
    let table = cache.block_table(id(2), 0).unwrap();
    // The query at 32 sees keys from 27 on, the first of them in block 6.
    assert!(table[..6].iter().all(|&block| block == NO_BLOCK));
    assert!(table[6..].iter().all(|&block| block != NO_BLOCK));
    assert!(cache.block_table(id(2), 1).unwrap().iter().all(|&block| block != NO_BLOCK));
    cache.audit().unwrap();
}

#[test]
fn a_hit_must_hold_in_every_group() {
    // What the window has left behind is evicted first, and the end of the prefix does not need it. The
    // fourth block to go is one that the window still sees: full attention has everything, and yet nothing hits.
    for (blocks, evicted, hit) in [(13, 3, 16), (12, 4, 0)] {
        let mut cache = windowed(4, blocks, &[Some(4), None]);
        fill(&mut cache, 1, &tokens(0, 16));
        free(&mut cache, 1);
        assert_eq!(cache.cached_tokens(&prompt(&tokens(0, 17))), 16);
        cache.allocate(id(2), prompt(&tokens(1000, 16))).unwrap();
        assert_eq!(cache.stats().evicted_blocks, evicted);
        assert_eq!(cache.cached_tokens(&prompt(&tokens(0, 17))), hit);
        cache.audit().unwrap();
    }
}

#[test]
fn truncation_stops_where_the_window_would_see_freed_blocks() {
    let mut cache = windowed(4, 64, &[Some(8)]);
    fill(&mut cache, 1, &tokens(0, 40));
    // The query at 40 sees from 33 on: block 8. One at 38 sees from 31: block 7, which is gone.
    let before = cache.clone();
    assert_eq!(cache.truncate(id(1), 38), Err(CacheError::BehindWindow { sequence: id(1), len: 38 }));
    assert!(cache == before);
    cache.truncate(id(1), 39).unwrap();
    extend(&mut cache, 1, &[7, 8, 9]);
    assert_eq!(cache.computed(id(1)), Some(42));
}

#[test]
fn truncating_uncomputed_slots_is_always_possible() {
    let mut cache = windowed(4, 64, &[Some(3)]);
    fill(&mut cache, 1, &tokens(0, 20));
    cache.append(id(1), 9).unwrap();
    cache.truncate(id(1), 20).unwrap();
    cache.audit().unwrap();
}

#[test]
fn a_gang_does_not_count_on_hits_that_its_first_member_may_evict() {
    // Found by the state machine: the first prompt's new blocks evicted what the second one's window needed.
    for blocks in 12..40 {
        for first in 1..20 {
            let mut cache = windowed(2, blocks, &[None, Some(4)]);
            if cache.allocate(id(1), prompt(&tokens(0, 9))).is_err() {
                continue;
            }
            cache.mark_computed(id(1), &tokens(0, 9)).unwrap();
            free(&mut cache, 1);
            let (one, two) = (tokens(100, first), tokens(0, 9));
            if cache.can_allocate(&[prompt(&one), prompt(&two)]) == pagewise_kvcache::Admission::Now {
                cache.allocate(id(2), prompt(&one)).unwrap();
                cache.allocate(id(3), prompt(&two)).unwrap();
            }
        }
    }
}

#[test]
fn one_admission_answer_covers_all_groups() {
    let cache = windowed(4, 9, &[Some(4), None, Some(8)]);
    use pagewise_kvcache::Admission::{Never, Now};
    assert_eq!(cache.can_allocate(&[prompt(&tokens(0, 11))]), Now, "12 tokens, 3 blocks in each of 3 groups");
    assert_eq!(cache.can_allocate(&[prompt(&tokens(0, 12))]), Never);
}
