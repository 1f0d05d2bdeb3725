//! Time of each operation in a pool of 1,000 and one of 1,000,000 blocks. The design says that it depends on
//! the blocks touched only, so the two must agree, except for what the processor's caches make of it.
//!
//! Every pool is used before it is timed: its blocks hold cached prompts, so that taking one evicts another,
//! frees a node of the prefix tree and relinks three lists. "near" touches the same sequence again and again;
//! "spread" touches another part of the pool each time, which at 1,000,000 blocks is a cache miss at every
//! step.

#![allow(missing_docs, clippy::unwrap_used, reason = "a bench")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, criterion_group, criterion_main};
use pagewise_kvcache::{CacheConfig, CacheManager, KvCacheManager, KvGroup, Prompt, SequenceId};

const BLOCK_SIZE: usize = 16;
const POOLS: [usize; 2] = [1_000, 1_000_000];
/// Blocks of the sequences that are forked, freed, looked up and swapped.
const BLOCKS: usize = 32;

fn prompt(tokens: &[u32]) -> Prompt<'_> {
    Prompt { tokens, salt: 0, use_prefix_cache: true }
}

/// The `index`-th prompt; all are different from their first block on.
fn text(index: usize) -> Vec<u32> {
    let start = index as u32 * 100_003;
    (0..(BLOCKS * BLOCK_SIZE) as u32).map(|position| start.wrapping_add(position)).collect()
}

fn compute(cache: &mut KvCacheManager, sequence: SequenceId, tokens: &[u32]) {
    let cached = cache.allocate(sequence, prompt(tokens)).unwrap().cached_tokens;
    cache.mark_computed(sequence, &tokens[cached..]).unwrap();
}

/// A pool full of cached prompts, and how many there are.
fn used_pool(blocks: usize, prefix_cache: bool) -> (KvCacheManager, usize) {
    let mut cache = KvCacheManager::new(CacheConfig {
        block_size: BLOCK_SIZE,
        device_blocks: blocks,
        host_blocks: blocks,
        groups: vec![KvGroup { window: None }],
        watermark: 0.01,
        prefix_cache,
    })
    .unwrap();
    let prompts = blocks / BLOCKS;
    // Running at the same time and freed in another order, so that neighbours in a table are not neighbours
    // in memory.
    for wave in (0..prompts).collect::<Vec<_>>().chunks(16) {
        for &index in wave {
            cache.allocate(SequenceId(index as u64), prompt(&text(index)[..BLOCK_SIZE])).unwrap();
        }
        for position in 1..BLOCKS {
            for &index in wave {
                if position == 1 {
                    cache.mark_computed(SequenceId(index as u64), &text(index)[..BLOCK_SIZE]).unwrap();
                }
                cache.append(SequenceId(index as u64), BLOCK_SIZE).unwrap();
            }
        }
        for &index in wave {
            cache.mark_computed(SequenceId(index as u64), &text(index)[BLOCK_SIZE..]).unwrap();
        }
        for &index in wave.iter().rev() {
            cache.free(SequenceId(index as u64)).unwrap();
        }
    }
    (cache, prompts)
}

const FIRST: SequenceId = SequenceId(1 << 40);

/// Benches `one(index) -> time of `inner` operations`, reported for one of them.
fn bench(
    group: &mut BenchmarkGroup<'_, WallTime>,
    blocks: usize,
    inner: usize,
    mut one: impl FnMut(usize) -> Duration,
) {
    let mut index = 0;
    group.bench_function(BenchmarkId::from_parameter(blocks), |bencher| {
        bencher.iter_custom(|iterations| {
            let rounds = iterations.div_ceil(inner as u64);
            let mut total = Duration::ZERO;
            for _ in 0..rounds {
                total += one(index);
                index += 1;
            }
            total.mul_f64(iterations as f64 / (rounds * inner as u64) as f64)
        });
    });
}

