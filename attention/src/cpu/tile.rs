//! One unit of work: the rows of a tile against the keys of some segments, and the merge of segments.
//!
//! It knows which row sees which key, has `gather` find keys and values, and drives the loops of `kernel`.

use super::ahead::{Ahead, Coming};
use super::elements::{E4m3, E5m2, Element};
use super::gather::{Gather, Source};
use super::kernel::{
    Group, Heads, ROWS, RowPointers, SCORE_STRIDE, ScoreTerms, Scores, Softmax, SoftmaxRow, VisibleKeys,
    WeightedSums,
};
use super::lanes::{LANES, Lanes};
use super::plan::{CONVERT_ROWS, Tile, Unit};
use super::run::{Context, Workspace, padded};
use super::{CHUNK, SEGMENT};
use crate::{HostTensor, Mask, SequenceView};
use std::ops::Range;

/// Computes a unit. A whole tile is written to the output; the segments of a split one go to the partial
/// results, and whoever completes the tile merges them.
pub(super) fn compute<L: Lanes>(context: &Context<'_, '_>, unit: &Unit, workspace: &mut Workspace) {
    let inputs = context.inputs;
    match (inputs.k, inputs.v) {
        (HostTensor::F32(k), HostTensor::F32(v)) => typed::<L, f32>(context, unit, workspace, k, v),
        (HostTensor::F16(k), HostTensor::F16(v)) => typed::<L, _>(context, unit, workspace, k, v),
        (HostTensor::Bf16(k), HostTensor::Bf16(v)) => typed::<L, _>(context, unit, workspace, k, v),
        (HostTensor::F8E4M3(k), HostTensor::F8E4M3(v)) => {
            typed::<L, E4m3>(context, unit, workspace, E4m3::slice(k), E4m3::slice(v));
        }
        (HostTensor::F8E5M2(k), HostTensor::F8E5M2(v)) => {
            typed::<L, E5m2>(context, unit, workspace, E5m2::slice(k), E5m2::slice(v));
        }
        // `Inputs::check` has refused caches of two types.
        _ => {}
    }
}

fn typed<L: Lanes, T: Element>(
    context: &Context<'_, '_>,
    unit: &Unit,
    workspace: &mut Workspace,
    k: &[T],
    v: &[T],
) {
    let problem = context.plan.problem();
    let (config, layout) = (problem.config(), problem.layout());
    let Some(tile) = context.plan.tiles.get(unit.tile) else { return };
    let view = problem.sequence(tile.sequence);
    workspace.load_rows(context, tile, &view);
    let width = padded(config.head_dim_v);
    let elements = tile.rows() * width;

    let (block_size, table) = (layout.block_size, view.table);
    let k = Gather { cache: k, strides: layout.k, dim: config.head_dim_qk, table, block_size };
    let v = Gather { cache: v, strides: layout.v, dim: config.head_dim_v, table, block_size };
    let mut run = TileRun { context, tile, view: &view, k, v, found: None };
    for segment in unit.segments.clone() {
        workspace.segment.clear();
        run.segment::<L>(segment, workspace);
        match unit.split {
            None => {
                for row in 0..tile.rows() {
                    let (part, columns) = (&workspace.segment, row * width..(row + 1) * width);
                    workspace.total.add::<L>(row, part.softmax[row], &part.sums[columns]);
                }
            }
            Some(split) => {
                let index = segment - tile.segments().start;
                // SAFETY: this segment's place in the partial results belongs to this unit alone.
                let place = unsafe { context.partial(split, index, tile.rows()) };
                let (sums, softmax) = place.split_at_mut(elements);
                sums.copy_from_slice(&workspace.segment.sums[..elements]);
                for (to, from) in softmax.chunks_exact_mut(2).zip(&workspace.segment.softmax) {
                    to.copy_from_slice(&[from.max, from.sum]);
                }
            }
        }
    }
    let complete = match unit.split {
        None => true,
        Some(split) if context.completes(split) => {
            for index in 0..tile.segments().len() {
                // SAFETY: all units of the tile are done, and this thread alone was told so.
                let place = unsafe { context.partial(split, index, tile.rows()) };
                let (sums, softmax) = place.split_at(elements);
                for row in 0..tile.rows() {
                    let part = Softmax { max: softmax[2 * row], sum: softmax[2 * row + 1] };
                    workspace.total.add::<L>(row, part, &sums[row * width..(row + 1) * width]);
                }
            }
            true
        }
        Some(_) => false,
    };
    if complete {
        workspace.store_rows::<L>(context, tile, &view);
    }
}

