//! What the prefix cache finds, keeps apart, merges, evicts, pins and forgets.

#![allow(clippy::unwrap_used, reason = "a helper that fails should fail the test that called it")]

mod common;

use common::*;
use pagewise_kvcache::{CacheConfig, CacheError, CacheManager, KvCacheManager, Prompt};

#[test]
fn a_hit_never_covers_the_last_prompt_token() {
    let mut cache = cache(4, 16, 0);
    fill(&mut cache, 1, &tokens(0, 12));
    for (len, cached) in [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8), (13, 12)] {
        assert_eq!(cache.cached_tokens(&prompt(&tokens(0, len))), cached, "prompt of {len}");
        assert_eq!(fill(&mut cache, 2, &tokens(0, len)), cached, "prompt of {len}");
        free(&mut cache, 2);
    }
}

#[test]
fn a_hit_shares_the_blocks_of_a_running_sequence() {
    let mut cache = cache(4, 16, 0);
    fill(&mut cache, 1, &tokens(0, 10));
    let used = cache.device_usage().used;
    assert_eq!(fill(&mut cache, 2, &tokens(0, 10)), 8);
    assert_eq!(cache.device_usage().used, used + 1);
    assert_eq!(table(&cache, 1)[..2], table(&cache, 2)[..2]);
    let stats = cache.stats();
    assert_eq!((stats.lookup_tokens, stats.hit_tokens), (20, 8));
}

#[test]
fn a_block_is_found_when_computed_not_when_allocated() {
    let mut cache = cache(4, 16, 0);
    cache.allocate(id(1), prompt(&tokens(0, 8))).unwrap();
    assert_eq!(cache.cached_tokens(&prompt(&tokens(0, 9))), 0);
    cache.mark_computed(id(1), &tokens(0, 7)).unwrap();
    assert_eq!(cache.cached_tokens(&prompt(&tokens(0, 9))), 4);
    cache.mark_computed(id(1), &[7]).unwrap();
    assert_eq!(cache.cached_tokens(&prompt(&tokens(0, 9))), 8);
}

#[test]
fn equal_blocks_after_different_prefixes_are_different() {
    let mut cache = cache(2, 16, 0);
    fill(&mut cache, 1, &[1, 2, 9, 9, 5]);
    assert_eq!(cache.cached_tokens(&prompt(&[3, 4, 9, 9, 5])), 0);
    assert_eq!(cache.cached_tokens(&prompt(&[9, 9, 5])), 0);
    assert_eq!(cache.cached_tokens(&prompt(&[1, 2, 9, 9, 6])), 4);
}

#[test]
fn salts_never_share() {
    let mut cache = cache(2, 16, 0);
    let tokens = tokens(0, 7);
    let salted = |salt| Prompt { tokens: &tokens, salt, use_prefix_cache: true };
    for salt in [0, 1, u64::MAX] {
        assert_eq!(cache.cached_tokens(&salted(salt)), 0);
        cache.allocate(id(salt), salted(salt)).unwrap();
        cache.mark_computed(id(salt), &tokens).unwrap();
        assert_eq!(cache.cached_tokens(&salted(salt)), 6);
    }
    assert_eq!(cache.device_usage().used, 12);
    cache.audit().unwrap();
}

#[test]
fn prompt_logprobs_bypass_hits_but_still_share_afterwards() {
    let mut cache = cache(4, 16, 0);
    let tokens = tokens(0, 10);
    fill(&mut cache, 1, &tokens);
    let bypass = Prompt { tokens: &tokens, salt: 0, use_prefix_cache: false };
    assert_eq!(cache.allocate(id(2), bypass).unwrap().cached_tokens, 0);
    assert_eq!(cache.device_usage().used, 6);
    cache.mark_computed(id(2), &tokens).unwrap();
    assert_eq!(cache.device_usage().used, 4, "the computed blocks merged");
    assert_eq!(cache.stats().lookup_tokens, 10, "a bypass is no look-up");
    cache.audit().unwrap();
}

