//! Sixteen lanes in two AVX2 registers.

use super::{Kernel, LANES, Lanes, Vector};
use std::arch::x86_64::*;

/// Lanes 0 to 7 and 8 to 15. Exists only where the processor has AVX2, FMA and F16C: `run` chooses the type
/// after [`Level::is_available`](super::Level::is_available), and its functions are inlined into
/// `with_features`.
#[derive(Clone, Copy)]
pub(in super::super) struct Avx2(__m256, __m256);

/// An intrinsic on registers.
macro_rules! intrinsic {
    ($($body:tt)*) => {{
        // SAFETY: the processor has the instruction, see the type.
        unsafe { $($body)* }
    }};
}

impl Avx2 {
    /// Lanes `i` and `i + 8` added.
    #[inline(always)]
    fn folded(self) -> __m256 {
        intrinsic!(_mm256_add_ps(self.0, self.1))
    }

    #[inline(always)]
    fn half_pow2(n: __m256) -> __m256 {
        intrinsic! {
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent))
        }
    }

    #[inline(always)]
    fn half_select(bits: i32, yes: __m256, no: __m256) -> __m256 {
        intrinsic! {
            let lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
            let set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(bits), lane), lane);
            _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(set))
        }
    }

    /// # Safety
    /// The kernel's, and the processor has these features.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn with_features<K: Kernel>(kernel: K) -> K::Output {
        // SAFETY: the caller's.
        unsafe { kernel.run::<Self>() }
    }

    /// [`Lanes::sum`] of four vectors.
    #[inline(always)]
    fn sum4(vectors: &[Self; 4]) -> [f32; 4] {
        let (a, b) = (vectors[0].folded(), vectors[1].folded());
        let (c, d) = (vectors[2].folded(), vectors[3].folded());
        let mut sums = [0.0f32; 4];
        // The tree of `sum`, two vectors to a register and then all four.
        // SAFETY: the processor has the instructions, and four elements are stored.
        unsafe {
            let ab =
                _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b));
            let cd =
                _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(c, d), _mm256_permute2f128_ps::<0x31>(c, d));
            let low = _mm256_shuffle_ps::<0b01_00_01_00>(ab, cd);
            let pairs = _mm256_add_ps(low, _mm256_shuffle_ps::<0b11_10_11_10>(ab, cd));
            let even = _mm256_shuffle_ps::<0b10_00_10_00>(pairs, pairs);
            let all = _mm256_add_ps(even, _mm256_shuffle_ps::<0b11_01_11_01>(pairs, pairs));
            // a and c in the lower half, b and d in the upper.
            let (ac, bd) = (_mm256_castps256_ps128(all), _mm256_extractf128_ps::<1>(all));
            _mm_storeu_ps(sums.as_mut_ptr(), _mm_unpacklo_ps(ac, bd));
        }
        sums
    }
}

/// Eight lanes, with the same condition as [`Avx2`].
#[derive(Clone, Copy)]
pub(in super::super) struct Half(__m256);

impl Vector for Half {
    const WIDTH: usize = 8;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self(intrinsic!(_mm256_set1_ps(value)))
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's, and the processor has the instruction.
        Self(unsafe { _mm256_loadu_ps(from) })
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        // SAFETY: as `load`.
        Self(unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) })
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: as `load`.
        Self(unsafe {
            let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
        })
    }

    #[inline(always)]
    unsafe fn load_e4m3(from: *const u8) -> Self {
        // The magnitude where a binary16 has it reads 2^8 too small; 0x7f is NaN.
        // SAFETY: as `load`.
        Self(unsafe {
            let bytes = _mm_cvtepu8_epi16(_mm_loadl_epi64(from.cast()));
            let magnitude = _mm_and_si128(bytes, _mm_set1_epi16(0x7f));
            let sign = _mm_slli_epi16::<8>(_mm_andnot_si128(_mm_set1_epi16(0x7f), bytes));
            let nan = _mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7f));
            // NaN of binary16 survives the conversion and the product.
            let bits = _mm_or_si128(sign, _mm_slli_epi16::<7>(magnitude));
            let bits = _mm_or_si128(bits, _mm_and_si128(nan, _mm_set1_epi16(0x7e00)));
            _mm256_mul_ps(_mm256_cvtph_ps(bits), _mm256_set1_ps(256.0))
        })
    }

    #[inline(always)]
    unsafe fn load_e5m2(from: *const u8) -> Self {
        // SAFETY: as `load`.
        Self(unsafe {
            let bytes = _mm_cvtepu8_epi16(_mm_loadl_epi64(from.cast()));
            _mm256_cvtph_ps(_mm_slli_epi16::<8>(bytes))
        })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's, and the processor has the instruction.
        unsafe { _mm256_storeu_ps(to, self.0) }
    }

    #[inline(always)]
    fn fma(self, factor: Self, addend: Self) -> Self {
        Self(intrinsic!(_mm256_fmadd_ps(self.0, factor.0, addend.0)))
    }
}

