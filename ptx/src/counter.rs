//! `counter`: fills memory with numbers that are a function of their index. For tests of tensors too large to copy,
//! part of no model.
//!
//! Owns the variants, parameters and geometry, and the same function for the host; the kernel is
//! `kernels/counter.ptx`.

use minijinja::context;

use crate::kernel::{Kernel, Launch, Source, Target, parameters};
use crate::{DType, Error};

/// Family and template name.
const FAMILY: &str = "counter";

/// Threads of a block.
const THREADS: u32 = 256;

/// Element `index` of what [`Counter`] writes with this seed: a multiple of 1/64 from −2 up to, not including, 2, which
/// f16 and bf16 hold exactly.
pub fn number(seed: u32, index: u64) -> f32 {
    let (low, high) = (index as u32, (index >> 32) as u32);
    let mut x = low.wrapping_mul(0x9e37_79b9).wrapping_add(seed).wrapping_add(high.wrapping_mul(0x85eb_ca6b));
    x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d);
    x = (x ^ (x >> 15)).wrapping_mul(0x846c_a68b);
    x ^= x >> 16;
    ((x >> 24) as f32 - 128.0) / 64.0
}

/// What one launch works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CounterArgs {
    /// Device address of the elements; a multiple of 16 bytes.
    pub data: u64,
    /// Elements.
    pub count: u64,
    /// Which numbers.
    pub seed: u32,
}

parameters! {
    const PARAMS of pub fn CounterArgs::values(&self);
    data: Pointer = self.data,
    count: U64 = self.count,
    seed: U32 = self.seed,
}

/// One variant, rendered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counter {
    vector: u32,
    kernel: Kernel,
}

impl Counter {
    /// The types that there are variants for.
    pub const TYPES: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];

    /// Renders the variant of a type.
    ///
    /// # Errors
    /// [`Error::UnsupportedTypes`] for an fp8 type, which does not hold the numbers.
    pub fn new(dtype: DType) -> Result<Self, Error> {
        if dtype.is_fp8() {
            return Err(Error::UnsupportedTypes { kernel: FAMILY, source_dtype: dtype, cache: dtype });
        }
        let source = Source {
            family: FAMILY,
            text: include_str!("../kernels/counter.ptx"),
            params: &PARAMS,
            max_threads: THREADS,
            static_shared: 0,
            dynamic_shared: 0,
        };
        let vector = 16 / dtype.size();
        let variables = context! { dtype => dtype.name(), size => dtype.size(), vector, threads => THREADS };
        let kernel = source.render(format!("{FAMILY}_{dtype}"), Target::from(80, (7, 4)), variables)?;
        Ok(Self { vector, kernel })
    }

    /// The rendered kernel.
    pub fn kernel(&self) -> &Kernel {
        &self.kernel
    }

    /// The rendered kernel, by value.
    pub fn into_kernel(self) -> Kernel {
        self.kernel
    }

    /// Grid and block for so many elements, a multiple of 16 bytes of them.
    ///
    /// # Errors
    /// [`Error::Zero`] without elements, [`Error::NotDivisible`] when they do not fill vectors,
    /// [`Error::GridTooLarge`] beyond CUDA's limits.
    pub fn launch(&self, count: u64) -> Result<Launch, Error> {
        if count == 0 {
            return Err(Error::Zero { kernel: FAMILY, field: "count" });
        }
        let vector = u64::from(self.vector);
        let value = u32::try_from(count).unwrap_or(u32::MAX);
        if !count.is_multiple_of(vector) {
            return Err(Error::NotDivisible { kernel: FAMILY, vector: self.vector, field: "count", value });
        }
        let blocks = (count / vector).div_ceil(u64::from(THREADS));
        let limit = i32::MAX as u32;
        let needed = u32::try_from(blocks).unwrap_or(u32::MAX);
        if needed > limit {
            return Err(Error::GridTooLarge { kernel: FAMILY, field: "count", value, needed, limit });
        }
        Ok(Launch { grid: [needed, 1, 1], block: [THREADS, 1, 1], dynamic_shared: 0 })
    }
}
