//! A model as it lies in a Hugging Face directory: configuration, weights, tokenizer files, defaults.
//! Everything that comes from a file is distrusted here, so that nobody above has to.

mod config;
mod error;

pub use config::{Architecture, ModelConfig, RopeConfig, RopeScaling};
pub use error::ModelError;
