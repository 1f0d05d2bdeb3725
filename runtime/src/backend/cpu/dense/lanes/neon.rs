//! NEON: four registers hold the sixteen lanes.

use super::super::tile::{Ahead, Tile, dots, strip};
use super::{Lanes, Weight};
use half::{bf16, f16};
use std::arch::aarch64::*;
use std::arch::asm;

/// 32 registers: 2 rows × 3 weights, 24 registers of sums.
#[derive(Clone, Copy)]
pub(in super::super) struct Neon;

impl Lanes for Neon {
    type Register = float32x4_t;
    type All = [float32x4_t; 4];
    const WIDTH: usize = 4;
    const TILE_ROWS: usize = 2;

    #[inline(always)]
    unsafe fn zero() -> float32x4_t {
        // SAFETY: every AArch64 has NEON.
        unsafe { vdupq_n_f32(0.0) }
    }

    #[inline(always)]
    unsafe fn zeros() -> [float32x4_t; 4] {
        // SAFETY: every AArch64 has NEON.
        unsafe { [vdupq_n_f32(0.0); 4] }
    }

    #[inline(always)]
    unsafe fn load(p: *const f32) -> float32x4_t {
        // SAFETY: the caller has 4 elements.
        unsafe { vld1q_f32(p) }
    }

    #[inline(always)]
    unsafe fn load_f16(p: *const f16) -> float32x4_t {
        // SAFETY: the caller has 4 elements. The instruction is in base NEON; its intrinsic needs a newer Rust.
        unsafe {
            let half = vld1_u16(p.cast());
            let wide: float32x4_t;
            asm!("fcvtl {wide:v}.4s, {half:v}.4h", wide = lateout(vreg) wide, half = in(vreg) half,
                options(pure, nomem, nostack, preserves_flags));
            wide
        }
    }

    #[inline(always)]
    unsafe fn load_bf16(p: *const bf16) -> float32x4_t {
        // SAFETY: the caller has 4 elements.
        unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(p.cast()))) }
    }

    #[inline(always)]
    unsafe fn multiply_add(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        // SAFETY: every AArch64 has NEON.
        unsafe { vfmaq_f32(c, a, b) }
    }

    #[inline(always)]
    fn multiply_add_scalar(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }

    #[inline(always)]
    unsafe fn sum4(sums: [[float32x4_t; 4]; 4]) -> [f32; 4] {
        // SAFETY: every AArch64 has NEON.
        unsafe {
            sums.map(|[a, b, c, d]| {
                let four = vaddq_f32(vaddq_f32(a, c), vaddq_f32(b, d));
                let two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
                vget_lane_f32::<0>(two) + vget_lane_f32::<1>(two)
            })
        }
    }

    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        // SAFETY: a prefetch of any address is allowed.
        unsafe { asm!("prfm pldl2keep, [{p}]", p = in(reg) p, options(nostack, preserves_flags, readonly)) }
    }

    #[inline(always)]
    unsafe fn strip<T: Weight>(tile: Tile<'_, T>, ahead: Ahead) {
        // SAFETY: the caller's.
        unsafe {
            match tile.rows {
                1 => strip::<Self, T, 1, 4>(tile, ahead),
                _ => strip::<Self, T, 2, 3>(tile, ahead),
            }
        }
    }

    #[inline(never)]
    unsafe fn dots<T: Weight, const MR: usize, const NR: usize>(tile: &Tile<'_, T>) {
        // SAFETY: the caller's.
        unsafe { dots::<Self, T, MR, NR>(tile) }
    }
}
