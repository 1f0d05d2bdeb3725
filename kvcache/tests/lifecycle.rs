//! Allocate, append, fork with copy-on-write, truncate, free, and the refusals of each.

#![allow(clippy::unwrap_used, reason = "a helper that fails should fail the test that called it")]

mod common;

use common::*;
use pagewise_kvcache::{BlockCopy, CacheConfig, CacheError, CacheManager, KvCacheManager, KvGroup};

#[test]
fn a_sequence_takes_a_block_for_each_block_size_tokens() {
    for block_size in [1, 2, 4, 8, 16, 32, 64, 128, 256] {
        let mut cache = cache(block_size, 1024, 0);
        for (sequence, len) in [1, 15, 16, 17, 255, 256, 257].into_iter().enumerate() {
            fill(&mut cache, sequence as u64, &tokens(sequence as u32 * 1000, len));
            assert_eq!(table(&cache, sequence as u64).len(), len.div_ceil(block_size));
        }
    }
}

#[test]
fn freed_ids_are_reused() {
    let mut cache = cache(16, 4, 0);
    fill(&mut cache, 1, &tokens(0, 20));
    let before = table(&cache, 1);
    free(&mut cache, 1);
    assert_eq!(cache.device_usage().free, 4);
    fill(&mut cache, 2, &tokens(1000, 64));
    let after = table(&cache, 2);
    assert!(before.iter().all(|block| after.contains(block)));
}

#[test]
fn fork_adds_no_block_and_copies_only_a_partial_last_block() {
    for len in [1, 15, 16, 17, 31, 32, 129] {
        for append in [1, 16, 129] {
            for child_first in [false, true] {
                let mut cache = cache(16, 64, 0);
                fill(&mut cache, 1, &tokens(0, len));
                let used = cache.device_usage().used;
                cache.fork(id(1), id(2)).unwrap();
                assert_eq!(cache.device_usage().used, used, "fork adds no block");
                assert_eq!(table(&cache, 1), table(&cache, 2));

                let (first, second) = if child_first { (2, 1) } else { (1, 2) };
                let last = *table(&cache, 1).last().unwrap();
                cache.append(id(first), append).unwrap();
                cache.append(id(second), append).unwrap();
                cache.audit().unwrap();
                let copies = cache.take_block_ops().copy;
                if len % 16 == 0 {
                    assert!(copies.is_empty(), "a full last block is shared for good");
                } else {
                    let copy = table(&cache, first)[len / 16];
                    assert_eq!(
                        copies,
                        [BlockCopy { group: 0, src: last, dst: copy }],
                        "the first writer copies"
                    );
                    assert_eq!(table(&cache, second)[len / 16], last, "the second writes in place");
                }
                let shared = len / 16;
                assert_eq!(table(&cache, 1)[..shared], table(&cache, 2)[..shared]);
                assert!(
                    table(&cache, 1)[shared..]
                        .iter()
                        .all(|block| !table(&cache, 2)[shared..].contains(block))
                );
            }
        }
    }
}

#[test]
fn a_third_owner_still_forces_a_copy() {
    let mut cache = cache(4, 8, 0);
    fill(&mut cache, 1, &[1, 2, 3]);
    cache.fork(id(1), id(2)).unwrap();
    cache.fork(id(1), id(3)).unwrap();
    for sequence in 1..=3 {
        cache.append(id(sequence), 1).unwrap();
    }
    assert_eq!(cache.take_block_ops().copy.len(), 2);
    assert_eq!(cache.stats().copied_blocks, 2);
    cache.audit().unwrap();
}

#[test]
fn copies_of_a_step_never_depend_on_each_other() {
    let mut cache = cache(4, 8, 0);
    fill(&mut cache, 1, &[1, 2]);
    let source = table(&cache, 1)[0];
    cache.fork(id(1), id(2)).unwrap();
    cache.append(id(2), 1).unwrap();
    cache.truncate(id(2), 2).unwrap();
    cache.fork(id(2), id(3)).unwrap();
    cache.append(id(3), 1).unwrap();
    let copies = cache.take_block_ops().copy;
    assert_eq!(copies.len(), 2);
    assert!(copies.iter().all(|copy| copy.src == source), "the second copy reads the first one's source");
    cache.audit().unwrap();
}

