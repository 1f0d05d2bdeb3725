//! The inner loops of attention over one chunk of keys: scores (rows · keysᵀ), softmax of the scores, weighted
//! sums of values; and the small loops around them.
//!
//! A key or a value is a row of `16 · n` elements found through a list of pointers, so that these loops know
//! neither blocks nor strides. They go through a chunk strip by strip, all heads of a strip before the next, so
//! that memory is read in order whether a token's heads or a head's tokens lie side by side. Bits of a row are
//! the same for every group, strip and tile: a dot product is one chain of multiply-adds for each lane and a
//! fixed tree; a weighted sum is one chain over the keys.
//!
//! Registers travel in arrays that are indexed by constants only, in plain loops (see
//! [`Kernel`]).
#![expect(clippy::needless_range_loop, reason = "iterators over arrays of registers keep them in memory")]

use super::CHUNK;
use super::ahead::Ahead;
use super::elements::Element;
use super::lanes::{Kernel, LANES, Lanes, Vector};
use super::math;
use std::ops::Range;

/// Rows that share the keys and values in registers.
pub(super) const ROWS: usize = 4;

/// Distance between two rows of scores: a chunk, and what a tile may write past its end.
pub(super) const SCORE_STRIDE: usize = CHUNK + LANES;

/// Pointers to the rows of a chunk's keys or values; behind the last one it is repeated, so that tiles may
/// reach past the end.
pub(super) type RowPointers<T> = [*const T; CHUNK + LANES];

/// A chunk's keys or values for some heads.
pub(super) struct Heads<'a, T> {
    /// A token's row of some head.
    pub(super) pointers: &'a RowPointers<T>,
    /// Elements from there to the first head's row.
    pub(super) first: usize,
    /// Elements from a head's row to the next one's.
    pub(super) stride: usize,
}

impl<T> Heads<'_, T> {
    /// Elements from a token's pointer to its row of a head.
    #[inline(always)]
    pub(super) fn offset(&self, head: usize) -> usize {
        self.first + head * self.stride
    }
}

impl<T> Clone for Heads<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Heads<'_, T> {}

/// Rows of queries that go through a chunk together, `[heads, rows]`: those of a head share its keys.
#[derive(Clone, Copy)]
pub(super) struct Group {
    pub(super) heads: usize,
    pub(super) rows: usize,
}

/// Loops over a tile of `R` rows and `N` keys or registers of values, whose accumulators stay in registers.
trait Tiles {
    /// The rows `row..row + R` of the head `head`.
    fn rows<L: Lanes, const R: usize, const N: usize>(&mut self, head: usize, row: usize, keys: Range<usize>);

    /// All rows of all heads against the keys, a strip at a time.
    #[inline(always)]
    fn strips<L: Lanes>(&mut self, group: Group, keys: Range<usize>, strip: usize) {
        let mut start = keys.start;
        while start < keys.end {
            let end = keys.end.min((start / strip + 1) * strip);
            for head in 0..group.heads {
                let mut row = 0;
                while row < group.rows {
                    let keys = start..end;
                    match (group.rows - row, L::REGISTERS >= 32) {
                        (1, _) => self.rows::<L, 1, 8>(head, row, keys),
                        (2, true) => self.rows::<L, 2, 8>(head, row, keys),
                        (2, false) => self.rows::<L, 2, 4>(head, row, keys),
                        (3, true) => self.rows::<L, 3, 4>(head, row, keys),
                        (3, false) => self.rows::<L, 3, 2>(head, row, keys),
                        (_, true) => self.rows::<L, 4, 4>(head, row, keys),
                        (_, false) => self.rows::<L, 4, 2>(head, row, keys),
                    }
                    row += ROWS;
                }
            }
            start = end;
        }
    }
}

/// Dot products of a group of queries with keys of a chunk, into `scores[row · SCORE_STRIDE + key]`. Up to
/// 15 scores behind the last one are overwritten.
///
/// # Safety
/// It may be run only if
/// - `q` is valid for reads of the group's rows `16 · vectors` apart, each of as many elements,
/// - the rows of `keys.start..keys.end + 15` of each head are valid for reads of `16 · vectors` elements each,
/// - `scores` is valid for writes of the group's rows `SCORE_STRIDE` apart, each of as many elements, and
///   `keys.end ≤ CHUNK`.
pub(super) struct Scores<'a, 'n, T, N> {
    pub(super) group: Group,
    pub(super) q: *const f32,
    pub(super) vectors: usize,
    pub(super) k: Heads<'a, T>,
    pub(super) keys: Range<usize>,
    /// Keys of a strip, a multiple of sixteen.
    pub(super) strip: usize,
    pub(super) scores: *mut f32,
    pub(super) ahead: Option<&'a mut Ahead<'n, N>>,
}

