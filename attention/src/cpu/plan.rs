//! The work list: rows of one sequence in tiles, and long ones split by segments.
//! Host arithmetic only; `run` hands the units to threads and `tile` computes them.

use super::io::{Inputs, Outputs};
use super::lanes::Level;
use super::run::{self, Partials, Workspace};
use super::{CHUNK, SEGMENT};
use crate::{Mask, PagedBatch, Problem, ProblemError, SequenceView};
use std::ops::Range;
use std::sync::Mutex;

/// Rows (queries times heads that share a key-value head) of a tile: enough to make up for converting the
/// keys and values, few enough for their sums to stay in the second-level cache.
pub(super) const TILE_ROWS: usize = 64;

/// Rows from which on keys and values are converted to `f32` once a chunk instead of once for each four rows.
pub(super) const CONVERT_ROWS: usize = 9;

/// Multiply-adds below which another thread costs more than it helps.
const LEAST_SHARE: u64 = 1 << 17;

/// Rows of one sequence that are computed together, `[kv_heads, queries, heads]`.
#[derive(Clone, Debug)]
pub(super) struct Tile {
    pub(super) sequence: usize,
    /// Several if their rows are few: the heads of a token often lie side by side, so going through the keys
    /// once for all of them reads memory in order.
    pub(super) kv_heads: Range<usize>,
    /// Queries, counted from the sequence's first.
    pub(super) queries: Range<usize>,
    /// Query heads, counted from the first that uses the same key-value head.
    pub(super) heads: Range<usize>,
    /// Keys that at least one row may see.
    pub(super) keys: Range<usize>,
}

impl Tile {
    pub(super) fn rows(&self) -> usize {
        self.kv_heads.len() * self.rows_of_head()
    }

    /// Rows that share a key-value head.
    pub(super) fn rows_of_head(&self) -> usize {
        self.queries.len() * self.heads.len()
    }

    /// Query of a row, counted from the sequence's first.
    pub(super) fn query(&self, row: usize) -> usize {
        self.queries.start + row / self.heads.len() % self.queries.len()
    }

    /// Key-value head of a row.
    pub(super) fn kv_head(&self, row: usize) -> usize {
        self.kv_heads.start + row / self.rows_of_head()
    }

    /// Query head of a row, of all heads.
    pub(super) fn q_head(&self, row: usize, group: usize) -> usize {
        self.kv_head(row) * group + self.heads.start + row % self.heads.len()
    }

    /// The segments in which its keys lie.
    pub(super) fn segments(&self) -> Range<usize> {
        match self.keys.is_empty() {
            true => 0..0,
            false => self.keys.start / SEGMENT..self.keys.end.div_ceil(SEGMENT),
        }
    }
}

/// What a thread takes at a time: a tile, or some of the segments of one.
#[derive(Clone, Debug)]
pub(super) struct Unit {
    pub(super) tile: usize,
    pub(super) segments: Range<usize>,
    /// Set if other units compute the other segments of the tile.
    pub(super) split: Option<Split>,
}

/// Where a split tile's partial results go.
#[derive(Clone, Copy, Debug)]
pub(super) struct Split {
    /// Which split tile, counted over the plan.
    pub(super) index: usize,
    /// Where the tile's partial results begin, in `f32` elements.
    pub(super) offset: usize,
}

/// A step's work for one kind of layer: made once a step, run once a layer.
///
/// It is made for the threads of the rayon pool that it is made in ([`rayon::current_num_threads`]); running
/// it in another pool is allowed and gives the same bits.
#[derive(Debug)]
pub struct Plan<'a> {
    problem: Problem<'a>,
    pub(super) tiles: Vec<Tile>,
    /// Largest first.
    pub(super) units: Vec<Unit>,
    /// For each split tile, the number of its units.
    pub(super) splits: Vec<usize>,
    /// Elements that the partial results of all split tiles take.
    pub(super) partial_elements: usize,
    pub(super) workers: usize,
    /// One that the processor has.
    pub(super) level: Level,
    /// Buffers that runs borrow and give back, so that a layer allocates nothing.
    pub(super) workspaces: Mutex<Vec<Workspace>>,
    /// As `workspaces`, one for each run at a time.
    pub(super) partials: Mutex<Vec<Partials>>,
}

impl<'a> Plan<'a> {
    /// Plans the work of a checked problem.
    pub fn new(problem: Problem<'a>) -> Self {
        let threads = rayon::current_num_threads().max(1);
        let tiles = tiles(&problem, threads);
        let config = problem.config();
        let dims = (config.head_dim_qk + config.head_dim_v) as u64;
        // Few rows are bound by reading keys and values: a row costs at least as much as four.
        let cost =
            |tile: &Tile, keys: usize| keys as u64 * tile.rows().max(4 * tile.kv_heads.len()) as u64 * dims;
        let total: u64 = tiles.iter().map(|tile| cost(tile, tile.keys.len())).sum();
        let workers = (total / LEAST_SHARE).clamp(1, threads as u64) as usize;

        let mut units: Vec<(u64, Unit)> = Vec::with_capacity(tiles.len());
        let (mut splits, mut partial_elements) = (Vec::new(), 0);
        // Four pieces a thread even out the end.
        let share = (total / (4 * workers as u64)).max(LEAST_SHARE);
        for (index, tile) in tiles.iter().enumerate() {
            let (whole, segments) = (cost(tile, tile.keys.len()), tile.segments());
            let pieces = (whole / share).min(segments.len() as u64) as usize;
            if workers == 1 || pieces < 2 {
                units.push((whole, Unit { tile: index, segments, split: None }));
                continue;
            }
            let split = Split { index: splits.len(), offset: partial_elements };
            partial_elements += segments.len() * run::partial_len(config, tile.rows());
            splits.push(pieces);
            for piece in 0..pieces {
                let at = |piece: usize| segments.start + segments.len() * piece / pieces;
                let segments = at(piece)..at(piece + 1);
                let cost = cost(tile, segments.len() * SEGMENT);
                units.push((cost, Unit { tile: index, segments, split: Some(split) }));
            }
        }
        units.sort_by_key(|&(cost, _)| std::cmp::Reverse(cost));
        let units = units.into_iter().map(|(_, unit)| unit).collect();
        let (workspaces, partials) = Default::default();
        let level = Level::detect();
        Self { problem, tiles, units, splits, partial_elements, workers, level, workspaces, partials }
    }

