//! Dot products side by side in registers: the inner loops of [`linear`](super::linear).
//!
//! ```text
//!              weights (NR rows of K)           one step of k: 16 elements
//!              w0  w1  w2  w3  w4  w5           NR loads + conversions, MR loads, MR · NR multiply-adds
//!   x   r0   [ Σ   Σ   Σ   Σ   Σ   Σ ]
//!  (MR  r1   [ Σ   Σ   Σ   Σ   Σ   Σ ]          each Σ is 16 lanes: one, two or four registers, and
//! rows) r2   [ Σ   Σ   Σ   Σ   Σ   Σ ]          MR and NR such that all of them stay in registers
//!       r3   [ Σ   Σ   Σ   Σ   Σ   Σ ]
//! ```
//!
//! Which tile a dot product falls into never changes its bits: the lanes and their order are fixed.

use super::lanes::{LANES, Lanes, Weight};
use pagewise_attention::HostTensor;

/// Bytes of a cache line.
const LINE: usize = 64;

/// A block of the output: `rows × features` dot products of length `k`.
///
/// # Safety
/// For whoever calls a kernel with it:
/// - `x` is valid for reads of `rows · k` elements, `weight` of `features · k`;
/// - `out` is valid for writes of `features` elements at each of `rows` rows `out_stride` apart, and nobody
///   else touches them meanwhile;
/// - `bias`, if there is one, has at least `bias_start + features` elements.
#[derive(Clone, Copy)]
pub(super) struct Tile<'a, T> {
    /// Rows of activations, `k` apart.
    pub(super) x: *const f32,
    /// Rows of activations and of the output.
    pub(super) rows: usize,
    /// Rows of weights, `k` apart: output features.
    pub(super) weight: *const T,
    /// Output features.
    pub(super) features: usize,
    /// Length of a dot product.
    pub(super) k: usize,
    /// Added to the sums.
    pub(super) bias: Option<HostTensor<'a>>,
    /// The first feature's bias.
    pub(super) bias_start: usize,
    /// First element of the output.
    pub(super) out: *mut f32,
    /// Elements from one output row to the next.
    pub(super) out_stride: usize,
    /// Memory that is wanted next; it is asked for on the way.
    pub(super) ahead: Ahead,
}

/// Cache lines to ask for while computing, so many bytes per step of sixteen elements. It need not be valid.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    start: *const u8,
    end: *const u8,
    per_step: usize,
}

impl Ahead {
    /// Nothing.
    pub(super) const NONE: Self = Self { start: std::ptr::null(), end: std::ptr::null(), per_step: 0 };

    /// Part `i` of `n` equal parts of `bytes` from `start` on, spread over `steps`.
    #[inline(always)]
    fn part(start: *const u8, bytes: usize, i: usize, n: usize, steps: usize) -> Self {
        let line = |i| bytes * i / n / LINE * LINE;
        let (from, to) = (line(i), line(i + 1));
        Self {
            start: start.wrapping_add(from),
            end: start.wrapping_add(to),
            per_step: (to - from).div_ceil(steps.max(1)).next_multiple_of(LINE),
        }
    }
}

impl<T> Tile<'_, T> {
    /// From row `row` on, `rows` of them.
    ///
    /// # Safety
    /// They are in the tile.
    #[inline(always)]
    unsafe fn rows(self, row: usize, rows: usize) -> Self {
        // SAFETY: inside of the tile.
        unsafe {
            Self { x: self.x.add(row * self.k), rows, out: self.out.add(row * self.out_stride), ..self }
        }
    }

    /// From feature `feature` on, `features` of them.
    ///
    /// # Safety
    /// They are in the tile.
    #[inline(always)]
    unsafe fn features(self, feature: usize, features: usize) -> Self {
        // SAFETY: inside of the tile.
        unsafe {
            Self {
                weight: self.weight.add(feature * self.k),
                features,
                bias_start: self.bias_start + feature,
                out: self.out.add(feature),
                ..self
            }
        }
    }
}

/// Rows up to which weights are read once from memory and all rows meet them in the cache: their time is that
/// of the memory or a small multiple of it. With more rows, a few rows of x stay in the nearest cache instead.
const FEW_ROWS: usize = 48;

/// Weights that all of a few rows meet before the next ones.
const FEW_ROWS_FEATURES: usize = 24;

