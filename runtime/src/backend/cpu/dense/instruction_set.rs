//! Which vector instructions the kernels use, found out once at run time.

use std::fmt;
use std::sync::OnceLock;

/// An instruction set that this machine has: a value is the proof, since only [`InstructionSet::available`]
/// makes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InstructionSet(pub(super) Kind);

/// The ways in which the kernels are compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// AVX-512 F, BW, VL and DQ
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX2, FMA and F16C
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// Advanced SIMD, which every AArch64 has
    #[cfg(target_arch = "aarch64")]
    Neon,
    /// What the compiler makes of plain Rust
    Portable,
}

impl InstructionSet {
    /// All that this machine has, the widest first, the portable one last.
    pub fn available() -> &'static [Self] {
        static AVAILABLE: OnceLock<Vec<InstructionSet>> = OnceLock::new();
        AVAILABLE.get_or_init(|| {
            let mut sets = Vec::new();
            #[cfg(target_arch = "x86_64")]
            {
                let avx2 = is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c");
                if avx2
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
                {
                    sets.push(Self(Kind::Avx512));
                }
                if avx2 {
                    sets.push(Self(Kind::Avx2));
                }
            }
            #[cfg(target_arch = "aarch64")]
            sets.push(Self(Kind::Neon));
            sets.push(Self(Kind::Portable));
            sets
        })
    }

    /// The widest one: what the kernels use unless told otherwise.
    pub fn best() -> Self {
        Self::available().first().copied().unwrap_or(Self(Kind::Portable))
    }

    /// Whether products are fused with sums; all sets that fuse give the same bits.
    pub fn fused(self) -> bool {
        self.0 != Kind::Portable
    }
}

impl fmt::Display for InstructionSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => "AVX-512",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => "AVX2",
            #[cfg(target_arch = "aarch64")]
            Kind::Neon => "NEON",
            Kind::Portable => "portable",
        })
    }
}

/// Compiles a generic kernel once for each instruction set and calls the one asked for.
///
/// `dispatch!(set, unsafe fn name<L>(argument: Type, …))` expects `name` to be an `#[inline(always)]` unsafe
/// function, generic over [`Lanes`](super::lanes::Lanes) first and then over the types in brackets.
macro_rules! dispatch {
    ($set:expr, $kernel:ident :: <$($generic:ident : $bound:path),*> ($($argument:ident : $type:ty),* $(,)?)) => {{
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
        unsafe fn avx512<$($generic: $bound),*>($($argument: $type),*) {
            // SAFETY: the caller's.
            unsafe { $kernel::<$crate::backend::cpu::dense::lanes::Avx512, $($generic),*>($($argument),*) }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn avx2<$($generic: $bound),*>($($argument: $type),*) {
            // SAFETY: the caller's.
            unsafe { $kernel::<$crate::backend::cpu::dense::lanes::Avx2, $($generic),*>($($argument),*) }
        }
        // SAFETY: an `InstructionSet` proves that the machine has it; the kernel's own contract is the caller's.
        match $set.0 {
            #[cfg(target_arch = "x86_64")]
            $crate::backend::cpu::dense::instruction_set::Kind::Avx512 => avx512::<$($generic),*>($($argument),*),
            #[cfg(target_arch = "x86_64")]
            $crate::backend::cpu::dense::instruction_set::Kind::Avx2 => avx2::<$($generic),*>($($argument),*),
            #[cfg(target_arch = "aarch64")]
            $crate::backend::cpu::dense::instruction_set::Kind::Neon => {
                $kernel::<$crate::backend::cpu::dense::lanes::Neon, $($generic),*>($($argument),*)
            }
            $crate::backend::cpu::dense::instruction_set::Kind::Portable => {
                $kernel::<$crate::backend::cpu::dense::lanes::Portable, $($generic),*>($($argument),*)
            }
        }
    }};
}
pub(super) use dispatch;
