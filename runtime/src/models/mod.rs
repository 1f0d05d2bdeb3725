//! The models, each one file that reads like its architecture diagram, written once for every backend.

mod llama;
mod weights;

pub use weights::WeightSource;

use crate::backend::{Backend, BackendError};
use crate::model_dir::{Architecture, ModelConfig, ModelError};

/// A model on a device: from a step's tokens to the logits it asks for.
pub trait Model<B: Backend>: Send + Sync {
    /// Computes a step: writes its keys and values into the cache and returns `[logit rows, vocab_size]`.
    ///
    /// # Errors
    /// [`BackendError`] if the device fails.
    fn forward(
        &self,
        backend: &B,
        step: &B::Step<'_>,
        cache: &mut B::Cache,
    ) -> Result<B::Tensor, BackendError>;
}

/// Why a model could not be brought to a device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadModelError {
    /// Its files.
    #[error(transparent)]
    Files(#[from] ModelError),
    /// The device.
    #[error(transparent)]
    Backend(#[from] BackendError),
}

/// Brings the weights of a model to the device, in the order in which they are used.
///
/// # Errors
/// [`LoadModelError`] if a weight is missing or has another shape than the configuration says.
pub fn load_model<B: Backend>(
    config: &ModelConfig,
    weights: &WeightSource,
    backend: &B,
) -> Result<Box<dyn Model<B>>, LoadModelError> {
    match config.architecture {
        // One diagram; they differ in biases and windows, which the configuration carries.
        Architecture::Llama | Architecture::Qwen2 | Architecture::Mistral => {
            Ok(Box::new(llama::Llama::load(config, weights, backend)?))
        }
    }
}
