//! Between text and tokens: tokenizer, streaming detokenisation, chat templates. Knows nothing of models.

mod byte_level_files;
mod chat_template;
mod stream_decoder;
mod template_json;
mod tokenizer;

pub use chat_template::{ChatMessage, ChatTemplate, TemplateError};
pub use stream_decoder::StreamDecoder;
pub use tokenizer::{Tokenizer, TokenizerError};
