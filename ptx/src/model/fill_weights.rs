//! `fill_weights`: random weights made on the device, for engines that are measured without a model.
//!
//! Owns the variants, the parameter list, the geometry and the same numbers on the host; the kernel is
//! `kernels/model/fill_weights.ptx`.

use minijinja::context;

use super::{COMPUTE_TYPES, Source, check_types, descriptor};
use crate::kernel::{Launch, parameters};
use crate::{DType, Error};

/// Family and template name.
const FAMILY: &str = "fill_weights";

/// Threads of a block.
const THREADS: u32 = 256;

/// The most blocks: enough for any GPU; threads go round.
const MAX_BLOCKS: u64 = 4096;

/// Which variant: fixed when the text is rendered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FillWeightsSpec {
    /// Type of the weights.
    pub dtype: DType,
}

impl FillWeightsSpec {
    /// Every variant that exists.
    pub fn all() -> impl Iterator<Item = Self> {
        COMPUTE_TYPES.into_iter().map(|dtype| Self { dtype })
    }

    /// The entry point: `fill_weights_bf16`.
    pub fn entry(self) -> String {
        format!("{FAMILY}_{}", self.dtype)
    }
}

/// What one launch works on: `out[i] = center + spread · u(seed, first + i)`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct FillWeightsArgs {
    /// Device address of the weights, `[count]`.
    pub out: u64,
    /// Weights.
    pub count: u64,
    /// Number of the first one within its tensor.
    pub first: u64,
    /// Seed; another one for each tensor.
    pub seed: u64,
    /// Middle of the range: 1 for norms, 0 otherwise.
    pub center: f32,
    /// Half of the range: 0.125 for norms, sqrt(3 / in_features) for matrices, whose variance is then 1 / in_features.
    pub spread: f32,
}

/// `u(seed, number)`, uniform in [−1, 1): what the kernel computes, exactly.
pub fn uniform(seed: u64, number: u64) -> f32 {
    let mut z = seed.wrapping_add(number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^= z >> 31;
    ((z >> 40) as f32 - 8_388_608.0) / 8_388_608.0
}

const SOURCE: Source = Source {
    family: FAMILY,
    text: include_str!("../../kernels/model/fill_weights.ptx"),
    params: &PARAMS,
    max_threads: THREADS,
    static_shared: 0,
    dynamic_shared: 0,
};

parameters! {
    const PARAMS of pub fn FillWeightsArgs::values(&self);
    out: Pointer = self.out,
    count: U64 = self.count,
    first: U64 = self.first,
    seed: U64 = self.seed,
    center: F32 = self.center,
    spread: F32 = self.spread,
}

descriptor! {
    /// One variant, rendered.
    FillWeights of FillWeightsSpec
}

impl FillWeights {
    /// Renders a variant.
    ///
    /// # Errors
    /// [`Error::UnsupportedTypes`] for an fp8 type.
    pub fn new(spec: FillWeightsSpec) -> Result<Self, Error> {
        let dtype = spec.dtype;
        check_types(FAMILY, dtype, 1)?;
        let variables = context! { dtype => dtype.name(), size => dtype.size() };
        Ok(Self { spec, kernel: SOURCE.kernel(spec.entry(), false, variables)? })
    }

    /// Grid and block for so many weights.
    ///
    /// # Errors
    /// [`Error::Zero`] for none.
    pub fn launch(&self, count: u64) -> Result<Launch, Error> {
        if count == 0 {
            return Err(Error::Zero { kernel: FAMILY, field: "count" });
        }
        let blocks = count.div_ceil(u64::from(THREADS)).min(MAX_BLOCKS) as u32;
        Ok(Launch { grid: [blocks, 1, 1], block: [THREADS, 1, 1], dynamic_shared: 0 })
    }
}
