//! From what a user calls a model to a directory: a directory is itself, `organisation/name` is fetched from the
//! Hugging Face hub into its usual cache.

use super::ModelError;
use std::path::{Path, PathBuf};

/// How far a download has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FetchProgress {
    /// File of the model.
    pub file: String,
    /// Bytes that are here.
    pub bytes: u64,
    /// Bytes in all.
    pub total: u64,
}

const WHAT_A_MODEL_IS: &str = "a model is a directory that holds config.json and model.safetensors, or the name of \
                               one on the Hugging Face hub such as HuggingFaceTB/SmolLM2-135M-Instruct";

/// The directory of a model. An existing directory is itself; anything else that looks like `organisation/name`
/// comes from the hub's cache, or is fetched into it, with `progress` told how far it is. Whether the hub can be
/// reached is decided within seconds.
///
/// # Errors
/// There is no such directory, or the hub cannot be reached or has no such model.
pub fn resolve_model(name: &str, progress: &mut dyn FnMut(FetchProgress)) -> Result<PathBuf, ModelError> {
    let path = Path::new(name);
    if path.is_dir() {
        return Ok(path.to_owned());
    }
    if path.exists() || !is_hub_id(name) {
        return Err(ModelError::Missing { path: path.to_owned(), hint: WHAT_A_MODEL_IS.to_owned() });
    }
    from_hub(name, progress)
}

#[cfg(not(feature = "hub"))]
fn from_hub(name: &str, _: &mut dyn FnMut(FetchProgress)) -> Result<PathBuf, ModelError> {
    let problem = "this build cannot fetch models (feature `hub` is off); give a directory".to_owned();
    Err(ModelError::Hub { id: name.to_owned(), problem })
}

#[cfg(feature = "hub")]
use super::hub_fetch::from_hub;

/// `organisation/name`, in the characters that the hub allows.
fn is_hub_id(name: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && !part.starts_with(['.', '-'])
            && !part.contains("..")
            && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
    };
    name.len() <= 96
        && name.split_once('/').is_some_and(|(organisation, name)| part(organisation) && part(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_hub_ids_go_to_the_hub() {
        assert!(is_hub_id("HuggingFaceTB/SmolLM2-135M-Instruct") && is_hub_id("a/b_c.1"));
        for name in ["", "gpt2", "/etc", "a/", "/b", "../b", "a/../b", "a/b/c", "./b", "a/b c", "a/-b", "a/é"]
        {
            assert!(!is_hub_id(name), "{name}");
        }
    }

    #[test]
    fn a_directory_is_itself_and_the_rest_is_explained() {
        let directory = tempfile::tempdir().unwrap();
        let name = directory.path().to_str().unwrap();
        assert_eq!(resolve_model(name, &mut |_| ()).unwrap(), directory.path());

        let error = resolve_model("no-such-model", &mut |_| ()).unwrap_err().to_string();
        assert_eq!(error, format!("no-such-model is missing; {WHAT_A_MODEL_IS}"));
    }
}
