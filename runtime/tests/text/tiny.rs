//! Tokenizers small enough to be written down, one for each way of decoding.

use pagewise_runtime::text::Tokenizer;
use serde_json::{Value, json};

pub(crate) fn open(file: &Value) -> Tokenizer {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("tokenizer.json"), file.to_string()).unwrap();
    Tokenizer::open(directory.path()).unwrap().unwrap()
}

/// A `tokenizer.json` around a model and a decoder, with `<|end|>` as a special token and `<tool>` as one that is
/// added but not special.
fn file(model: Value, pre_tokenizer: Value, decoder: Value) -> Value {
    let words = model["vocab"].as_object().unwrap().len();
    let added = |id: usize, content: &str, special: bool| {
        json!({"id": words + id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": special})
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [added(0, "<|end|>", true), added(1, "<tool>", false)],
        "normalizer": null, "pre_tokenizer": pre_tokenizer, "post_processor": null, "decoder": decoder, "model": model
    })
}

/// The 256 characters in which byte-level vocabularies write bytes (Radford et al. 2019, `bytes_to_unicode`).
fn byte_characters() -> Vec<char> {
    let printable = |byte: u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut next = 256;
    let character = |byte: u32| {
        if printable(byte) {
            return byte;
        }
        next += 1;
        next - 1
    };
    (0..256).map(character).map(|code| char::from_u32(code).unwrap()).collect()
}

/// Byte-level BPE: ids 0..256 are the bytes, then a few merges within and across characters.
pub(crate) fn byte_level_json() -> Value {
    let bytes = byte_characters();
    let mut vocab: serde_json::Map<String, Value> =
        bytes.iter().enumerate().map(|(id, c)| (c.to_string(), json!(id))).collect();
    let mut merges = Vec::new();
    // "é", the first three bytes of an emoji, a space with the first two bytes of "日", the end of "日" with "a"
    for (left, right) in [("\u{c3}", "\u{a9}"), ("\u{f0}", "\u{9f}"), (" ", "\u{e6}"), ("\u{a5}", "a")] {
        let written = |text: &str| -> String { text.chars().map(|c| bytes[c as usize]).collect() };
        let (left, right) = (written(left), written(right));
        vocab.insert(format!("{left}{right}"), json!(vocab.len()));
        merges.push(json!([left, right]));
    }
    let model = json!({"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": merges});
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true});
    file(model, byte_level.clone(), byte_level)
}

pub(crate) fn byte_level() -> Tokenizer {
    open(&byte_level_json())
}

fn bpe(words: &[&str], byte_tokens: bool) -> Value {
    let bytes = (0..256).filter(|_| byte_tokens).map(|byte| format!("<0x{byte:02X}>"));
    let all =
        std::iter::once("<unk>".to_owned()).chain(bytes).chain(words.iter().map(|word| (*word).to_owned()));
    let vocab: serde_json::Map<String, Value> = all.enumerate().map(|(id, word)| (word, json!(id))).collect();
    json!({"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": byte_tokens, "vocab": vocab, "merges": []})
}

const WORDS: [&str; 12] = ["▁", "▁a", "a", "b", "▁▁", "▁▁▁", "é", "日", "\u{fffd}", "x\u{fffd}", ",", "▁the"];

/// As Llama 2 has it: spaces are `▁`, unknown characters are byte tokens, and one space at the beginning goes.
pub(crate) fn sentencepiece() -> Tokenizer {
    let decoder = json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    ]});
    open(&file(bpe(&WORDS, true), Value::Null, decoder))
}

/// Spaces are `▁`, and that of the first token goes.
pub(crate) fn metaspace() -> Tokenizer {
    let decoder = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
    open(&file(bpe(&WORDS, false), Value::Null, decoder))
}

/// Words are joined by spaces, their continuations (`##`) are not.
pub(crate) fn wordpiece() -> Tokenizer {
    let decoder = json!({"type": "WordPiece", "prefix": "##", "cleanup": true});
    open(&file(bpe(&["a", "##b", "the", ".", "n't", "do", "##\u{fffd}"], false), Value::Null, decoder))
}

/// Words end in `</w>`, of which the last one's goes.
pub(crate) fn suffix() -> Tokenizer {
    let decoder = json!({"type": "BPEDecoder", "suffix": "</w>"});
    open(&file(bpe(&["a", "a</w>", "b", "</w>", "the</w>"], false), Value::Null, decoder))
}

/// Without a decoder, tokens are joined by spaces.
pub(crate) fn plain() -> Tokenizer {
    open(&file(bpe(&["a", "b", "", "\u{fffd}"], false), Value::Null, Value::Null))
}
