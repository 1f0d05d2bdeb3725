//! A conversation as the one text that a model was trained to continue: the chat template of a model directory,
//! rendered the way `transformers` does it. Templates come from strangers: what they may spend is bounded.

use super::template_json;
use crate::model_dir::{
    ModelError,
    json::{self, Object, invalid},
    quiet,
};
use minijinja::{Environment, Error, ErrorKind, Value, context, escape_formatter, syntax::SyntaxConfig};
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;
use std::{collections::BTreeMap, fmt, path::Path, sync::Arc};

const NAME: &str = "chat template";
/// One unit pays for an instruction or for 64 bytes of data: enough for conversations of some megabytes, and
/// used up within a second.
const FUEL: u64 = 1_000_000;
/// Of macros, includes and nested blocks.
const RECURSION: usize = 100;
/// Values nest as deeply as the fuel allows, one level for about two units, and the engine walks and frees them by
/// recursion, with up to 500 bytes of stack a level. Pages that are not touched are not taken.
const STACK_BYTES: usize = 512 << 20;
/// Tokens that templates can name.
const SPECIAL_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// What was said.
    pub content: String,
}

/// A conversation that cannot be rendered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TemplateError {
    /// The template called `raise_exception`.
    #[error("the model's chat template does not accept these messages: {0}")]
    Refused(String),
    /// The template itself fails.
    #[error("the model's chat template failed: {0}")]
    Failed(String),
}

/// The chat template of a model; clones share it.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    special_tokens: Vec<(&'static str, String)>,
}

impl ChatTemplate {
    /// Reads `chat_template.jinja`, or else the `chat_template` of `tokenizer_config.json` (of several named ones
    /// that called `default`); `None` when the model has none.
    ///
    /// # Errors
    /// A damaged file, or a template that is not valid.
    pub fn open(directory: &Path) -> Result<Option<Self>, ModelError> {
        let file = directory.join("chat_template.jinja");
        let config = json::read_object(&directory.join("tokenizer_config.json"))?;
        let special_tokens = config.as_ref().map(special_tokens).transpose()?.unwrap_or_default();
        let (path, source) = match (json::read_text(&file)?, &config) {
            (Some(source), _) => (file, source),
            (None, Some(config)) => match template_of(config)? {
                Some(source) => (config.path.clone(), source),
                None => return Ok(None),
            },
            (None, None) => return Ok(None),
        };
        let environment = quiet::catch(|| environment(source).map_err(|error| describe(&error)))
            .and_then(|result| result)
            .map_err(|problem| invalid(&path, format!("its chat template is not valid: {problem}")))?;
        Ok(Some(Self { environment: Arc::new(environment), special_tokens }))
    }

    /// The text to continue. With `add_generation_prompt` it ends where the assistant's answer begins.
    ///
    /// # Errors
    /// The template refuses the messages, fails, or takes more than it may.
    pub fn render(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
    ) -> Result<String, TemplateError> {
        std::thread::scope(|scope| {
            let work = || {
                quiet::catch(|| self.render_here(messages, add_generation_prompt))
                    .unwrap_or_else(|problem| Err(TemplateError::Failed(problem)))
            };
            let thread = std::thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, work);
            let thread =
                thread.map_err(|error| TemplateError::Failed(format!("no thread for it: {error}")))?;
            thread.join().unwrap_or_else(|_| Err(TemplateError::Failed("it panicked".to_owned())))
        })
    }

    fn render_here(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
    ) -> Result<String, TemplateError> {
        let message = |m: &ChatMessage| context! { role => m.role.as_str(), content => m.content.as_str() };
        let messages: Vec<Value> = messages.iter().map(message).collect();
        let tokens = self.special_tokens.iter().map(|(name, token)| (*name, Value::from(token.as_str())));
        let input = context! {
            messages,
            add_generation_prompt,
            tools => Value::from(()),
            documents => Value::from(()),
            ..Value::from(tokens.collect::<BTreeMap<_, _>>())
        };
        self.environment
            .get_template(NAME)
            .and_then(|template| template.render(input))
            .map_err(|error| refusal(&error).unwrap_or_else(|| TemplateError::Failed(describe(&error))))
    }
}