/// Computes a block of any size. The weights of the next `following` features stand behind its own.
///
/// # Safety
/// Those of [`Tile`] and [`Lanes`].
#[inline(always)]
pub(super) unsafe fn block<L: Lanes, T: Weight>(tile: Tile<'_, T>, following: usize) {
    let few = tile.rows <= FEW_ROWS;
    let step = if few { FEW_ROWS_FEATURES } else { tile.features };
    let row_tiles = tile.rows.div_ceil(L::TILE_ROWS);
    let mut feature = 0;
    while feature < tile.features {
        let features = step.min(tile.features - feature);
        let next = if few { step.min(tile.features + following - feature - features) } else { 0 };
        for row_tile in 0..row_tiles {
            let row = row_tile * L::TILE_ROWS;
            let rows = L::TILE_ROWS.min(tile.rows - row);
            // SAFETY: inside of the tile.
            unsafe {
                let part = tile.rows(row, rows).features(feature, features);
                let ahead = part.weight.wrapping_add(features * tile.k).cast();
                L::strip(part, Ahead::part(ahead, next * tile.k * size_of::<T>(), row_tile, row_tiles, 1));
            }
        }
        feature += features;
    }
}

/// Computes `MR` rows, `NR` features at a time.
///
/// # Safety
/// Those of [`Tile`] and [`Lanes`]; `tile.rows = MR`.
#[inline(always)]
pub(super) unsafe fn strip<L: Lanes, T: Weight, const MR: usize, const NR: usize>(
    tile: Tile<'_, T>,
    ahead: Ahead,
) {
    // SAFETY: the caller's.
    unsafe {
        if tile.features < NR {
            for feature in 0..tile.features {
                L::dots::<T, MR, 1>(&tile.features(feature, 1));
            }
            return;
        }
        let groups = tile.features.div_ceil(NR);
        for group in 0..groups {
            // The last ones overlap the ones before, which get the same bits again.
            let start = (group * NR).min(tile.features - NR);
            let mut part = tile.features(start, NR);
            if ahead.per_step > 0 {
                let bytes = ahead.end as usize - ahead.start as usize;
                part.ahead = Ahead::part(ahead.start, bytes, group, groups, tile.k.div_ceil(LANES));
            }
            L::dots::<T, MR, NR>(&part);
        }
    }
}

/// `MR × NR` dot products.
///
/// # Safety
/// Those of [`Tile`] and [`Lanes`]; `tile.rows = MR`, `tile.features = NR`.
#[inline(always)]
pub(super) unsafe fn dots<L: Lanes, T: Weight, const MR: usize, const NR: usize>(tile: &Tile<'_, T>) {
    const { assert!(MR * NR <= MAX_SUMS) };
    let k = tile.k;
    let rest = k % LANES;
    // SAFETY: the caller's; all offsets are below MR · k and NR · k.
    unsafe {
        // Made before there are sums in registers, which would have to be put away around the copying.
        let (mut last_x, mut last_weight) = ([[0.0; LANES]; MR], [[T::ZERO; LANES]; NR]);
        if rest > 0 {
            fill(&mut last_x, tile.x.add(k - rest), k, rest);
            fill(&mut last_weight, tile.weight.add(k - rest), k, rest);
        }
        let mut sums = [L::zeros(); MAX_SUMS];
        let whole = Stretch {
            x: Rows { start: tile.x, stride: k },
            weight: Rows { start: tile.weight, stride: k },
            count: k / LANES,
        };
        let end = Stretch {
            x: Rows { start: last_x.as_ptr().cast(), stride: LANES },
            weight: Rows { start: last_weight.as_ptr().cast(), stride: LANES },
            count: usize::from(rest > 0),
        };
        // One row waits for memory, so it takes the weights in their order; two registers are the sixteen lanes of
        // the only instruction set for which that differs.
        if MR == 1 && L::PARTS == 2 {
            passes::<L, T, MR, NR, 2>(&mut sums, [whole, end], tile.ahead);
        } else {
            passes::<L, T, MR, NR, 1>(&mut sums, [whole, end], tile.ahead);
        }
        let mut totals = [0.0f32; MAX_SUMS];
        for i in 0..(MR * NR).div_ceil(4) {
            let four = L::sum4([sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]]);
            totals[4 * i..4 * i + 4].copy_from_slice(&four);
        }
        for m in 0..MR {
            let out = tile.out.add(m * tile.out_stride);
            std::ptr::copy_nonoverlapping(totals.as_ptr().add(m * NR), out, NR);
            if let Some(bias) = tile.bias {
                for n in 0..NR {
                    *out.add(n) += element(bias, tile.bias_start + n);
                }
            }
        }
    }
}

/// Rows of a matrix.
#[derive(Clone, Copy)]
struct Rows<T> {
    start: *const T,
    stride: usize,
}

/// Steps of sixteen elements of activations and weights.
#[derive(Clone, Copy)]
struct Stretch<T> {
    x: Rows<f32>,
    weight: Rows<T>,
    count: usize,
}

impl<T> Rows<T> {
    /// From element `at` of each row on.
    ///
    /// # Safety
    /// The rows have it.
    #[inline(always)]
    unsafe fn from(self, at: usize) -> Self {
        // SAFETY: the caller's.
        Self { start: unsafe { self.start.add(at) }, ..self }
    }
}

