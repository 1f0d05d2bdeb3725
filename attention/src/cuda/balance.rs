//! How a step's work is best spread over the GPU: KV heads of a thread block, and where rows are cut.
//!
//! A model of time with a few constants from one H100 (`docs/kernel-notes.md`). Reading takes the bytes of
//! all rows over the bandwidth of the memory; but one multiprocessor cannot draw more than a small multiple of its
//! share, so a thread block that has too much to do is late. Cutting rows makes thread blocks equal; merging what they
//! found costs time of its own. Where the memory is faster than an H100's, a share has more bytes, so what takes a time of
//! its own costs more of them ([`Step::pace`]).

use pagewise_ptx::decode::TILE_KEYS;

use super::Device;
use super::split::{Shrink, shrinking};
use crate::plan::{Cut, Keys};

/// How many times its share of the bandwidth one multiprocessor can draw. That is what it can draw at all, 42 GB/s, so with
/// faster memory it is less.
const MOST_SHARES: f64 = 1.75;

/// What the merge of splits takes, in bytes that a multiprocessor reads in that time: about 2 µs.
const MERGE: f64 = 48e3;

/// What it takes a multiprocessor to go from one thread block to the next, likewise: about 1.5 µs.
const NEXT: f64 = 36e3;

/// What a thread block takes from its launch to its first keys and from its last to its end, likewise: about 2.35 µs. Others
/// hide it, as far as they draw more than their shares.
const ENDS: f64 = 57e3;

/// What the DRAM loses when a thread block reads one KV head of a block instead of eight, as a part of the time; a
/// third less for two heads, two thirds less for four.
const SCATTER: f64 = 0.01;

/// What merging a partial result of another KV head in the same thread block takes, as a part of its bytes: they come
/// from the L2, but one row after the other. This one and the next were not measured by themselves: with them the model
/// takes what measured best of whole plans.
const MERGE_ROW: f64 = 0.5;

/// What storing a row of another KV head takes a thread block, likewise: about 0.06 µs.
const STORE_ROW: f64 = 1.5e3;

/// Splits that are merged at once, before what groups of so many gave: `merge_group` of the tunings.
const MERGE_GROUP: u32 = 16;

/// What each wave of thread blocks after the first adds, as a part of what one thread block has to do: they do not
/// all end together.
const WAVE: f64 = 0.04;

/// KV heads that a thread block may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Heads {
    /// As many as suit the lengths.
    Any,
    /// So many.
    Fixed(u32),
    /// One, or the most with which whole rows give nearly every multiprocessor a thread block. Those follow from the number of
    /// rows alone, so steps of as many rows have two kinds of launches at most.
    OneOrMost,
}

/// The part of the multiprocessors that are enough for [`Heads::OneOrMost`]: 0.73 of them took two thirds of the time that
/// twice as many thread blocks of half the heads took, at 192 keys, on an H200.
const ENOUGH: f64 = 0.7;

/// What there is to spread, and over what.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step {
    pub(super) kv_heads: u32,
    pub(super) query_tiles: u32,
    /// Query heads of the largest query tile.
    pub(super) tile_rows: u32,
    /// Warps of a thread block.
    pub(super) warps: u32,
    pub(super) multiprocessors: u64,
    /// Thread blocks that fit a multiprocessor at once.
    pub(super) blocks_each: u64,
    /// Bytes of K and V of a key of one KV head.
    pub(super) key_bytes: u64,
    /// A multiprocessor's share of the memory's bandwidth, over what it is on an H100.
    pub(super) pace: f64,
}

/// [`Step::pace`] of a GPU; 1 where the driver does not say.
pub(super) fn pace(device: &Device) -> f64 {
    let share = |device: &Device| device.memory_bandwidth as f64 / f64::from(device.multiprocessors.max(1));
    match device.memory_bandwidth {
        0 => 1.0,
        _ => share(device) / share(&Device::h100()),
    }
}

impl Step {
    /// Thread blocks that fit the GPU at once.
    pub(super) fn slots(&self) -> u64 {
        self.multiprocessors * self.blocks_each
    }

    /// Thread blocks of a work item.
    pub(super) fn blocks_per_item(&self, block_heads: u32) -> u64 {
        u64::from(self.kv_heads / block_heads.max(1)) * u64::from(self.query_tiles)
    }

    /// Keys that a thread block's warps take at a time.
    pub(super) fn round(&self, block_heads: u32) -> u32 {
        self.warps / block_heads.max(1) * TILE_KEYS
    }