impl<T: Element, N> Kernel for Scores<'_, '_, T, N> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(mut self) {
        self.strips::<L>(self.group, self.keys.clone(), self.strip);
    }
}

impl<T: Element, N> Tiles for Scores<'_, '_, T, N> {
    #[inline(always)]
    fn rows<L: Lanes, const R: usize, const K: usize>(
        &mut self,
        head: usize,
        row: usize,
        strip: Range<usize>,
    ) {
        let width = self.vectors * LANES;
        let first = head * self.group.rows + row;
        let mut key = strip.start;
        while key < strip.end {
            if row == 0
                && let Some(ahead) = self.ahead.as_mut()
            {
                ahead.used::<L>(K, 1);
            }
            // Lanes of the sums that are not used stay 0.
            let mut sums = [L::splat(0.0); LANES];
            // SAFETY: see the type; `key + K ≤ keys.end + 15`, and the scores written end before `CHUNK + 16`.
            unsafe {
                let q = self.q.add(first * width);
                let keys = &*self.k.pointers.as_ptr().add(key).cast::<[*const T; K]>();
                let offset = self.k.offset(head);
                for register in 0..LANES / L::Register::WIDTH {
                    let mut acc = [[L::Register::splat(0.0); K]; R];
                    let mut at = register * L::Register::WIDTH;
                    while at < width {
                        let mut q_at = [L::Register::splat(0.0); R];
                        for i in 0..R {
                            q_at[i] = L::Register::load(q.add(i * width + at));
                        }
                        for i in 0..K {
                            let k: L::Register = T::load(keys[i].add(offset + at));
                            for row in 0..R {
                                acc[row][i] = q_at[row].fma(k, acc[row][i]);
                            }
                        }
                        at += LANES;
                    }
                    for row in 0..R {
                        for i in 0..K {
                            sums[row * K + i] = sums[row * K + i].with_register(register, acc[row][i]);
                        }
                    }
                }
                let flat = L::sums(&sums, R * K);
                for row in 0..R {
                    let to = self.scores.add((first + row) * SCORE_STRIDE + key).cast::<[f32; K]>();
                    to.write(*flat.as_ptr().add(row * K).cast::<[f32; K]>());
                }
            }
            key += K;
        }
    }
}

/// What happens to a row's dot products before the softmax.
#[derive(Clone, Copy)]
pub(super) struct ScoreTerms {
    /// The configuration's scale times the key scale.
    pub(super) scale: f32,
    /// Soft cap, if there is one.
    pub(super) softcap: Option<f32>,
    /// Slope of the row's head and (position of the chunk's first key − position of the row), if there is
    /// ALiBi.
    pub(super) alibi: Option<(f32, f32)>,
}

/// Which of sixteen keys a row sees, for each sixteen of a chunk.
pub(super) type VisibleKeys = [u16; CHUNK / LANES];

/// The online softmax of one row: largest score and sum of `exp(score − largest)` so far.
#[derive(Clone, Copy, Debug)]
pub(super) struct Softmax {
    pub(super) max: f32,
    pub(super) sum: f32,
}

impl Softmax {
    /// No key seen.
    pub(super) const EMPTY: Self = Self { max: f32::NEG_INFINITY, sum: 0.0 };
}

/// Turns a row's dot products with a chunk into probabilities, not yet normalised, updates its softmax and
/// rescales its weighted sums. Keys that the row does not see get 0. Only the sixteens `blocks` are touched;
/// the row sees at least one key in them.
///
/// # Safety
/// It may be run only if `scores` is valid for reads and writes of `16 · blocks.end` elements, `sums` for those of
/// `16 · vectors` elements, and `blocks.end ≤ CHUNK / 16`.
pub(super) struct SoftmaxRow<'a> {
    pub(super) scores: *mut f32,
    pub(super) visible: &'a VisibleKeys,
    pub(super) blocks: Range<usize>,
    pub(super) terms: ScoreTerms,
    pub(super) state: &'a mut Softmax,
    pub(super) sums: *mut f32,
    pub(super) vectors: usize,
}

