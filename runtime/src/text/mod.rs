//! Between text and tokens: tokenizer, streaming detokenisation, chat templates. Knows nothing of models.

mod quiet;
mod stream_decoder;
mod tokenizer;

pub use stream_decoder::StreamDecoder;
pub use tokenizer::{Tokenizer, TokenizerError};
