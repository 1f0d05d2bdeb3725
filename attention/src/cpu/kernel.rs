//! The three inner loops of attention over one chunk of keys, for a batch of one to four rows:
//! scores (rows · keysᵀ), softmax of the scores, weighted sum of values.
//!
//! A key or a value is a row of `16 · n` elements found through a list of pointers, so that these loops know
//! neither blocks nor strides. Bits of a row are the same for every size of batch and tile: a dot product is
//! one chain of multiply-adds for each lane and a fixed tree; a weighted sum is one chain over the keys.

use super::CHUNK;
use super::elements::Element;
use super::lanes::{LANES, Lanes};
use super::math;

/// Rows that go through the loops together.
pub(super) const ROWS: usize = 4;

/// Distance between two rows of scores: a chunk, and what a tile may write past its end.
pub(super) const SCORE_STRIDE: usize = CHUNK + LANES;

/// Pointers to the rows of a chunk's keys or values; behind the last one it is repeated, so that tiles may
/// reach past the end.
pub(super) type RowPointers<T> = [*const T; CHUNK + LANES];

/// Dot products of `R` rows of queries with the keys `keys.start..keys.end` of a chunk, into
/// `scores[row · SCORE_STRIDE + key]`. Up to 15 scores behind the last one are overwritten.
///
/// # Safety
/// - `q` is valid for reads of `R` rows `q_stride` apart, each of `16 · vectors` elements.
/// - `pointers[keys.start..keys.end + 15]` are valid for reads of `16 · vectors` elements each.
/// - `scores` is valid for writes of `R · SCORE_STRIDE` elements, and `keys.end ≤ CHUNK`.
#[inline(always)]
pub(super) unsafe fn scores<L: Lanes, T: Element>(
    rows: usize,
    q: *const f32,
    q_stride: usize,
    vectors: usize,
    pointers: &RowPointers<T>,
    keys: std::ops::Range<usize>,
    scores: *mut f32,
) {
    // SAFETY: the caller's. The tiles are those whose accumulators fit the registers.
    unsafe {
        if L::ACCUMULATORS >= 16 {
            match rows {
                1 => score_tiles::<L, T, 1, 16>(q, q_stride, vectors, pointers, keys, scores),
                2 => score_tiles::<L, T, 2, 8>(q, q_stride, vectors, pointers, keys, scores),
                3 => score_tiles::<L, T, 3, 4>(q, q_stride, vectors, pointers, keys, scores),
                _ => score_tiles::<L, T, 4, 4>(q, q_stride, vectors, pointers, keys, scores),
            }
        } else {
            let mut row = 0;
            while row < rows {
                let (q, scores) = (q.add(row * q_stride), scores.add(row * SCORE_STRIDE));
                if rows - row >= 2 {
                    score_tiles::<L, T, 2, 2>(q, q_stride, vectors, pointers, keys.clone(), scores);
                    row += 2;
                } else {
                    score_tiles::<L, T, 1, 4>(q, q_stride, vectors, pointers, keys.clone(), scores);
                    row += 1;
                }
            }
        }
    }
}

