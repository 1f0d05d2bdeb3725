//! `Now`, `Later` and `Never`, for one prompt and for prompts that come in together.

#![allow(clippy::unwrap_used, reason = "a helper that fails should fail the test that called it")]

mod common;

use common::*;
use pagewise_kvcache::Admission::{Later, Never, Now};
use pagewise_kvcache::{CacheConfig, CacheManager, KvCacheManager};

fn with_watermark(device_blocks: usize, watermark: f64) -> KvCacheManager {
    KvCacheManager::new(CacheConfig { watermark, ..config(4, device_blocks, 0) }).unwrap()
}

#[test]
fn a_prompt_needs_room_for_itself_and_one_more_token() {
    let mut cache = with_watermark(4, 0.0);
    assert_eq!(cache.can_allocate(&[prompt(&tokens(0, 15))]), Now);
    assert_eq!(cache.can_allocate(&[prompt(&tokens(0, 16))]), Never);
    fill(&mut cache, 1, &tokens(100, 1));
    assert_eq!(cache.can_allocate(&[prompt(&tokens(0, 11))]), Now);
    assert_eq!(cache.can_allocate(&[prompt(&tokens(0, 12))]), Later);
}

#[test]
fn the_watermark_stays_free() {
    let mut cache = with_watermark(10, 0.2);
    assert_eq!(cache.watermark_blocks(), 2);
    fill(&mut cache, 1, &tokens(0, 4 * 6 - 1));
    assert_eq!(cache.can_allocate(&[prompt(&tokens(100, 7))]), Now);
    assert_eq!(cache.can_allocate(&[prompt(&tokens(100, 8))]), Later);
    assert!(cache.can_append(id(1), 4 * 4), "the watermark is there for those who run");
}

#[test]
fn what_could_never_leave_the_watermark_free_waits_for_an_empty_cache() {
    let mut cache = with_watermark(10, 0.2);
    let long = tokens(0, 39);
    assert_eq!(cache.can_allocate(&[prompt(&long)]), Now);
    fill(&mut cache, 1, &tokens(100, 1));
    assert_eq!(cache.can_allocate(&[prompt(&long)]), Later);
    free(&mut cache, 1);
    assert_eq!(cache.can_allocate(&[prompt(&long)]), Now);
    assert_eq!(cache.can_allocate(&[prompt(&tokens(0, 40))]), Never);
}

#[test]
fn a_gang_comes_in_together_or_not_at_all() {
    let mut cache = with_watermark(6, 0.0);
    let (a, b) = (tokens(0, 7), tokens(100, 7));
    assert_eq!(cache.can_allocate(&[]), Now);
    assert_eq!(cache.can_allocate(&[prompt(&a), prompt(&b)]), Now);
    fill(&mut cache, 1, &tokens(200, 12));
    assert_eq!(cache.can_allocate(&[prompt(&a)]), Now);
    assert_eq!(cache.can_allocate(&[prompt(&a), prompt(&b)]), Later);
    assert_eq!(cache.can_allocate(&[prompt(&a), prompt(&b), prompt(&tokens(300, 12))]), Never);
}

#[test]
fn cached_prefixes_make_room_and_are_counted_once() {
    let mut cache = with_watermark(5, 0.0);
    fill(&mut cache, 1, &tokens(0, 8));
    // Held by a sequence: two prompts with that prefix need one block each.
    let (mut a, mut b) = (tokens(0, 8), tokens(0, 8));
    a.push(500);
    b.push(600);
    assert_eq!(cache.can_allocate(&[prompt(&a), prompt(&b)]), Now);
    // Held by nobody: the prefix itself takes its two blocks back, but not twice.
    free(&mut cache, 1);
    fill(&mut cache, 2, &tokens(100, 1));
    assert_eq!(cache.device_usage().free, 4);
    assert_eq!(cache.can_allocate(&[prompt(&a), prompt(&b)]), Now);
    extend(&mut cache, 2, &tokens(101, 4));
    assert_eq!(cache.can_allocate(&[prompt(&a), prompt(&b)]), Later);
    assert_eq!(cache.can_allocate(&[prompt(&a)]), Now);
}

#[test]
fn now_means_that_allocation_succeeds() {
    let mut cache = with_watermark(8, 0.1);
    let mut sequence = 0;
    for len in (1..30).cycle().take(200) {
        let tokens = tokens(sequence as u32 * 1000, len);
        match cache.can_allocate(&[prompt(&tokens)]) {
            Now => {
                cache.allocate(id(sequence), prompt(&tokens)).unwrap();
                assert!(cache.can_append(id(sequence), 1));
                sequence += 1;
            }
            Later => {
                let oldest = cache.sequences().min().unwrap();
                cache.free(oldest).unwrap();
            }
            Never => panic!("{len} tokens fit"),
        }
    }
}