    /// Numbers of KV heads that a thread block can have, in a step of so many rows.
    fn head_choices(&self, heads: Heads, rows: usize) -> impl Iterator<Item = u32> {
        let Self { kv_heads, warps, .. } = *self;
        let fits = move |heads: &u32| *heads <= warps && kv_heads.is_multiple_of(*heads);
        let busy = |heads: u32| rows as f64 * self.blocks_per_item(heads) as f64;
        let enough = |heads: &u32| fits(heads) && busy(*heads) >= ENOUGH * self.slots() as f64;
        let most = [8, 4, 2].into_iter().find(enough).unwrap_or(1);
        let offered = move |number: &u32| match heads {
            Heads::Any => fits(number),
            Heads::Fixed(_) => false,
            Heads::OneOrMost => *number == 1 || *number == most,
        };
        let fixed = if let Heads::Fixed(number) = heads { Some(number) } else { None };
        [1, 2, 4, 8].into_iter().filter(offered).chain(fixed)
    }
}

/// The lengths of the rows, as far as the model asks.
struct Lengths {
    rows: f64,
    total: f64,
    longest: f64,
}

/// How a step is spread.
#[derive(Clone, Copy, Debug)]
pub(super) struct Choice {
    pub(super) block_heads: u32,
    pub(super) cut: Cut,
    /// What it takes, in bytes that a multiprocessor reads in that time at its share of the bandwidth.
    pub(super) cost: f64,
    /// What it would take at least, likewise.
    pub(super) floor: f64,
}

impl Choice {
    /// Whether another kernel could not be much better, so that asking costs more than it can save.
    pub(super) fn is_good(&self) -> bool {
        self.cost <= 1.04 * self.floor
    }
}

/// KV heads of a thread block, and how rows are cut.
pub(super) fn choose(rows: &[Keys], step: &Step, heads: Heads, shrink: Option<Shrink>) -> Choice {
    let lengths =
        rows.iter().map(Keys::span).fold(Lengths { rows: 0.0, total: 0.0, longest: 0.0 }, |so_far, span| {
            Lengths {
                rows: so_far.rows + f64::from(u8::from(span > 0)),
                total: so_far.total + f64::from(span),
                longest: so_far.longest.max(f64::from(span)),
            }
        });
    let (slots, each) = (step.slots() as f64, step.blocks_each as f64);
    // The bytes of a multiprocessor's share, the floor of every choice.
    let bytes = lengths.total * (step.key_bytes * step.blocks_per_item(1)) as f64;
    let share = bytes / step.multiprocessors as f64;
    let most_shares = (MOST_SHARES / step.pace).clamp(1.0, MOST_SHARES);
    // The most that one thread block draws, as long as others share its multiprocessor.
    let most = most_shares / each;
    let scattered = |heads: u32| share * (1.0 + SCATTER * (1.0 - f64::from(heads).log2() / 3.0));
    let (next, crowd) = (NEXT * step.pace / each, (1.0 + each) / 2.0);
    let merge = MERGE * step.pace * crowd;

    let cut_heads = if let Heads::Fixed(heads) = heads { heads } else { 1 };
    // Pieces shrink within rows: of short rows each is a thread block, whose beginning and end nothing hides.
    let short = {
        let mean = (u64::from(cut_heads) * step.key_bytes) as f64 * lengths.total / lengths.rows.max(1.0);
        let ends = ENDS * step.pace / each - mean * (1.0 - 1.0 / most_shares);
        ends.max(0.0) * lengths.rows * step.blocks_per_item(cut_heads) as f64 / slots
    };
    let shrunk = Choice {
        block_heads: cut_heads,
        cut: shrinking(shrink.unwrap_or_default(), lengths.total as u64, step, cut_heads),
        cost: scattered(cut_heads) + merge + 2.0 * next + short,
        floor: share,
    };
    if shrink.is_some() {
        return shrunk;
    }

    // Whole rows need no merge.
    let whole = |heads: u32| {
        let key = (u64::from(heads) * step.key_bytes) as f64;
        let blocks = lengths.rows * step.blocks_per_item(heads) as f64;
        let waves = (blocks / slots).ceil().max(1.0);
        let mean = key * lengths.total / lengths.rows.max(1.0);
        // The last thread blocks have the memory to themselves and still need their time.
        let last = mean * (blocks - (waves - 1.0) * slots) / step.multiprocessors as f64;
        let tail = match waves > 1.0 {
            true => (mean / most_shares - last).max(0.0) + (next + WAVE * mean) * (waves - 1.0),
            false => 0.0,
        };
        let cost = (scattered(heads) + tail).max(key * lengths.longest / most);
        Choice { block_heads: heads, cut: Cut::Equal(u32::MAX), cost, floor: share }
    };
    let whole = step.head_choices(heads, rows.len()).map(whole).reduce(cheaper).unwrap_or(shrunk);
    if whole.cost <= scattered(cut_heads) + merge {
        return whole;
    }
    // Equal pieces that fill the GPU once; or pieces that shrink with what is left. Several heads to a piece are for one
    // row, whose pieces are no longer than the share: 64 ragged rows took 12% longer in such pieces.
    let single = lengths.rows == 1.0;
    let offered = step.head_choices(heads, rows.len()).filter(|&heads| heads == cut_heads || single);
    let equal = offered.filter_map(|heads| {
        let (keys, splits) = one_wave(rows, step, heads)?;
        let piece = f64::from(keys) * (u64::from(heads) * step.key_bytes) as f64;
        let longest = if heads == 1 { piece / most } else { piece * each };
        // A partial result is about as large as a key.
        let groups = if splits > MERGE_GROUP { splits.div_ceil(MERGE_GROUP) } else { 0 };
        let partials = f64::from(splits.min(MERGE_GROUP) + groups) * step.key_bytes as f64;
        let more =
            f64::from(heads - 1) * f64::from(step.tile_rows) * (MERGE_ROW * partials + STORE_ROW * step.pace);
        let cost = scattered(heads).max(longest) + merge + more * crowd;
        Some(Choice { block_heads: heads, cut: Cut::Equal(keys), cost, floor: share })
    });
    std::iter::once(whole).chain(equal).fold(shrunk, cheaper)
}