impl Kernel for SoftmaxRow<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self { scores, visible, blocks, terms, state, sums, vectors } = self;
        let hidden = L::splat(f32::NEG_INFINITY);
        let mut largest = hidden;
        for block in blocks.clone() {
            // SAFETY: `block < CHUNK / 16`.
            unsafe {
                let at = scores.add(block * LANES);
                let mut score = L::load(at).mul(L::splat(terms.scale));
                if let Some(cap) = terms.softcap {
                    score = math::tanh(score.div(L::splat(cap))).mul(L::splat(cap));
                }
                if let Some((slope, distance)) = terms.alibi {
                    let distance = L::splat(distance).add(L::load(KEY_INDEX.as_ptr().add(block * LANES)));
                    score = L::splat(slope).fma(distance, score);
                }
                let score = L::select(*visible.get_unchecked(block), score, hidden);
                score.store(at);
                largest = largest.max(score);
            }
        }
        let max = state.max.max(largest.max_lane());
        // A row may see keys whose scores are all −∞ or NaN; then `max` is no number to subtract.
        let shift = if max == f32::NEG_INFINITY { 0.0 } else { max };
        let mut sum = L::splat(0.0);
        for block in blocks {
            // SAFETY: as above.
            unsafe {
                let at = scores.add(block * LANES);
                let probability = math::exp(L::load(at).sub(L::splat(shift)));
                probability.store(at);
                sum = sum.add(probability);
            }
        }
        let rescale = if state.max == max { 1.0 } else { math::exp1::<L>(state.max - shift) };
        *state = Softmax { max, sum: state.sum * rescale + sum.sum() };
        if rescale != 1.0 {
            for vector in 0..vectors {
                // SAFETY: see the type.
                unsafe {
                    let at = sums.add(vector * LANES);
                    L::load(at).mul(L::splat(rescale)).store(at);
                }
            }
        }
    }
}

/// 0, 1, 2 …
static KEY_INDEX: [f32; CHUNK] = {
    let mut index = [0.0; CHUNK];
    let mut i = 0;
    while i < CHUNK {
        index[i] = i as f32;
        i += 1;
    }
    index
};

/// Adds to the weighted sums of a group's rows the values `keys` of a chunk times the rows' probabilities.
///
/// # Safety
/// It may be run only if
/// - `probabilities` is valid for reads of the group's rows `SCORE_STRIDE` apart, each of `keys.end` elements,
/// - the rows of `keys` of each head are valid for reads of `16 · vectors` elements each, `keys.end ≤ CHUNK`,
/// - `sums` is valid for reads and writes of the group's rows `16 · vectors` apart, each of as many elements.
pub(super) struct WeightedSums<'a, 'n, T, N> {
    pub(super) group: Group,
    pub(super) probabilities: *const f32,
    pub(super) vectors: usize,
    pub(super) v: Heads<'a, T>,
    pub(super) keys: Range<usize>,
    /// Keys of a strip.
    pub(super) strip: usize,
    pub(super) sums: *mut f32,
    pub(super) ahead: Option<&'a mut Ahead<'n, N>>,
}

impl<T: Element, N> Kernel for WeightedSums<'_, '_, T, N> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(mut self) {
        self.strips::<L>(self.group, self.keys.clone(), self.strip);
    }
}

impl<T: Element, N> Tiles for WeightedSums<'_, '_, T, N> {
    #[inline(always)]
    fn rows<L: Lanes, const R: usize, const V: usize>(
        &mut self,
        head: usize,
        row: usize,
        keys: Range<usize>,
    ) {
        let registers = self.vectors * (LANES / L::Register::WIDTH);
        let mut register = 0;
        while register + V <= registers {
            if row == 0
                && let Some(ahead) = self.ahead.as_mut()
            {
                ahead.used::<L>(keys.len() * V, registers);
            }
            self.tile::<L, R, V>(head, row, keys.clone(), register);
            register += V;
        }
        while register < registers {
            self.tile::<L, R, 1>(head, row, keys.clone(), register);
            register += 1;
        }
    }
}

