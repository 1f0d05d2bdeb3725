//! `tokenizer.json`, read by the `tokenizers` crate. That crate trusts its file more than we do: panics inside of
//! it become errors here, and its padding and truncation are switched off.

use super::byte_level_files;
use crate::model_dir::{ModelError, json, quiet};
use std::{path::Path, sync::Arc};
use tokenizers::Model as _;

/// The largest vocabularies come to 40 MB.
const MAX_BYTES: u64 = 256 << 20;

/// A text or a sequence of tokens that the tokenizer could not turn into the other.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the tokenizer could not {task}: {problem}")]
pub struct TokenizerError {
    /// `encode the text` or `decode the tokens`
    pub task: &'static str,
    /// The tokenizer's words.
    pub problem: String,
}

/// A tokenizer; clones share it.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    byte_fallback: bool,
    vocab_size: usize,
}

impl Tokenizer {
    /// Reads `tokenizer.json` of a model directory, or else the `vocab.json` and `merges.txt` of GPT-2 and OPT; `None`
    /// when it has neither.
    ///
    /// # Errors
    /// A file that the `tokenizers` crate does not accept.
    pub fn open(directory: &Path) -> Result<Option<Self>, ModelError> {
        let mut path = directory.join("tokenizer.json");
        let bytes = match json::read_bounded(&path, MAX_BYTES)? {
            Some(bytes) => bytes,
            None => match byte_level_files::tokenizer_json(directory)? {
                Some(bytes) => {
                    path.set_file_name(byte_level_files::VOCAB);
                    bytes
                }
                None => return Ok(None),
            },
        };
        let wrong = |problem: String| json::invalid(&path, format!("it is not a tokenizer: {problem}"));
        let load = || {
            let mut tokenizer =
                tokenizers::Tokenizer::from_bytes(&bytes).map_err(|error| error.to_string())?;
            tokenizer.with_padding(None);
            tokenizer.with_truncation(None).map_err(|error| error.to_string())?;
            let vocab_size = tokenizer.get_vocab_size(true);
            Ok::<_, String>((tokenizer, vocab_size))
        };
        let (tokenizer, vocab_size) = quiet::catch(load).and_then(|result| result).map_err(wrong)?;
        let byte_fallback = tokenizer.get_decoder().is_some_and(has_byte_fallback);
        Ok(Some(Self { inner: Arc::new(tokenizer), byte_fallback, vocab_size }))
    }

    /// Tokens of a text. With `add_special_tokens` the tokenizer puts those around it that its model was trained
    /// with; a text from a chat template has them already. Special tokens written out in the text are recognised.
    ///
    /// # Errors
    /// The tokenizer's own, for example a character that the vocabulary lacks.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TokenizerError> {
        let call = || {
            let encoding =
                self.inner.encode_fast(text, add_special_tokens).map_err(|error| error.to_string())?;
            Ok(encoding.get_ids().to_vec())
        };
        quiet::catch(call)
            .and_then(|result| result)
            .map_err(|problem| TokenizerError { task: "encode the text", problem })
    }

    /// Text of tokens. Ids outside of the vocabulary have none.
    ///
    /// # Errors
    /// The tokenizer's own.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, TokenizerError> {
        // Not every decoder of the crate can be given nothing.
        if !ids.iter().any(|id| !skip_special_tokens || self.role(*id) != TokenRole::None) {
            return Ok(String::new());
        }
        quiet::catch(|| self.inner.decode(ids, skip_special_tokens).map_err(|error| error.to_string()))
            .and_then(|result| result)
            .map_err(|problem| TokenizerError { task: "decode the tokens", problem })
    }

    /// Number of tokens, added ones included. A model's embedding may have more rows.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// What a token is to a stream of text.
    pub(super) fn role(&self, id: u32) -> TokenRole {
        // The same look-up as in the tokenizer's own decoding.
        let added = self.inner.get_added_vocabulary();
        let token = added.simple_id_to_token(id).or_else(|| self.inner.get_model().id_to_token(id));
        let Some(token) = token else { return TokenRole::None };
        if added.is_special_token(&token) {
            TokenRole::None
        } else if self.byte_fallback && is_byte_token(&token) {
            TokenRole::Byte
        } else {
            TokenRole::Text
        }
    }
}

/// What a token is to a stream of text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TokenRole {
    /// Left out: a special token, or no token at all.
    None,
    /// One byte; the text of a run of these is known when the run has ended.
    Byte,
    /// Anything else.
    Text,
}

fn has_byte_fallback(decoder: &tokenizers::DecoderWrapper) -> bool {
    match decoder {
        tokenizers::DecoderWrapper::ByteFallback(_) => true,
        tokenizers::DecoderWrapper::Sequence(sequence) => {
            sequence.get_decoders().iter().any(has_byte_fallback)
        }
        _ => false,
    }
}

/// `<0x0A>`
fn is_byte_token(token: &str) -> bool {
    token
        .strip_prefix("<0x")
        .and_then(|rest| rest.strip_suffix('>'))
        .is_some_and(|digits| digits.len() == 2 && u8::from_str_radix(digits, 16).is_ok())
}
