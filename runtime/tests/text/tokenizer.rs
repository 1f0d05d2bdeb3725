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
