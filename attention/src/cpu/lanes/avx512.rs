//! Sixteen lanes in one AVX-512 register.

use super::{Kernel, LANES, Lanes, Vector};
use std::arch::x86_64::*;

/// One register. Exists only where the processor has AVX-512 F, BW, DQ and VL: `run` chooses the type after
/// [`Level::is_available`](super::Level::is_available), and its functions are inlined into `with_features`.
#[derive(Clone, Copy)]
pub(in super::super) struct Avx512(__m512);

/// An intrinsic on registers.
macro_rules! intrinsic {
    ($($body:tt)*) => {{
        // SAFETY: the processor has the instruction, see the type.
        unsafe { $($body)* }
    }};
}

/// The tree of `sum` for sixteen registers in four rounds, each halving their number: parts of two registers
/// are brought together by shuffles and added. (Functions, not closures: those are compiled without the
/// instruction set.)
impl Avx512 {
    /// Lanes 8 apart.
    #[inline(always)]
    fn halves(x: Self, y: Self) -> Self {
        Self(intrinsic! {
            let low = _mm512_shuffle_f32x4::<0b01_00_01_00>(x.0, y.0);
            _mm512_add_ps(low, _mm512_shuffle_f32x4::<0b11_10_11_10>(x.0, y.0))
        })
    }

    /// Lanes 4 apart.
    #[inline(always)]
    fn quarters(x: Self, y: Self) -> Self {
        Self(intrinsic! {
            let even = _mm512_shuffle_f32x4::<0b10_00_10_00>(x.0, y.0);
            _mm512_add_ps(even, _mm512_shuffle_f32x4::<0b11_01_11_01>(x.0, y.0))
        })
    }

    /// Lanes 2 apart.
    #[inline(always)]
    fn pairs(x: Self, y: Self) -> Self {
        Self(intrinsic! {
            let low = _mm512_shuffle_ps::<0b01_00_01_00>(x.0, y.0);
            _mm512_add_ps(low, _mm512_shuffle_ps::<0b11_10_11_10>(x.0, y.0))
        })
    }

    /// Neighbours.
    #[inline(always)]
    fn singles(x: Self, y: Self) -> Self {
        Self(intrinsic! {
            let even = _mm512_shuffle_ps::<0b10_00_10_00>(x.0, y.0);
            _mm512_add_ps(even, _mm512_shuffle_ps::<0b11_01_11_01>(x.0, y.0))
        })
    }

    #[inline(always)]
    fn column(vectors: &[Self; LANES], i: usize) -> Self {
        let low = Self::halves(vectors[i], vectors[i + 4]);
        Self::quarters(low, Self::halves(vectors[i + 8], vectors[i + 12]))
    }

    /// # Safety
    /// The kernel's, and the processor has these features.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn with_features<K: Kernel>(kernel: K) -> K::Output {
        // SAFETY: the caller's.
        unsafe { kernel.run::<Self>() }
    }
}

impl Vector for Avx512 {
    const WIDTH: usize = LANES;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self(intrinsic!(_mm512_set1_ps(value)))
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's, and the processor has the instruction.
        Self(unsafe { _mm512_loadu_ps(from) })
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        // SAFETY: as `load`.
        Self(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) })
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: as `load`.
        Self(unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
        })
    }

    #[inline(always)]
    unsafe fn load_e4m3(from: *const u8) -> Self {
        // The magnitude where a binary16 has it reads 2^8 too small; 0x7f is NaN.
        // SAFETY: as `load`.
        Self(unsafe {
            let bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128(from.cast()));
            let magnitude = _mm256_and_si256(bytes, _mm256_set1_epi16(0x7f));
            let sign = _mm256_slli_epi16::<8>(_mm256_andnot_si256(_mm256_set1_epi16(0x7f), bytes));
            let bits = _mm256_or_si256(sign, _mm256_slli_epi16::<7>(magnitude));
            let nan = _mm256_cmpeq_epi16_mask(magnitude, _mm256_set1_epi16(0x7f));
            let values = _mm512_mul_ps(_mm512_cvtph_ps(bits), _mm512_set1_ps(256.0));
            _mm512_mask_blend_ps(nan, values, _mm512_set1_ps(f32::NAN))
        })
    }

    #[inline(always)]
    unsafe fn load_e5m2(from: *const u8) -> Self {
        // SAFETY: as `load`.
        Self(unsafe {
            let bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128(from.cast()));
            _mm512_cvtph_ps(_mm256_slli_epi16::<8>(bytes))
        })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's, and the processor has the instruction.
        unsafe { _mm512_storeu_ps(to, self.0) }
    }

    #[inline(always)]
    fn fma(self, factor: Self, addend: Self) -> Self {
        Self(intrinsic!(_mm512_fmadd_ps(self.0, factor.0, addend.0)))
    }
}

