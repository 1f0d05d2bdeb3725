//! `model.safetensors.index.json`: which shard holds which tensor. A shard is named by a file name and lies in
//! the model's directory; an index cannot reach any other file.

use super::{ModelError, json, json::invalid, shard::shorten};
use serde_json::Value;
use std::path::{Component, Path, PathBuf};

/// Name of the index.
pub(super) const INDEX: &str = "model.safetensors.index.json";
const MAX_SHARDS: usize = 4096;

/// The index of a sharded model.
pub(super) struct Index {
    pub(super) path: PathBuf,
    /// Tensor and position of its shard in `shards`.
    pub(super) tensors: Vec<(String, usize)>,
    /// File names, each once, in order of first appearance.
    pub(super) shards: Vec<String>,
}

impl Index {
    /// Reads the index of a directory; `None` when it has none.
    pub(super) fn open(directory: &Path) -> Result<Option<Self>, ModelError> {
        let path = directory.join(INDEX);
        let Some(file) = json::read_object(&path)? else { return Ok(None) };
        let Some(Value::Object(weight_map)) = file.get("weight_map") else {
            return Err(file.invalid("weight_map", "an object from tensor names to file names"));
        };
        if weight_map.is_empty() {
            return Err(invalid(&path, "'weight_map' is empty".to_owned()));
        }
        let mut positions = rustc_hash::FxHashMap::default();
        let mut shards = Vec::new();
        let mut tensors = Vec::with_capacity(weight_map.len());
        for (tensor, shard) in weight_map {
            let Some(shard) = shard.as_str() else {
                let problem = format!(
                    "tensor '{}' is mapped to {}, not to a file name",
                    shorten(tensor),
                    json::kind(shard)
                );
                return Err(invalid(&path, problem));
            };
            let position = match positions.get(shard) {
                Some(position) => *position,
                None => {
                    check_name(&path, shard)?;
                    if shards.len() == MAX_SHARDS {
                        return Err(invalid(&path, format!("it names more than {MAX_SHARDS} files")));
                    }
                    positions.insert(shard, shards.len());
                    shards.push(shard.to_owned());
                    shards.len() - 1
                }
            };
            tensors.push((tensor.clone(), position));
        }
        Ok(Some(Self { path, tensors, shards }))
    }
}

/// A shard's name must be one plain component.
fn check_name(index: &Path, name: &str) -> Result<(), ModelError> {
    let mut components = Path::new(name).components();
    let plain = matches!((components.next(), components.next()), (Some(Component::Normal(one)), None) if one == name)
        && !name.contains(['/', '\\', '\0']);
    if plain {
        return Ok(());
    }
    Err(invalid(
        index,
        format!("shard '{}' is not a plain file name", shorten(&name.escape_debug().to_string())),
    ))
}

/// Refuses a shard that is a link out of its directory. The hub's cache keeps a snapshot as links into the
/// `blobs` folder beside `snapshots`; that one is let through.
pub(super) fn check_inside(directory: &Path, shard: &Path) -> Result<(), ModelError> {
    let resolve =
        |path: &Path| path.canonicalize().map_err(|source| ModelError::Io { path: path.to_owned(), source });
    let real = resolve(shard)?;
    let directory = resolve(directory)?;
    if real.starts_with(&directory) {
        return Ok(());
    }
    let snapshots = directory.parent().filter(|parent| parent.ends_with("snapshots"));
    if snapshots.and_then(Path::parent).is_some_and(|repository| real.starts_with(repository.join("blobs"))) {
        return Ok(());
    }
    Err(invalid(shard, "it is a link that leaves the model's directory".to_owned()))
}
