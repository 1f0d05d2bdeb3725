//! The query rows of a problem, each with the keys that it sees.

use super::TooLarge;
use super::split::{MAX_PIECE_KEYS, TILE_KEYS};
use crate::{BlockTables, Problem};

/// The keys that one query row sees.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Keys {
    /// First entry of its block table.
    pub(crate) table: u32,
    pub(crate) row: u32,
    pub(crate) begin: u32,
    pub(crate) end: u32,
    pub(crate) position: i32,
}

impl Keys {
    /// Keys from the first tile's begin on.
    pub(crate) fn span(&self) -> u32 {
        (self.end - self.begin.min(self.end)).saturating_add(self.begin % TILE_KEYS)
    }
}

/// The first entry of a sequence's block table, counted from the beginning of all tables.
pub(crate) fn first_entry(problem: &Problem<'_>, index: usize) -> usize {
    match problem.batch().block_tables {
        BlockTables::Padded { max_blocks, .. } => index * max_blocks,
        BlockTables::Csr { indptr, .. } => indptr.get(index).map_or(0, |&start| start.max(0) as usize),
    }
}

/// The query rows of the sequences that are asked for, with the keys that they see.
pub(crate) fn visible_rows(
    problem: &Problem<'_>,
    wanted: impl Fn(usize) -> bool,
) -> Result<Vec<Keys>, TooLarge> {
    let batch = problem.batch();
    let mut rows = Vec::with_capacity(problem.total_queries());
    for index in (0..problem.num_sequences()).filter(|&index| wanted(index)) {
        let sequence = problem.sequence(index);
        let table = first_entry(problem, index);
        for query in 0..sequence.query_len {
            let keys = batch.visible(problem.config().mask, &sequence, query);
            let position = batch.position(&sequence, query);
            rows.push(Keys {
                table: count("the block tables' length", table)?,
                row: count("the number of query rows", sequence.query_start + query)?,
                begin: count("a sequence's length", keys.start)?,
                end: count("a sequence's length", keys.end)?,
                position: position.clamp(i64::from(i32::MIN), i64::from(i32::MAX)) as i32,
            });
        }
    }
    Ok(rows)
}

/// A size as the kernels count it. They add tiles to these, so that some room is left below 2^31.
pub(crate) fn count(what: &'static str, value: usize) -> Result<u32, TooLarge> {
    let max = i32::MAX as u32 - MAX_PIECE_KEYS;
    match u32::try_from(value) {
        Ok(small) if small <= max => Ok(small),
        _ => Err(TooLarge { what, value: value as u64, max: u64::from(max) }),
    }
}
