//! What is wrong with a model directory, said in one sentence that names the file.

use std::path::PathBuf;

/// A model directory that cannot be used. Nothing has been kept or printed when one is returned.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The directory or a file in it is missing.
    #[error("{} is missing; {hint}", .path.display())]
    Missing {
        /// Which.
        path: PathBuf,
        /// What to do.
        hint: String,
    },
    /// The operating system would not read it.
    #[error("{} cannot be read: {source}", .path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Its words.
        source: std::io::Error,
    },
    /// It is not what it should be.
    #[error("{}: {problem}", .path.display())]
    Invalid {
        /// Which file.
        path: PathBuf,
        /// What is wrong and what was expected.
        problem: String,
    },
    /// It is sound but asks for something that is not supported.
    #[error("{}: {feature} is not supported; {hint}", .path.display())]
    Unsupported {
        /// Which file.
        path: PathBuf,
        /// What it asks for, by its own name.
        feature: String,
        /// What is.
        hint: String,
    },
    /// The hub could not be asked.
    #[error("model '{id}' is not a directory and could not be fetched from the hub: {problem}")]
    Hub {
        /// Its id.
        id: String,
        /// Why not and what to do.
        problem: String,
    },
}
