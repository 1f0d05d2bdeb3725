//! Tokens are those of the reference, and their text is the text they came from.

use crate::{fixture, smollm2_tokenizer, tiny};
use pagewise_runtime::text::Tokenizer;

#[test]
fn smollm2_texts_have_the_tokens_of_the_reference() {
    let Some(tokenizer) = smollm2_tokenizer("smollm2_texts_have_the_tokens_of_the_reference") else { return };
    let golden = fixture("smollm2_tokenizer_golden.json");
    let cases = golden.as_array().unwrap();
    assert!(cases.len() > 50);
    for case in cases {
        let text = case["text"].as_str().unwrap();
        let ids: Vec<u32> =
            case["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
        assert_eq!(tokenizer.encode(text, false).unwrap(), ids, "{text:?}");
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
    }
    assert_eq!(tokenizer.vocab_size(), 49152);
}

#[test]
fn special_tokens_are_recognised_and_left_out_on_request() {
    let tokenizer = tiny::byte_level();
    let ids = tokenizer.encode("ab<|end|>c", false).unwrap();
    assert_eq!(ids.len(), 4);
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "abc");
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), "ab<|end|>c");
    // Ids outside of the vocabulary have no text.
    assert_eq!(tokenizer.decode(&[u32::MAX], false).unwrap(), "");
}

#[test]
fn a_directory_without_a_tokenizer_has_none() {
    assert!(Tokenizer::open(tempfile::tempdir().unwrap().path()).unwrap().is_none());
}

#[test]
fn padding_and_truncation_of_the_file_are_ignored() {
    let mut file = tiny::byte_level_json();
    file["truncation"] = serde_json::json!(
        {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    );
    file["padding"] = serde_json::json!(
        {"strategy": {"Fixed": 2_000_000_000}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
         "pad_type_id": 0, "pad_token": "!"}
    );
    assert_eq!(tiny::open(&file).encode("x y z", false).unwrap().len(), 5);
}

/// GPT-2's files before there was `tokenizer.json` are the same tokenizer; OPT's say that a text begins with a token.
#[test]
fn vocabulary_and_merges_make_the_same_tokenizer() {
    let file = tiny::byte_level_json();
    let reference = tiny::open(&file);
    let mut vocab = file["model"]["vocab"].clone();
    vocab["</s>"] = vocab.as_object().unwrap().len().into();
    let end = vocab["</s>"].as_u64().unwrap() as u32;
    let merges = file["model"]["merges"].as_array().unwrap().iter();
    let merges = merges.map(|pair| format!("{} {}\n", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()));
    let merges = format!("#version: 0.2\n{}", merges.collect::<String>());
    let open = |tokenizer_config: &str, config: &str| {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(directory.path().join(name), text).unwrap();
        write("vocab.json", &vocab.to_string());
        write("merges.txt", &merges);
        write("tokenizer_config.json", tokenizer_config);
        write("config.json", config);
        Tokenizer::open(directory.path())
    };
    let opt = r#"{"tokenizer_class": "GPT2Tokenizer", "add_bos_token": true, "bos_token": {"content": "</s>"},
                  "eos_token": "</s>", "pad_token": "<pad>"}"#;
    let (opt, gpt2) = (open(opt, "{}"), open("{}", r#"{"model_type": "gpt2"}"#));
    let (opt, gpt2) = (opt.unwrap().unwrap(), gpt2.unwrap().unwrap());
    for text in ["", "caf\u{e9} \u{1f600} \u{65e5}a", " two  spaces\n\nit's 12"] {
        let ids = reference.encode(text, true).unwrap();
        assert_eq!(gpt2.encode(text, true).unwrap(), ids, "{text:?}");
        assert_eq!(opt.encode(text, false).unwrap(), ids, "{text:?}");
        let with_end: Vec<u32> = std::iter::once(end).chain(ids.iter().copied()).collect();
        assert_eq!(opt.encode(text, true).unwrap(), with_end, "{text:?}");
        assert_eq!(opt.decode(&with_end, true).unwrap(), text);
        assert_eq!(gpt2.decode(&ids, true).unwrap(), text);
    }
    // Others split words in other ways.
    assert!(open(r#"{"tokenizer_class": "Qwen2Tokenizer"}"#, "{}").unwrap().is_none());
    assert!(open("{}", r#"{"model_type": "llama"}"#).unwrap().is_none());
    let error = open(r#"{"tokenizer_class": "GPT2Tokenizer", "add_bos_token": 1}"#, "{}").unwrap_err();
    assert!(error.to_string().contains("'add_bos_token' must be true or false"), "{error}");
}
