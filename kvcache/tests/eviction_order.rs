//! The prefix cache against a naive model of it: contents written out in full, one list for the least
//! recently used. Hits, free blocks and evictions must agree after every operation.

#![allow(clippy::unwrap_used, reason = "a helper that fails should fail the test that called it")]

mod common;

use std::collections::BTreeMap;

use common::*;
use pagewise_kvcache::CacheManager;
use proptest::prelude::*;
use proptest::test_runner::Config;

const BLOCK_SIZE: usize = 2;

/// A block's content: all tokens up to its end.
type Content = Vec<u32>;

#[derive(Debug)]
struct Model {
    running: BTreeMap<u64, Vec<u32>>,
    /// Cached and held by nobody, least recently used first.
    idle: Vec<Content>,
    total: usize,
    evicted: u64,
}

fn contents(tokens: &[u32]) -> impl DoubleEndedIterator<Item = Content> + '_ {
    (1..=tokens.len() / BLOCK_SIZE).map(|blocks| tokens[..blocks * BLOCK_SIZE].to_vec())
}

impl Model {
    fn in_use(&self, content: &Content) -> bool {
        self.running.values().any(|tokens| tokens.starts_with(content))
    }

    fn hit(&self, tokens: &[u32]) -> usize {
        let most = (tokens.len() - 1) / BLOCK_SIZE;
        contents(tokens)
            .take(most)
            .take_while(|content| self.in_use(content) || self.idle.contains(content))
            .count()
    }

    fn used(&self) -> usize {
        let mut full: Vec<Content> = self.running.values().flat_map(|tokens| contents(tokens)).collect();
        full.sort();
        full.dedup();
        full.len() + self.running.values().filter(|tokens| tokens.len() % BLOCK_SIZE != 0).count()
    }

    /// Allocates and computes a prompt; `false` if there is no room.
    fn start(&mut self, sequence: u64, tokens: &[u32]) -> bool {
        let hit = self.hit(tokens);
        let found: Vec<Content> = contents(tokens).take(hit).collect();
        let new = tokens.len().div_ceil(BLOCK_SIZE) - hit;
        let idle_found = found.iter().filter(|content| self.idle.contains(content)).count();
        let free = self.total - self.used() - idle_found;
        if new > free {
            return false;
        }
        let empty = self.total - self.used() - self.idle.len();
        self.idle.retain(|content| !found.contains(content));
        let evicted = new.saturating_sub(empty);
        self.idle.drain(..evicted);
        self.evicted += evicted as u64;
        // What is computed again merges into what is still cached.
        self.idle.retain(|content| !tokens.starts_with(content));
        self.running.insert(sequence, tokens.to_vec());
        true
    }

    fn stop(&mut self, sequence: u64) {
        let tokens = self.running.remove(&sequence).unwrap();
        for content in contents(&tokens).rev() {
            if !self.in_use(&content) {
                self.idle.push(content);
            }
        }
    }
}

fn prompts() -> impl Strategy<Value = Vec<u32>> {
    proptest::collection::vec(0_u32..2, 1..11)
}

proptest! {
    #![proptest_config(Config { cases: 3000, failure_persistence: None, ..Config::default() })]

    #[test]
    fn hits_and_evictions_agree_with_a_naive_model(
        total in 1_usize..14,
        operations in proptest::collection::vec((0_u64..4, prompts()), 1..60),
        probes in proptest::collection::vec(prompts(), 5),
    ) {
        let mut cache = cache(BLOCK_SIZE, total, 0);
        let mut model = Model { running: BTreeMap::new(), idle: Vec::new(), total, evicted: 0 };
        for (sequence, tokens) in &operations {
            if model.running.contains_key(sequence) {
                model.stop(*sequence);
                cache.free(id(*sequence)).unwrap();
            } else if model.start(*sequence, tokens) {
                fill(&mut cache, *sequence, tokens);
            } else {
                prop_assert!(cache.allocate(id(*sequence), prompt(tokens)).is_err());
            }
            prop_assert_eq!(cache.device_usage().free, total - model.used());
            prop_assert_eq!(cache.stats().evicted_blocks, model.evicted);
            for probe in probes.iter().chain(operations.iter().map(|(_, tokens)| tokens)) {
                prop_assert_eq!(cache.cached_tokens(&prompt(probe)), model.hit(probe) * BLOCK_SIZE, "{:?}", probe);
            }
        }
    }
}
