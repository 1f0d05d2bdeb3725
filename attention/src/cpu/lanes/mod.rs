//! Sixteen `f32` lanes: the vector that every inner loop is written in, and its instruction sets.
//!
//! One AVX-512 register, two of AVX2, four of NEON or a plain array: lane `i` of an operation has the same
//! bits on all of them that fuse multiply-add, because the number of lanes and the tree of a sum are fixed.

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

/// Number of lanes.
pub(super) const LANES: usize = 16;

/// An inner loop that is compiled once for each instruction set.
///
/// `run` and everything that it calls on the way to an intrinsic must be `#[inline(always)]` functions: a
/// closure, or an iterator adapter that takes one, is compiled without the instruction set, and every
/// instruction in it becomes a call.
pub(super) trait Kernel {
    /// What it gives.
    type Output;

    /// The loop.
    ///
    /// # Safety
    /// What the type says about its fields.
    unsafe fn run<L: Lanes>(self) -> Self::Output;
}

/// Some `f32` lanes: a register of the processor, or all sixteen.
pub(super) trait Vector: Copy {
    /// Number of lanes, a divisor of sixteen.
    const WIDTH: usize;

    /// All lanes the same.
    fn splat(value: f32) -> Self;

    /// # Safety
    /// `from` is valid for reads of `WIDTH` elements; no alignment is needed.
    unsafe fn load(from: *const f32) -> Self;

    /// Binary16 elements, exactly.
    ///
    /// # Safety
    /// `from` is valid for reads of `WIDTH` elements.
    unsafe fn load_f16(from: *const u16) -> Self;

    /// Bfloat16 elements, exactly.
    ///
    /// # Safety
    /// `from` is valid for reads of `WIDTH` elements.
    unsafe fn load_bf16(from: *const u16) -> Self;

    /// fp8 E4M3 elements, exactly.
    ///
    /// # Safety
    /// `from` is valid for reads of `WIDTH` elements.
    unsafe fn load_e4m3(from: *const u8) -> Self;

    /// fp8 E5M2 elements, exactly.
    ///
    /// # Safety
    /// `from` is valid for reads of `WIDTH` elements.
    unsafe fn load_e5m2(from: *const u8) -> Self;

    /// # Safety
    /// `to` is valid for writes of `WIDTH` elements; no alignment is needed.
    unsafe fn store(self, to: *mut f32);

    /// `self · factor + addend`, rounded once where the processor can.
    fn fma(self, factor: Self, addend: Self) -> Self;
}

/// Sixteen `f32` lanes.
///
/// The types of an instruction set may be used only where the processor has it; [`Level::detect`] and the
/// dispatch in `run` are the only places that choose one.
pub(super) trait Lanes: Vector {
    /// A register. Lanes do not mix until they are summed, so the loops that want many accumulators go through
    /// the registers of sixteen lanes one after the other, with the same bits.
    type Register: Vector;

    /// Registers that the processor has.
    const REGISTERS: usize;

    /// These lanes with the register at `index` in their place.
    fn with_register(self, index: usize, register: Self::Register) -> Self;

    /// Runs a kernel in a function for which the instruction set is enabled.
    ///
    /// # Safety
    /// The kernel's.
    unsafe fn enter<K: Kernel>(kernel: K) -> K::Output;

    /// `self + other`
    fn add(self, other: Self) -> Self;

    /// `self − other`
    fn sub(self, other: Self) -> Self;

    /// `self · other`
    fn mul(self, other: Self) -> Self;

    /// `self / other`
    fn div(self, other: Self) -> Self;

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

    /// [`Lanes::sum`] of the first `count` vectors, a number known when compiled.
    fn sums(vectors: &[Self; LANES], count: usize) -> [f32; LANES];

    /// Asks for the cache line at `at`, which need not be valid.
    #[inline(always)]
    fn prefetch<T>(_at: *const T) {}
}

/// An instruction set that the CPU backend is written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// AVX-512 F, BW, DQ and VL (x86-64).
    Avx512,
    /// AVX2, FMA and F16C (x86-64).
    Avx2,
    /// NEON (AArch64).
    Neon,
    /// Plain Rust, whatever the compiler makes of it.
    Portable,
}

impl Level {
    /// All of them, the fastest of each architecture first.
    pub const ALL: [Self; 4] = [Self::Avx512, Self::Avx2, Self::Neon, Self::Portable];

    /// Whether this processor has it.
    pub fn is_available(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && Self::Avx2.is_available()
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            Self::Neon => cfg!(target_arch = "aarch64"),
            Self::Portable => true,
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx512 | Self::Avx2 => false,
        }
    }

    /// The best one that this processor has.
    pub fn detect() -> Self {
        Self::ALL.into_iter().find(|level| level.is_available()).unwrap_or(Self::Portable)
    }

    /// The name used in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Avx512 => "avx512",
            Self::Avx2 => "avx2",
            Self::Neon => "neon",
            Self::Portable => "portable",
        }
    }
}

#[cfg(test)]
mod tests;
