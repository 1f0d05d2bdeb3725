//! The models, each one file that reads like its architecture diagram, written once for every backend. What they
//! share has a name in `blocks` (what a model is made of), `loader` (how that is found in a file) and `pass` (what is
//! done with it).

mod blocks;
mod gemma2;
mod gpt2;
mod llama;
mod loader;
mod opt;
mod pass;
mod weights;

pub use weights::WeightSource;

use crate::backend::{Backend, BackendError};
use crate::model_dir::{Architecture, ModelConfig, ModelError};
use loader::{Loader, Names};
use pagewise_attention::DType;

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
    let loader = Loader::new(config, weights, backend, names(config.architecture));
    match config.architecture {
        // One diagram; they differ in biases, windows, norms of the heads, and how the file holds the projections.
        Architecture::Llama
        | Architecture::Qwen2
        | Architecture::Mistral
        | Architecture::Qwen3
        | Architecture::Phi3 => Ok(Box::new(llama::Llama::load(&loader)?)),
        Architecture::Gemma2 => Ok(Box::new(gemma2::Gemma2::load(&loader)?)),
        Architecture::Opt => Ok(Box::new(opt::Opt::load(&loader)?)),
        Architecture::Gpt2 => Ok(Box::new(gpt2::Gpt2::load(&loader)?)),
    }
}

/// The type of a model's weights: that of its embedding.
///
/// # Errors
/// As of [`load_model`].
pub fn weight_dtype(config: &ModelConfig, weights: &WeightSource) -> Result<DType, ModelError> {
    let names = names(config.architecture);
    let name = names.prefix(weights).to_owned() + names.embedding;
    weights.dtype(&name, &[config.vocab_size, config.embedding_size])
}

/// How files name the weights of a model.
fn names(architecture: Architecture) -> Names {
    match architecture {
        Architecture::Llama
        | Architecture::Qwen2
        | Architecture::Mistral
        | Architecture::Qwen3
        | Architecture::Phi3
        | Architecture::Gemma2 => llama::NAMES,
        Architecture::Opt => opt::NAMES,
        Architecture::Gpt2 => gpt2::NAMES,
    }
}