/// Most rows of a head in a group: those of a tile of few rows.
const GROUP_ROWS: usize = CONVERT_ROWS - 1;

/// A tile on its way through its chunks.
struct TileRun<'r, 'p, T> {
    context: &'r Context<'r, 'p>,
    tile: &'r Tile,
    view: &'r SequenceView<'p>,
    k: Gather<'r, T>,
    v: Gather<'r, T>,
    /// The chunk that comes next, if it was found while the last one was computed.
    found: Option<Chunk<T>>,
}

/// Which rows go through a chunk.
struct Pass {
    /// Position of the chunk's first place.
    first: usize,
    /// The group's first row in the tile.
    row: usize,
    group: Group,
    /// Keys that all heads go through before the next.
    strip: usize,
}

/// A chunk that was found in the cache: where the tile's first head's rows lie.
#[derive(Clone, Copy)]
struct Chunk<T> {
    /// Position of its first place.
    first: usize,
    /// The tile's first and last keys in it, as positions.
    keys: (usize, usize),
    k: RowPointers<T>,
    v: RowPointers<T>,
    /// Whether the first strip of its keys was asked for.
    asked_for: bool,
}

impl<T: Element> TileRun<'_, '_, T> {
    fn segment<L: Lanes>(&mut self, segment: usize, workspace: &mut Workspace) {
        let many_rows = self.tile.rows_of_head() >= CONVERT_ROWS;
        let converts = [self.k.converts(many_rows), self.v.converts(many_rows)];
        for first in (segment * SEGMENT..(segment + 1) * SEGMENT).step_by(CHUNK) {
            let found = self.found.take().filter(|chunk| chunk.first == first);
            let Some(chunk) = found.or_else(|| self.find(first)) else { continue };
            // Rows are bound by arithmetic if they are many, and otherwise by memory.
            match many_rows || converts.contains(&true) {
                true => self.head_by_head::<L>(&chunk, converts, workspace),
                false => self.all_heads::<L>(&chunk, workspace),
            }
        }
    }

    fn find(&self, first: usize) -> Option<Chunk<T>> {
        let (start, end) = (first.max(self.tile.keys.start), (first + CHUNK).min(self.tile.keys.end));
        (start < end).then(|| {
            let head = self.tile.kv_heads.start;
            let (k, v) = (self.k.pointers(head, first, start..end), self.v.pointers(head, first, start..end));
            Chunk { first, keys: (start, end), k, v, asked_for: false }
        })
    }

