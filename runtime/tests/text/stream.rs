//! Pieces of a stream, joined, are the text of all tokens, and no piece holds a part of a character.

use crate::{smollm2_tokenizer, tiny};
use pagewise_runtime::text::{StreamDecoder, Tokenizer};
use proptest::{prelude::*, test_runner::TestRunner};

const BROKEN: char = char::REPLACEMENT_CHARACTER;

fn stream(tokenizer: &Tokenizer, ids: &[u32]) -> (Vec<String>, String) {
    let mut decoder = StreamDecoder::new(tokenizer);
    let pieces = ids.iter().map(|id| decoder.push(*id)).collect();
    (pieces, decoder.finish())
}

/// Random sequences of all tokens; the last ones, among which are special ones, and ids of no token more often
/// than their share. A failure prints its ids on one line.
fn check(name: &str, tokenizer: &Tokenizer) {
    let vocab = tokenizer.vocab_size() as u32;
    let id = prop_oneof![8 => 0..vocab, 1 => vocab - 2..vocab, 1 => 0..3u32, 1 => Just(u32::MAX)];
    let config = ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() };
    let run = TestRunner::new(config).run(&prop::collection::vec(id, 0..60), |ids| {
        let (pieces, rest) = stream(tokenizer, &ids);
        let joined = pieces.concat() + &rest;
        prop_assert_eq!(joined, tokenizer.decode(&ids, true).unwrap(), "pieces {:?} + {:?}", pieces, rest);
        Ok(())
    });
    if let Err(error) = run {
        panic!("{name}: {error}");
    }
}

#[test]
fn random_tokens_of_every_kind_of_decoder() {
    check("byte level", &tiny::byte_level());
    check("sentencepiece", &tiny::sentencepiece());
    check("metaspace", &tiny::metaspace());
    check("wordpiece", &tiny::wordpiece());
    check("suffix", &tiny::suffix());
    check("plain", &tiny::plain());
}

#[test]
fn random_tokens_of_smollm2() {
    let Some(tokenizer) = smollm2_tokenizer("random_tokens_of_smollm2") else { return };
    check("SmolLM2", &tokenizer);
}

/// Texts of whole characters, as sequences of which a stream never shows a broken one.
#[test]
fn no_piece_of_a_sound_text_is_broken() {
    let mut tokenizers = vec![tiny::byte_level(), tiny::sentencepiece()];
    tokenizers.extend(smollm2_tokenizer("no_piece_of_a_sound_text_is_broken"));
    for tokenizer in tokenizers {
        let config = ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() };
        let run = TestRunner::new(config).run(&"[a-c é日本👩‍💻🏽\u{300}]{0,30}", |text| {
            let ids = tokenizer.encode(&text, false).unwrap();
            let (pieces, rest) = stream(&tokenizer, &ids);
            prop_assert!(
                !pieces.iter().chain([&rest]).any(|piece| piece.contains(BROKEN)),
                "{pieces:?} {rest:?}"
            );
            prop_assert_eq!(pieces.concat() + &rest, tokenizer.decode(&ids, true).unwrap());
            Ok(())
        });
        if let Err(error) = run {
            panic!("{error}");
        }
    }
}

#[test]
fn a_character_appears_with_its_last_byte() {
    let tokenizer = tiny::byte_level();
    let ids: Vec<u32> = "é日".bytes().map(u32::from).collect();
    let (pieces, rest) = stream(&tokenizer, &ids);
    assert_eq!(pieces, ["", "é", "", "", "日"]);
    assert_eq!(rest, "");
    // What never becomes a character is shown as such, at the latest at the end.
    let (pieces, rest) = stream(&tokenizer, &[0xe6, 0x97, u32::from(b'a'), 0xe6]);
    assert_eq!((pieces.concat(), rest), (format!("{BROKEN}a"), BROKEN.to_string()));
}

/// Runs of bytes that never become characters, with letters between: the window moves on in their midst.
#[test]
fn long_broken_runs_between_letters_are_shown_in_full() {
    let tokenizer = tiny::byte_level();
    let mut ids = Vec::new();
    for broken in [12, 30, 5, 17, 40] {
        ids.push(u32::from(b'a'));
        ids.extend(std::iter::repeat_n(0x80, broken));
    }
    let (pieces, rest) = stream(&tokenizer, &ids);
    let bytes: Vec<u8> = ids.iter().map(|&id| id as u8).collect();
    assert_eq!(pieces.concat() + &rest, String::from_utf8_lossy(&bytes));
}

#[test]
fn the_first_space_goes_and_the_others_stay() {
    let tokenizer = tiny::sentencepiece();
    // "▁", "▁", "▁a", "▁the"
    let (pieces, _) = stream(&tokenizer, &[257, 257, 258, 268]);
    assert_eq!(pieces, ["", " ", " a", " the"]);
}

/// A long stream costs what its length says: were every token to decode all before it, this would take minutes.
#[test]
fn long_streams_take_linear_time() {
    let tokenizer = tiny::byte_level();
    for byte in [b'a', 0x80, 0xf0] {
        let mut decoder = StreamDecoder::new(&tokenizer);
        let mut bytes = 0;
        for _ in 0..100_000 {
            bytes += decoder.push(u32::from(byte)).len();
        }
        bytes += decoder.finish().len();
        assert_eq!(bytes, String::from_utf8_lossy(&[byte; 100_000]).len());
    }
}
