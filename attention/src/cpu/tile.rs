//! One unit of work: the rows of a tile against the keys of some segments, and the merge of segments.
//!
//! It knows which row sees which key, has `gather` find keys and values, and drives the loops of `kernel`.

use super::elements::{E4m3, E5m2, Element};
use super::gather::{Gather, Source};
use super::kernel::{
    Ahead, ROWS, SCORE_STRIDE, ScoreTerms, Scores, Softmax, SoftmaxRow, VisibleKeys, WeightedSums,
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

    for segment in unit.segments.clone() {
        workspace.segment.clear();
        let (block_size, table) = (layout.block_size, view.table);
        let k = Gather { cache: k, strides: layout.k, dim: config.head_dim_qk, table, block_size };
        let v = Gather { cache: v, strides: layout.v, dim: config.head_dim_v, table, block_size };
        SegmentRun { context, tile, view: &view, k, v, workspace }.segment::<L>(segment);
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

/// A tile against the chunks of a segment.
struct SegmentRun<'r, 'p, T> {
    context: &'r Context<'r, 'p>,
    tile: &'r Tile,
    view: &'r SequenceView<'p>,
    k: Gather<'r, T>,
    v: Gather<'r, T>,
    workspace: &'r mut Workspace,
}

/// A chunk of one head, found and if need be converted.
struct Chunk<T> {
    /// Its first key's position.
    first: usize,
    k: Source<T>,
    v: Source<T>,
}

impl<T: Element> SegmentRun<'_, '_, T> {
    fn segment<L: Lanes>(&mut self, segment: usize) {
        let tile = self.tile;
        let many_rows = tile.rows_of_head() >= CONVERT_ROWS;
        let keys_of = |first: usize| first.max(tile.keys.start)..(first + CHUNK).min(tile.keys.end);
        for first in (segment * SEGMENT..(segment + 1) * SEGMENT).step_by(CHUNK) {
            let keys = keys_of(first);
            if keys.is_empty() {
                continue;
            }
            // Few rows wait for memory, so the next chunk of all heads is asked for while this one is used.
            let next = if many_rows { 0..0 } else { keys_of(first + CHUNK) };
            let start = first + CHUNK;
            let rows = (!next.is_empty()).then(|| {
                let head = tile.kv_heads.start;
                [self.k.pointers(head, start, next.clone()), self.v.pointers(head, start, next.clone())]
            });
            let mut ahead = rows.as_ref().map(|[k, v]| Ahead {
                rows: [k, v],
                head_strides: [self.k.strides.head as usize, self.v.strides.head as usize],
                dims: [self.k.dim, self.v.dim],
                heads: tile.kv_heads.len(),
                tokens: next.start - start..next.end - start,
                head_major: self.k.strides.head > self.k.strides.token,
                next: (0, next.start - start, 0),
            });
            for kv_head in tile.kv_heads.clone() {
                let k = self.k.pointers(kv_head, first, keys.clone());
                let v = self.v.pointers(kv_head, first, keys.clone());
                let k = match self.k.converts(many_rows) {
                    true => {
                        let buffer = &mut self.workspace.k;
                        Source::Converted(self.k.convert::<L>(first, keys.clone(), &k, buffer))
                    }
                    false => Source::Stored(k),
                };
                let v = match self.v.converts(many_rows) {
                    true => {
                        let buffer = &mut self.workspace.v;
                        Source::Converted(self.v.convert::<L>(first, keys.clone(), &v, buffer))
                    }
                    false => Source::Stored(v),
                };
                let chunk = Chunk { first, k, v };
                let rows = (kv_head - tile.kv_heads.start) * tile.rows_of_head();
                let rows = rows..rows + tile.rows_of_head();
                for row in rows.clone().step_by(ROWS) {
                    self.batch::<L>(&chunk, row, ROWS.min(rows.end - row), ahead.as_mut());
                }
            }
        }
    }

    /// One to four rows against a chunk.
    fn batch<L: Lanes>(
        &mut self,
        chunk: &Chunk<T>,
        row: usize,
        rows: usize,
        mut ahead: Option<&mut Ahead<'_, T>>,
    ) {
        let mut seen: [Range<usize>; ROWS] = std::array::from_fn(|_| 0..0);
        let mut visible = [VisibleKeys::default(); ROWS];
        let mut union: Option<Range<usize>> = None;
        for i in 0..rows {
            seen[i] = self.visible(chunk.first, row + i, &mut visible[i]);
            if !seen[i].is_empty() {
                let other = union.unwrap_or(seen[i].clone());
                union = Some(other.start.min(seen[i].start)..other.end.max(seen[i].end));
            }
        }
        let Some(keys) = union else { return };
        let (k_vectors, v_vectors) = (self.k.vectors(), self.v.vectors());
        let width = v_vectors * LANES;
        let workspace = &mut *self.workspace;
        let scores = workspace.scores.as_mut_ptr();
        // SAFETY: the workspace holds `TILE_ROWS` rows of queries and sums and `ROWS` rows of scores; `keys` lie
        // among the tile's keys in this chunk, which `Gather` has found.
        unsafe {
            let q = workspace.q.as_ptr().add(row * k_vectors * LANES);
            let sums = workspace.segment.sums.as_mut_ptr().add(row * width);
            match &chunk.k {
                Source::Stored(pointers) => {
                    let ahead = ahead.as_deref_mut();
                    L::enter(Scores { rows, q, vectors: k_vectors, pointers, keys, scores, ahead });
                }
                Source::Converted(pointers) => {
                    let ahead = ahead.as_deref_mut();
                    L::enter(Scores { rows, q, vectors: k_vectors, pointers, keys, scores, ahead });
                }
            }
            for i in 0..rows {
                if seen[i].is_empty() {
                    continue;
                }
                L::enter(SoftmaxRow {
                    scores: scores.add(i * SCORE_STRIDE),
                    visible: &visible[i],
                    blocks: seen[i].start / LANES..seen[i].end.div_ceil(LANES),
                    terms: self.context.terms(self.tile, self.view, row + i, chunk.first),
                    state: &mut workspace.segment.softmax[row + i],
                    sums: sums.add(i * width),
                    vectors: v_vectors,
                });
            }
            let mut add = |first: usize, rows: usize, keys: Range<usize>| {
                if keys.is_empty() {
                    return;
                }
                let probabilities = scores.add(first * SCORE_STRIDE).cast_const();
                let (sums, vectors, ahead) = (sums.add(first * width), v_vectors, ahead.as_deref_mut());
                match &chunk.v {
                    Source::Stored(pointers) => {
                        L::enter(WeightedSums { rows, probabilities, vectors, pointers, keys, sums, ahead });
                    }
                    Source::Converted(pointers) => {
                        L::enter(WeightedSums { rows, probabilities, vectors, pointers, keys, sums, ahead });
                    }
                }
            };
            if self.context.plan.problem().config().mask == Mask::Bits {
                for i in 0..rows {
                    for_each_run(&visible[i], seen[i].clone(), |keys| add(i, 1, keys));
                }
                return;
            }
            // What all rows see goes in tiles; what some see, before and behind it, row by row. Each row adds
            // its keys in rising order either way.
            let start = seen[..rows].iter().map(|keys| keys.start).max().unwrap_or(0);
            let end = seen[..rows].iter().map(|keys| keys.end).min().unwrap_or(0);
            let (start, end, together) = if start < end { (start, end, rows) } else { (CHUNK, CHUNK, 0) };
            for (i, keys) in seen[..rows].iter().enumerate() {
                add(i, 1, keys.start..keys.end.min(start));
            }
            add(0, together, start..end);
            for (i, keys) in seen[..rows].iter().enumerate() {
                add(i, 1, end.max(keys.start)..keys.end);
            }
        }
    }

    /// Which keys of the chunk a row sees: the smallest range, and the bits.
    fn visible(&self, first: usize, row: usize, bits: &mut VisibleKeys) -> Range<usize> {
        let Some(keys) = self.workspace.visible.get(row) else { return 0..0 };
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
