//! AVX-512 F, BW, VL and DQ: one register holds all sixteen lanes.

use super::super::tile::{Ahead, Tile, dots, strip};
use super::{Lanes, Weight};
use half::{bf16, f16};
use std::arch::x86_64::*;

/// 32 registers: 4 rows × 6 weights, 24 registers of sums.
#[derive(Clone, Copy)]
pub(in super::super) struct Avx512;

impl Lanes for Avx512 {
    type Register = __m512;
    type All = [__m512; 1];
    const WIDTH: usize = 16;
    const TILE_ROWS: usize = 4;

    #[inline(always)]
    unsafe fn zero() -> __m512 {
        // SAFETY: the caller has AVX-512.
        unsafe { _mm512_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn zeros() -> [__m512; 1] {
        // SAFETY: the caller has AVX-512.
        unsafe { [_mm512_setzero_ps()] }
    }

    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m512 {
        // SAFETY: the caller has AVX-512 and 16 elements.
        unsafe { _mm512_loadu_ps(p) }
    }

    #[inline(always)]
    unsafe fn load_f16(p: *const f16) -> __m512 {
        // SAFETY: the caller has AVX-512 and 16 elements.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }

    #[inline(always)]
    unsafe fn load_bf16(p: *const bf16) -> __m512 {
        // SAFETY: the caller has AVX-512 and 16 elements.
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
        }
    }

    #[inline(always)]
    unsafe fn multiply_add(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: the caller has AVX-512.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn multiply_add_scalar(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }

    /// In blocks of four lanes: `a` = a0 a1 a2 a3; two dot products are folded into one register, then four.
    #[inline(always)]
    unsafe fn sum4([[a], [b], [c], [d]]: [[__m512; 1]; 4]) -> [f32; 4] {
        // SAFETY: the caller has AVX-512.
        unsafe {
            // a0+a2 a1+a3 b0+b2 b1+b3
            let ab = _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b));
            let cd = _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(c, d), _mm512_shuffle_f32x4::<0xee>(c, d));
            // One block each: a b c d.
            let four =
                _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(ab, cd), _mm512_shuffle_f32x4::<0xdd>(ab, cd));
            let two = _mm512_add_ps(four, _mm512_permute_ps::<0b00_00_11_10>(four));
            let one = _mm512_add_ps(two, _mm512_permute_ps::<0b00_00_00_01>(two));
            let first = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
            let sums = _mm512_castps512_ps128(_mm512_permutexvar_ps(first, one));
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
                1 => strip::<Self, T, 1, 8>(tile, ahead),
                2 => strip::<Self, T, 2, 8>(tile, ahead),
                3 => strip::<Self, T, 3, 6>(tile, ahead),
                _ => strip::<Self, T, 4, 6>(tile, ahead),
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
    unsafe fn dots<T: Weight, const MR: usize, const NR: usize>(tile: &Tile<'_, T>) {
        // SAFETY: the caller's.
        unsafe { dots::<Self, T, MR, NR>(tile) }
    }
}
