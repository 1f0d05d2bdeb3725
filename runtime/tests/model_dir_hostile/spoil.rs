//! Ways to make something wrong in a copy of the fixture.

use serde_json::{Value, json};
use std::{fs, path::Path};

/// Makes something wrong in a copy of the fixture.
pub(crate) type Spoil = Box<dyn Fn(&Path)>;

/// Writes fields into `config.json`.
pub(crate) fn config(fields: Value) -> Spoil {
    fields_of("config.json", fields)
}

pub(crate) fn fields_of(file: &'static str, fields: Value) -> Spoil {
    Box::new(move |directory| {
        let path = directory.join(file);
        let mut object: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        for (name, value) in fields.as_object().unwrap() {
            object[name] = value.clone();
        }
        fs::write(path, object.to_string()).unwrap();
    })
}

pub(crate) fn without(field: &'static str) -> Spoil {
    Box::new(move |directory| {
        let path = directory.join("config.json");
        let mut object: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        object.as_object_mut().unwrap().remove(field).unwrap();
        fs::write(path, object.to_string()).unwrap();
    })
}

/// Puts a file there.
pub(crate) fn file(name: &'static str, contents: impl AsRef<[u8]> + 'static) -> Spoil {
    Box::new(move |directory| fs::write(directory.join(name), &contents).unwrap())
}

/// Changes the bytes of `model.safetensors`.
pub(crate) fn bytes(change: impl Fn(&mut Vec<u8>) + 'static) -> Spoil {
    Box::new(move |directory| {
        let path = directory.join("model.safetensors");
        let mut contents = fs::read(&path).unwrap();
        change(&mut contents);
        fs::write(path, contents).unwrap();
    })
}

/// A safetensors file of the given header over `data` zero bytes.
pub(crate) fn safetensors(header: &str, data: usize) -> Vec<u8> {
    let mut contents = (header.len() as u64).to_le_bytes().to_vec();
    contents.extend_from_slice(header.as_bytes());
    contents.resize(contents.len() + data, 0);
    contents
}

pub(crate) fn header(header: impl Into<String>, data: usize) -> Spoil {
    file("model.safetensors", safetensors(&header.into(), data))
}

/// Replaces the single file by an index that puts `model.norm.weight` into `shard`.
pub(crate) fn index(shard: &'static str) -> Spoil {
    Box::new(move |directory| {
        fs::rename(directory.join("model.safetensors"), directory.join("one.safetensors")).unwrap();
        let index = json!({"weight_map": {"model.norm.weight": shard}});
        fs::write(directory.join("model.safetensors.index.json"), index.to_string()).unwrap();
    })
}

pub(crate) fn tokenizer(tokenizer: Value) -> Spoil {
    file("tokenizer.json", tokenizer.to_string())
}

pub(crate) fn remove(name: &'static str) -> Spoil {
    Box::new(move |directory| fs::remove_file(directory.join(name)).unwrap())
}

pub(crate) fn all(spoils: Vec<Spoil>) -> Spoil {
    Box::new(move |directory| spoils.iter().for_each(|spoil| spoil(directory)))
}