#[test]
fn a_filled_block_with_known_content_merges_into_the_cached_one() {
    let mut cache = cache(4, 16, 0);
    fill(&mut cache, 1, &tokens(0, 6));
    fill(&mut cache, 2, &tokens(0, 6));
    assert_ne!(table(&cache, 1)[1], table(&cache, 2)[1], "partial blocks are mutable, each has its own");
    extend(&mut cache, 1, &[6, 7]);
    assert_eq!(cache.device_usage().used, 3);
    extend(&mut cache, 2, &[6, 7]);
    assert_eq!(table(&cache, 1), table(&cache, 2));
    assert_eq!(cache.device_usage().used, 2);
}

#[test]
fn a_merge_never_takes_a_free_block() {
    let mut cache = cache(4, 3, 0);
    fill(&mut cache, 1, &tokens(0, 4));
    free(&mut cache, 1);
    // Two sequences share a block that has the same content, computed without looking.
    let tokens = tokens(0, 4);
    cache.allocate(id(2), Prompt { tokens: &tokens, salt: 0, use_prefix_cache: false }).unwrap();
    cache.fork(id(2), id(3)).unwrap();
    let free = cache.device_usage().free;
    cache.mark_computed(id(2), &tokens).unwrap();
    assert_eq!(cache.device_usage().free, free);
    cache.mark_computed(id(3), &tokens).unwrap();
    assert_eq!(cache.device_usage().free, free);
    assert_eq!(table(&cache, 2), table(&cache, 3));
    cache.audit().unwrap();
}

#[test]
fn the_tail_is_evicted_before_the_head() {
    for (taken, left) in [(1, 12), (2, 8), (3, 4), (4, 0)] {
        let mut cache = cache(4, 4, 0);
        fill(&mut cache, 1, &tokens(0, 16));
        free(&mut cache, 1);
        cache.allocate(id(2), prompt(&tokens(1000, 4 * taken))).unwrap();
        assert_eq!(cache.cached_tokens(&prompt(&tokens(0, 17))), left, "{taken} blocks taken");
        assert_eq!(cache.stats().evicted_blocks, taken as u64);
        cache.audit().unwrap();
    }
}

#[test]
fn the_least_recently_used_is_evicted_first() {
    let mut cache = cache(4, 3, 0);
    for (sequence, start) in [(1, 0), (2, 100), (3, 200)] {
        fill(&mut cache, sequence, &tokens(start, 4));
    }
    for sequence in [2, 1, 3] {
        free(&mut cache, sequence);
    }
    // Using the second prompt again makes it the most recent one.
    assert_eq!(cache.cached_tokens(&prompt(&tokens(100, 5))), 4, "looking does not count as use");
    fill(&mut cache, 4, &tokens(300, 3));
    assert_eq!(cache.cached_tokens(&prompt(&tokens(100, 5))), 0, "freed first, evicted first");
    assert_eq!(cache.cached_tokens(&prompt(&tokens(0, 5))), 4);
    assert_eq!(cache.cached_tokens(&prompt(&tokens(200, 5))), 4);
}

#[test]
fn empty_blocks_are_taken_before_anything_is_evicted() {
    let mut cache = cache(4, 4, 0);
    fill(&mut cache, 1, &tokens(0, 8));
    free(&mut cache, 1);
    fill(&mut cache, 2, &tokens(100, 7));
    assert_eq!(cache.stats().evicted_blocks, 0);
    assert_eq!(cache.cached_tokens(&prompt(&tokens(0, 9))), 8);
}

#[test]
fn duplicate_contents_are_evicted_singly() {
    let mut cache = cache(4, 4, 0);
    // Both compute the same content at the same time, without seeing each other.
    let tokens = tokens(0, 4);
    for sequence in [1, 2] {
        cache.allocate(id(sequence), prompt(&tokens)).unwrap();
    }
    for sequence in [1, 2] {
        cache.mark_computed(id(sequence), &tokens).unwrap();
    }
    free(&mut cache, 1);
    free(&mut cache, 2);
    fill(&mut cache, 3, &common::tokens(100, 11));
    assert_eq!(cache.stats().evicted_blocks, 0, "the duplicate was not kept as a second entry");
    cache.append(id(3), 2).unwrap();
    assert_eq!(cache.stats().evicted_blocks, 1, "and the one entry is evicted once");
    assert_eq!(cache.cached_tokens(&prompt(&[0, 1, 2, 3, 4])), 0);
    cache.audit().unwrap();
}

