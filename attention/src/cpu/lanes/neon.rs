//! Sixteen lanes in four NEON registers.

use super::{Kernel, LANES, Lanes, Vector};
use std::arch::aarch64::*;
use std::array::from_fn;

/// Lanes 0 to 3, 4 to 7, 8 to 11 and 12 to 15. NEON is a part of every AArch64 processor.
#[derive(Clone, Copy)]
pub(in super::super) struct Neon([float32x4_t; 4]);

/// An intrinsic on registers.
macro_rules! intrinsic {
    ($($body:tt)*) => {{
        // SAFETY: every AArch64 processor has NEON.
        #[allow(unused_unsafe, reason = "which intrinsics are safe depends on the compiler's version")]
        unsafe { $($body)* }
    }};
}

impl Neon {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(float32x4_t, float32x4_t) -> float32x4_t) -> Self {
        Self(from_fn(|i| f(self.0[i], other.0[i])))
    }

    /// Lanes `i`, `i + 4`, `i + 8` and `i + 12` added, in the tree of `sum`.
    #[inline(always)]
    fn folded(self) -> float32x4_t {
        let [a, b, c, d] = self.0;
        intrinsic!(vaddq_f32(vaddq_f32(a, c), vaddq_f32(b, d)))
    }
}

/// Four lanes.
#[derive(Clone, Copy)]
pub(in super::super) struct Quarter(float32x4_t);

impl Quarter {
    /// Four binary16 bit patterns in 32-bit lanes. Moved to where a binary32 has them they read 2^112 too
    /// small, subnormals included; infinities and NaN keep the largest exponent.
    #[inline(always)]
    fn from_f16_bits(bits: uint32x4_t) -> float32x4_t {
        intrinsic! {
            let magnitude = vandq_u32(bits, vdupq_n_u32(0x7fff));
            let sign = vshlq_n_u32::<16>(vandq_u32(bits, vdupq_n_u32(0x8000)));
            let value = vreinterpretq_f32_u32(vshlq_n_u32::<13>(magnitude));
            let value = vmulq_f32(value, vdupq_n_f32(f32::from_bits((112 + 127) << 23)));
            let special = vcgeq_u32(magnitude, vdupq_n_u32(0x7c00));
            let exponent = vandq_u32(special, vdupq_n_u32(0x7f80_0000));
            vreinterpretq_f32_u32(vorrq_u32(vorrq_u32(vreinterpretq_u32_f32(value), exponent), sign))
        }
    }

    /// Four bytes widened to 32-bit lanes.
    ///
    /// # Safety
    /// `from` is valid for reads of four elements.
    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> uint32x4_t {
        // SAFETY: the caller's.
        let four = unsafe { from.cast::<u32>().read_unaligned() };
        intrinsic! {
            let bytes = vreinterpret_u8_u32(vdup_n_u32(four));
            vmovl_u16(vget_low_u16(vmovl_u8(bytes)))
        }
    }

    /// Four 16-bit elements widened to 32-bit lanes.
    ///
    /// # Safety
    /// `from` is valid for reads of four elements.
    #[inline(always)]
    unsafe fn load_words(from: *const u16) -> uint32x4_t {
        // SAFETY: the caller's.
        let words = unsafe { vld1_u16(from) };
        intrinsic!(vmovl_u16(words))
    }
}

impl Vector for Quarter {
    const WIDTH: usize = 4;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self(intrinsic!(vdupq_n_f32(value)))
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's.
        Self(unsafe { vld1q_f32(from) })
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        // SAFETY: the caller's.
        Self(Self::from_f16_bits(unsafe { Self::load_words(from) }))
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: the caller's.
        let bits = unsafe { Self::load_words(from) };
        Self(intrinsic!(vreinterpretq_f32_u32(vshlq_n_u32::<16>(bits))))
    }

    #[inline(always)]
    unsafe fn load_e4m3(from: *const u8) -> Self {
        // The magnitude where a binary16 has it reads 2^8 too small; 0x7f is NaN.
        // SAFETY: the caller's.
        let byte = unsafe { Self::load_bytes(from) };
        Self(intrinsic! {
            let magnitude = vandq_u32(byte, vdupq_n_u32(0x7f));
            let sign = vshlq_n_u32::<8>(vandq_u32(byte, vdupq_n_u32(0x80)));
            let nan = vandq_u32(vceqq_u32(magnitude, vdupq_n_u32(0x7f)), vdupq_n_u32(0x7e00));
            let bits = vorrq_u32(vorrq_u32(vshlq_n_u32::<7>(magnitude), nan), sign);
            vmulq_f32(Self::from_f16_bits(bits), vdupq_n_f32(256.0))
        })
    }

    #[inline(always)]
    unsafe fn load_e5m2(from: *const u8) -> Self {
        // SAFETY: the caller's.
        let byte = unsafe { Self::load_bytes(from) };
        Self(Self::from_f16_bits(intrinsic!(vshlq_n_u32::<8>(byte))))
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's.
        unsafe { vst1q_f32(to, self.0) }
    }

    #[inline(always)]
    fn fma(self, factor: Self, addend: Self) -> Self {
        Self(intrinsic!(vfmaq_f32(addend.0, self.0, factor.0)))
    }
}

