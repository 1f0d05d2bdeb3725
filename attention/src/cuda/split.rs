//! Work items that shrink, and how many there can be. Pure arithmetic over lengths; the cutting itself is
//! `crate::plan`'s.

use super::balance::Step;
use crate::plan::{Cut, MAX_PIECE_KEYS, TILE_KEYS};

/// Work items that shrink as less is left to do, so that the last thread blocks finish together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shrink {
    /// An item is one of so many shares of what is left for each thread block that fits the GPU.
    pub shares: u32,
    /// Keys of the smallest item.
    pub smallest: u32,
}

impl Default for Shrink {
    fn default() -> Self {
        Self { shares: 1, smallest: 256 }
    }
}

/// A shrinking item is never smaller than this part of what a slot has to do: what bounds the workspace.
const SMALLEST_PART: u64 = 64;

// The kernel takes the pieces that are cut, so both must agree on where they end.
const _: () = assert!(TILE_KEYS == pagewise_ptx::decode::TILE_KEYS);

/// Shrinking pieces for rows of so many keys in all.
pub(super) fn shrinking(shrink: Shrink, keys: u64, step: &Step, block_heads: u32) -> Cut {
    let per_slot = (keys * step.blocks_per_item(block_heads)).div_ceil(step.slots());
    let least = (per_slot / SMALLEST_PART).min(u64::from(MAX_PIECE_KEYS)) as u32;
    let round = step.round(block_heads);
    Cut::Shrinking {
        shares: step.slots() * u64::from(shrink.shares.max(1)),
        smallest: shrink.smallest.max(least).max(round),
        round,
    }
}

