//! The prefill part of a step for the wgpu backend: which query rows and keys go to which work item.
//!
//! Pure host arithmetic; the kernel that consumes the items is [`pagewise_shaders::prefill`]'s, `plan.rs` puts them into
//! the plan's buffer.

use std::cmp::Reverse;

use pagewise_shaders::decode::{MAX_SPLITS, MERGE_WORDS};
use pagewise_shaders::prefill::{PrefillItem, PrefillKernel, TILE_KEYS};

use super::WgpuError;
use crate::plan::{TooLarge, count, first_entry};
use crate::{AttentionConfig, Mask, Problem};

/// The fewest keys that are worth a workgroup and a merge of their own.
const SMALLEST_PIECE: u32 = 512;

/// What part of the workgroups that a plan aims for are enough here: they are larger than those of decode.
const FEWER_WORKGROUPS: u32 = 4;

/// How the keys of tiles are split.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pieces {
    /// Keys of an item, if fixed.
    pub(super) keys: Option<u32>,
    /// Otherwise: workgroups that the plan aims for.
    pub(super) workgroups: u32,
}

/// Items, rows to merge, and what every row sees.
#[derive(Clone, Debug, Default)]
pub(super) struct PrefillPart {
    /// Their ranges are counted from the first of `ranges`.
    pub(super) items: Vec<PrefillItem>,
    /// Row, first partial result, splits, 0.
    pub(super) merges: Vec<[u32; MERGE_WORDS]>,
    /// First key, one past the last, position, 0.
    pub(super) ranges: Vec<[u32; PrefillItem::RANGE_WORDS]>,
    /// One past the last partial result.
    pub(super) partials: u32,
}

impl PrefillPart {
    /// Cuts the sequences that are asked for into tiles and items; their partial results begin at `first_partial`.
    pub(super) fn new(
        problem: &Problem<'_>,
        sequences: &[usize],
        kernel: PrefillKernel,
        pieces: Pieces,
        first_partial: u32,
    ) -> Result<Self, WgpuError> {
        let config = problem.config();
        let mut part = Self { partials: first_partial, ..Self::default() };
        let mut tiles = Vec::new();
        for &index in sequences {
            part.tile_sequence(problem, index, kernel, &mut tiles)?;
        }
        let keys: u64 = tiles.iter().filter(|tile| tile.even).map(|tile| u64::from(span(&tile.item))).sum();
        let longest = tiles.iter().map(|tile| span(&tile.item)).max().unwrap_or(0);
        let piece = piece_keys(keys, longest, workgroups_of_item(config, kernel), pieces);
        for tile in tiles {
            part.add(tile, piece)?;
        }
        // The longest first, so that the last ones to end are short.
        part.items.sort_by_key(|item| Reverse(item.end - item.begin));
        Ok(part)
    }

    /// Cuts a sequence's rows into tiles of whole queries.
    fn tile_sequence(
        &mut self,
        problem: &Problem<'_>,
        index: usize,
        kernel: PrefillKernel,
        tiles: &mut Vec<Tile>,
    ) -> Result<(), WgpuError> {
        let (batch, config, sequence) = (problem.batch(), problem.config(), problem.sequence(index));
        let table = count("the block tables' length", first_entry(problem, index))?;
        let group = count("the group", config.group())?;
        let most = kernel.queries(group) as usize;
        for first in (0..sequence.query_len).step_by(most) {
            let queries = most.min(sequence.query_len - first);
            let ranges = self.ranges.len() * PrefillItem::RANGE_WORDS;
            // All keys that some row sees, those that all rows see, and the fewest that a row sees.
            let (mut begin, mut end, mut plain_begin, mut plain_end) = (u32::MAX, 0, 0, u32::MAX);
            let mut fewest = u32::MAX;
            for query in first..first + queries {
                let keys = batch.visible(config.mask, &sequence, query);
                let from = count("a sequence's length", keys.start)?;
                let to = count("a sequence's length", keys.end)?;
                let position = batch.position(&sequence, query);
                let position = position.clamp(i64::from(i32::MIN), i64::from(i32::MAX)) as i32;
                self.ranges.push([from, to, position.cast_unsigned(), 0]);
                if from < to {
                    (begin, end) = (begin.min(from), end.max(to));
                }
                (plain_begin, plain_end) = (plain_begin.max(from), plain_end.min(to));
                fewest = fewest.min(to.saturating_sub(from));
            }
            let begin = begin.min(end);
            let item = PrefillItem {
                table,
                row: count("the number of query rows", sequence.query_start + first)?,
                queries: count("the queries of a tile", queries)?,
                begin,
                end,
                plain_begin,
                plain_end: if config.mask == Mask::Bits { 0 } else { plain_end },
                split: 0,
                splits: 1,
                first_partial: 0,
                ranges: count("the plan's length", ranges)?,
            };
            tiles.push(Tile { item, even: fewest >= (end - begin).div_ceil(2) });
        }
        Ok(())
    }

