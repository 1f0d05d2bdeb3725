//! Groups that are dropped and rebuilt: what they give back, and that they come back no larger.

#![allow(clippy::unwrap_used, reason = "a helper that fails should fail the test that called it")]

mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::*;
use pagewise_kvcache::{
    Admission, CacheConfig, CacheError, CacheManager, KvCacheManager, RebuildStep, RecomputePlan,
};

fn plain(device: usize, host: usize) -> KvCacheManager {
    KvCacheManager::new(CacheConfig { prefix_cache: false, ..config(4, device, host) }).unwrap()
}

/// Carries out a plan as an engine would.
fn rebuild(cache: &mut KvCacheManager, plan: &RecomputePlan, texts: &BTreeMap<u64, Vec<u32>>) {
    for &step in &plan.steps {
        match step {
            RebuildStep::Grow { sequence, len, computed } => {
                let text = &texts[&sequence.0];
                match cache.len(sequence) {
                    Some(has) => cache.append(sequence, len - has).unwrap(),
                    None => drop(cache.allocate(sequence, prompt(&text[..len])).unwrap()),
                }
                let has = cache.computed(sequence).unwrap();
                if computed > has {
                    cache.mark_computed(sequence, &text[has..computed]).unwrap();
                }
            }
            RebuildStep::Fork { parent, child } => cache.fork(parent, child).unwrap(),
            RebuildStep::Truncate { sequence, len } => cache.truncate(sequence, len).unwrap(),
        }
        cache.audit().unwrap();
    }
}

fn distinct(cache: &KvCacheManager, group: &[u64]) -> usize {
    group.iter().flat_map(|&sequence| table(cache, sequence)).collect::<BTreeSet<_>>().len()
}

/// Drops and rebuilds a group, and checks that sizes and lengths come back.
fn round_trip(cache: &mut KvCacheManager, group: &[u64], texts: &BTreeMap<u64, Vec<u32>>) -> RecomputePlan {
    settle(cache);
    let before = distinct(cache, group);
    let lens: Vec<_> = group.iter().map(|&s| (cache.len(id(s)), cache.computed(id(s)))).collect();
    let ids: Vec<_> = group.iter().map(|&s| id(s)).collect();
    let plan = cache.drop_for_recompute(&ids).unwrap();
    assert_eq!(plan.held_blocks, before);
    assert!(group.iter().all(|&s| !cache.contains(id(s))));
    rebuild(cache, &plan, texts);
    assert!(distinct(cache, group) <= before, "{} blocks after, {before} before", distinct(cache, group));
    let after: Vec<_> = group.iter().map(|&s| (cache.len(id(s)), cache.computed(id(s)))).collect();
    assert_eq!(after, lens);
    plan
}

#[test]
fn parallel_samples_share_their_prompt_again() {
    let mut cache = plain(32, 0);
    let mut texts = BTreeMap::from([(1, tokens(0, 10))]);
    fill(&mut cache, 1, &texts[&1]);
    for child in 2..=4 {
        cache.fork(id(1), id(child)).unwrap();
        texts.insert(child, texts[&1].clone());
    }
    for (&sequence, text) in &mut texts {
        let more = tokens(sequence as u32 * 100, 3 + sequence as usize);
        extend(&mut cache, sequence, &more);
        text.extend(more);
    }
    let plan = round_trip(&mut cache, &[1, 2, 3, 4], &texts);
    assert_eq!(plan.freed_blocks, plan.held_blocks);
    // The longest comes first; the others are forked from it where the shared blocks end.
    assert_eq!(plan.steps[0], RebuildStep::Grow { sequence: id(4), len: 8, computed: 8 });
    assert_eq!(plan.steps[1], RebuildStep::Fork { parent: id(4), child: id(3) });
}

