//! Where weights come from: the files of a model directory, or a seed.

use crate::model_dir::{MadeUp, ModelError, WeightTensor, Weights};
use pagewise_attention::DType;

/// Gives out weights by name and shape.
#[derive(Debug)]
pub enum WeightSource {
    /// From safetensors files, as stored or converted.
    Files {
        /// The files.
        weights: Weights,
        /// Type to convert to; `None` keeps what is stored.
        dtype: Option<DType>,
    },
    /// Made up from the weight's name: for benches of shapes whose weights are not at hand.
    Dummy {
        /// Type to make.
        dtype: DType,
    },
}

impl WeightSource {
    /// Whether there is a weight of this name; of those that are made up, any.
    pub fn contains(&self, name: &str) -> bool {
        match self {
            Self::Files { weights, .. } => weights.contains(name),
            Self::Dummy { .. } => true,
        }
    }

    /// The type that the weight of this name comes out in; nothing is converted or made up to find it.
    ///
    /// # Errors
    /// As of [`tensor`](Self::tensor).
    pub fn dtype(&self, name: &str, shape: &[usize]) -> Result<DType, ModelError> {
        match self {
            Self::Files { weights, dtype: None } => Ok(weights.tensor(name, shape)?.dtype()),
            Self::Files { dtype: Some(dtype), .. } | Self::Dummy { dtype } => Ok(*dtype),
        }
    }

    /// The weight of this name, which must have this shape.
    ///
    /// # Errors
    /// [`ModelError`] names the file, the weight, what was found and what was expected.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<WeightTensor, ModelError> {
        match self {
            Self::Files { weights, dtype } => {
                let tensor = weights.tensor(name, shape)?;
                Ok(match dtype {
                    Some(dtype) => tensor.to_dtype(*dtype),
                    None => tensor,
                })
            }
            Self::Dummy { dtype } => Ok(WeightTensor::of_made_up(made_up(name, shape), *dtype, shape)),
        }
    }
}

/// Uniform numbers of a size at which activations neither vanish nor explode; norms are near one.
fn made_up(name: &str, shape: &[usize]) -> MadeUp {
    let seed =
        name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    let (center, spread) = match shape {
        // A power of two: the product with it is exact, so that devices that fuse the sum give the same bits.
        [_] if name.ends_with(".weight") => (1.0, 0.125),
        [.., columns] => (0.0, (3.0 / (*columns).max(1) as f32).sqrt()),
        [] => (0.0, 1.0),
    };
    MadeUp { seed, first: 0, center, spread }
}
