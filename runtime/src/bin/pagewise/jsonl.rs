//! The JSON lines of `generate`: what they hold. `input` reads a line, `output` writes one; neither knows files or the
//! engine.

mod input;
mod output;

pub(crate) use input::{parse_line, split_lines};
pub(crate) use output::{error_line, output_line};
use serde::Serialize;

use crate::options::SamplingOptions;

/// A line of `--prompts`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Line {
    pub(crate) prompt: Prompt,
    /// What the line itself says of sampling.
    pub(crate) sampling: SamplingOptions,
}

/// What is to be continued.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Prompt {
    /// Text, taken as it is.
    Text(String),
    /// Token ids, taken as they are.
    TokenIds(Vec<u32>),
    /// A chat, for the model's template.
    Messages(Vec<Message>),
}

impl Prompt {
    /// The field of a line that holds it.
    pub(crate) fn field(&self) -> &'static str {
        match self {
            Self::Text(_) => "prompt",
            Self::TokenIds(_) => "prompt_token_ids",
            Self::Messages(_) => "messages",
        }
    }
}

/// One message of a chat.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) role: String,
    pub(crate) content: String,
}

/// Why a line cannot be served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct LineError {
    pub(crate) message: String,
    /// The field at fault, where one is.
    pub(crate) param: Option<String>,
}

impl LineError {
    pub(crate) fn new(param: Option<&str>, message: impl Into<String>) -> Self {
        Self { message: message.into(), param: param.map(str::to_owned) }
    }
}
