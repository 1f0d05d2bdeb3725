//! How a step's work is best spread over the GPU: KV heads of a thread block, and where rows are cut.
//!
//! A model of time with four constants, all measured on one H100 (`docs/kernel-notes.md`). Reading takes the bytes of
//! all rows over the bandwidth of the memory; but one multiprocessor cannot draw more than a small multiple of its
//! share, so a thread block that has too much to do is late. Cutting rows makes thread blocks equal; merging what they
//! found costs time of its own.

use pagewise_ptx::decode::TILE_KEYS;

use super::split::{Cut, Keys, Shrink};

/// How many times its share of the bandwidth one multiprocessor can draw.
const MOST_SHARES: f64 = 1.75;

/// What the merge of splits takes, in bytes that a multiprocessor reads in that time: about 2 µs.
const MERGE: f64 = 48e3;

/// What it takes a multiprocessor to go from one thread block to the next, likewise: about 1.5 µs.
const NEXT: f64 = 36e3;

/// What the DRAM loses when a thread block reads one KV head of a block instead of eight, as a part of the time; a
/// third less for two heads, two thirds less for four.
const SCATTER: f64 = 0.01;

/// What each wave of thread blocks after the first adds, as a part of what one thread block has to do: they do not
/// all end together.
const WAVE: f64 = 0.04;

/// What there is to spread, and over what.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step {
    pub(super) kv_heads: u32,
    pub(super) query_tiles: u32,
    /// Warps of a thread block.
    pub(super) warps: u32,
    /// Thread blocks that fit the GPU at once.
    pub(super) slots: u64,
    /// Bytes of K and V of a key of one KV head.
    pub(super) key_bytes: u64,
}

impl Step {
    /// Thread blocks of a work item.
    pub(super) fn blocks_per_item(&self, block_heads: u32) -> u64 {
        u64::from(self.kv_heads / block_heads.max(1)) * u64::from(self.query_tiles)
    }

    /// Keys that a thread block's warps take at a time.
    pub(super) fn round(&self, block_heads: u32) -> u32 {
        self.warps / block_heads.max(1) * TILE_KEYS
    }

    /// Numbers of KV heads that a thread block can have.
    fn head_choices(&self, fixed: Option<u32>) -> impl Iterator<Item = u32> {
        let Self { kv_heads, warps, .. } = *self;
        let fits = move |heads: &u32| *heads <= warps && kv_heads.is_multiple_of(*heads);
        let free = [1, 2, 4, 8].into_iter().filter(move |heads| fixed.is_none() && fits(heads));
        free.chain(fixed)
    }
}

/// The lengths of the rows, as far as the model asks.
struct Lengths {
    rows: f64,
    total: f64,
    longest: f64,
}

/// KV heads of a thread block, and how rows are cut.
pub(super) fn choose(
    rows: &[Keys],
    step: &Step,
    block_heads: Option<u32>,
    shrink: Option<Shrink>,
) -> (u32, Cut) {
    let lengths =
        rows.iter().map(Keys::span).fold(Lengths { rows: 0.0, total: 0.0, longest: 0.0 }, |so_far, span| {
            Lengths {
                rows: so_far.rows + f64::from(u8::from(span > 0)),
                total: so_far.total + f64::from(span),
                longest: so_far.longest.max(f64::from(span)),
            }
        });
    let cut_heads = block_heads.unwrap_or(1);
    let shrinking = Cut::shrinking(shrink.unwrap_or_default(), lengths.total as u64, step, cut_heads);
    if shrink.is_some() {
        return (cut_heads, shrinking);
    }
    // The bytes of a slot's share, the floor of every choice.
    let share = lengths.total * (step.key_bytes * step.blocks_per_item(1)) as f64 / step.slots as f64;
    let scattered = |heads: u32| share * (1.0 + SCATTER * (1.0 - f64::from(heads).log2() / 3.0));

    // Whole rows need no merge.
    let whole = |heads: u32| {
        let row = (u64::from(heads) * step.key_bytes) as f64;
        let blocks = lengths.rows * step.blocks_per_item(heads) as f64;
        let waves = (blocks / step.slots as f64).ceil().max(1.0);
        let last = blocks - (waves - 1.0) * step.slots as f64;
        // The last thread blocks have the memory to themselves and still need their time.
        let mean = row * lengths.total / lengths.rows.max(1.0);
        let tail = match waves > 1.0 {
            true => {
                let alone = (mean / MOST_SHARES - mean * last / step.slots as f64).max(0.0);
                alone + (NEXT + WAVE * mean) * (waves - 1.0)
            }
            false => 0.0,
        };
        (scattered(heads) + tail).max(row * lengths.longest / MOST_SHARES)
    };
    let whole = step.head_choices(block_heads).map(|heads| (whole(heads), heads));
    let (whole, heads) = whole.min_by(|a, b| a.0.total_cmp(&b.0)).unwrap_or((f64::INFINITY, cut_heads));
    let floor = scattered(cut_heads) + MERGE;
    if whole <= floor {
        return (heads, Cut::Equal(u32::MAX));
    }

    // Equal pieces that fill the GPU once.
    let one_wave = one_wave(rows, step, cut_heads);
    let piece = (u64::from(cut_heads) * step.key_bytes) as f64 / MOST_SHARES;
    let equal = one_wave.map_or(f64::INFINITY, |keys| floor.max(f64::from(keys) * piece + MERGE));
    // Pieces that shrink with what is left.
    let shrunk = floor + 2.0 * NEXT;
    match one_wave {
        Some(keys) if equal <= whole.min(shrunk) => (cut_heads, Cut::Equal(keys)),
        _ if whole <= shrunk => (heads, Cut::Equal(u32::MAX)),
        _ => (cut_heads, shrinking),
    }
}

/// The smallest pieces, in whole rounds, that are no more than there are slots for.
fn one_wave(rows: &[Keys], step: &Step, block_heads: u32) -> Option<u32> {
    let most = step.slots / step.blocks_per_item(block_heads).max(1);
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
    let (mut low, mut high) = (total.div_ceil(most).div_ceil(u64::from(round)).max(1) as u32, longest);
    low = low.min(high);
    while low < high {
        let middle = low + (high - low) / 2;
        match pieces(middle) <= most {
            true => high = middle,
            false => low = middle + 1,
        }
    }
    Some(high * round)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(lens: &[u32]) -> Vec<Keys> {
        let number =
            |(row, &end): (usize, &u32)| Keys { table: 0, row: row as u32, begin: 0, end, position: 0 };
        lens.iter().enumerate().map(number).collect()
    }

    /// An H100 with 8 warps a thread block, head_dim 128 in 16 bits.
    fn h100(kv_heads: u32) -> Step {
        Step { kv_heads, query_tiles: 1, warps: 8, slots: 132, key_bytes: 512 }
    }

    #[test]
    fn what_measured_best_is_chosen() {
        let choice = |kv_heads, lens: &[u32]| choose(&rows(lens), &h100(kv_heads), None, None);
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
        // Two long waves end raggedly: better pieces that shrink.
        assert!(matches!(choice(32, &[4096; 64]), (1, Cut::Shrinking { .. })));
    }

    #[test]
    fn nothing_to_do_is_no_special_case() {
        for lens in [&[][..], &[0], &[0, 0, 1]] {
            let (heads, _) = choose(&rows(lens), &h100(8), None, None);
            assert!([1, 2, 4, 8].contains(&heads));
        }
    }
}
