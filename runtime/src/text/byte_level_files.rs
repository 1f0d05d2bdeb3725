//! `vocab.json` and `merges.txt`, the files of a byte-level BPE tokenizer before there was `tokenizer.json`: GPT-2's, and
//! all that OPT is published with. Makes a `tokenizer.json` of them, as `transformers` does.

use crate::model_dir::{
    ModelError,
    json::{self, Object, invalid},
};
use serde_json::{Value, json};
use std::path::Path;

pub(super) const VOCAB: &str = "vocab.json";

/// Class of the tokenizers that are read here; others have such files too, but split words in ways of their own.
const CLASSES: [&str; 2] = ["GPT2Tokenizer", "GPT2TokenizerFast"];
/// Models whose tokenizer is of that class where the directory does not say.
const MODEL_TYPES: [&str; 2] = ["gpt2", "opt"];
const SPECIAL_TOKENS: [&str; 4] = ["bos_token", "eos_token", "unk_token", "pad_token"];
/// The token of those that `tokenizer_config.json` does not name.
const DEFAULT_TOKEN: &str = "<|endoftext|>";

/// The text of a `tokenizer.json`; `None` if the directory has no such files, or they are another kind's.
///
/// # Errors
/// A file is damaged.
pub(super) fn tokenizer_json(directory: &Path) -> Result<Option<Vec<u8>>, ModelError> {
    let merges_path = directory.join("merges.txt");
    let Some(vocab) = json::read_object(&directory.join(VOCAB))? else { return Ok(None) };
    let Some(merges) = json::read_text(&merges_path)? else { return Ok(None) };
    let config = json::read_object(&directory.join("tokenizer_config.json"))?;
    if !is_gpt2(directory, config.as_ref())? {
        return Ok(None);
    }
    let flag = |name: &str| {
        Ok::<_, ModelError>(config.as_ref().map_or(Ok(None), |c| c.boolean(name))?.unwrap_or(false))
    };
    let (add_prefix_space, add_bos_token) = (flag("add_prefix_space")?, flag("add_bos_token")?);

    // The first line names the format's version.
    let is_version = |i: usize, line: &str| i == 0 && line.starts_with('#');
    let lines = merges.lines().enumerate().filter(|&(i, line)| !(line.is_empty() || is_version(i, line)));
    let merges = lines.map(|(i, line)| match line.split(' ').collect::<Vec<_>>().as_slice() {
        [left, right] => Ok(json!([left, right])),
        _ => {
            Err(invalid(&merges_path, format!("line {} is not two pieces with a space between them", i + 1)))
        }
    });
    let merges = merges.collect::<Result<Vec<_>, _>>()?;

    let mut special = Vec::new();
    let mut bos = None;
    for name in SPECIAL_TOKENS {
        let token = config.as_ref().map_or(Ok(None), |config| config.special_token(name))?;
        // A pad token has no default.
        let Some(token) = token.or((name != "pad_token").then_some(DEFAULT_TOKEN)) else { continue };
        let Some(id) = vocab.get(token).and_then(Value::as_u64) else { continue };
        if name == "bos_token" {
            bos = Some((token, id));
        }
        if !special.contains(&(token, id)) {
            special.push((token, id));
        }
    }
    let added = special.iter().map(|(content, id)| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": true, "special": true})
    });
    let byte_level = |add_prefix_space: bool| json!({"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": false, "use_regex": true});
    let post_processor = match bos.filter(|_| add_bos_token) {
        Some((token, id)) => json!({
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [],
            "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}}
        }),
        None => byte_level(false),
    };
    let file = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": added.collect::<Vec<_>>(),
        "pre_tokenizer": byte_level(add_prefix_space),
        "post_processor": post_processor,
        "decoder": byte_level(true),
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "",
                  "end_of_word_suffix": "", "fuse_unk": false, "byte_fallback": false,
                  "vocab": vocab.to_value(), "merges": merges}
    });
    Ok(Some(file.to_string().into_bytes()))
}

/// Whether the directory says, or its model implies, that words are split as GPT-2 does.
fn is_gpt2(directory: &Path, config: Option<&Object>) -> Result<bool, ModelError> {
    if let Some(class) = config.map_or(Ok(None), |config| config.string("tokenizer_class"))? {
        return Ok(CLASSES.contains(&class));
    }
    let Some(model) = json::read_object(&directory.join("config.json"))? else { return Ok(false) };
    Ok(model.string("model_type")?.is_some_and(|model_type| MODEL_TYPES.contains(&model_type)))
}