/// [`scores`] in tiles of `R` rows and `K` keys, `R · K ≤ 16`.
///
/// # Safety
/// As [`scores`].
#[inline(always)]
unsafe fn score_tiles<L: Lanes, T: Element, const R: usize, const K: usize>(
    q: *const f32,
    q_stride: usize,
    vectors: usize,
    pointers: &RowPointers<T>,
    keys: std::ops::Range<usize>,
    scores: *mut f32,
) {
    let mut key = keys.start;
    while key < keys.end {
        let mut sums = [[L::splat(0.0); K]; R];
        // SAFETY: `key + K ≤ keys.end + 15`, so that the pointers are valid, and the scores written end
        // before `CHUNK + 16`.
        unsafe {
            let keys: [*const T; K] = std::array::from_fn(|i| *pointers.get_unchecked(key + i));
            for vector in 0..vectors {
                let k: [L; K] = std::array::from_fn(|i| T::load(keys[i].add(vector * LANES)));
                for (row, sums) in sums.iter_mut().enumerate() {
                    let q = L::load(q.add(row * q_stride + vector * LANES));
                    for (sum, k) in sums.iter_mut().zip(k) {
                        *sum = q.fma(k, *sum);
                    }
                }
            }
            if R * K > 4 {
                let mut all = [L::splat(0.0); 16];
                for (i, sum) in sums.as_flattened().iter().enumerate() {
                    all[i] = *sum;
                }
                let mut flat = [0.0f32; 16];
                L::sum16(&all).store(flat.as_mut_ptr());
                for row in 0..R {
                    let to = scores.add(row * SCORE_STRIDE + key);
                    std::ptr::copy_nonoverlapping(flat.as_ptr().add(row * K), to, K);
                }
            } else {
                let mut all = [L::splat(0.0); 4];
                for (i, sum) in sums.as_flattened().iter().enumerate() {
                    all[i] = *sum;
                }
                let flat = L::sum4(&all);
                for row in 0..R {
                    let to = scores.add(row * SCORE_STRIDE + key);
                    std::ptr::copy_nonoverlapping(flat.as_ptr().add(row * K), to, K);
                }
            }
        }
        key += K;
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

/// Turns a row's dot products with a chunk into probabilities, not yet normalised, and updates its softmax.
/// Returns the factor that the weighted sum so far must be multiplied with. Keys that the row does not see
/// get 0. Only the sixteens `blocks` are touched; the row sees at least one key in them.
///
/// # Safety
/// `scores` is valid for reads and writes of `16 · blocks.end` elements, and `blocks.end ≤ CHUNK / 16`.
#[inline(always)]
pub(super) unsafe fn softmax<L: Lanes>(
    scores: *mut f32,
    visible: &VisibleKeys,
    blocks: std::ops::Range<usize>,
    terms: &ScoreTerms,
    state: &mut Softmax,
) -> f32 {
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
    rescale
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

/// Adds to each of `rows` weighted sums the values `keys` of a chunk times the row's probabilities.
///
/// # Safety
/// - `probabilities` is valid for reads of `rows` rows `SCORE_STRIDE` apart, each of `keys.end` elements.
/// - `pointers[keys]` are valid for reads of `16 · vectors` elements each.
/// - `sums` is valid for reads and writes of `rows` rows `sum_stride` apart, each of `16 · vectors` elements.
#[inline(always)]
pub(super) unsafe fn weighted_sums<L: Lanes, T: Element>(
    rows: usize,
    probabilities: *const f32,
    vectors: usize,
    pointers: &RowPointers<T>,
    keys: std::ops::Range<usize>,
    sums: *mut f32,
    sum_stride: usize,
) {
    // SAFETY: the caller's. The tiles are those whose accumulators fit the registers.
    unsafe {
        if L::ACCUMULATORS >= 16 {
            match rows {
                1 => sum_tiles::<L, T, 1, 8>(probabilities, vectors, pointers, keys, sums, sum_stride),
                2 => sum_tiles::<L, T, 2, 8>(probabilities, vectors, pointers, keys, sums, sum_stride),
                3 => sum_tiles::<L, T, 3, 4>(probabilities, vectors, pointers, keys, sums, sum_stride),
                _ => sum_tiles::<L, T, 4, 4>(probabilities, vectors, pointers, keys, sums, sum_stride),
            }
        } else {
            let mut row = 0;
            while row < rows {
                let probabilities = probabilities.add(row * SCORE_STRIDE);
                let sums = sums.add(row * sum_stride);
                let keys = keys.clone();
                if rows - row >= 2 {
                    sum_tiles::<L, T, 2, 2>(probabilities, vectors, pointers, keys, sums, sum_stride);
                    row += 2;
                } else {
                    sum_tiles::<L, T, 1, 4>(probabilities, vectors, pointers, keys, sums, sum_stride);
                    row += 1;
                }
            }
        }
    }
}

/// [`weighted_sums`] in tiles of `R` rows and `V` vectors, then single vectors.
///
/// # Safety
/// As [`weighted_sums`].
#[inline(always)]
unsafe fn sum_tiles<L: Lanes, T: Element, const R: usize, const V: usize>(
    probabilities: *const f32,
    vectors: usize,
    pointers: &RowPointers<T>,
    keys: std::ops::Range<usize>,
    sums: *mut f32,
    sum_stride: usize,
) {
    let mut vector = 0;
    // SAFETY: the caller's; a tile ends at `vectors` at most.
    unsafe {
        while vector + V <= vectors {
            sum_tile::<L, T, R, V>(probabilities, vector, pointers, keys.clone(), sums, sum_stride);
            vector += V;
        }
        while vector + 2 <= vectors {
            sum_tile::<L, T, R, 2>(probabilities, vector, pointers, keys.clone(), sums, sum_stride);
            vector += 2;
        }
        while vector < vectors {
            sum_tile::<L, T, R, 1>(probabilities, vector, pointers, keys.clone(), sums, sum_stride);
            vector += 1;
        }
    }
}

/// # Safety
/// As [`weighted_sums`], for the vectors `first..first + V`.
#[inline(always)]
unsafe fn sum_tile<L: Lanes, T: Element, const R: usize, const V: usize>(
    probabilities: *const f32,
    first: usize,
    pointers: &RowPointers<T>,
    keys: std::ops::Range<usize>,
    sums: *mut f32,
    sum_stride: usize,
) {
    // SAFETY: the caller's.
    unsafe {
        let at = |row: usize, i: usize| sums.add(row * sum_stride + (first + i) * LANES);
        let mut acc: [[L; V]; R] = std::array::from_fn(|r| std::array::from_fn(|i| L::load(at(r, i))));
        for key in keys {
            let value = *pointers.get_unchecked(key);
            let values: [L; V] = std::array::from_fn(|i| T::load(value.add((first + i) * LANES)));
            for (row, acc) in acc.iter_mut().enumerate() {
                let probability = L::splat(*probabilities.add(row * SCORE_STRIDE + key));
                for (acc, value) in acc.iter_mut().zip(values) {
                    *acc = probability.fma(value, *acc);
                }
            }
        }
        for (row, acc) in acc.iter().enumerate() {
            for (i, acc) in acc.iter().enumerate() {
                acc.store(at(row, i));
            }
        }
    }
}

/// Multiplies a row of `16 · vectors` elements.
///
/// # Safety
/// `row` is valid for reads and writes of that many elements.
#[inline(always)]
pub(super) unsafe fn scale_row<L: Lanes>(row: *mut f32, vectors: usize, factor: f32) {
    for vector in 0..vectors {
        // SAFETY: the caller's.
        unsafe {
            let at = row.add(vector * LANES);
            L::load(at).mul(L::splat(factor)).store(at);
        }
    }
}