    /// A head's few rows at a time, or all of them if they are no more; keys and values converted first where
    /// that pays.
    fn head_by_head<L: Lanes>(
        &mut self,
        chunk: &Chunk<T>,
        [convert_k, convert_v]: [bool; 2],
        workspace: &mut Workspace,
    ) {
        let keys = chunk.keys.0..chunk.keys.1;
        for head in 0..self.tile.kv_heads.len() {
            let source = |gather: &Gather<'_, T>, pointers, converts, buffer: &mut [f32]| {
                let heads = Heads { pointers, first: head * gather.strides.head as usize, stride: 0 };
                match converts {
                    true => Source::Converted(gather.convert::<L>(chunk.first, keys.clone(), heads, buffer)),
                    false => Source::Stored(heads),
                }
            };
            let k = source(&self.k, &chunk.k, convert_k, &mut workspace.k);
            let v = source(&self.v, &chunk.v, convert_v, &mut workspace.v);
            let rows = head * self.tile.rows_of_head()..(head + 1) * self.tile.rows_of_head();
            for row in rows.clone().step_by(ROWS) {
                let group = Group { heads: 1, rows: ROWS.min(rows.end - row) };
                let pass = Pass { first: chunk.first, row, group, strip: CHUNK };
                self.pass::<L>(pass, [&k, &v], workspace, None);
            }
        }
    }

    /// All rows at once, a strip of keys after the other, while the memory of the next strip is on its way.
    fn all_heads<L: Lanes>(&mut self, chunk: &Chunk<T>, workspace: &mut Workspace) {
        const STRIP: usize = LANES;
        let tile = self.tile;
        let mut next = self.find(chunk.first + CHUNK);
        let heads = tile.kv_heads.len();
        let [k_stride, v_stride] = [&self.k, &self.v].map(|of| of.strides.head as usize);
        let tokens = chunk.keys.0 - chunk.first..chunk.keys.1 - chunk.first;
        let (next_k, next_tokens) = match &next {
            Some(next) => (&next.k, 0..STRIP.min(next.keys.1 - next.first)),
            None => (&chunk.k, 0..0),
        };
        let (k_dim, v_dim) = (self.k.dim, self.v.dim);
        let streams = [
            Coming { pointers: &chunk.k, tokens: tokens.clone(), dim: k_dim, head_stride: k_stride },
            Coming { pointers: &chunk.v, tokens, dim: v_dim, head_stride: v_stride },
            Coming { pointers: next_k, tokens: next_tokens, dim: k_dim, head_stride: k_stride },
        ];
        let mut ahead = Ahead::new(streams, heads, STRIP, self.k.strides.head > self.k.strides.token);
        ahead.first_strip::<L>(chunk.asked_for);
        let k = Source::Stored(Heads { pointers: &chunk.k, first: 0, stride: k_stride });
        let v = Source::Stored(Heads { pointers: &chunk.v, first: 0, stride: v_stride });
        let group = Group { heads, rows: tile.rows_of_head() };
        let pass = Pass { first: chunk.first, row: 0, group, strip: STRIP };
        self.pass::<L>(pass, [&k, &v], workspace, Some(&mut ahead));
        if let Some(next) = next.as_mut() {
            next.asked_for = true;
        }
        self.found = next;
    }

    /// A group of rows against a chunk.
    fn pass<L: Lanes>(
        &self,
        pass: Pass,
        [k, v]: [&Source<'_, T>; 2],
        workspace: &mut Workspace,
        mut ahead: Option<&mut Ahead<'_, T>>,
    ) {
        let Pass { first, row, group, strip } = pass;
        // What a row sees is the same for all heads.
        let mut seen: [Range<usize>; GROUP_ROWS] = std::array::from_fn(|_| 0..0);
        let mut visible = [VisibleKeys::default(); GROUP_ROWS];
        let mut union: Option<Range<usize>> = None;
        for i in 0..group.rows {
            seen[i] = self.visible(workspace, first, row + i, &mut visible[i]);
            if !seen[i].is_empty() {
                let other = union.unwrap_or(seen[i].clone());
                union = Some(other.start.min(seen[i].start)..other.end.max(seen[i].end));
            }
        }
        let Some(keys) = union else { return };
        let seen = &seen[..group.rows];
        let (k_vectors, v_vectors) = (self.k.vectors(), self.v.vectors());
        let width = v_vectors * LANES;
        let scores = workspace.scores.as_mut_ptr();
        // SAFETY: the workspace holds `TILE_ROWS` rows of queries, scores and sums, and a group's rows are among the
        // tile's; `keys` lie among the tile's keys in this chunk, which `Gather` has found.
        unsafe {
            let q = workspace.q.as_ptr().add(row * k_vectors * LANES);
            let sums = workspace.segment.sums.as_mut_ptr().add(row * width);
            let (vectors, asked) = (k_vectors, ahead.as_deref_mut());
            match k {
                &Source::Stored(k) => {
                    L::enter(Scores { group, q, vectors, k, keys, strip, scores, ahead: asked });
                }
                Source::Converted(pointers) => {
                    let k = Heads { pointers, first: 0, stride: 0 };
                    L::enter(Scores { group, q, vectors, k, keys, strip, scores, ahead: asked });
                }
            }
            for head in 0..group.heads {
                for (i, seen) in seen.iter().enumerate().filter(|(_, seen)| !seen.is_empty()) {
                    let at = head * group.rows + i;
                    L::enter(SoftmaxRow {
                        scores: scores.add(at * SCORE_STRIDE),
                        visible: &visible[i],
                        blocks: seen.start / LANES..seen.end.div_ceil(LANES),
                        terms: self.context.terms(self.tile, self.view, row + at, first),
                        state: &mut workspace.segment.softmax[row + at],
                        sums: sums.add(at * width),
                        vectors: v_vectors,
                    });
                }
            }
            // One row of a head, or all rows of all heads.
            let mut add = |row: Option<(usize, usize)>, keys: Range<usize>| {
                if keys.is_empty() {
                    return;
                }
                let (first_head, at, group) = match row {
                    Some((head, i)) => (head, head * group.rows + i, Group { heads: 1, rows: 1 }),
                    None => (0, 0, group),
                };
                let probabilities = scores.add(at * SCORE_STRIDE).cast_const();
                let (sums, vectors, ahead) = (sums.add(at * width), v_vectors, ahead.as_deref_mut());
                match v {
                    &Source::Stored(v) => {
                        let v = Heads { first: v.offset(first_head), ..v };
                        L::enter(WeightedSums { group, probabilities, vectors, v, keys, strip, sums, ahead });
                    }
                    Source::Converted(pointers) => {
                        let v = Heads { pointers, first: 0, stride: 0 };
                        L::enter(WeightedSums { group, probabilities, vectors, v, keys, strip, sums, ahead });
                    }
                }
            };
            let rows = || {
                (0..group.heads)
                    .flat_map(|head| seen.iter().enumerate().map(move |(i, keys)| (head, i, keys)))
            };
            if self.context.plan.problem().config().mask == Mask::Bits {
                for (head, i, keys) in rows() {
                    for_each_run(&visible[i], keys.clone(), |keys| add(Some((head, i)), keys));
                }
                return;
            }
            // What all rows see goes in tiles; what some see, before and behind it, row by row. Each row adds
            // its keys in rising order either way.
            let start = seen.iter().map(|keys| keys.start).max().unwrap_or(0);
            let end = seen.iter().map(|keys| keys.end).min().unwrap_or(0);
            let (start, end) = if start < end { (start, end) } else { (CHUNK, CHUNK) };
            for (head, i, keys) in rows() {
                add(Some((head, i)), keys.start..keys.end.min(start));
            }
            add(None, start..end);
            for (head, i, keys) in rows() {
                add(Some((head, i)), end.max(keys.start)..keys.end);
            }
        }
    }

    /// Which keys of the chunk a row sees: the smallest range, and the bits.
    fn visible(
        &self,
        workspace: &Workspace,
        first: usize,
        row: usize,
        bits: &mut VisibleKeys,
    ) -> Range<usize> {
        let Some(keys) = workspace.visible.get(row) else { return 0..0 };
        let start = keys.start.clamp(first, first + CHUNK) - first;
        let end = keys.end.clamp(first, first + CHUNK) - first;
        if start >= end {
            return 0..0;
        }
        let blocks = start / LANES..end.div_ceil(LANES);
        for (block, bits) in blocks.clone().zip(&mut bits[blocks.clone()]) {
            let from = start.saturating_sub(block * LANES);
            let to = (end - block * LANES).min(LANES);
            *bits = ((1u32 << to) - (1u32 << from)) as u16;
        }
        let problem = self.context.plan.problem();
        let Some(mask) = problem.batch().mask_bits else { return start..end };
        let query = self.view.query_start + self.tile.query(row);
        let (mut least, mut most) = (end, start);
        for (block, bits) in blocks.clone().zip(&mut bits[blocks]) {
            let key = first + block * LANES;
            let word = mask.words.get(query * mask.row_words + key / 32).copied().unwrap_or(0);
            *bits &= (word >> (key % 32)) as u16;
            if *bits != 0 {
                least = least.min(block * LANES + bits.trailing_zeros() as usize);
                most = (block + 1) * LANES - bits.leading_zeros() as usize;
            }
        }
        least..most.max(least)
    }
}

/// Calls `f` with each run of set bits, in rising order.
fn for_each_run(bits: &VisibleKeys, keys: Range<usize>, mut f: impl FnMut(Range<usize>)) {
    let is_set = |key: usize| bits[key / LANES] >> (key % LANES) & 1 == 1;
    let mut key = keys.start;
    while key < keys.end {
        if !is_set(key) {
            key += 1;
            continue;
        }
        let start = key;
        while key < keys.end && is_set(key) {
            key += 1;
        }
        f(start..key);
    }
}

impl Context<'_, '_> {
    /// What is done to the scores of a row of a tile with the chunk that begins at `first`.
    fn terms(&self, tile: &Tile, view: &SequenceView<'_>, row: usize, first: usize) -> ScoreTerms {
        let problem = self.plan.problem();
        let config = problem.config();
        let alibi = self.inputs.alibi_slopes.map(|slopes| {
            let distance = first as i64 - problem.batch().position(view, tile.query(row));
            let q_head = tile.q_head(row, config.group());
            (slopes.get(q_head).copied().unwrap_or(0.0), distance as f32)
        });
        let scale = config.scale * self.inputs.k_scale.of(tile.kv_head(row));
        ScoreTerms { scale, softcap: config.softcap, alibi }
    }
}