#[test]
fn pinned_prefixes_outlive_any_pressure() {
    let mut cache = cache(4, 4, 0);
    fill(&mut cache, 1, &tokens(0, 8));
    free(&mut cache, 1);
    let pin = cache.pin_prefix(prompt(&tokens(0, 8))).unwrap();
    assert_eq!(pin.tokens, 8, "a pin may cover the last token");
    assert_eq!(cache.device_usage().used, 2);
    for round in 0..3 {
        fill(&mut cache, 2, &tokens(1000 * (round + 1), 8));
        assert!(cache.allocate(id(3), prompt(&[1])).is_err());
        free(&mut cache, 2);
    }
    assert_eq!(cache.cached_tokens(&prompt(&tokens(0, 9))), 8);
    assert_eq!(cache.reset_prefix_cache(), Err(CacheError::InUse { used: 2 }));
    cache.unpin_prefix(pin.id).unwrap();
    assert_eq!(cache.device_usage().free, 4);
    assert!(matches!(cache.unpin_prefix(pin.id), Err(CacheError::UnknownPin(_))));
    fill(&mut cache, 2, &tokens(9000, 13));
    assert_eq!(cache.cached_tokens(&prompt(&tokens(0, 9))), 0);
}

#[test]
fn only_what_is_cached_can_be_pinned() {
    let mut cache = cache(4, 4, 0);
    assert_eq!(cache.pin_prefix(prompt(&tokens(0, 8))), Err(CacheError::NotCached));
    fill(&mut cache, 1, &tokens(0, 6));
    assert_eq!(cache.pin_prefix(prompt(&tokens(0, 8))).unwrap().tokens, 4);
    let mut off = KvCacheManager::new(CacheConfig { prefix_cache: false, ..config(4, 4, 0) }).unwrap();
    fill(&mut off, 1, &tokens(0, 8));
    assert_eq!(off.pin_prefix(prompt(&tokens(0, 8))), Err(CacheError::NotCached));
}

#[test]
fn a_pinned_block_is_copied_before_it_is_rewritten() {
    let mut cache = cache(4, 4, 0);
    fill(&mut cache, 1, &tokens(0, 4));
    cache.pin_prefix(prompt(&tokens(0, 4))).unwrap();
    cache.truncate(id(1), 2).unwrap();
    extend(&mut cache, 1, &[70, 80]);
    assert_eq!(cache.take_block_ops().copy.len(), 1);
    cache.confirm_block_ops().unwrap();
    assert_eq!(cache.cached_tokens(&prompt(&tokens(0, 5))), 4);
    assert_eq!(cache.cached_tokens(&prompt(&[0, 1, 70, 80, 5])), 4);
}

#[test]
fn reset_is_refused_while_in_use() {
    let mut cache = cache(4, 8, 8);
    fill(&mut cache, 1, &tokens(0, 8));
    assert_eq!(cache.reset_prefix_cache(), Err(CacheError::InUse { used: 2 }));
    cache.swap_out(&[id(1)]).unwrap();
    assert_eq!(cache.reset_prefix_cache(), Err(CacheError::InUse { used: 4 }), "being copied");
    settle(&mut cache);
    assert_eq!(cache.reset_prefix_cache(), Err(CacheError::InUse { used: 2 }), "it would come back");
    free(&mut cache, 1);
    assert_eq!(cache.cached_tokens(&prompt(&tokens(0, 9))), 8);
    assert_eq!(cache.reset_prefix_cache(), Ok(2));
    assert_eq!(cache.cached_tokens(&prompt(&tokens(0, 9))), 0);
    assert_eq!(cache.device_usage().free, 8);
    cache.audit().unwrap();
}

#[test]
fn without_a_prefix_cache_nothing_is_found_or_merged() {
    let mut cache = KvCacheManager::new(CacheConfig { prefix_cache: false, ..config(4, 8, 0) }).unwrap();
    assert_eq!(fill(&mut cache, 1, &tokens(0, 9)), 0);
    assert_eq!(fill(&mut cache, 2, &tokens(0, 9)), 0);
    assert_eq!(cache.device_usage().used, 6);
    cache.truncate(id(1), 5).unwrap();
    extend(&mut cache, 1, &tokens(0, 9));
    assert_eq!(cache.stats().lookup_tokens, 0);
}
