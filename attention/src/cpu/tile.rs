//! One unit of work: the rows of a tile against the keys of some segments, and the merge of segments.
//!
//! It finds keys and values through the block table, converts them once where many rows share them, and
//! drives the loops of `kernel`.

use super::elements::{E4m3, E5m2, Element};
use super::kernel::{self, ROWS, RowPointers, SCORE_STRIDE, ScoreTerms, Softmax, VisibleKeys};
use super::lanes::{LANES, Lanes};
use super::plan::{Tile, Unit};
use super::run::{Context, Workspace, padded};
use super::{CHUNK, SEGMENT, math};
use crate::{HostTensor, KvStrides, Mask, SequenceView};
use std::ops::Range;

/// Rows from which on keys and values are converted to `f32` once a chunk instead of once for each four rows.
const CONVERT_ROWS: usize = 9;

/// Computes a unit. A whole tile is written to the output; the segments of a split one go to the partial
/// results, and whoever completes the tile merges them.
#[inline(always)]
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

#[inline(always)]
fn typed<L: Lanes, T: Element>(
    context: &Context<'_, '_>,
    unit: &Unit,
    workspace: &mut Workspace,
    k: &[T],
    v: &[T],
) {
    let problem = context.plan.problem();
    let config = problem.config();
    let Some(tile) = context.plan.tiles.get(unit.tile) else { return };
    let view = problem.sequence(tile.sequence);
    workspace.load_rows(context, tile, &view);
    let width = padded(config.head_dim_v);
    let elements = tile.rows() * width;

    for segment in unit.segments.clone() {
        workspace.segment.clear();
        let mut run = SegmentRun { context, tile, view: &view, k, v, workspace };
        run.segment::<L>(segment);
        match unit.split {
            None => {
                for row in 0..tile.rows() {
                    let (total, part) = (&mut workspace.total, &workspace.segment);
                    let columns = row * width..(row + 1) * width;
                    merge_row::<L>(
                        (&mut total.softmax[row], &mut total.sums[columns.clone()]),
                        (&part.softmax[row], &part.sums[columns]),
                    );
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
                    let columns = row * width..(row + 1) * width;
                    let part = Softmax { max: softmax[2 * row], sum: softmax[2 * row + 1] };
                    let total = &mut workspace.total;
                    merge_row::<L>(
                        (&mut total.softmax[row], &mut total.sums[columns.clone()]),
                        (&part, &sums[columns]),
                    );
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

/// Adds a segment's softmax and sums to the total's.
#[inline(always)]
fn merge_row<L: Lanes>(total: (&mut Softmax, &mut [f32]), part: (&Softmax, &[f32])) {
    let ((state, sums), (part, part_sums)) = (total, part);
    // A row that saw no key of the segment. NaN is not 0 and goes on.
    if part.sum == 0.0 {
        return;
    }
    let max = state.max.max(part.max);
    let shift = if max == f32::NEG_INFINITY { 0.0 } else { max };
    let (keep, add) = (math::exp1::<L>(state.max - shift), math::exp1::<L>(part.max - shift));
    *state = Softmax { max, sum: state.sum * keep + part.sum * add };
    for (to, from) in sums.chunks_exact_mut(LANES).zip(part_sums.chunks_exact(LANES)) {
        // SAFETY: both hold sixteen elements.
        unsafe {
            let kept = L::load(to.as_ptr()).mul(L::splat(keep));
            L::load(from.as_ptr()).fma(L::splat(add), kept).store(to.as_mut_ptr());
        }
    }
}

/// Keys or values of a chunk: as they are stored, or converted.
enum Source<T> {
    Stored(RowPointers<T>),
    Converted(RowPointers<f32>),
}

struct SegmentRun<'r, 'p, T> {
    context: &'r Context<'r, 'p>,
    tile: &'r Tile,
    view: &'r SequenceView<'p>,
    k: &'r [T],
    v: &'r [T],
    workspace: &'r mut Workspace,
}

impl<T: Element> SegmentRun<'_, '_, T> {
    #[inline(always)]
    fn segment<L: Lanes>(&mut self, segment: usize) {
        let config = self.context.plan.problem().config();
        let (k_width, v_width) = (padded(config.head_dim_qk), padded(config.head_dim_v));
        let layout = *self.context.plan.problem().layout();
        for first in (segment * SEGMENT..(segment + 1) * SEGMENT).step_by(CHUNK) {
            let keys = first.max(self.tile.keys.start)..(first + CHUNK).min(self.tile.keys.end);
            if keys.is_empty() {
                continue;
            }
            let k = self.source::<L>(self.k, layout.k, config.head_dim_qk, first, keys.clone(), true);
            let v = self.source::<L>(self.v, layout.v, config.head_dim_v, first, keys, false);
            let mut row = 0;
            while row < self.tile.rows() {
                let rows = ROWS.min(self.tile.rows() - row);
                self.batch::<L>(first, row, rows, (&k, k_width / LANES), (&v, v_width / LANES));
                row += rows;
            }
        }
    }

    /// Finds the rows of `keys` in the cache.
    #[inline(always)]
    fn source<L: Lanes>(
        &mut self,
        cache: &[T],
        strides: KvStrides,
        dim: usize,
        first: usize,
        keys: Range<usize>,
        is_k: bool,
    ) -> Source<T> {
        let block_size = self.context.plan.problem().layout().block_size;
        let (shift, place_mask) = (block_size.trailing_zeros(), block_size - 1);
        let head = self.tile.kv_head as u64 * strides.head;
        let mut pointers: RowPointers<T> = [cache.as_ptr(); CHUNK + LANES];
        let mut last = cache.as_ptr();
        for key in keys.clone() {
            // Validation has checked the entries of all keys that a row can see.
            let block = self.view.table.get(key >> shift).map_or(0, |&block| block.max(0) as u64);
            let at = block * strides.block + (key & place_mask) as u64 * strides.token + head;
            last = cache.as_ptr().wrapping_add(at as usize);
            pointers[key - first] = last;
        }
        let range = keys.start - first..keys.end - first;
        pointers[range.end..].fill(last);
        if dim.is_multiple_of(LANES)
            && (self.tile.rows() < CONVERT_ROWS || size_of::<T>() == size_of::<f32>())
        {
            return Source::Stored(pointers);
        }
        let width = padded(dim);
        let buffer = if is_k { &mut self.workspace.k } else { &mut self.workspace.v };
        let buffer = buffer.as_mut_ptr();
        for key in range.clone() {
            // SAFETY: a key's row of `dim` elements lies in the cache (`Inputs::check`), and its place in the
            // buffer in `CHUNK` rows of `width` elements, whose padding stays 0.
            unsafe {
                let (from, to) = (pointers[key], buffer.add(key * width));
                for vector in 0..dim / LANES {
                    T::load::<L>(from.add(vector * LANES)).store(to.add(vector * LANES));
                }
                for i in dim - dim % LANES..dim {
                    *to.add(i) = (*from.add(i)).to_f32();
                }
            }
        }
        let mut converted: RowPointers<f32> = [buffer; CHUNK + LANES].map(<*mut f32>::cast_const);
        for (key, pointer) in converted.iter_mut().enumerate() {
            let key = key.clamp(range.start, range.end - 1);
            *pointer = buffer.wrapping_add(key * width);
        }
        Source::Converted(converted)
    }

    /// One to four rows against a chunk.
    #[inline(always)]
    fn batch<L: Lanes>(
        &mut self,
        first: usize,
        row: usize,
        rows: usize,
        (k, k_vectors): (&Source<T>, usize),
        (v, v_vectors): (&Source<T>, usize),
    ) {
        let mut seen: [Range<usize>; ROWS] = std::array::from_fn(|_| 0..0);
        let mut visible = [VisibleKeys::default(); ROWS];
        let mut union: Option<Range<usize>> = None;
        for i in 0..rows {
            seen[i] = self.visible(first, row + i, &mut visible[i]);
            if !seen[i].is_empty() {
                let other = union.unwrap_or(seen[i].clone());
                union = Some(other.start.min(seen[i].start)..other.end.max(seen[i].end));
            }
        }
        let Some(union) = union else { return };
        let workspace = &mut *self.workspace;
        let width = v_vectors * LANES;
        let q = workspace.q.as_ptr().wrapping_add(row * k_vectors * LANES);
        let scores = workspace.scores.as_mut_ptr();
        let sums = workspace.segment.sums.as_mut_ptr().wrapping_add(row * width);
        // SAFETY: the workspace holds `TILE_ROWS` rows of queries and sums and `ROWS` rows of scores; the
        // pointers of `k` and `v` are valid for all keys of the tile in this chunk, and `union` lies in them.
        unsafe {
            match k {
                Source::Stored(keys) => {
                    kernel::scores::<L, T>(rows, q, k_vectors * LANES, k_vectors, keys, union, scores);
                }
                Source::Converted(keys) => {
                    kernel::scores::<L, f32>(rows, q, k_vectors * LANES, k_vectors, keys, union, scores);
                }
            }
            for i in 0..rows {
                if seen[i].is_empty() {
                    continue;
                }
                let terms = self.context.terms(self.tile, self.view, row + i, first);
                let blocks = seen[i].start / LANES..seen[i].end.div_ceil(LANES);
                let state = &mut workspace.segment.softmax[row + i];
                let scores = scores.add(i * SCORE_STRIDE);
                let rescale = kernel::softmax::<L>(scores, &visible[i], blocks, &terms, state);
                if rescale != 1.0 {
                    kernel::scale_row::<L>(sums.add(i * width), v_vectors, rescale);
                }
            }
            let add = |first: usize, rows: usize, keys: Range<usize>| {
                let (p, sums) = (scores.add(first * SCORE_STRIDE), sums.add(first * width));
                match v {
                    Source::Stored(values) => {
                        kernel::weighted_sums::<L, T>(rows, p, v_vectors, values, keys, sums, width);
                    }
                    Source::Converted(values) => {
                        kernel::weighted_sums::<L, f32>(rows, p, v_vectors, values, keys, sums, width);
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
            if start >= end {
                for i in 0..rows {
                    add(i, 1, seen[i].clone());
                }
                return;
            }
            for i in 0..rows {
                add(i, 1, seen[i].start..start);
            }
            add(0, rows, start..end);
            for i in 0..rows {
                add(i, 1, end..seen[i].end);
            }
        }
    }

    /// Which keys of the chunk a row sees: the smallest range, and the bits.
    #[inline(always)]
    fn visible(&self, first: usize, row: usize, bits: &mut VisibleKeys) -> Range<usize> {
        let Some(keys) = self.workspace.visible.get(row) else { return 0..0 };
        let start = keys.start.clamp(first, first + CHUNK) - first;
        let end = keys.end.clamp(first, first + CHUNK) - first;
        if start >= end {
            return 0..0;
        }
        for block in start / LANES..end.div_ceil(LANES) {
            let from = start.saturating_sub(block * LANES);
            let to = (end - block * LANES).min(LANES);
            bits[block] = ((1u32 << to) - (1u32 << from)) as u16;
        }
        let problem = self.context.plan.problem();
        let Some(mask) = problem.batch().mask_bits else { return start..end };
        let query = self.view.query_start + self.tile.queries.start + row / self.tile.heads.len();
        let (mut least, mut most) = (end, start);
        for block in start / LANES..end.div_ceil(LANES) {
            let key = first + block * LANES;
            let word = mask.words.get(query * mask.row_words + key / 32).copied().unwrap_or(0);
            bits[block] &= (word >> (key % 32)) as u16;
            if bits[block] != 0 {
                least = least.min(block * LANES + bits[block].trailing_zeros() as usize);
                most = (block + 1) * LANES - bits[block].leading_zeros() as usize;
            }
        }
        least..most.max(least)
    }
}

/// Calls `f` with each run of set bits, in rising order.
#[inline(always)]
fn for_each_run(bits: &VisibleKeys, keys: Range<usize>, f: impl Fn(Range<usize>)) {
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
    #[inline(always)]
    fn terms(&self, tile: &Tile, view: &SequenceView<'_>, row: usize, first: usize) -> ScoreTerms {
        let problem = self.plan.problem();
        let config = problem.config();
        let alibi = self.inputs.alibi_slopes.map(|slopes| {
            let q_head = tile.kv_head * config.group() + tile.heads.start + row % tile.heads.len();
            let query = tile.queries.start + row / tile.heads.len();
            let distance = first as i64 - problem.batch().position(view, query);
            (slopes.get(q_head).copied().unwrap_or(0.0), distance as f32)
        });
        let scale = config.scale * self.inputs.k_scale.of(tile.kv_head);
        ScoreTerms { scale, softcap: config.softcap, alibi }
    }
}