#[test]
fn a_tree_of_beams_parts_where_it_parted() {
    let mut cache = plain(64, 0);
    let mut texts = BTreeMap::from([(1, tokens(0, 5))]);
    fill(&mut cache, 1, &texts[&1]);
    for (parent, child, steps) in [(1, 2, 6), (2, 3, 7), (1, 4, 2), (3, 5, 0), (2, 6, 9)] {
        cache.fork(id(parent), id(child)).unwrap();
        texts.insert(child, texts[&parent].clone());
        let alive: Vec<u64> = texts.keys().copied().collect();
        for sequence in alive {
            let more = tokens(sequence as u32 * 1000 + child as u32 * 50, steps);
            extend(&mut cache, sequence, &more);
            texts.get_mut(&sequence).unwrap().extend(more);
        }
    }
    round_trip(&mut cache, &[1, 2, 3, 4, 5, 6], &texts);
    round_trip(&mut cache, &[6, 3, 1, 5, 2, 4], &texts);
    round_trip(&mut cache, &[5, 2], &texts);
}

#[test]
fn a_shared_partial_block_stays_one_block() {
    for (cut, computed) in [(6, 6), (7, 7), (6, 5)] {
        let mut cache = plain(16, 0);
        let text = tokens(0, 7);
        cache.allocate(id(1), prompt(&text)).unwrap();
        cache.mark_computed(id(1), &text[..computed]).unwrap();
        cache.fork(id(1), id(2)).unwrap();
        cache.truncate(id(2), cut).unwrap();
        let texts = BTreeMap::from([(1, text.clone()), (2, text.clone())]);
        round_trip(&mut cache, &[1, 2], &texts);
        assert_eq!(distinct(&cache, &[1, 2]), 2);
        round_trip(&mut cache, &[2, 1], &texts);
        assert_eq!(distinct(&cache, &[1, 2]), 2);
    }
}

#[test]
fn the_prefix_cache_makes_the_return_cheaper() {
    let mut cache = cache(4, 16, 0);
    let text = tokens(0, 14);
    fill(&mut cache, 1, &text);
    let plan = cache.drop_for_recompute(&[id(1)]).unwrap();
    assert_eq!(plan.steps, [RebuildStep::Grow { sequence: id(1), len: 14, computed: 14 }]);
    assert_eq!(cache.allocate(id(1), prompt(&text)).unwrap().cached_tokens, 12);
}

#[test]
fn what_outsiders_hold_is_not_given_back() {
    let mut cache = plain(16, 0);
    fill(&mut cache, 1, &tokens(0, 8));
    cache.fork(id(1), id(2)).unwrap();
    extend(&mut cache, 2, &[70]);
    let plan = cache.drop_for_recompute(&[id(2)]).unwrap();
    assert_eq!((plan.freed_blocks, plan.held_blocks), (1, 3));
}

#[test]
fn a_swapped_out_group_can_be_dropped_too() {
    let mut cache = plain(8, 8);
    let text = tokens(0, 10);
    fill(&mut cache, 1, &text);
    cache.swap_out(&[id(1)]).unwrap();
    settle(&mut cache);
    let plan = cache.drop_for_recompute(&[id(1)]).unwrap();
    assert_eq!((plan.freed_blocks, plan.held_blocks), (0, 3));
    assert_eq!(cache.host_usage().free, 8);
    rebuild(&mut cache, &plan, &BTreeMap::from([(1, text)]));
}

#[test]
fn admission_of_the_return() {
    let mut cache = plain(4, 0);
    fill(&mut cache, 1, &tokens(0, 12));
    let plan = cache.drop_for_recompute(&[id(1)]).unwrap();
    assert_eq!(cache.can_rebuild(&plan), Admission::Now);
    fill(&mut cache, 2, &[1]);
    assert_eq!(cache.can_rebuild(&plan), Admission::Later);
}

#[test]
fn refusals_change_nothing() {
    let mut cache = plain(4, 0);
    fill(&mut cache, 1, &tokens(0, 12));
    let before = cache.clone();
    assert_eq!(cache.drop_for_recompute(&[id(1), id(2)]), Err(CacheError::UnknownSequence(id(2))));
    assert_eq!(cache.drop_for_recompute(&[id(1), id(1)]), Err(CacheError::NamedTwice(id(1))));
    assert!(cache == before);
}
