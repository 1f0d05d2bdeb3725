//! Dot products side by side in registers: the inner loops of [`linear`](super::linear).
//!
//! ```text
//!              weights (NR rows of K)           one step of k: 16 elements
//!              w0  w1  w2  w3  w4  w5           NR loads + conversions, MR loads, MR · NR multiply-adds
//!   x   r0   [ Σ   Σ   Σ   Σ   Σ   Σ ]
//!  (MR  r1   [ Σ   Σ   Σ   Σ   Σ   Σ ]          each Σ is 16 lanes; where a register holds fewer, the
//! rows) r2   [ Σ   Σ   Σ   Σ   Σ   Σ ]          tile is computed in passes over groups of lanes
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
    /// How far ahead weights are asked for, in bytes; 0 is not at all.
    pub(super) prefetch: usize,
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
const FEW_ROWS: usize = 32;

/// Weights that all of a few rows meet before the next ones.
const FEW_ROWS_FEATURES: usize = 24;

/// Computes a block of any size.
///
/// # Safety
/// Those of [`Tile`] and [`Lanes`].
#[inline(always)]
pub(super) unsafe fn block<L: Lanes, T: Weight>(tile: Tile<'_, T>) {
    let step = if tile.rows <= FEW_ROWS { FEW_ROWS_FEATURES } else { tile.features };
    let mut feature = 0;
    while feature < tile.features {
        let features = step.min(tile.features - feature);
        let mut row = 0;
        while row < tile.rows {
            let rows = L::TILE_ROWS.min(tile.rows - row);
            // SAFETY: inside of the tile.
            unsafe {
                let mut part = tile.rows(row, rows).features(feature, features);
                if row > 0 {
                    part.prefetch = 0;
                }
                L::strip(part);
            }
            row += rows;
        }
        feature += features;
    }
}

/// Computes `MR` rows, `NR` features at a time with `SUB` registers of each dot product per pass.
///
/// # Safety
/// Those of [`Tile`] and [`Lanes`]; `tile.rows = MR`.
#[inline(always)]
pub(super) unsafe fn strip<L: Lanes, T: Weight, const MR: usize, const NR: usize, const SUB: usize>(
    tile: Tile<'_, T>,
) {
    // SAFETY: the caller's.
    unsafe {
        if tile.features < NR {
            for feature in 0..tile.features {
                dots::<L, T, MR, 1, SUB>(tile.features(feature, 1));
            }
            return;
        }
        let mut feature = 0;
        while feature < tile.features {
            // The last ones overlap the ones before, which get the same bits again.
            let start = feature.min(tile.features - NR);
            dots::<L, T, MR, NR, SUB>(tile.features(start, NR));
            feature += NR;
        }
    }
}

/// `MR × NR` dot products.
///
/// # Safety
/// Those of [`Tile`] and [`Lanes`]; `tile.rows = MR`, `tile.features = NR`.
#[inline(always)]
unsafe fn dots<L: Lanes, T: Weight, const MR: usize, const NR: usize, const SUB: usize>(tile: Tile<'_, T>) {
    const { assert!(MR * NR <= MAX_SUMS && L::PARTS % SUB == 0) };
    let Tile { x, weight, k, .. } = tile;
    let whole = k - k % LANES;
    // SAFETY: the caller's; all offsets are below MR · k and NR · k.
    unsafe {
        let mut sums = [L::zeros(); MAX_SUMS];
        let mut part = 0;
        while part < L::PARTS {
            let mut acc = [[[L::zero(); SUB]; NR]; MR];
            let mut at = 0;
            while at < whole {
                if tile.prefetch != 0 && part == 0 && at % (LINE / size_of::<T>()) == 0 {
                    for n in 0..NR {
                        L::prefetch(weight.add(n * k + at).cast::<u8>().wrapping_add(tile.prefetch));
                    }
                }
                for s in 0..SUB {
                    let offset = at + (part + s) * L::WIDTH;
                    let mut w = [L::zero(); NR];
                    for n in 0..NR {
                        w[n] = T::load::<L>(weight.add(n * k + offset));
                    }
                    for m in 0..MR {
                        let x = L::load(x.add(m * k + offset));
                        for n in 0..NR {
                            acc[m][n][s] = L::multiply_add(x, w[n], acc[m][n][s]);
                        }
                    }
                }
                at += LANES;
            }
            if whole < k {
                let mut w = [[0.0f32; LANES]; NR];
                for n in 0..NR {
                    for l in 0..k - whole {
                        w[n][l] = (*weight.add(n * k + whole + l)).widen();
                    }
                }
                for m in 0..MR {
                    let mut row = [0.0f32; LANES];
                    std::ptr::copy_nonoverlapping(x.add(m * k + whole), row.as_mut_ptr(), k - whole);
                    for n in 0..NR {
                        for s in 0..SUB {
                            let lanes = (part + s) * L::WIDTH;
                            acc[m][n][s] = L::multiply_add(
                                L::load(row.as_ptr().add(lanes)),
                                L::load(w[n].as_ptr().add(lanes)),
                                acc[m][n][s],
                            );
                        }
                    }
                }
            }
            for m in 0..MR {
                for n in 0..NR {
                    for s in 0..SUB {
                        sums[m * NR + n][part + s] = acc[m][n][s];
                    }
                }
            }
            part += SUB;
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
        prefetch: 0,
    };
    // SAFETY: x is one row of activations and of weights, the sum one element of output.
    unsafe { L::strip(tile) };
    sum
}