    /// The same plan for another instruction set than the best one; `None` if the processor lacks it. AVX-512,
    /// AVX2 and NEON give the same bits.
    pub fn with_level(self, level: Level) -> Option<Self> {
        level.is_available().then_some(Self { level, ..self })
    }

    /// The problem that was planned.
    pub fn problem(&self) -> &Problem<'a> {
        &self.problem
    }

    /// Computes a layer. Every output row of the problem is written; nothing else is.
    ///
    /// # Errors
    /// [`ProblemError`] if a buffer is too short or of another dtype, or an input is missing or not asked for;
    /// nothing has been written then.
    pub fn run(&self, inputs: &Inputs<'_>, outputs: &mut Outputs<'_>) -> Result<(), ProblemError> {
        inputs.check(&self.problem)?;
        outputs.check(&self.problem)?;
        run::run(self, inputs, outputs);
        Ok(())
    }
}

fn tiles(problem: &Problem<'_>, threads: usize) -> Vec<Tile> {
    let (config, batch) = (problem.config(), problem.batch());
    let group = config.group();
    // A wide group is cut into equal parts that fit a tile.
    let heads = group.div_ceil(group.div_ceil(TILE_ROWS));
    let tile_queries = (TILE_ROWS / heads).max(1);
    let views = || (0..problem.num_sequences()).map(|i| (i, problem.sequence(i)));
    // With little else to share out, every key-value head goes its own way.
    let segments: usize = views().map(|(_, view)| view.query_len.min(1) * view.len.div_ceil(SEGMENT)).sum();
    let shares = (2 * threads).div_ceil(segments.max(1));
    let mut tiles = Vec::new();
    for (sequence, view) in views() {
        let rows = heads * view.query_len.min(tile_queries);
        let kv_heads = match rows < CONVERT_ROWS {
            true => (TILE_ROWS / rows.max(1)).min(config.kv_heads.div_ceil(shares)).max(1),
            false => 1,
        };
        for first in (0..view.query_len).step_by(tile_queries) {
            let queries = first..(first + tile_queries).min(view.query_len);
            let keys = visible_keys(batch, config.mask, &view, queries.clone());
            for kv_head in (0..config.kv_heads).step_by(kv_heads) {
                for first_head in (0..group).step_by(heads) {
                    tiles.push(Tile {
                        sequence,
                        kv_heads: kv_head..(kv_head + kv_heads).min(config.kv_heads),
                        queries: queries.clone(),
                        heads: first_head..(first_head + heads).min(group),
                        keys: keys.clone(),
                    });
                }
            }
        }
    }
    tiles
}

/// The smallest range of keys outside of which none of the queries sees any.
fn visible_keys(
    batch: &PagedBatch<'_>,
    mask: Mask,
    view: &SequenceView<'_>,
    queries: Range<usize>,
) -> Range<usize> {
    let ranges = queries.map(|query| batch.visible(mask, view, query)).filter(|range| !range.is_empty());
    ranges.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end)).unwrap_or(0..0)
}

const _: () = assert!(SEGMENT.is_multiple_of(CHUNK) && CHUNK.is_multiple_of(32));

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AttentionConfig, CacheLayout, DType};

    /// Each key-value head of each key is read once in a decode: its tiles do not overlap, and the units of a
    /// tile share its segments out.
    #[test]
    fn decode_reads_keys_and_values_once() {
        for (q_heads, kv_heads) in [(32, 8), (9, 3), (8, 8), (64, 1), (60, 2)] {
            for threads in [1, 2, 5, 16] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let config = AttentionConfig::new(q_heads, kv_heads, 64, DType::Bf16);
                let lens = [1, 130, 4096, 7000];
                let tables: Vec<i32> = vec![0; lens.len() * 438];
                let starts: Vec<i32> = (0..=lens.len() as i32).collect();
                let batch = PagedBatch::padded(&starts, &lens, &tables, 438);
                let problem = Problem::new(&config, CacheLayout::nhd(1, 16, &config), batch).unwrap();
                let plan = pool.install(|| Plan::new(problem));
                for (sequence, &len) in lens.iter().enumerate() {
                    let mut reads = vec![vec![0; len as usize]; kv_heads];
                    for unit in &plan.units {
                        let tile = &plan.tiles[unit.tile];
                        let keys = unit.segments.start * SEGMENT..unit.segments.end * SEGMENT;
                        let keys = keys.start.max(tile.keys.start)..keys.end.min(tile.keys.end);
                        if tile.sequence == sequence {
                            for head in tile.kv_heads.clone() {
                                reads[head][keys.clone()].iter_mut().for_each(|reads| *reads += 1);
                            }
                        }
                    }
                    let once = reads.iter().flatten().all(|&reads| reads == 1);
                    assert!(once, "{q_heads}/{kv_heads} heads, {threads} threads, sequence of {len}");
                }
            }
        }
    }
}