impl Lanes for Avx512 {
    type Register = Self;

    const REGISTERS: usize = 32;

    #[inline(always)]
    fn with_register(self, _index: usize, register: Self) -> Self {
        register
    }

    #[inline(always)]
    unsafe fn enter<K: Kernel>(kernel: K) -> K::Output {
        // SAFETY: the caller's, and the processor has the features, see the type.
        unsafe { Self::with_features(kernel) }
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(intrinsic!(_mm512_add_ps(self.0, other.0)))
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        Self(intrinsic!(_mm512_sub_ps(self.0, other.0)))
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        Self(intrinsic!(_mm512_mul_ps(self.0, other.0)))
    }

    #[inline(always)]
    fn div(self, other: Self) -> Self {
        Self(intrinsic!(_mm512_div_ps(self.0, other.0)))
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        Self(intrinsic!(_mm512_max_ps(self.0, other.0)))
    }

    #[inline(always)]
    fn round(self) -> Self {
        Self(intrinsic!(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0)))
    }

    #[inline(always)]
    fn pow2(self) -> Self {
        Self(intrinsic! {
            let exponent = _mm512_add_epi32(_mm512_cvtps_epi32(self.0), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(exponent))
        })
    }

    #[inline(always)]
    fn select(bits: u16, yes: Self, no: Self) -> Self {
        Self(intrinsic!(_mm512_mask_blend_ps(bits, no.0, yes.0)))
    }

    #[inline(always)]
    fn select_less(a: Self, b: Self, yes: Self, no: Self) -> Self {
        Self(intrinsic! {
            let less = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(a.0, b.0);
            _mm512_mask_blend_ps(less, no.0, yes.0)
        })
    }

    #[inline(always)]
    fn first(self) -> f32 {
        intrinsic!(_mm512_cvtss_f32(self.0))
    }

    #[inline(always)]
    fn max_lane(self) -> f32 {
        intrinsic!(_mm512_reduce_max_ps(self.0))
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        intrinsic! {
            let a = _mm256_add_ps(_mm512_castps512_ps256(self.0), _mm512_extractf32x8_ps::<1>(self.0));
            let b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let c = _mm_add_ps(b, _mm_movehl_ps(b, b));
            _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps::<1>(c, c)))
        }
    }

    #[inline(always)]
    fn sums(vectors: &[Self; LANES], _count: usize) -> [f32; LANES] {
        let mut sums = [0.0f32; LANES];
        // Columns 0, 4, 8, 12 and so on, so that the result comes out in order.
        let (a, b) = (Self::column(vectors, 0), Self::column(vectors, 1));
        let (c, d) = (Self::column(vectors, 2), Self::column(vectors, 3));
        let all = Self::singles(Self::pairs(a, b), Self::pairs(c, d));
        // SAFETY: sixteen elements.
        unsafe { all.store(sums.as_mut_ptr()) };
        sums
    }

    #[inline(always)]
    fn prefetch<T>(at: *const T) {
        intrinsic!(_mm_prefetch::<_MM_HINT_T1>(at.cast()));
    }
}
