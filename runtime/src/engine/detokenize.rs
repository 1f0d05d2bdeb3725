//! The seam to the tokenizer.

use crate::text::{StreamDecoder, Tokenizer};

/// Turns the tokens of one completion into text, piece by piece.
pub trait Detokenize: Send + Sync {
    /// Adds a token and returns the text that has become certain: whole characters only.
    fn push(&mut self, token_id: u32) -> String;

    /// Returns what is still held back; nothing is pushed afterwards.
    fn finish(&mut self) -> String;
}

/// Makes a detokeniser for each completion.
pub type DetokenizerFactory = Box<dyn Fn() -> Box<dyn Detokenize> + Send + Sync>;

impl Detokenize for StreamDecoder {
    fn push(&mut self, token_id: u32) -> String {
        StreamDecoder::push(self, token_id)
    }

    fn finish(&mut self) -> String {
        StreamDecoder::finish(self)
    }
}

/// Stream decoders of one tokenizer.
pub(super) fn factory(tokenizer: Tokenizer) -> DetokenizerFactory {
    Box::new(move || Box::new(StreamDecoder::new(&tokenizer)))
}
