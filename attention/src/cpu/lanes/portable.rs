//! Sixteen lanes in plain Rust, for processors without a path of their own.
//! Multiply-add rounds twice here: without the instruction, rounding once costs a library call a lane.

use super::super::elements::{E4m3, E5m2, Element};
use super::{Kernel, LANES, Lanes, Vector};
use half::{bf16, f16};
use std::array::from_fn;

/// A plain array of sixteen lanes, or of the four that most processors have in a register.
#[derive(Clone, Copy)]
pub(in super::super) struct Array<const WIDTH: usize>([f32; WIDTH]);

/// Sixteen lanes.
pub(in super::super) type Portable = Array<LANES>;

impl<const WIDTH: usize> Array<WIDTH> {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Self(from_fn(|i| f(self.0[i], other.0[i])))
    }

    /// # Safety
    /// `from` is valid for reads of `WIDTH` elements.
    #[inline(always)]
    unsafe fn load_as<T: Copy>(from: *const T, to_f32: impl Fn(T) -> f32) -> Self {
        // SAFETY: the caller's; an array of `T` has no further invariants and the read needs no alignment.
        let elements = unsafe { from.cast::<[T; WIDTH]>().read_unaligned() };
        Self(elements.map(to_f32))
    }
}

impl<const WIDTH: usize> Vector for Array<WIDTH> {
    const WIDTH: usize = WIDTH;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self([value; WIDTH])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's.
        unsafe { Self::load_as(from, |x| x) }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        // SAFETY: the caller's.
        unsafe { Self::load_as(from, |x| f16::from_bits(x).to_f32()) }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: the caller's.
        unsafe { Self::load_as(from, |x| bf16::from_bits(x).to_f32()) }
    }

    #[inline(always)]
    unsafe fn load_e4m3(from: *const u8) -> Self {
        // SAFETY: the caller's.
        unsafe { Self::load_as(from, |x| E4m3(x).to_f32()) }
    }

    #[inline(always)]
    unsafe fn load_e5m2(from: *const u8) -> Self {
        // SAFETY: the caller's.
        unsafe { Self::load_as(from, |x| E5m2(x).to_f32()) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's.
        unsafe { to.cast::<[f32; WIDTH]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    fn fma(self, factor: Self, addend: Self) -> Self {
        Self(from_fn(|i| self.0[i] * factor.0[i] + addend.0[i]))
    }
}

impl Lanes for Portable {
    type Register = Array<4>;

    const REGISTERS: usize = 16;

    #[inline(always)]
    fn with_register(mut self, index: usize, register: Array<4>) -> Self {
        if let Some(four) = self.0.as_chunks_mut::<4>().0.get_mut(index) {
            *four = register.0;
        }
        self
    }

    #[inline(always)]
    unsafe fn enter<K: Kernel>(kernel: K) -> K::Output {
        // SAFETY: the caller's.
        unsafe { kernel.run::<Self>() }
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, other: Self) -> Self {
        self.zip(other, |a, b| a / b)
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn round(self) -> Self {
        Self(self.0.map(f32::round_ties_even))
    }

    #[inline(always)]
    fn pow2(self) -> Self {
        Self(self.0.map(|n| f32::from_bits(((n as i32).wrapping_add(127) as u32) << 23)))
    }

    #[inline(always)]
    fn select(bits: u16, yes: Self, no: Self) -> Self {
        Self(from_fn(|i| if bits >> i & 1 == 1 { yes.0[i] } else { no.0[i] }))
    }

    #[inline(always)]
    fn select_less(a: Self, b: Self, yes: Self, no: Self) -> Self {
        Self(from_fn(|i| if a.0[i] < b.0[i] { yes.0[i] } else { no.0[i] }))
    }

    #[inline(always)]
    fn first(self) -> f32 {
        self.0[0]
    }

    #[inline(always)]
    fn max_lane(self) -> f32 {
        self.0.into_iter().fold(f32::NEG_INFINITY, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        let a: [f32; 8] = from_fn(|i| self.0[i] + self.0[i + 8]);
        let b: [f32; 4] = from_fn(|i| a[i] + a[i + 4]);
        (b[0] + b[2]) + (b[1] + b[3])
    }

    #[inline(always)]
    fn sums(vectors: &[Self; LANES], count: usize) -> [f32; LANES] {
        from_fn(|i| if i < count { vectors[i].sum() } else { 0.0 })
    }
}