impl Vector for Neon {
    const WIDTH: usize = LANES;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self([Quarter::splat(value).0; 4])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's.
        Self(from_fn(|i| unsafe { Quarter::load(from.add(4 * i)).0 }))
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        // SAFETY: the caller's.
        Self(from_fn(|i| unsafe { Quarter::load_f16(from.add(4 * i)).0 }))
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: the caller's.
        Self(from_fn(|i| unsafe { Quarter::load_bf16(from.add(4 * i)).0 }))
    }

    #[inline(always)]
    unsafe fn load_e4m3(from: *const u8) -> Self {
        // SAFETY: the caller's.
        Self(from_fn(|i| unsafe { Quarter::load_e4m3(from.add(4 * i)).0 }))
    }

    #[inline(always)]
    unsafe fn load_e5m2(from: *const u8) -> Self {
        // SAFETY: the caller's.
        Self(from_fn(|i| unsafe { Quarter::load_e5m2(from.add(4 * i)).0 }))
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        for (i, four) in self.0.into_iter().enumerate() {
            // SAFETY: the caller's.
            unsafe { Quarter(four).store(to.add(4 * i)) };
        }
    }

    #[inline(always)]
    fn fma(self, factor: Self, addend: Self) -> Self {
        Self(from_fn(|i| intrinsic!(vfmaq_f32(addend.0[i], self.0[i], factor.0[i]))))
    }
}

impl Lanes for Neon {
    type Register = Quarter;

    const REGISTERS: usize = 32;

    #[inline(always)]
    fn with_register(mut self, index: usize, register: Quarter) -> Self {
        if let Some(four) = self.0.get_mut(index) {
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
        self.zip(other, |a, b| intrinsic!(vaddq_f32(a, b)))
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| intrinsic!(vsubq_f32(a, b)))
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| intrinsic!(vmulq_f32(a, b)))
    }

    #[inline(always)]
    fn div(self, other: Self) -> Self {
        self.zip(other, |a, b| intrinsic!(vdivq_f32(a, b)))
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| intrinsic!(vmaxnmq_f32(a, b)))
    }

    #[inline(always)]
    fn round(self) -> Self {
        Self(self.0.map(|x| intrinsic!(vrndnq_f32(x))))
    }

    #[inline(always)]
    fn pow2(self) -> Self {
        Self(self.0.map(|n| {
            intrinsic! {
                let exponent = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
                vreinterpretq_f32_s32(vshlq_n_s32::<23>(exponent))
            }
        }))
    }

    #[inline(always)]
    fn select(bits: u16, yes: Self, no: Self) -> Self {
        Self(from_fn(|i| {
            intrinsic! {
                let lane = vld1q_u32([1u32, 2, 4, 8].as_ptr());
                let set = vtstq_u32(vdupq_n_u32(u32::from(bits >> (4 * i))), lane);
                vbslq_f32(set, yes.0[i], no.0[i])
            }
        }))
    }

    #[inline(always)]
    fn select_less(a: Self, b: Self, yes: Self, no: Self) -> Self {
        Self(from_fn(|i| intrinsic!(vbslq_f32(vcltq_f32(a.0[i], b.0[i]), yes.0[i], no.0[i]))))
    }

    #[inline(always)]
    fn first(self) -> f32 {
        intrinsic!(vgetq_lane_f32::<0>(self.0[0]))
    }

    #[inline(always)]
    fn max_lane(self) -> f32 {
        let [a, b, c, d] = self.0;
        intrinsic!(vmaxnmvq_f32(vmaxnmq_f32(vmaxnmq_f32(a, b), vmaxnmq_f32(c, d))))
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        let four = self.folded();
        intrinsic! {
            let pair = vadd_f32(vget_low_f32(four), vget_high_f32(four));
            vget_lane_f32::<0>(pair) + vget_lane_f32::<1>(pair)
        }
    }

    #[inline(always)]
    fn sums(vectors: &[Self; LANES], count: usize) -> [f32; LANES] {
        from_fn(|i| if i < count { vectors[i].sum() } else { 0.0 })
    }
}
