//! Groups to the host and back: sharing kept, outsiders left alone, counts conserved, refusals harmless.

#![allow(clippy::unwrap_used, reason = "a helper that fails should fail the test that called it")]

mod common;

use common::*;
use pagewise_kvcache::{Admission, CacheConfig, CacheError, CacheManager, KvCacheManager, Prompt};

/// Prefix cache off, so that every block has to be copied.
fn plain(device: usize, host: usize) -> KvCacheManager {
    KvCacheManager::new(CacheConfig { prefix_cache: false, ..config(4, device, host) }).unwrap()
}

#[test]
fn a_group_goes_and_returns_with_its_sharing() {
    let mut cache = plain(16, 16);
    fill(&mut cache, 1, &tokens(0, 10));
    cache.fork(id(1), id(2)).unwrap();
    extend(&mut cache, 2, &[70]);
    settle(&mut cache);
    let used = cache.device_usage().used;
    assert_eq!(used, 4);

    cache.swap_out(&[id(1), id(2)]).unwrap();
    cache.audit().unwrap();
    assert_eq!(cache.block_table(id(1), 0), None, "nothing to run with");
    assert_eq!(cache.is_swapped_out(id(1)), Some(true));
    assert_eq!((cache.device_usage().pending, cache.host_usage().pending), (4, 4));
    assert_eq!(cache.device_usage().free, 12, "not free before the copy is confirmed");
    assert_eq!(cache.can_swap_in(&[id(1), id(2)]), Admission::Later);
    assert_eq!(cache.swap_in(&[id(1), id(2)]), Err(CacheError::Pending(id(1))));
    let ops = cache.take_block_ops();
    assert_eq!((ops.swap_out.len(), ops.swap_in.len(), ops.copy.len()), (4, 0, 0));
    cache.confirm_block_ops().unwrap();
    assert_eq!((cache.device_usage().free, cache.host_usage().used), (16, 4));

    assert_eq!(cache.can_swap_in(&[id(1), id(2)]), Admission::Now);
    cache.swap_in(&[id(1), id(2)]).unwrap();
    assert_eq!(cache.take_block_ops().swap_in.len(), 4);
    cache.confirm_block_ops().unwrap();
    assert_eq!((cache.device_usage().used, cache.host_usage().free), (4, 16));
    assert_eq!(table(&cache, 1)[..2], table(&cache, 2)[..2]);
    assert_ne!(table(&cache, 1)[2], table(&cache, 2)[2]);
    let stats = cache.stats();
    assert_eq!((stats.swapped_out_blocks, stats.swapped_in_blocks), (4, 4));
    cache.audit().unwrap();
}

#[test]
fn blocks_shared_with_an_outsider_stay_on_the_device() {
    let mut cache = plain(16, 16);
    fill(&mut cache, 1, &tokens(0, 10));
    cache.fork(id(1), id(2)).unwrap();
    extend(&mut cache, 2, &[70]);
    settle(&mut cache);
    let outside = table(&cache, 1);
    cache.swap_out(&[id(2)]).unwrap();
    assert_eq!(cache.take_block_ops().swap_out.len(), 1, "only its own last block");
    cache.confirm_block_ops().unwrap();
    assert_eq!(table(&cache, 1), outside);
    assert_eq!(cache.references(outside[0]), 2);
    free(&mut cache, 1);
    assert_eq!(cache.device_usage().used, 2, "still held from the host");
    cache.swap_in(&[id(2)]).unwrap();
    settle(&mut cache);
    assert_eq!(table(&cache, 2)[..2], outside[..2]);
}

#[test]
fn an_impossible_swap_says_so_and_changes_nothing() {
    let mut cache = plain(6, 2);
    fill(&mut cache, 1, &tokens(0, 12));
    fill(&mut cache, 2, &tokens(100, 8));
    let before = cache.clone();
    assert_eq!(cache.swap_out(&[id(1)]), Err(CacheError::OutOfHostBlocks { wanted: 3, free: 2 }));
    assert_eq!(cache.swap_out(&[id(2), id(9)]), Err(CacheError::UnknownSequence(id(9))));
    assert_eq!(cache.swap_out(&[id(2), id(2)]), Err(CacheError::NamedTwice(id(2))));
    assert_eq!(cache.swap_in(&[id(2)]), Err(CacheError::NotOnHost(id(2))));
    assert_eq!(cache.can_swap_in(&[id(2)]), Admission::Never);
    assert!(cache == before);

    cache.swap_out(&[id(2)]).unwrap();
    settle(&mut cache);
    fill(&mut cache, 3, &tokens(200, 8));
    let before = cache.clone();
    assert_eq!(cache.can_swap_in(&[id(2)]), Admission::Later);
    assert_eq!(cache.swap_in(&[id(2)]), Err(CacheError::OutOfBlocks { wanted: 2, free: 1 }));
    for refused in [
        cache.append(id(2), 1),
        cache.mark_computed(id(2), &[]),
        cache.fork(id(2), id(7)),
        cache.swap_out(&[id(2)]),
    ] {
        assert_eq!(refused, Err(CacheError::NotOnDevice(id(2))));
    }
    assert!(!cache.can_append(id(2), 1));
    assert!(cache == before);
}

