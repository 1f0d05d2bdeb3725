//! AVX2 with FMA and F16C: two registers hold the sixteen lanes.

use super::super::tile::{Ahead, Tile, dots, strip};
use super::{Lanes, Weight};
use half::{bf16, f16};
use std::arch::x86_64::*;

/// 16 registers: 4 rows × 3 weights, 12 registers of sums.
#[derive(Clone, Copy)]
pub(in super::super) struct Avx2;

impl Lanes for Avx2 {
    type Register = __m256;
    type All = [__m256; 2];
    const WIDTH: usize = 8;
    const TILE_ROWS: usize = 4;

    #[inline(always)]
    unsafe fn zero() -> __m256 {
        // SAFETY: the caller has AVX2.
        unsafe { _mm256_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn zeros() -> [__m256; 2] {
        // SAFETY: the caller has AVX2.
        unsafe { [_mm256_setzero_ps(); 2] }
    }

    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m256 {
        // SAFETY: the caller has AVX2 and 8 elements.
        unsafe { _mm256_loadu_ps(p) }
    }

    #[inline(always)]
    unsafe fn load_f16(p: *const f16) -> __m256 {
        // SAFETY: the caller has F16C and 8 elements.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }

    #[inline(always)]
    unsafe fn load_bf16(p: *const bf16) -> __m256 {
        // SAFETY: the caller has AVX2 and 8 elements.
        unsafe {
            let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
        }
    }

    #[inline(always)]
    unsafe fn multiply_add(a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: the caller has FMA.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn multiply_add_scalar(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }

    #[inline(always)]
    unsafe fn sum4([a, b, c, d]: [[__m256; 2]; 4]) -> [f32; 4] {
        // SAFETY: the caller has AVX2.
        unsafe {
            let eight = |x: [__m256; 2]| _mm256_add_ps(x[0], x[1]);
            let four = |x: __m256, y: __m256| {
                _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(x, y), _mm256_permute2f128_ps::<0x31>(x, y))
            };
            // Blocks of four lanes: a b, c d.
            let (ab, cd) = (four(eight(a), eight(b)), four(eight(c), eight(d)));
            // Two lanes each: a c, b d.
            let two = _mm256_add_ps(_mm256_shuffle_ps::<0x44>(ab, cd), _mm256_shuffle_ps::<0xee>(ab, cd));
            let one = _mm256_hadd_ps(two, two);
            // a c · · and b d · ·
            let sums = _mm_unpacklo_ps(_mm256_castps256_ps128(one), _mm256_extractf128_ps::<1>(one));
            let mut out = [0.0; 4];
            _mm_storeu_ps(out.as_mut_ptr(), sums);
            out
        }
    }

    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        // SAFETY: a prefetch of any address is allowed.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }

    #[inline(always)]
    unsafe fn strip<T: Weight>(tile: Tile<'_, T>, ahead: Ahead) {
        // SAFETY: the caller's.
        unsafe {
            match tile.rows {
                1 => strip::<Self, T, 1, 4>(tile, ahead),
                2 => strip::<Self, T, 2, 6>(tile, ahead),
                3 => strip::<Self, T, 3, 4>(tile, ahead),
                _ => strip::<Self, T, 4, 3>(tile, ahead),
            }
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn dots<T: Weight, const MR: usize, const NR: usize>(tile: &Tile<'_, T>) {
        // SAFETY: the caller's.
        unsafe { dots::<Self, T, MR, NR>(tile) }
    }
}