/// The language as `transformers` sets it up: Jinja2 with trimmed blocks and Python's methods, nothing escaped.
fn environment(source: String) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_fuel(Some(FUEL));
    environment.set_recursion_limit(RECURSION);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_formatter(|out, state, value| match value {
        value if value.is_none() => out.write_str("None").map_err(Error::from),
        value if value.kind() == minijinja::value::ValueKind::Bool => {
            out.write_str(if value.is_true() { "True" } else { "False" }).map_err(Error::from)
        }
        value => escape_formatter(out, state, value),
    });
    environment.add_filter("tojson", template_json::tojson);
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Refusal(message)))
    });
    environment.add_function("strftime_now", |format: String| {
        jiff::fmt::strtime::format(&format, &jiff::Zoned::now())
            .map_err(|error| Error::new(ErrorKind::InvalidOperation, error.to_string()))
    });
    environment.add_template_owned(NAME, without_generation_tags(&source))?;
    Ok(environment)
}

/// `{% generation %}` marks what a model is trained on and has no bearing on the text: its tags become those of a
/// block that is always shown.
fn without_generation_tags(source: &str) -> String {
    let mut result = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((before, tag)) = rest.split_once("{%") {
        result.push_str(before);
        result.push_str("{%");
        rest = tag;
        let Some((inside, _)) = tag.split_once("%}") else { continue };
        let word = inside.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']).trim();
        let replacement = match word {
            "generation" => " if true ",
            "endgeneration" => " endif ",
            _ => continue,
        };
        result.extend(inside.chars().next().filter(|c| matches!(c, '-' | '+')));
        result.push_str(replacement);
        result.extend(inside.chars().last().filter(|c| matches!(c, '-' | '+')));
        rest = tag.get(inside.len()..).unwrap_or_default();
    }
    result.push_str(rest);
    result
}

fn template_of(config: &Object) -> Result<Option<String>, ModelError> {
    let rule = "a template or a list of {name, template}";
    match config.get("chat_template") {
        None => Ok(None),
        Some(Json::String(source)) => Ok(Some(source.clone())),
        Some(Json::Array(list)) => {
            for entry in list {
                let (name, template) = (entry.get("name"), entry.get("template"));
                let (Some(name), Some(template)) =
                    (name.and_then(Json::as_str), template.and_then(Json::as_str))
                else {
                    return Err(config.invalid("chat_template", rule));
                };
                if name == "default" {
                    return Ok(Some(template.to_owned()));
                }
            }
            Err(config.invalid("chat_template", "a template or a list that has one named 'default'"))
        }
        Some(_) => Err(config.invalid("chat_template", rule)),
    }
}

fn special_tokens(config: &Object) -> Result<Vec<(&'static str, String)>, ModelError> {
    let mut tokens = Vec::new();
    for name in SPECIAL_TOKENS {
        if let Some(token) = config.special_token(name)? {
            tokens.push((name, token.to_owned()));
        }
    }
    Ok(tokens)
}

/// What a template says with `raise_exception`.
#[derive(Debug)]
struct Refusal(String);

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refusal {}

fn refusal(error: &Error) -> Option<TemplateError> {
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        if let Some(Refusal(message)) = error.downcast_ref() {
            return Some(TemplateError::Refused(message.clone()));
        }
        source = error.source();
    }
    None
}

/// One line: what and where.
fn describe(error: &Error) -> String {
    let what = error.detail().map_or_else(|| error.kind().to_string(), |d| format!("{}: {d}", error.kind()));
    match error.line() {
        Some(line) => format!("{what} (line {line})"),
        None => what,
    }
}