/// The cheaper of two choices, the second if they are equal.
fn cheaper(a: Choice, b: Choice) -> Choice {
    if a.cost < b.cost { a } else { b }
}

/// About the smallest pieces, in whole rounds, that are no more than there are slots for, and how many of them the
/// longest row has.
fn one_wave(rows: &[Keys], step: &Step, block_heads: u32) -> Option<(u32, u32)> {
    let most = step.slots() / step.blocks_per_item(block_heads).max(1);
    let round = step.round(block_heads);
    let pieces = |rounds: u32| {
        rows.iter()
            .map(|keys| u64::from(keys.span().max(1).div_ceil(rounds.saturating_mul(round))))
            .sum::<u64>()
    };
    let longest = rows.iter().map(Keys::span).max()?.max(1).div_ceil(round);
    if most == 0 || pieces(longest) > most {
        return None;
    }
    // No fewer than would be enough if all rows were as long as they are together.
    let total: u64 = rows.iter().map(|keys| u64::from(keys.span())).sum();
    let mut rounds = total.div_ceil(most).div_ceil(u64::from(round)).clamp(1, u64::from(longest)) as u32;
    // An eighth more each time: a few tries, where a search for the very least would take as long as all the rest.
    while pieces(rounds) > most {
        rounds = (rounds + rounds.div_ceil(8)).min(longest);
    }
    Some((rounds * round, longest.div_ceil(rounds)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(lens: &[u32]) -> Vec<Keys> {
        let number =
            |(row, &end): (usize, &u32)| Keys { table: 0, row: row as u32, begin: 0, end, position: 0 };
        lens.iter().enumerate().map(number).collect()
    }

    /// An H100 with one thread block of 8 warps a multiprocessor, head_dim 128 in 16 bits.
    fn h100(kv_heads: u32) -> Step {
        Step {
            kv_heads,
            query_tiles: 1,
            tile_rows: if kv_heads == 32 { 1 } else { 4 },
            warps: 8,
            multiprocessors: 132,
            blocks_each: 1,
            key_bytes: 512,
            pace: 1.0,
        }
    }

    #[test]
    fn what_measured_best_is_chosen() {
        let choice = |kv_heads, lens: &[u32]| {
            let Choice { block_heads, cut, .. } = choose(&rows(lens), &h100(kv_heads), Heads::Any, None);
            (block_heads, cut)
        };
        let whole = Cut::Equal(u32::MAX);
        // Enough rows: whole ones, with as many heads to a thread block as leave one for every multiprocessor.
        assert_eq!(choice(8, &[4096; 64]), (4, whole));
        assert_eq!(choice(32, &[1024; 8]), (2, whole));
        assert_eq!(choice(8, &[512; 256]), (8, whole));
        assert_eq!(choice(1, &[1024; 128]), (1, whole));
        // Half the multiprocessors are enough for short rows; a merge would take longer.
        assert_eq!(choice(8, &[1024; 8]), (1, whole));
        // Few rows: one wave of equal pieces.
        assert_eq!(choice(8, &[8192]), (1, Cut::Equal(512)));
        assert_eq!(choice(8, &[32768]), (1, Cut::Equal(2048)));
        assert_eq!(choice(1, &[8192; 8]), (1, Cut::Equal(512)));
        // One long row of many heads: what they read together outweighs a larger merge.
        assert_eq!(choice(32, &[131_072]), (8, Cut::Equal(3984)));
        assert_eq!(choice(32, &[32_768]), (1, Cut::Equal(8192)));
        // Two long waves end raggedly: better pieces that shrink.
        assert!(matches!(choice(32, &[4096; 64]), (1, Cut::Shrinking { .. })));
    }

    #[test]
    fn short_rows_take_several_heads_to_a_thread_block() {
        let heads = |step: &Step, lens: &[u32]| {
            let Choice { block_heads, cut, .. } = choose(&rows(lens), step, Heads::Any, None);
            (cut == Cut::Equal(u32::MAX)).then_some(block_heads)
        };
        // A decode of OPT-13B and of Llama 3 8B by 64 requests: a thread block to each head took 1.3 times as long (H200).
        for step in [h100(40), Step { pace: pace(&Device::h200()), ..h100(40) }] {
            assert!(heads(&step, &[192; 64]).is_some_and(|heads| heads >= 4));
            assert!(heads(&step, &[64; 256]).is_some_and(|heads| heads == 8));
        }
        assert_eq!(heads(&h100(8), &[192; 64]), Some(4));
        assert_eq!(heads(&h100(8), &[192; 256]), Some(8));
    }

    #[test]
    fn steps_of_as_many_rows_have_two_kinds_of_launches() {
        let numbers = |kv_heads, count: usize| {
            let lens = [1, 16, 64, 192, 512, 2048, 8192, 100_000].map(|len| vec![len; count]);
            let heads =
                |lens: &Vec<u32>| choose(&rows(lens), &h100(kv_heads), Heads::OneOrMost, None).block_heads;
            lens.iter().map(heads).collect::<std::collections::BTreeSet<_>>()
        };
        for (kv_heads, count, most) in
            [(8, 1, 1), (8, 16, 1), (8, 32, 2), (8, 48, 4), (8, 64, 4), (8, 256, 8), (40, 8, 2), (40, 64, 8)]
        {
            let found = numbers(kv_heads, count);
            assert!(found.contains(&most), "{kv_heads} heads, {count} rows: {found:?}");
            assert!(found.iter().all(|heads| [1, most].contains(heads)), "{count} rows: {found:?}");
        }
    }

    #[test]
    fn faster_memory_leaves_less_to_draw_beyond_a_share() {
        let h200 = Step { pace: pace(&Device::h200()), ..h100(8) };
        assert!((1.46..1.47).contains(&h200.pace), "{}", h200.pace);
        // 96 thread blocks of eight heads are enough for an H100's memory, by the model, but took 18% longer than 384 of two on an H200.
        let heads = |step: &Step| choose(&rows(&[512; 96]), step, Heads::Any, None).block_heads;
        assert_eq!((heads(&h100(8)), heads(&h200)), (8, 2));
        let unknown = Device { memory_bandwidth: 0, ..Device::h100() };
        assert_eq!((pace(&unknown), pace(&Device::h100())), (1.0, 1.0));
    }

    #[test]
    fn two_thread_blocks_a_multiprocessor_take_what_would_be_two_waves() {
        let two = Step { warps: 4, blocks_each: 2, ..h100(1) };
        let cost = |step: &Step, lens: &[u32]| choose(&rows(lens), step, Heads::Any, None).cost;
        assert!(cost(&two, &[512; 256]) < cost(&h100(1), &[512; 256]));
        assert!(cost(&two, &[8192; 8]) > cost(&h100(1), &[8192; 8]));
    }

    #[test]
    fn nothing_to_do_is_no_special_case() {
        for lens in [&[][..], &[0], &[0, 0, 1]] {
            let choice = choose(&rows(lens), &h100(8), Heads::Any, None);
            assert!([1, 2, 4, 8].contains(&choice.block_heads));
        }
    }
}