impl<T: Element, N> WeightedSums<'_, '_, T, N> {
    /// `V` registers from `register` on of each row.
    #[inline(always)]
    fn tile<L: Lanes, const R: usize, const V: usize>(
        &mut self,
        head: usize,
        row: usize,
        keys: Range<usize>,
        register: usize,
    ) {
        let width = self.vectors * LANES;
        let first = head * self.group.rows + row;
        // SAFETY: see the type.
        unsafe {
            let sums = self.sums.add(first * width + register * L::Register::WIDTH);
            let probabilities = self.probabilities.add(first * SCORE_STRIDE);
            let offset = self.v.offset(head) + register * L::Register::WIDTH;
            let mut acc = [[L::Register::splat(0.0); V]; R];
            for row in 0..R {
                for i in 0..V {
                    acc[row][i] = L::Register::load(sums.add(row * width + i * L::Register::WIDTH));
                }
            }
            for key in keys {
                let value = self.v.pointers.get_unchecked(key).add(offset);
                let mut values = [L::Register::splat(0.0); V];
                for i in 0..V {
                    values[i] = T::load(value.add(i * L::Register::WIDTH));
                }
                for row in 0..R {
                    let probability = L::Register::splat(*probabilities.add(row * SCORE_STRIDE + key));
                    for i in 0..V {
                        acc[row][i] = probability.fma(values[i], acc[row][i]);
                    }
                }
            }
            for row in 0..R {
                for i in 0..V {
                    acc[row][i].store(sums.add(row * width + i * L::Register::WIDTH));
                }
            }
        }
    }
}

/// Converts the rows `keys` of a chunk to `f32`, row `key` to `to[key · width]`; elements from `dim` to `width`
/// are left alone.
///
/// # Safety
/// It may be run only if the first head's `rows` of `keys` are valid for reads of `dim` elements each and `to` is valid for writes of
/// `keys.end · width` elements, `dim ≤ width`.
pub(super) struct Convert<'a, T> {
    pub(super) rows: Heads<'a, T>,
    pub(super) keys: Range<usize>,
    pub(super) dim: usize,
    pub(super) width: usize,
    pub(super) to: *mut f32,
}

impl<T: Element> Kernel for Convert<'_, T> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        for key in self.keys.clone() {
            // SAFETY: see the type.
            unsafe {
                let from = self.rows.pointers.get_unchecked(key).add(self.rows.first);
                let to = self.to.add(key * self.width);
                for vector in 0..self.dim / LANES {
                    let elements: L = T::load(from.add(vector * LANES));
                    elements.store(to.add(vector * LANES));
                }
                for i in self.dim - self.dim % LANES..self.dim {
                    *to.add(i) = (*from.add(i)).to_f32();
                }
            }
        }
    }
}

/// Adds the softmax and weighted sums of a part of a row's keys to those of the parts before. Both rows of
/// sums hold a multiple of sixteen elements. Safe to run.
pub(super) struct MergeRow<'a> {
    pub(super) total: &'a mut Softmax,
    pub(super) total_sums: &'a mut [f32],
    pub(super) part: Softmax,
    pub(super) part_sums: &'a [f32],
}

impl Kernel for MergeRow<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self { total, total_sums, part, part_sums } = self;
        // A row that saw no key of the part. NaN is not 0 and goes on.
        if part.sum == 0.0 {
            return;
        }
        let max = total.max.max(part.max);
        let shift = if max == f32::NEG_INFINITY { 0.0 } else { max };
        let (keep, add) = (math::exp1::<L>(total.max - shift), math::exp1::<L>(part.max - shift));
        *total = Softmax { max, sum: total.sum * keep + part.sum * add };
        for (to, from) in
            total_sums.as_chunks_mut::<LANES>().0.iter_mut().zip(part_sums.as_chunks::<LANES>().0)
        {
            // SAFETY: both hold sixteen elements.
            unsafe {
                let kept = L::load(to.as_ptr()).mul(L::splat(keep));
                L::load(from.as_ptr()).fma(L::splat(add), kept).store(to.as_mut_ptr());
            }
        }
    }
}

/// `exp(x)` of one number, as the lanes compute it. Safe to run.
pub(super) struct Exp(pub(super) f32);

impl Kernel for Exp {
    type Output = f32;

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) -> f32 {
        math::exp1::<L>(self.0)
    }
}