/// Dot products over some stretches of rows, each of a number of steps of sixteen elements.
///
/// Lanes do not meet before the sum, so a tile goes through the registers of the sixteen `P` at a time: the fewer, the
/// more dot products stay in registers, and the more of them each widened weight serves.
///
/// # Safety
/// Those of [`steps`] for each stretch; `MR · NR ≤ MAX_SUMS`.
#[inline(always)]
unsafe fn passes<L: Lanes, T: Weight, const MR: usize, const NR: usize, const P: usize>(
    sums: &mut [L::All; MAX_SUMS],
    stretches: [Stretch<T>; 2],
    mut ahead: Ahead,
) {
    // SAFETY: the caller's.
    unsafe {
        for pass in 0..L::PARTS / P {
            let lanes = pass * P * L::WIDTH;
            let mut acc = [[[L::zero(); P]; NR]; MR];
            for Stretch { x, weight, count } in stretches {
                steps::<L, T, MR, NR, P>(&mut acc, x.from(lanes), weight.from(lanes), count, &mut ahead);
            }
            for m in 0..MR {
                for n in 0..NR {
                    for p in 0..P {
                        sums[m * NR + n][pass * P + p] = acc[m][n][p];
                    }
                }
            }
        }
    }
}

/// Adds to the sums, of each of `count` steps of sixteen elements, the first `P` registers.
///
/// # Safety
/// That of [`Lanes`]; `x` has `MR` rows and `weight` has `NR` rows of as many elements.
#[expect(clippy::needless_range_loop, reason = "indices of three arrays each, and of memory")]
#[inline(always)]
unsafe fn steps<L: Lanes, T: Weight, const MR: usize, const NR: usize, const P: usize>(
    acc: &mut [[[L::Register; P]; NR]; MR],
    x: Rows<f32>,
    weight: Rows<T>,
    count: usize,
    ahead: &mut Ahead,
) {
    // SAFETY: the caller's.
    unsafe {
        let Ahead { start: mut next, end: ahead_end, per_step } = *ahead;
        for step in 0..count {
            if next < ahead_end {
                let end = next.wrapping_add(per_step);
                while next < end {
                    L::prefetch(next);
                    next = next.wrapping_add(LINE);
                }
            }
            for p in 0..P {
                let at = step * LANES + p * L::WIDTH;
                let mut w = [L::zero(); NR];
                for n in 0..NR {
                    w[n] = T::load::<L>(weight.start.add(n * weight.stride + at));
                }
                for m in 0..MR {
                    let x = L::load(x.start.add(m * x.stride + at));
                    for n in 0..NR {
                        acc[m][n][p] = L::multiply_add(x, w[n], acc[m][n][p]);
                    }
                }
            }
        }
        ahead.start = next;
    }
}

/// Copies the last `rest` elements of rows, leaving what fills them up to a whole step.
///
/// # Safety
/// `start` is valid for reads of `rest ≤ 16` elements at each of `rows.len()` rows `stride` apart.
#[inline(never)]
unsafe fn fill<T: Weight>(rows: &mut [[T; LANES]], start: *const T, stride: usize, rest: usize) {
    for (n, row) in rows.iter_mut().enumerate() {
        // SAFETY: the caller's.
        unsafe { std::ptr::copy_nonoverlapping(start.add(n * stride), row.as_mut_ptr(), rest) };
    }
}

/// Room for the dot products of the largest tile, and of four at a time.
const MAX_SUMS: usize = 24;

/// One element of a bias; those of types that [`linear`](super::linear) refuses are not met.
///
/// # Safety
/// `i` is below the length.
#[inline(always)]
unsafe fn element(bias: HostTensor<'_>, i: usize) -> f32 {
    // SAFETY: the caller's.
    unsafe {
        match bias {
            HostTensor::F32(b) => *b.get_unchecked(i),
            HostTensor::F16(b) => b.get_unchecked(i).to_f32(),
            HostTensor::Bf16(b) => b.get_unchecked(i).to_f32(),
            HostTensor::F8E4M3(_) | HostTensor::F8E5M2(_) => f32::NAN,
        }
    }
}

/// Sixteen lanes of `Σ x²`, summed by the same tree as a dot product.
///
/// # Safety
/// That of [`Lanes`].
#[inline(always)]
pub(super) unsafe fn sum_of_squares<L: Lanes>(x: &[f32]) -> f32 {
    let mut sum = 0.0;
    let tile = Tile {
        x: x.as_ptr(),
        rows: 1,
        weight: x.as_ptr(),
        features: 1,
        k: x.len(),
        bias: None,
        bias_start: 0,
        out: &raw mut sum,
        out_stride: 1,
        ahead: Ahead::NONE,
    };
    // SAFETY: x is one row of activations and of weights, the sum one element of output.
    unsafe { L::strip(tile, Ahead::NONE) };
    sum
}