impl Vector for Avx2 {
    const WIDTH: usize = LANES;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        let half = Half::splat(value);
        Self(half.0, half.0)
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's.
        unsafe { Self(Half::load(from).0, Half::load(from.add(8)).0) }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        // SAFETY: the caller's.
        unsafe { Self(Half::load_f16(from).0, Half::load_f16(from.add(8)).0) }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: the caller's.
        unsafe { Self(Half::load_bf16(from).0, Half::load_bf16(from.add(8)).0) }
    }

    #[inline(always)]
    unsafe fn load_e4m3(from: *const u8) -> Self {
        // SAFETY: the caller's.
        unsafe { Self(Half::load_e4m3(from).0, Half::load_e4m3(from.add(8)).0) }
    }

    #[inline(always)]
    unsafe fn load_e5m2(from: *const u8) -> Self {
        // SAFETY: the caller's.
        unsafe { Self(Half::load_e5m2(from).0, Half::load_e5m2(from.add(8)).0) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's.
        unsafe {
            Half(self.0).store(to);
            Half(self.1).store(to.add(8));
        }
    }

    #[inline(always)]
    fn fma(self, factor: Self, addend: Self) -> Self {
        let low = Half(self.0).fma(Half(factor.0), Half(addend.0));
        let high = Half(self.1).fma(Half(factor.1), Half(addend.1));
        Self(low.0, high.0)
    }
}

impl Lanes for Avx2 {
    type Register = Half;

    const REGISTERS: usize = 16;

    #[inline(always)]
    fn with_register(self, index: usize, register: Half) -> Self {
        match index {
            0 => Self(register.0, self.1),
            _ => Self(self.0, register.0),
        }
    }

    #[inline(always)]
    unsafe fn enter<K: Kernel>(kernel: K) -> K::Output {
        // SAFETY: the caller's, and the processor has the features, see the type.
        unsafe { Self::with_features(kernel) }
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        intrinsic!(Self(_mm256_add_ps(self.0, other.0), _mm256_add_ps(self.1, other.1)))
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        intrinsic!(Self(_mm256_sub_ps(self.0, other.0), _mm256_sub_ps(self.1, other.1)))
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        intrinsic!(Self(_mm256_mul_ps(self.0, other.0), _mm256_mul_ps(self.1, other.1)))
    }

    #[inline(always)]
    fn div(self, other: Self) -> Self {
        intrinsic!(Self(_mm256_div_ps(self.0, other.0), _mm256_div_ps(self.1, other.1)))
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        intrinsic!(Self(_mm256_max_ps(self.0, other.0), _mm256_max_ps(self.1, other.1)))
    }

    #[inline(always)]
    fn round(self) -> Self {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        intrinsic!(Self(_mm256_round_ps::<NEAREST>(self.0), _mm256_round_ps::<NEAREST>(self.1)))
    }

    #[inline(always)]
    fn pow2(self) -> Self {
        Self(Self::half_pow2(self.0), Self::half_pow2(self.1))
    }

    #[inline(always)]
    fn select(bits: u16, yes: Self, no: Self) -> Self {
        let (low, high) = (i32::from(bits), i32::from(bits >> 8));
        Self(Self::half_select(low, yes.0, no.0), Self::half_select(high, yes.1, no.1))
    }

    #[inline(always)]
    fn select_less(a: Self, b: Self, yes: Self, no: Self) -> Self {
        intrinsic! {
            let low = _mm256_cmp_ps::<_CMP_LT_OQ>(a.0, b.0);
            let high = _mm256_cmp_ps::<_CMP_LT_OQ>(a.1, b.1);
            Self(_mm256_blendv_ps(no.0, yes.0, low), _mm256_blendv_ps(no.1, yes.1, high))
        }
    }

    #[inline(always)]
    fn first(self) -> f32 {
        intrinsic!(_mm256_cvtss_f32(self.0))
    }

    #[inline(always)]
    fn max_lane(self) -> f32 {
        intrinsic! {
            let a = _mm256_max_ps(self.0, self.1);
            let b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let c = _mm_max_ps(b, _mm_movehl_ps(b, b));
            _mm_cvtss_f32(_mm_max_ss(c, _mm_shuffle_ps::<1>(c, c)))
        }
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        intrinsic! {
            let a = self.folded();
            let b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let c = _mm_add_ps(b, _mm_movehl_ps(b, b));
            _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps::<1>(c, c)))
        }
    }

    #[inline(always)]
    fn sums(vectors: &[Self; LANES], count: usize) -> [f32; LANES] {
        let mut sums = [0.0f32; LANES];
        let fours = sums.as_chunks_mut::<4>().0.iter_mut().zip(vectors.as_chunks::<4>().0);
        for (to, four) in fours.take(count.div_ceil(4)) {
            *to = Self::sum4(four);
        }
        sums
    }

    #[inline(always)]
    fn prefetch<T>(at: *const T) {
        intrinsic!(_mm_prefetch::<_MM_HINT_T0>(at.cast()));
    }
}
