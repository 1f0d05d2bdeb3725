//! The inner loops of attention over one chunk of keys, for a batch of one to four rows: scores
//! (rows · keysᵀ), softmax of the scores, weighted sums of values; and the small loops around them.
//!
//! A key or a value is a row of `16 · n` elements found through a list of pointers, so that these loops know
//! neither blocks nor strides. Bits of a row are the same for every size of batch and tile: a dot product is
//! one chain of multiply-adds for each lane and a fixed tree; a weighted sum is one chain over the keys.
//!
//! Registers travel in arrays that are indexed by constants only, in plain loops (see
//! [`Kernel`]).
#![expect(clippy::needless_range_loop, reason = "iterators over arrays of registers keep them in memory")]

use super::CHUNK;
use super::elements::Element;
use super::lanes::{Kernel, LANES, Lanes};
use super::math;
use std::ops::Range;

/// Rows that go through the loops together.
pub(super) const ROWS: usize = 4;

/// Distance between two rows of scores: a chunk, and what a tile may write past its end.
pub(super) const SCORE_STRIDE: usize = CHUNK + LANES;

/// Pointers to the rows of a chunk's keys or values; behind the last one it is repeated, so that tiles may
/// reach past the end.
pub(super) type RowPointers<T> = [*const T; CHUNK + LANES];

/// Rows of keys and values that will be read soon, in the order in which they lie in memory: that is what a
/// processor's own prefetching follows, and it reaches further than the few lines that a core can ask for.
pub(super) struct Ahead<'a, T> {
    /// Keys and values: a token's row of the first head.
    pub(super) rows: [&'a RowPointers<T>; 2],
    /// Elements from a head to the next.
    pub(super) head_strides: [usize; 2],
    /// Elements of a row.
    pub(super) dims: [usize; 2],
    pub(super) heads: usize,
    /// The tokens, as places in their chunk.
    pub(super) tokens: Range<usize>,
    /// Whether a head's tokens lie side by side, rather than a token's heads.
    pub(super) head_major: bool,
    /// What comes next: keys (0) or values (1), token, head.
    pub(super) next: (usize, usize, usize),
}

impl<T> Ahead<'_, T> {
    /// Asks for the memory of the next row.
    #[inline(always)]
    fn step<L: Lanes>(&mut self) {
        const LINE: usize = 64;
        let (tensor, token, head) = self.next;
        if tensor == 2 {
            return;
        }
        let row = self.rows[tensor][token].wrapping_add(head * self.head_strides[tensor]).cast::<u8>();
        let mut line = 0;
        while line < self.dims[tensor] * size_of::<T>() {
            L::prefetch(row.wrapping_add(line));
            line += LINE;
        }
        self.next = match self.head_major {
            true if token + 1 < self.tokens.end => (tensor, token + 1, head),
            true if head + 1 < self.heads => (tensor, self.tokens.start, head + 1),
            false if head + 1 < self.heads => (tensor, token, head + 1),
            false if token + 1 < self.tokens.end => (tensor, token + 1, 0),
            _ => (tensor + 1, self.tokens.start, 0),
        };
    }
}

/// Dot products of some rows of queries with keys of a chunk, into `scores[row · SCORE_STRIDE + key]`. Up to
/// 15 scores behind the last one are overwritten.
///
/// # Safety
/// It may be run only if
/// - `q` is valid for reads of `rows` rows `16 · vectors` apart, each of as many elements,
/// - `pointers[keys.start..keys.end + 15]` are valid for reads of `16 · vectors` elements each,
/// - `scores` is valid for writes of `ROWS · SCORE_STRIDE` elements, `rows ≤ ROWS` and `keys.end ≤ CHUNK`.
pub(super) struct Scores<'a, 'n, T, N> {
    pub(super) rows: usize,
    pub(super) q: *const f32,
    pub(super) vectors: usize,
    pub(super) pointers: &'a RowPointers<T>,
    pub(super) keys: Range<usize>,
    pub(super) scores: *mut f32,
    /// For each key, one more row is asked for.
    pub(super) ahead: Option<&'a mut Ahead<'n, N>>,
}

impl<T: Element, N> Kernel for Scores<'_, '_, T, N> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(mut self) {
        // The tiles are those whose accumulators fit the registers.
        if L::ACCUMULATORS >= 16 {
            match self.rows {
                1 => self.tiles::<L, 1, 16>(0),
                2 => self.tiles::<L, 2, 8>(0),
                3 => self.tiles::<L, 3, 4>(0),
                _ => self.tiles::<L, 4, 4>(0),
            }
        } else {
            let mut row = 0;
            while row + 2 <= self.rows {
                self.tiles::<L, 2, 2>(row);
                row += 2;
            }
            if row < self.rows {
                self.tiles::<L, 1, 4>(row);
            }
        }
    }
}

