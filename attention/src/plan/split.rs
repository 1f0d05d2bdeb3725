//! How the keys of query rows are cut into pieces of about equal size.

use super::{Keys, TooLarge};

/// Pieces end at multiples of so many keys, or at the end of a row's keys.
pub(crate) const TILE_KEYS: u32 = 16;

/// No piece that is cut is larger, so that sums of keys and tiles stay below 2³².
pub(crate) const MAX_PIECE_KEYS: u32 = 1 << 24;

/// How rows are cut.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Cut {
    /// Into pieces of at most so many keys, as equal as tiles allow.
    Equal(u32),
    /// Into pieces that shrink with the work that is left, in units of `round` keys.
    #[cfg_attr(
        not(feature = "cuda"),
        allow(dead_code, reason = "only CUDA's planner knows how wide its GPU is")
    )]
    Shrinking { shares: u64, smallest: u32, round: u32 },
}

/// The keys `begin..end` of a query row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// First entry of the sequence's block table, counted from the beginning of all tables.
    pub(crate) table: u32,
    /// The row of the queries and of the output.
    pub(crate) row: u32,
    pub(crate) begin: u32,
    pub(crate) end: u32,
    /// Which piece of the row this is, of how many.
    pub(crate) split: u32,
    pub(crate) splits: u32,
    /// Number of the row's first partial result, if it has several pieces.
    pub(crate) first_partial: u32,
    /// The query's position, for ALiBi.
    pub(crate) position: i32,
}

/// Cuts every row into pieces; the largest come first. Gives the items and the number of partial results.
pub(crate) fn split(rows: &[Keys], blocks_per_item: u64, cut: Cut) -> Result<(Vec<Piece>, u32), TooLarge> {
    let mut items = Vec::with_capacity(rows.len() * 2);
    let mut partials = 0u32;
    let mut left: u64 = rows.iter().map(|keys| u64::from(keys.span())).sum();
    for keys in rows {
        let first_item = items.len();
        let first_tile = keys.begin - keys.begin % TILE_KEYS;
        let span = keys.span();
        let equal = match cut {
            Cut::Equal(most) => span.div_ceil(span.div_ceil(most).max(1)).max(1).next_multiple_of(TILE_KEYS),
            Cut::Shrinking { .. } => 0,
        };
        let mut done = 0;
        loop {
            let size = match cut {
                Cut::Equal(_) => equal,
                Cut::Shrinking { shares, smallest, round } => {
                    let share = (left * blocks_per_item).div_ceil(shares);
                    let share = share.max(u64::from(smallest)).min(u64::from(MAX_PIECE_KEYS)) as u32;
                    let size = share.next_multiple_of(round).min(MAX_PIECE_KEYS);
                    // No crumb at the end of a row: rather a piece that is a little larger, or two equal ones.
                    match span - done {
                        rest if rest <= size + smallest.min(size / 2) => rest,
                        rest if rest < 2 * size => rest.div_ceil(2).next_multiple_of(TILE_KEYS),
                        _ => size,
                    }
                }
            };
            let end = done.saturating_add(size).min(span);
            items.push(Piece {
                table: keys.table,
                row: keys.row,
                begin: keys.begin.max(first_tile + done),
                end: keys.end.min(first_tile.saturating_add(end)),
                split: (items.len() - first_item) as u32,
                splits: 1,
                first_partial: partials,
                position: keys.position,
            });
            left -= u64::from(end - done);
            done = end;
            if done >= span {
                break;
            }
        }
        let mine = items.get_mut(first_item..).unwrap_or_default();
        let splits = mine.len() as u32;
        if splits > 1 {
            mine.iter_mut().for_each(|item| item.splits = splits);
            partials = partials.checked_add(splits).ok_or(TooLarge {
                what: "the number of splits",
                value: u64::from(partials) + u64::from(splits),
                max: u64::from(u32::MAX),
            })?;
        }
    }
    items.sort_by_key(|item| std::cmp::Reverse(item.end.saturating_sub(item.begin)));
    Ok((items, partials))
}