#[test]
fn copied_blocks_stay_pending_until_confirmed() {
    let mut cache = cache(4, 4, 0);
    fill(&mut cache, 1, &[1, 2, 3]);
    cache.fork(id(1), id(2)).unwrap();
    cache.append(id(2), 1).unwrap();
    let usage = cache.device_usage();
    assert_eq!((usage.free, usage.used, usage.pending), (2, 0, 2));
    free(&mut cache, 1);
    free(&mut cache, 2);
    assert_eq!(cache.device_usage().free, 2, "a block being copied is not free, even without an owner");
    cache.take_block_ops();
    assert_eq!(cache.device_usage().free, 2, "taken is not confirmed");
    cache.confirm_block_ops().unwrap();
    assert_eq!(cache.device_usage().free, 4);
    assert_eq!(cache.confirm_block_ops(), Err(CacheError::NothingToConfirm));
    cache.audit().unwrap();
}

#[test]
fn truncate_gives_back_blocks_and_computed_tokens() {
    let mut cache = cache(4, 8, 0);
    fill(&mut cache, 1, &tokens(0, 14));
    cache.truncate(id(1), 6).unwrap();
    assert_eq!((cache.len(id(1)), cache.computed(id(1))), (Some(6), Some(6)));
    assert_eq!(table(&cache, 1).len(), 2);
    cache.audit().unwrap();
    // The same continuation is known again, a different one is not.
    extend(&mut cache, 1, &[6, 7, 8, 9]);
    free(&mut cache, 1);
    assert_eq!(cache.cached_tokens(&prompt(&tokens(0, 12))), 8);
    cache.truncate(id(1), 0).unwrap_err();
}

#[test]
fn what_truncation_exposes_is_not_overwritten_while_shared() {
    let mut cache = cache(4, 8, 0);
    fill(&mut cache, 1, &tokens(0, 8));
    cache.fork(id(1), id(2)).unwrap();
    cache.truncate(id(1), 6).unwrap();
    extend(&mut cache, 1, &[60, 70]);
    assert_ne!(table(&cache, 1)[1], table(&cache, 2)[1]);
    assert_eq!(cache.take_block_ops().copy.len(), 1);
}

#[test]
fn a_cached_block_that_is_rewritten_is_no_longer_found() {
    let mut cache = cache(4, 8, 0);
    fill(&mut cache, 1, &tokens(0, 8));
    cache.truncate(id(1), 6).unwrap();
    assert_eq!(cache.cached_tokens(&prompt(&tokens(0, 9))), 8, "nothing is written yet");
    cache.append(id(1), 1).unwrap();
    assert_eq!(cache.cached_tokens(&prompt(&tokens(0, 9))), 4);
    cache.audit().unwrap();
}

#[test]
fn an_emptied_sequence_can_grow_again() {
    let mut cache = cache(4, 8, 0);
    fill(&mut cache, 1, &tokens(0, 8));
    cache.truncate(id(1), 0).unwrap();
    assert!(table(&cache, 1).is_empty());
    extend(&mut cache, 1, &tokens(50, 5));
    assert_eq!(table(&cache, 1).len(), 2);
}

#[test]
fn computing_in_chunks_is_computing_at_once() {
    for chunk in [1, 2, 3, 4, 5, 7, 16] {
        let mut cache = cache(4, 8, 0);
        let tokens = tokens(0, 13);
        cache.allocate(id(1), prompt(&tokens)).unwrap();
        for chunk in tokens.chunks(chunk) {
            cache.mark_computed(id(1), chunk).unwrap();
            cache.audit().unwrap();
        }
        assert_eq!(cache.computed(id(1)), Some(13));
        assert_eq!(cache.cached_tokens(&prompt(&tokens)), 12);
    }
}