#[test]
fn a_block_being_copied_cannot_be_swapped_out() {
    let mut cache = plain(8, 8);
    fill(&mut cache, 1, &tokens(0, 3));
    cache.fork(id(1), id(2)).unwrap();
    cache.append(id(2), 1).unwrap();
    let before = cache.clone();
    // The step's swap-outs come before its copies: the copy would not have been made yet.
    assert_eq!(cache.swap_out(&[id(2)]), Err(CacheError::Pending(id(2))));
    assert!(cache == before);
    settle(&mut cache);
    cache.swap_out(&[id(2)]).unwrap();
}

#[test]
fn a_swapped_out_sequence_can_be_freed_or_cut() {
    let mut cache = plain(8, 8);
    fill(&mut cache, 1, &tokens(0, 12));
    cache.swap_out(&[id(1)]).unwrap();
    cache.truncate(id(1), 5).unwrap();
    cache.audit().unwrap();
    settle(&mut cache);
    assert_eq!(cache.host_usage().used, 2);
    free(&mut cache, 1);
    assert_eq!((cache.host_usage().free, cache.device_usage().free), (8, 8));
}

#[test]
fn half_a_group_may_return_first() {
    let mut cache = plain(16, 16);
    fill(&mut cache, 1, &tokens(0, 8));
    cache.fork(id(1), id(2)).unwrap();
    cache.swap_out(&[id(1), id(2)]).unwrap();
    settle(&mut cache);
    cache.swap_in(&[id(1)]).unwrap();
    settle(&mut cache);
    assert_eq!((cache.device_usage().used, cache.host_usage().used), (2, 2));
    cache.swap_in(&[id(2)]).unwrap();
    settle(&mut cache);
    assert_eq!((cache.device_usage().used, cache.host_usage().used), (4, 0));
}

#[test]
fn what_the_prefix_cache_still_has_is_not_copied_back() {
    let mut cache = cache(4, 8, 8);
    fill(&mut cache, 1, &tokens(0, 10));
    cache.swap_out(&[id(1)]).unwrap();
    settle(&mut cache);
    assert_eq!(cache.cached_tokens(&prompt(&tokens(0, 9))), 8, "what left is still findable");
    cache.swap_in(&[id(1)]).unwrap();
    assert_eq!(cache.take_block_ops().swap_in.len(), 1, "only the partial block");
    cache.confirm_block_ops().unwrap();
    cache.audit().unwrap();
}

#[test]
fn what_comes_back_is_findable_again() {
    let mut cache = cache(4, 4, 8);
    fill(&mut cache, 1, &tokens(0, 12));
    cache.swap_out(&[id(1)]).unwrap();
    settle(&mut cache);
    fill(&mut cache, 2, &tokens(100, 16));
    free(&mut cache, 2);
    assert_eq!(cache.cached_tokens(&prompt(&tokens(0, 13))), 0, "evicted meanwhile");
    cache.swap_in(&[id(1)]).unwrap();
    assert_eq!(cache.cached_tokens(&prompt(&tokens(0, 13))), 0, "not while the copy is under way");
    settle(&mut cache);
    assert_eq!(cache.cached_tokens(&prompt(&tokens(0, 13))), 12);
}

#[test]
fn what_a_failed_copy_left_behind_is_never_found() {
    let mut cache = cache(4, 4, 8);
    fill(&mut cache, 1, &tokens(0, 12));
    cache.swap_out(&[id(1)]).unwrap();
    settle(&mut cache);
    fill(&mut cache, 2, &tokens(100, 16));
    free(&mut cache, 2);
    cache.swap_in(&[id(1)]).unwrap();
    let before = cache.clone();
    assert_eq!(cache.abandon_block_ops(), Err(CacheError::NothingToConfirm));
    assert!(cache == before, "nothing was taken");
    cache.take_block_ops();
    cache.abandon_block_ops().unwrap();
    cache.audit().unwrap();
    free(&mut cache, 1);
    assert_eq!(cache.cached_tokens(&prompt(&tokens(0, 13))), 0);
    assert_eq!(cache.device_usage().free, 4);
}

#[test]
fn a_swapped_in_sequence_runs_in_the_same_step() {
    let mut cache = cache(4, 8, 8);
    fill(&mut cache, 1, &tokens(0, 6));
    cache.swap_out(&[id(1)]).unwrap();
    settle(&mut cache);
    cache.swap_in(&[id(1)]).unwrap();
    cache.append(id(1), 1).unwrap();
    let ops = cache.take_block_ops();
    assert_eq!((ops.swap_in.len(), ops.copy.len()), (1, 0));
    cache.mark_computed(id(1), &[6]).unwrap();
    cache.confirm_block_ops().unwrap();
    cache.audit().unwrap();
}

#[test]
fn a_group_too_large_for_the_watermark_still_returns_to_an_empty_device() {
    let config = CacheConfig { watermark: 0.5, prefix_cache: false, ..config(4, 8, 8) };
    let mut cache = KvCacheManager::new(config).unwrap();
    fill(&mut cache, 1, &tokens(0, 28));
    cache.swap_out(&[id(1)]).unwrap();
    settle(&mut cache);
    cache.allocate(id(2), Prompt { tokens: &[1], salt: 0, use_prefix_cache: true }).unwrap();
    assert_eq!(cache.can_swap_in(&[id(1)]), Admission::Later, "it fits, but leaves nothing to grow in");
    free(&mut cache, 2);
    assert_eq!(cache.can_swap_in(&[id(1)]), Admission::Now);
}
