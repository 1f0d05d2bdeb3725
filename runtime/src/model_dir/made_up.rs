//! Weights that come from no file: uniform random numbers by their place, so that any part can be made by itself, on
//! whatever device.

use half::{bf16, f16, slice::HalfFloatSliceExt};
use pagewise_attention::{DType, HostTensor};
use std::sync::{Arc, OnceLock};

/// Element `i` is `center + spread · u(seed, first + i)`, `u` being uniform in [−1, 1).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct MadeUp {
    /// Another one for each weight.
    pub seed: u64,
    /// Number of the first element.
    pub first: u64,
    /// Middle of the range.
    pub center: f32,
    /// Half of the range.
    pub spread: f32,
}

impl MadeUp {
    /// Element `index`.
    pub fn element(&self, index: u64) -> f32 {
        // SplitMix64 (Steele et al. 2014), whose n-th state is a sum.
        let number = self.first.wrapping_add(index).wrapping_add(1);
        let mut z = self.seed.wrapping_add(number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let uniform = ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
        self.center + self.spread * uniform
    }
}

/// Made up elements of one type: made when they are first looked at on the host, if ever.
#[derive(Clone, Debug)]
pub(super) struct Lazy {
    pub(super) made: MadeUp,
    pub(super) dtype: DType,
    count: usize,
    host: Arc<OnceLock<Elements>>,
}

#[derive(Debug)]
enum Elements {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Lazy {
    /// So many elements; fp8, which no weight has, counts as f32.
    pub(super) fn new(made: MadeUp, dtype: DType, count: usize) -> Self {
        Self { made, dtype, count, host: Arc::default() }
    }

    pub(super) fn host(&self) -> HostTensor<'_> {
        match self.host.get_or_init(|| self.make()) {
            Elements::F32(x) => HostTensor::F32(x),
            Elements::F16(x) => HostTensor::F16(x),
            Elements::Bf16(x) => HostTensor::Bf16(x),
        }
    }

    fn make(&self) -> Elements {
        let wide: Vec<f32> = (0..self.count as u64).map(|index| self.made.element(index)).collect();
        match self.dtype {
            DType::F16 => {
                let mut narrow = vec![f16::ZERO; wide.len()];
                narrow.convert_from_f32_slice(&wide);
                Elements::F16(narrow)
            }
            DType::Bf16 => {
                let mut narrow = vec![bf16::ZERO; wide.len()];
                narrow.convert_from_f32_slice(&wide);
                Elements::Bf16(narrow)
            }
            DType::F32 | DType::F8E4M3 | DType::F8E5M2 => Elements::F32(wide),
        }
    }
}
