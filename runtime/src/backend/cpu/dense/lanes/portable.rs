//! Plain Rust, for the compiler to vectorise as the target allows. Products are rounded before they are
//! added, because a fused multiply-add without hardware is a slow library call.

use super::super::tile::{Ahead, Tile, dots, strip};
use super::{LANES, Lanes, Weight};
use half::{bf16, f16};

/// An array for a register.
#[derive(Clone, Copy)]
pub(in super::super) struct Portable;

impl Lanes for Portable {
    type Register = [f32; LANES];
    type All = [[f32; LANES]; 1];
    const WIDTH: usize = LANES;
    const TILE_ROWS: usize = 2;

    #[inline(always)]
    unsafe fn zero() -> [f32; LANES] {
        [0.0; LANES]
    }

    #[inline(always)]
    unsafe fn zeros() -> [[f32; LANES]; 1] {
        [[0.0; LANES]]
    }

    #[inline(always)]
    unsafe fn load(p: *const f32) -> [f32; LANES] {
        // SAFETY: the caller has 16 elements.
        unsafe { p.cast::<[f32; LANES]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn load_f16(p: *const f16) -> [f32; LANES] {
        // SAFETY: the caller has 16 elements.
        unsafe { p.cast::<[f16; LANES]>().read_unaligned() }.map(f16::to_f32)
    }

    #[inline(always)]
    unsafe fn load_bf16(p: *const bf16) -> [f32; LANES] {
        // SAFETY: the caller has 16 elements.
        unsafe { p.cast::<[bf16; LANES]>().read_unaligned() }.map(bf16::to_f32)
    }

    #[inline(always)]
    unsafe fn multiply_add(a: [f32; LANES], b: [f32; LANES], mut c: [f32; LANES]) -> [f32; LANES] {
        for l in 0..LANES {
            c[l] += a[l] * b[l];
        }
        c
    }

    #[inline(always)]
    fn multiply_add_scalar(a: f32, b: f32, c: f32) -> f32 {
        a * b + c
    }

    #[inline(always)]
    unsafe fn sum4(sums: [[[f32; LANES]; 1]; 4]) -> [f32; 4] {
        sums.map(|[mut lanes]| {
            for half in [8, 4, 2, 1] {
                for l in 0..half {
                    lanes[l] += lanes[l + half];
                }
            }
            lanes[0]
        })
    }

    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}

    #[inline(always)]
    unsafe fn strip<T: Weight>(tile: Tile<'_, T>, ahead: Ahead) {
        // SAFETY: the caller's.
        unsafe {
            match tile.rows {
                1 => strip::<Self, T, 1, 2>(tile, ahead),
                _ => strip::<Self, T, 2, 1>(tile, ahead),
            }
        }
    }

    #[inline(never)]
    unsafe fn dots<T: Weight, const MR: usize, const NR: usize>(tile: &Tile<'_, T>) {
        // SAFETY: the caller's.
        unsafe { dots::<Self, T, MR, NR>(tile) }
    }
}
