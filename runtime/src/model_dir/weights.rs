//! All weights of a model: one safetensors file, or an index and its shards. Finds a tensor by name and checks it
//! against the shape that the model expects.

use super::{
    ModelError, WeightTensor,
    index::{self, Index},
    json::invalid,
    page_in,
    shard::{Shard, shorten},
};
use pagewise_attention::DType;
use rustc_hash::FxHashMap;
use safetensors::Dtype;
use std::path::Path;

/// The weights of a model directory, mapped into memory. Nothing is read before a tensor is used.
#[derive(Debug)]
pub struct Weights {
    shards: Vec<Shard>,
    /// Position of the shard that holds a tensor.
    shard_of: FxHashMap<String, usize>,
}

impl Weights {
    /// Opens `model.safetensors`, or else `model.safetensors.index.json` and the shards that it names.
    ///
    /// # Errors
    /// No such file, or one whose header does not fit its contents, or an index that does not fit its shards.
    pub fn open(directory: &Path) -> Result<Self, ModelError> {
        let single = directory.join("model.safetensors");
        if let Some(shard) = Shard::open(&single)? {
            let shard_of = shard.tensors.keys().map(|name| (name.clone(), 0)).collect();
            return Ok(Self { shards: vec![shard], shard_of });
        }
        let Some(index) = Index::open(directory)? else {
            refuse_pickles(directory)?;
            let hint = format!("the weights are expected there or in shards named by {}", index::INDEX);
            return Err(ModelError::Missing { path: single, hint });
        };
        Self::open_shards(directory, index)
    }

    fn open_shards(directory: &Path, index: Index) -> Result<Self, ModelError> {
        let mut shards = Vec::with_capacity(index.shards.len());
        for name in &index.shards {
            let path = directory.join(name);
            let missing = || ModelError::Missing {
                path: path.clone(),
                hint: format!("{} names it; download the model again", index::INDEX),
            };
            if !path.exists() {
                return Err(missing());
            }
            index::check_inside(directory, &path)?;
            shards.push(Shard::open(&path)?.ok_or_else(missing)?);
        }

        let mut shard_of = FxHashMap::default();
        for (position, shard) in shards.iter().enumerate() {
            for name in shard.tensors.keys() {
                if shard_of.insert(name.clone(), position).is_some() {
                    let problem = format!("tensor '{}' is also in another shard", shorten(name));
                    return Err(invalid(&shard.path, problem));
                }
            }
        }
        for (name, position) in &index.tensors {
            if shard_of.get(name) != Some(position) {
                let shard = index.shards.get(*position).map_or("", String::as_str);
                let problem =
                    format!("tensor '{}' is not in '{shard}', where the index puts it", shorten(name));
                return Err(invalid(&index.path, problem));
            }
        }
        Ok(Self { shards, shard_of })
    }

    /// A tensor of the given shape, as stored: nothing is copied, except where the file has put it at an address
    /// that its element type cannot have.
    ///
    /// # Errors
    /// It is missing, has another shape, or elements that are not f32, f16 or bf16.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<WeightTensor, ModelError> {
        let shard = self.shard_of.get(name).and_then(|position| self.shards.get(*position));
        let Some((shard, entry)) = shard.and_then(|shard| Some((shard, shard.tensors.get(name)?))) else {
            let problem = match self.shards.as_slice() {
                [_] => format!("tensor '{name}' of shape {shape:?} is missing"),
                shards => {
                    format!("tensor '{name}' of shape {shape:?} is in none of the {} shards", shards.len())
                }
            };
            let path = self.shards.first().map(|shard| shard.path.clone()).unwrap_or_default();
            return Err(invalid(&path, problem));
        };
        if entry.shape != shape {
            let problem =
                format!("tensor '{name}' has shape {:?}; the configuration asks for {shape:?}", entry.shape);
            return Err(invalid(&shard.path, problem));
        }
        let dtype = match entry.dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::Bf16,
            other => {
                return Err(ModelError::Unsupported {
                    path: shard.path.clone(),
                    feature: format!("dtype {other} of tensor '{name}'"),
                    hint: "store the weights as F32, F16 or BF16".to_owned(),
                });
            }
        };
        Ok(WeightTensor::from_map(shard.map.clone(), entry.bytes.clone(), dtype, shape))
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.shard_of.contains_key(name)
    }

    /// Begins to bring all weights into memory, in the background.
    pub fn page_in(&self) {
        page_in::start(&self.shards);
    }

    /// Bytes of all files together.
    pub fn file_bytes(&self) -> u64 {
        self.shards.iter().map(|shard| shard.map.len() as u64).sum()
    }
}

/// Weights that are there, but in files that run code when they are read.
fn refuse_pickles(directory: &Path) -> Result<(), ModelError> {
    let pickles = ["pytorch_model.bin", "pytorch_model.bin.index.json"];
    let Some(path) = pickles.map(|name| directory.join(name)).into_iter().find(|path| path.exists()) else {
        return Ok(());
    };
    Err(ModelError::Unsupported {
        path,
        feature: "a model without safetensors weights".to_owned(),
        hint: "write model.safetensors with transformers: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(DIR), \
               or take a revision of the model that has it"
            .to_owned(),
    })
}
