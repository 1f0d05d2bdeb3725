//! Sixteen `f32` lanes: the vector that every inner loop is written in, and its instruction sets.
//!
//! One AVX-512 register, two of AVX2, four of NEON or a plain array: lane `i` of an operation has the same
//! bits on all of them that fuse multiply-add, because the number of lanes and the tree of a sum are fixed.

mod portable;

pub(super) use portable::Portable;

/// Number of lanes.
pub(super) const LANES: usize = 16;

/// Sixteen `f32` lanes.
///
/// The types of an instruction set may be used only where the processor has it; [`Level::detect`] and the
/// dispatch in `run` are the only places that choose one.
pub(super) trait Lanes: Copy {
    /// Accumulators that a tile of dot products or weighted sums can keep in registers.
    const ACCUMULATORS: usize;

    /// All lanes the same.
    fn splat(value: f32) -> Self;

    /// # Safety
    /// `from` is valid for reads of 16 elements; no alignment is needed.
    unsafe fn load(from: *const f32) -> Self;

    /// Binary16 elements, exactly.
    ///
    /// # Safety
    /// `from` is valid for reads of 16 elements.
    unsafe fn load_f16(from: *const u16) -> Self;

    /// Bfloat16 elements, exactly.
    ///
    /// # Safety
    /// `from` is valid for reads of 16 elements.
    unsafe fn load_bf16(from: *const u16) -> Self;

    /// fp8 E4M3 elements, exactly.
    ///
    /// # Safety
    /// `from` is valid for reads of 16 elements.
    unsafe fn load_e4m3(from: *const u8) -> Self;

    /// fp8 E5M2 elements, exactly.
    ///
    /// # Safety
    /// `from` is valid for reads of 16 elements.
    unsafe fn load_e5m2(from: *const u8) -> Self;

    /// # Safety
    /// `to` is valid for writes of 16 elements; no alignment is needed.
    unsafe fn store(self, to: *mut f32);

    /// `self + other`
    fn add(self, other: Self) -> Self;

    /// `self − other`
    fn sub(self, other: Self) -> Self;

    /// `self · other`
    fn mul(self, other: Self) -> Self;

    /// `self / other`
    fn div(self, other: Self) -> Self;

    /// `self · factor + addend`, rounded once where the processor can.
    fn fma(self, factor: Self, addend: Self) -> Self;

    /// The larger one; which, if one is NaN, is not said.
    fn max(self, other: Self) -> Self;

    /// To the nearest integer.
    fn round(self) -> Self;

    /// `2^self` for integers from −126 to 127; anything for others.
    fn pow2(self) -> Self;

    /// `yes` where bit `lane` of `bits` is set, `no` elsewhere.
    fn select(bits: u16, yes: Self, no: Self) -> Self;

    /// `yes` where `a < b`, `no` elsewhere.
    fn select_less(a: Self, b: Self, yes: Self, no: Self) -> Self;

    /// Lane 0.
    fn first(self) -> f32;

    /// The largest lane.
    fn max_lane(self) -> f32;

    /// The sum of the lanes, in one fixed tree: lanes 8 apart, then 4, 2 and 1.
    fn sum(self) -> f32;

    /// [`Lanes::sum`] of sixteen vectors, the `i`-th in lane `i`.
    fn sum16(vectors: &[Self; 16]) -> Self;

    /// [`Lanes::sum`] of four vectors.
    fn sum4(vectors: &[Self; 4]) -> [f32; 4];

    /// Asks for the cache line at `at`, which need not be valid.
    #[inline(always)]
    fn prefetch<T>(at: *const T) {
        let _ = at;
    }
}

/// The instruction set in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Plain Rust, whatever the compiler makes of it.
    Portable,
}

impl Level {
    /// The best one that this processor has.
    pub fn detect() -> Self {
        Self::Portable
    }
}