#[test]
fn refusals_say_why_and_change_nothing() {
    let mut cache = cache(4, 4, 0);
    fill(&mut cache, 1, &tokens(0, 10));
    cache.fork(id(1), id(2)).unwrap();
    let before = cache.clone();

    assert_eq!(cache.allocate(id(1), prompt(&[1])), Err(CacheError::SequenceExists(id(1))));
    assert_eq!(cache.allocate(id(3), prompt(&[])), Err(CacheError::EmptyPrompt(id(3))));
    assert_eq!(
        cache.allocate(id(3), prompt(&tokens(500, 8))),
        Err(CacheError::OutOfBlocks { wanted: 2, free: 1 })
    );
    // One more block for the tokens, and one for the copy of the shared last block.
    assert!(!cache.can_append(id(2), 3));
    assert_eq!(cache.append(id(2), 3), Err(CacheError::OutOfBlocks { wanted: 2, free: 1 }));
    assert!(!cache.can_append(id(2), usize::MAX));
    assert!(cache.append(id(2), usize::MAX).is_err());
    assert_eq!(cache.append(id(9), 1), Err(CacheError::UnknownSequence(id(9))));
    assert_eq!(
        cache.mark_computed(id(1), &[7]),
        Err(CacheError::BeyondAllocated { sequence: id(1), len: 10, wanted: 11 })
    );
    assert_eq!(cache.fork(id(9), id(3)), Err(CacheError::UnknownSequence(id(9))));
    assert_eq!(cache.fork(id(1), id(2)), Err(CacheError::SequenceExists(id(2))));
    assert_eq!(
        cache.truncate(id(1), 11),
        Err(CacheError::BeyondAllocated { sequence: id(1), len: 10, wanted: 11 })
    );
    assert_eq!(cache.free(id(9)), Err(CacheError::UnknownSequence(id(9))));
    assert_eq!(cache.swap_out(&[id(1), id(2)]), Err(CacheError::OutOfHostBlocks { wanted: 3, free: 0 }));
    assert_eq!(cache.swap_in(&[id(1)]), Err(CacheError::NotOnHost(id(1))));
    assert_eq!(cache.confirm_block_ops(), Err(CacheError::NothingToConfirm));
    assert!(cache == before, "a failed call changes nothing");
}

#[test]
fn an_allocation_failure_leaves_reference_counts_untouched() {
    let mut cache = cache(4, 5, 0);
    fill(&mut cache, 1, &tokens(0, 12));
    let blocks = table(&cache, 1);
    let mut longer = tokens(0, 12);
    longer.extend(tokens(500, 12));
    assert!(matches!(
        cache.allocate(id(2), prompt(&longer)),
        Err(CacheError::OutOfBlocks { wanted: 3, free: 2 })
    ));
    assert!(blocks.iter().all(|&block| cache.references(block) == 1));
    cache.audit().unwrap();
}

#[test]
fn absurd_configurations_are_refused_with_a_sentence() {
    let good = config(16, 8, 0);
    let cases = [
        (CacheConfig { block_size: 0, ..good.clone() }, "block size 0"),
        (CacheConfig { block_size: 3, ..good.clone() }, "block size 3"),
        (CacheConfig { block_size: 512, ..good.clone() }, "block size 512"),
        (CacheConfig { device_blocks: 0, ..good.clone() }, "no blocks"),
        (CacheConfig { device_blocks: 1 << 31, ..good.clone() }, "too many"),
        (CacheConfig { host_blocks: usize::MAX, ..good.clone() }, "too many"),
        (CacheConfig { groups: vec![], ..good.clone() }, "no KV group"),
        (CacheConfig { groups: vec![KvGroup { window: Some(0) }], ..good.clone() }, "window of KV group 0"),
        (CacheConfig { watermark: 1.0, ..good.clone() }, "watermark 1"),
        (CacheConfig { watermark: -0.1, ..good.clone() }, "watermark -0.1"),
        (CacheConfig { watermark: f64::NAN, ..good }, "watermark NaN"),
    ];
    for (config, wanted) in cases {
        let message = KvCacheManager::new(config).unwrap_err().to_string();
        assert!(message.contains(wanted), "{message}");
    }
}