    /// Adds a tile: as one item, or as several of about equal length.
    fn add(&mut self, tile: Tile, piece: u32) -> Result<(), WgpuError> {
        let item = tile.item;
        let splits = span(&item).div_ceil(piece);
        if splits <= 1 || !tile.even {
            self.items.push(item);
            return Ok(());
        }
        let first_partial = self.partials;
        let (from, key_tiles) = (item.begin, span(&item) / TILE_KEYS);
        for split in 0..splits {
            let at = |split: u32| {
                let tiles = u64::from(key_tiles) * u64::from(split) / u64::from(splits);
                from + tiles as u32 * TILE_KEYS
            };
            let end = if split + 1 == splits { item.end } else { at(split + 1) };
            self.items.push(PrefillItem { begin: at(split), end, split, splits, first_partial, ..item });
        }
        let mine = u64::from(splits) * u64::from(item.queries);
        let value = u64::from(first_partial) + mine;
        let too_large = TooLarge { what: "the number of splits", value, max: u64::from(u32::MAX) };
        self.partials = u32::try_from(value).map_err(|_| too_large)?;
        self.merges.extend((0..item.queries).map(|query| {
            let partial = first_partial + query * splits;
            [item.row + query, partial, splits, 0]
        }));
        Ok(())
    }
}

/// Some rows of a sequence and all keys that they see.
struct Tile {
    item: PrefillItem,
    /// Whether every row sees at least half of the keys. Others, at positions that lie apart, are not split: their rows
    /// would have many partial results of few keys.
    even: bool,
}

/// Keys of an item in whole tiles.
fn span(item: &PrefillItem) -> u32 {
    (item.end - item.begin).next_multiple_of(TILE_KEYS)
}

/// Workgroups that share an item for its different heads.
fn workgroups_of_item(config: &AttentionConfig, kernel: PrefillKernel) -> u64 {
    config.kv_heads as u64 * u64::from(kernel.head_tiles(config.group() as u32))
}

/// Keys of an item, for tiles that have `keys` keys in all.
fn piece_keys(keys: u64, longest: u32, heads: u64, pieces: Pieces) -> u32 {
    let fewest = longest.div_ceil(MAX_SPLITS - 1);
    let piece = match pieces.keys {
        Some(keys) => keys,
        None => {
            let workgroups = u64::from(pieces.workgroups.div_ceil(FEWER_WORKGROUPS).max(1));
            let share = (keys * heads).div_ceil(workgroups).min(u64::from(u32::MAX / 2));
            (share as u32).max(SMALLEST_PIECE)
        }
    };
    piece.max(fewest).max(1).next_multiple_of(TILE_KEYS)
}

/// Items and partial results beyond one a row that no prefill part exceeds, for rows that see `keys` keys in all.
pub(super) fn most_pieces(
    config: &AttentionConfig,
    kernel: PrefillKernel,
    rows: u64,
    keys: u64,
    pieces: Pieces,
) -> u64 {
    // A tile that is split has at most twice the keys of each of its rows, and at most a tile of keys on top.
    let of_rows = 2 * keys + rows * u64::from(TILE_KEYS);
    match pieces.keys {
        Some(piece) => of_rows / u64::from(piece.next_multiple_of(TILE_KEYS).max(TILE_KEYS)),
        None => {
            let heads = workgroups_of_item(config, kernel).max(1);
            let workgroups = u64::from(pieces.workgroups.div_ceil(FEWER_WORKGROUPS).max(1));
            let queries = u64::from(kernel.queries(config.group() as u32));
            (of_rows / u64::from(SMALLEST_PIECE)).min(workgroups.div_ceil(heads) * queries)
        }
    }
}
