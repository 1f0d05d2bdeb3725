//! Sixteen lanes of f32, however many registers they take: the only place that names vector instructions.
//!
//! What every implementation must agree on, to the bit: a multiply-add of a lane (fused, except for the
//! portable one), the exact widening of f16 and bf16, and the tree of [`Lanes::sum4`].

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

#[cfg(target_arch = "x86_64")]
pub(super) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(super) use avx512::Avx512;
#[cfg(target_arch = "aarch64")]
pub(super) use neon::Neon;
pub(super) use portable::Portable;

use super::tile::{Ahead, Tile};
use half::{bf16, f16};
use std::ops::IndexMut;

/// Lanes of a dot product.
pub(super) const LANES: usize = 16;

/// One instruction set's registers.
///
/// # Safety
/// The functions may only be called, or inlined into, where the instruction set is enabled. Pointers are
/// valid for reads of [`Lanes::WIDTH`] elements and need no alignment.
pub(super) trait Lanes: Copy + 'static {
    /// One register of [`Self::WIDTH`] lanes.
    type Register: Copy;
    /// The registers that hold all sixteen lanes.
    type All: Copy + IndexMut<usize, Output = Self::Register>;
    /// Lanes of a register.
    const WIDTH: usize;
    /// Registers of sixteen lanes.
    const PARTS: usize = LANES / Self::WIDTH;
    /// Rows of the largest tile.
    const TILE_ROWS: usize;

    /// All lanes 0.
    unsafe fn zero() -> Self::Register;
    /// All lanes of all registers 0.
    unsafe fn zeros() -> Self::All;
    /// Lanes from memory.
    unsafe fn load(p: *const f32) -> Self::Register;
    /// Lanes from memory, widened.
    unsafe fn load_f16(p: *const f16) -> Self::Register;
    /// Lanes from memory, widened.
    unsafe fn load_bf16(p: *const bf16) -> Self::Register;
    /// `a · b + c`
    unsafe fn multiply_add(a: Self::Register, b: Self::Register, c: Self::Register) -> Self::Register;
    /// The same for one number.
    fn multiply_add_scalar(a: f32, b: f32, c: f32) -> f32;
    /// Sums over the sixteen lanes of four dot products: lane `l` takes `l + 8`, then `l + 4`, `l + 2`, `l + 1`.
    unsafe fn sum4(sums: [Self::All; 4]) -> [f32; 4];
    /// Asks for the cache line of `p`, which need not be valid.
    unsafe fn prefetch(p: *const u8);
    /// Computes one strip of `tile` with the tile that fits this register file: `tile.rows ≤ TILE_ROWS`.
    ///
    /// # Safety
    /// Also that of [`Tile`].
    unsafe fn strip<T: Weight>(tile: Tile<'_, T>, ahead: Ahead);
    /// [`tile::dots`](super::tile::dots) as a function of its own, compiled for the instruction set: registers
    /// are few, and loops around it would take some.
    ///
    /// # Safety
    /// Also that of `tile::dots`.
    unsafe fn dots<T: Weight, const MR: usize, const NR: usize>(tile: &Tile<'_, T>);
}

/// How weights are stored.
pub(super) trait Weight: Copy + Send + Sync + 'static {
    /// The number 0.
    const ZERO: Self;
    /// One register of weights.
    ///
    /// # Safety
    /// That of [`Lanes`].
    unsafe fn load<L: Lanes>(p: *const Self) -> L::Register;
    /// One weight.
    fn widen(self) -> f32;
}

impl Weight for f32 {
    const ZERO: Self = 0.0;
    #[inline(always)]
    unsafe fn load<L: Lanes>(p: *const Self) -> L::Register {
        // SAFETY: the caller's.
        unsafe { L::load(p) }
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

impl Weight for f16 {
    const ZERO: Self = Self::from_bits(0);
    #[inline(always)]
    unsafe fn load<L: Lanes>(p: *const Self) -> L::Register {
        // SAFETY: the caller's.
        unsafe { L::load_f16(p) }
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }
}

impl Weight for bf16 {
    const ZERO: Self = Self::from_bits(0);
    #[inline(always)]
    unsafe fn load<L: Lanes>(p: *const Self) -> L::Register {
        // SAFETY: the caller's.
        unsafe { L::load_bf16(p) }
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }
}