/// The most items that `rows` rows with `keys` keys in all are cut into, whatever their lengths.
pub(super) fn most_items(
    rows: u64,
    keys: u64,
    step: &Step,
    block_heads: u32,
    item_keys: Option<u32>,
    shrink: Shrink,
) -> u64 {
    // A row that begins within a tile spans up to 15 keys more.
    let span = keys + rows * u64::from(TILE_KEYS - 1);
    let pieces = match item_keys {
        Some(keys) => span / u64::from(keys),
        None => {
            let wave = step.slots().div_ceil(step.blocks_per_item(block_heads).max(1));
            let smallest = u64::from(shrink.smallest.max(step.round(block_heads)));
            (span * 4 / (smallest * 3)).min(wave * (SMALLEST_PART + 1) * 4 / 3).max(wave)
        }
    };
    rows + pieces
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::balance::{Heads, choose};
    use super::*;
    use crate::plan::{Keys, Piece, split};

    fn rows() -> impl Strategy<Value = Vec<Keys>> {
        let one = prop_oneof![Just((0, 0)), (0..40u32, 0..100u32), (0..3000u32, 0..200_000u32)];
        prop::collection::vec(one, 1..40).prop_map(|list| {
            let number = |(index, (begin, len)): (usize, (u32, u32))| Keys {
                table: 3 * index as u32,
                row: index as u32,
                begin,
                end: begin + len,
                position: (begin + len) as i32,
            };
            list.into_iter().enumerate().map(number).collect()
        })
    }

    proptest! {
        #[test]
        fn every_key_is_in_exactly_one_item(
            rows in rows(),
            fixed in prop::option::of(1..=128u32),
            kv_heads in 1..64u32,
            slots in 1..1000u64,
            shrink in prop::option::of((1..8u32, 1..3000u32)),
            log_warps in 0..4u32,
            blocks_each in 1..4u64,
            pace in 0.2..3.0f64,
        ) {
            let step = Step { kv_heads, query_tiles: 1, tile_rows: 4, warps: 1 << log_warps, multiprocessors: slots, blocks_each, key_bytes: 512, pace };
            let shrink = shrink.map(|(shares, smallest)| Shrink { shares, smallest });
            let fixed = fixed.map(|tiles| tiles * TILE_KEYS);
            let (heads, cut) = match fixed {
                Some(keys) => (1, Cut::Equal(keys)),
                None => {
                    let choice = choose(&rows, &step, Heads::Any, shrink);
                    (choice.block_heads, choice.cut)
                }
            };
            let (items, partials) = split(&rows, step.blocks_per_item(heads), cut).unwrap();
            let mut seen_partials = vec![false; partials as usize];
            for keys in &rows {
                let mut mine: Vec<&Piece> = items.iter().filter(|item| item.row == keys.row).collect();
                mine.sort_by_key(|item| item.split);
                let mut next = keys.begin;
                for (index, item) in mine.iter().enumerate() {
                    prop_assert_eq!((item.begin, item.table, item.position), (next, keys.table, keys.position));
                    prop_assert_eq!((item.split, item.splits), (index as u32, mine.len() as u32));
                    if let Cut::Equal(most) = cut {
                        prop_assert!(item.end - item.begin / TILE_KEYS * TILE_KEYS <= most);
                    }
                    prop_assert!(item.end > item.begin || mine.len() == 1);
                    if item.splits > 1 {
                        let seen = &mut seen_partials[(item.first_partial + item.split) as usize];
                        prop_assert!(!*seen, "two items share a partial result");
                        *seen = true;
                    }
                    next = item.end;
                }
                prop_assert_eq!(next, keys.end);
            }
            prop_assert!(seen_partials.into_iter().all(|seen| seen), "a partial result belongs to no item");
            // Within the bound for these rows, and for any that are as many with as many keys.
            let keys: u64 = rows.iter().map(|keys| u64::from(keys.end - keys.begin)).sum();
            for more in [0, 1, 1000, 1 << 20] {
                let shrink = shrink.unwrap_or_default();
                let bound = most_items(rows.len() as u64, keys + more, &step, 1, fixed, shrink);
                prop_assert!(items.len() as u64 <= bound, "{} items, bound {bound}", items.len());
            }
        }

        #[test]
        fn a_slot_has_little_more_than_its_share(
            lens in prop::collection::vec(1..20_000u32, 1..64),
            slots in 8..600u64,
            kv_heads in 1..16u32,
        ) {
            let rows: Vec<Keys> = lens
                .iter()
                .enumerate()
                .map(|(i, &end)| Keys { table: 0, row: i as u32, begin: 0, end, position: 0 })
                .collect();
            let step = Step { kv_heads, query_tiles: 1, tile_rows: 4, warps: 8, multiprocessors: slots, blocks_each: 1, key_bytes: 512, pace: 1.0 };
            let choice = choose(&rows, &step, Heads::Any, None);
            let (heads, cut) = (choice.block_heads, choice.cut);
            let blocks_per_item = step.blocks_per_item(heads);
            let (items, _) = split(&rows, blocks_per_item, cut).unwrap();
            // Thread blocks in order, each to the slot that is free first.
            let mut busy = vec![0u64; slots as usize];
            for item in &items {
                for _ in 0..blocks_per_item {
                    let first = busy.iter_mut().min().unwrap();
                    *first += u64::from(item.end - item.begin);
                }
            }
            let total: u64 = lens.iter().map(|&len| u64::from(len) * blocks_per_item).sum();
            let longest = busy.into_iter().max().unwrap();
            // As much more as a multiprocessor can draw beyond its share, and what a merge or an item costs.
            let share = total as f64 / slots as f64;
            let slack = 512.0 / f64::from(heads);
            prop_assert!(longest as f64 <= 1.8 * share + slack, "{longest} keys, a share is {share}");
        }

        #[test]
        fn the_split_of_a_row_does_not_depend_on_its_batch_when_fixed(
            rows in rows(),
            tiles in 1..=128u32,
        ) {
            let (together, _) = split(&rows, 8, Cut::Equal(tiles * TILE_KEYS)).unwrap();
            for keys in &rows {
                let (alone, _) = split(&[*keys], 8, Cut::Equal(tiles * TILE_KEYS)).unwrap();
                let ranges = |items: &[Piece]| -> Vec<(u32, u32)> {
                    let mut ranges: Vec<(u32, u32)> = items
                        .iter()
                        .filter(|item| item.row == keys.row)
                        .map(|item| (item.begin, item.end))
                        .collect();
                    ranges.sort_unstable();
                    ranges
                };
                prop_assert_eq!(ranges(&together), ranges(&alone));
            }
        }
    }
}