fn timed(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

/// One token to one of 16 running sequences in turn, as a decode step does; every 16th takes a block.
fn append(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("append one token");
    for blocks in POOLS {
        let (mut cache, _) = used_pool(blocks, true);
        let sequences: Vec<_> = (0..16).map(|index| SequenceId(FIRST.0 + index)).collect();
        bench(&mut group, blocks, 16 * 256, |_| {
            for &sequence in &sequences {
                cache.allocate(sequence, prompt(&[1])).unwrap();
            }
            let time = timed(|| {
                for _ in 0..256 {
                    for &sequence in &sequences {
                        cache.append(black_box(sequence), 1).unwrap();
                    }
                }
            });
            for &sequence in &sequences {
                cache.free(sequence).unwrap();
            }
            time
        });
    }
    group.finish();
}

/// The same with the report of each token, as a whole decode step needs.
fn append_and_report(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("append and report one token");
    for blocks in POOLS {
        let (mut cache, _) = used_pool(blocks, true);
        bench(&mut group, blocks, 256, |index| {
            cache.allocate(FIRST, prompt(&[1])).unwrap();
            cache.mark_computed(FIRST, &[1]).unwrap();
            let time = timed(|| {
                for token in 0..256 {
                    cache.append(FIRST, 1).unwrap();
                    cache.mark_computed(FIRST, &[black_box(index as u32 + token)]).unwrap();
                }
            });
            cache.free(FIRST).unwrap();
            time
        });
    }
    group.finish();
}

fn fork_and_free(criterion: &mut Criterion) {
    for (name, measures_fork) in [("fork of 32 blocks", true), ("free of a fork of 32 blocks", false)] {
        let mut group = criterion.benchmark_group(name);
        for blocks in POOLS {
            let (mut cache, prompts) = used_pool(blocks, true);
            bench(&mut group, blocks, 64, |index| {
                compute(&mut cache, FIRST, &text(index % prompts));
                let children = (1..=64).map(|child| SequenceId(FIRST.0 + child));
                let fork = timed(|| children.clone().for_each(|child| cache.fork(FIRST, child).unwrap()));
                let free = timed(|| children.for_each(|child| cache.free(child).unwrap()));
                cache.free(FIRST).unwrap();
                if measures_fork { fork } else { free }
            });
        }
        group.finish();
    }
}

fn allocate_and_free(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("allocate, compute and free a new prompt of 32 blocks");
    for blocks in POOLS {
        let (mut cache, prompts) = used_pool(blocks, true);
        bench(&mut group, blocks, 1, |index| {
            let tokens = text(prompts + index);
            timed(|| {
                compute(&mut cache, FIRST, &tokens);
                cache.free(FIRST).unwrap();
            })
        });
    }
    group.finish();
}

fn look_up(criterion: &mut Criterion) {
    for (name, spread) in
        [("look-up of 31 cached blocks, near", false), ("look-up of 31 cached blocks, spread", true)]
    {
        let mut group = criterion.benchmark_group(name);
        for blocks in POOLS {
            let (cache, prompts) = used_pool(blocks, true);
            bench(&mut group, blocks, 1, |index| {
                let tokens = text(if spread { index * 7919 % prompts } else { 0 });
                timed(|| {
                    assert!(cache.cached_tokens(&prompt(black_box(&tokens))) >= (BLOCKS - 1) * BLOCK_SIZE);
                })
            });
        }
        group.finish();
    }
}

/// What the memory itself costs, to compare the spread look-up with: a block that is looked up reads an index
/// bucket, a node, its tokens and the block's state, 116 bytes a block in all. So many reads, each of a place
/// that the one before decides, spread over as much memory.
fn memory_for_scale(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("for scale: 124 dependent reads from as much memory");
    for blocks in POOLS {
        let words: Vec<u32> = (0..blocks as u32 * 29).map(|word| word.wrapping_mul(2_654_435_761)).collect();
        let mut at = 0;
        bench(&mut group, blocks, 1, |index| {
            timed(|| {
                for step in 0..4 * 31 {
                    at = (words[at] as usize ^ (index * 124 + step).wrapping_mul(0x9e37_79b9)) % words.len();
                }
                black_box(at);
            })
        });
    }
    group.finish();
}

fn swap(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("swap 32 blocks out and in");
    for blocks in POOLS {
        let (mut cache, _) = used_pool(blocks, false);
        compute(&mut cache, FIRST, &text(0));
        bench(&mut group, blocks, 1, |_| {
            timed(|| {
                cache.swap_out(&[FIRST]).unwrap();
                black_box(cache.take_block_ops());
                cache.confirm_block_ops().unwrap();
                cache.swap_in(&[FIRST]).unwrap();
                black_box(cache.take_block_ops());
                cache.confirm_block_ops().unwrap();
            })
        });
    }
    group.finish();
}

criterion_group! {
    name = operations;
    config = Criterion::default()
        .sample_size(30)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    targets = append, append_and_report, fork_and_free, allocate_and_free, look_up, memory_for_scale, swap
}
criterion_main!(operations);
