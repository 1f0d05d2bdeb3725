//! A model as it lies in a Hugging Face directory: configuration, weights, tokenizer files, defaults.
//! Everything that comes from a file is distrusted here, so that nobody above has to.

mod config;
mod error;
mod families;
mod generation;
mod hub;
#[cfg(feature = "hub")]
mod hub_fetch;
mod index;
pub(crate) mod json;
mod layer_windows;
mod made_up;
mod page_in;
mod parse_config;
mod parse_rope;
pub(crate) mod quiet;
mod refused;
mod shard;
mod weight_tensor;
mod weights;

pub use config::{Activation, Architecture, ModelConfig, RopeConfig, RopeScaling};
pub use error::ModelError;
pub use generation::GenerationConfig;
pub use hub::{FetchProgress, resolve_model};
pub use made_up::MadeUp;
pub use weight_tensor::WeightTensor;
pub use weights::Weights;

use std::path::{Path, PathBuf};

/// A directory whose configuration has been read and found usable. Weights and tokenizer are opened apart,
/// because not every use needs them.
#[derive(Clone, Debug)]
pub struct ModelDir {
    /// Where it lies.
    pub path: PathBuf,
    /// `config.json`
    pub config: ModelConfig,
    /// `generation_config.json`, if there is one
    pub generation: GenerationConfig,
    /// What somebody who uses the model should know of its configuration, a sentence each: fields that are not known
    /// here, positions that are not served.
    pub notes: Vec<String>,
}

impl ModelDir {
    /// Reads `config.json` and `generation_config.json` (optional). No weight is touched.
    ///
    /// # Errors
    /// A file that is missing, damaged, or asks for what is not supported.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        match path.metadata() {
            Ok(metadata) if metadata.is_dir() => {}
            Ok(_) => {
                let problem = "it is not a directory; give the directory that holds config.json".to_owned();
                return Err(json::invalid(path, problem));
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let hint = "give a directory that holds config.json, model.safetensors and tokenizer.json";
                return Err(ModelError::Missing { path: path.to_owned(), hint: hint.to_owned() });
            }
            Err(source) => return Err(ModelError::Io { path: path.to_owned(), source }),
        }
        let (config, notes) = parse_config::parse_config(path)?;
        let generation = generation::parse_generation(path, &config)?;
        Ok(Self { path: path.to_owned(), config, generation, notes })
    }
}
