//! How long items may be, and which thread block works on which, so that all end at about the same time.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use pagewise_ptx::prefill::PrefillItem;

use super::Tile;

/// What starting and ending an item takes, in tiles of keys.
const START: u64 = 2;

/// What the merge of split tiles takes, in the same.
const MERGE: u64 = 3;

/// The most thread blocks that a simulated schedule is worth its time for.
const MOST_SIMULATED: usize = 4096;

/// The most tiles of keys of an item: all, or fewer where that ends sooner although results must be merged.
pub(super) fn piece(tiles: &[Tile], heads: u64, slots: u64) -> u64 {
    let longest = tiles.first().map_or(0, |tile| tile.keys);
    let total: u64 = tiles.iter().map(|tile| (tile.keys + START) * heads).sum();
    let share = total.div_ceil(slots);
    let whole = makespan(tiles, heads, slots, longest).unwrap_or(share + longest / 2);
    // Pieces of a share, of half a share and so on: the first that is not worth less than the next.
    let mut best = (whole, longest);
    for parts in [1, 2, 3, 4] {
        let piece = share.div_ceil(parts).max(4);
        if piece >= longest {
            continue;
        }
        if let Some(time) = makespan(tiles, heads, slots, piece)
            && time + MERGE < best.0
        {
            best = (time + MERGE, piece);
        }
    }
    best.1
}

/// Deals items, the longest first, to thread blocks so that all have about equally much to do: in rounds, those that
/// come too short last filled up with items without work.
pub(super) fn deal(items: &[PrefillItem], blocks: usize, tile_keys: u32) -> Vec<PrefillItem> {
    let mut least: BinaryHeap<Reverse<(u64, usize)>> = (0..blocks).map(|block| Reverse((0, block))).collect();
    let mut hands = vec![Vec::new(); blocks];
    for item in items {
        let Some(Reverse((busy, block))) = least.pop() else { break };
        let tiles = u64::from(item.end.div_ceil(tile_keys) - (item.begin / tile_keys).min(item.end));
        least.push(Reverse((busy + tiles + START, block)));
        if let Some(hand) = hands.get_mut(block) {
            hand.push(*item);
        }
    }
    let rounds = hands.iter().map(Vec::len).max().unwrap_or(0);
    let round = |number: usize| hands.iter().map(move |hand| hand.get(number).copied().unwrap_or_default());
    (0..rounds).flat_map(round).collect()
}

/// When the last of the slots is done, if each takes the longest item that is left; `None` where there are so many
/// that it does not matter.
fn makespan(tiles: &[Tile], heads: u64, slots: u64, piece: u64) -> Option<u64> {
    let mut lengths = Vec::new();
    for tile in tiles {
        let splits = tile.keys.div_ceil(piece.max(1)).max(1);
        let count = splits.saturating_mul(heads) as usize;
        if lengths.len() + count > MOST_SIMULATED {
            return None;
        }
        lengths.resize(lengths.len() + count, tile.keys.div_ceil(splits) + START);
    }
    lengths.sort_unstable_by_key(|&length| Reverse(length));
    let mut busy: BinaryHeap<Reverse<u64>> = (0..slots).map(|_| Reverse(0)).collect();
    let mut last = 0;
    for length in lengths {
        let Reverse(free) = busy.pop()?;
        last = last.max(free + length);
        busy.push(Reverse(free + length));
    }
    Some(last)
}