impl<T: Element, N> Scores<'_, '_, T, N> {
    /// The rows from `first` on, in tiles of `R` rows and `K` keys, `R · K ≤ 16`.
    #[inline(always)]
    fn tiles<L: Lanes, const R: usize, const K: usize>(&mut self, first: usize) {
        let width = self.vectors * LANES;
        let mut key = self.keys.start;
        while key < self.keys.end {
            let mut sums = [[L::splat(0.0); K]; R];
            // SAFETY: see the type; `key + K ≤ keys.end + 15`, and the scores written end before `CHUNK + 16`.
            unsafe {
                let q = self.q.add(first * width);
                let scores = self.scores.add(first * SCORE_STRIDE + key);
                let keys = &*self.pointers.as_ptr().add(key).cast::<[*const T; K]>();
                if let Some(ahead) = self.ahead.as_mut().filter(|_| first == 0) {
                    for _ in 0..K {
                        ahead.step::<L>();
                    }
                }
                for vector in 0..self.vectors {
                    let mut k = [L::splat(0.0); K];
                    for i in 0..K {
                        k[i] = T::load(keys[i].add(vector * LANES));
                    }
                    for row in 0..R {
                        let q = L::load(q.add(row * width + vector * LANES));
                        for i in 0..K {
                            sums[row][i] = q.fma(k[i], sums[row][i]);
                        }
                    }
                }
                if R * K > 4 {
                    let mut all = [L::splat(0.0); 16];
                    for row in 0..R {
                        for i in 0..K {
                            all[row * K + i] = sums[row][i];
                        }
                    }
                    let mut flat = [0.0f32; 16];
                    L::sum16(&all).store(flat.as_mut_ptr());
                    for row in 0..R {
                        let to = scores.add(row * SCORE_STRIDE).cast::<[f32; K]>();
                        to.write(*flat.as_ptr().add(row * K).cast::<[f32; K]>());
                    }
                } else {
                    let mut all = [L::splat(0.0); 4];
                    for row in 0..R {
                        for i in 0..K {
                            all[row * K + i] = sums[row][i];
                        }
                    }
                    let flat = L::sum4(&all);
                    for row in 0..R {
                        let to = scores.add(row * SCORE_STRIDE).cast::<[f32; K]>();
                        to.write(*flat.as_ptr().add(row * K).cast::<[f32; K]>());
                    }
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

/// Adds to each of some rows' weighted sums the values `keys` of a chunk times the row's probabilities.
///
/// # Safety
/// It may be run only if
/// - `probabilities` is valid for reads of `rows` rows `SCORE_STRIDE` apart, each of `keys.end` elements,
/// - `pointers[keys]` are valid for reads of `16 · vectors` elements each, `keys.end ≤ CHUNK`,
/// - `sums` is valid for reads and writes of `rows` rows `16 · vectors` apart, each of as many elements.
pub(super) struct WeightedSums<'a, 'n, T, N> {
    pub(super) rows: usize,
    pub(super) probabilities: *const f32,
    pub(super) vectors: usize,
    pub(super) pointers: &'a RowPointers<T>,
    pub(super) keys: Range<usize>,
    pub(super) sums: *mut f32,
    /// For each key, one more row is asked for.
    pub(super) ahead: Option<&'a mut Ahead<'n, N>>,
}

impl<T: Element, N> Kernel for WeightedSums<'_, '_, T, N> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(mut self) {
        // The tiles are those whose accumulators fit the registers.
        if L::ACCUMULATORS >= 16 {
            match self.rows {
                1 => self.tiles::<L, 1, 8>(0),
                2 => self.tiles::<L, 2, 8>(0),
                3 => self.tiles::<L, 3, 4>(0),
                _ => self.tiles::<L, 4, 4>(0),
            }
        } else {
            let mut row = 0;
            while row + 2 <= self.rows {
                self.tiles::<L, 2, 2>(row);
                row += 2;
            }
            if row < self.rows {
                self.tiles::<L, 1, 4>(row);
            }
        }
    }
}

impl<T: Element, N> WeightedSums<'_, '_, T, N> {
    /// The rows from `first` on, in tiles of `R` rows and `V` vectors, then single vectors.
    #[inline(always)]
    fn tiles<L: Lanes, const R: usize, const V: usize>(&mut self, first: usize) {
        let mut vector = 0;
        while vector + V <= self.vectors {
            self.tile::<L, R, V>(first, vector);
            vector += V;
        }
        while vector < self.vectors {
            self.tile::<L, R, 1>(first, vector);
            vector += 1;
        }
    }

    #[inline(always)]
    fn tile<L: Lanes, const R: usize, const V: usize>(&mut self, first: usize, vector: usize) {
        let width = self.vectors * LANES;
        // SAFETY: see the type.
        unsafe {
            let sums = self.sums.add(first * width + vector * LANES);
            let probabilities = self.probabilities.add(first * SCORE_STRIDE);
            let mut acc = [[L::splat(0.0); V]; R];
            for row in 0..R {
                for i in 0..V {
                    acc[row][i] = L::load(sums.add(row * width + i * LANES));
                }
            }
            for key in self.keys.clone() {
                if let Some(ahead) = self.ahead.as_mut().filter(|_| first == 0 && vector == 0) {
                    ahead.step::<L>();
                }
                let value = self.pointers.get_unchecked(key).add(vector * LANES);
                let mut values = [L::splat(0.0); V];
                for i in 0..V {
                    values[i] = T::load(value.add(i * LANES));
                }
                for row in 0..R {
                    let probability = L::splat(*probabilities.add(row * SCORE_STRIDE + key));
                    for i in 0..V {
                        acc[row][i] = probability.fma(values[i], acc[row][i]);
                    }
                }
            }
            for row in 0..R {
                for i in 0..V {
                    acc[row][i].store(sums.add(row * width + i * LANES));
                }
            }
        }
    }
}

/// Converts the rows `keys` of a chunk to `f32`, row `key` to `to[key · width]`; elements from `dim` to `width`
/// are left alone.
///
/// # Safety
/// It may be run only if `pointers[keys]` are valid for reads of `dim` elements each and `to` is valid for writes of
/// `keys.end · width` elements, `dim ≤ width`.
pub(super) struct Convert<'a, T> {
    pub(super) pointers: &'a RowPointers<T>,
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
                let (from, to) = (*self.pointers.get_unchecked(key), self.to.add(key * self.width));
                for vector in 0..self.dim / LANES {
                    T::load::<L>(from.add(vector * LANES)).store(to.add(vector * LANES));
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
