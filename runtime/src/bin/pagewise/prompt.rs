//! From what a user gives (text, ids, a chat) to a request for the engine.

use pagewise_runtime::load::LoadedModel;
use pagewise_runtime::request::{Request, RequestError, RequestId, SamplingParams};
use pagewise_runtime::text::ChatMessage;

use crate::jsonl::{LineError, Message, Prompt};
use crate::options::SamplingOptions;

/// Makes the request. `sampling` falls back to the model's own defaults.
///
/// # Errors
/// [`LineError`] if the model lacks a tokenizer or chat template that the prompt needs, or the template refuses.
fn request(model: &LoadedModel, prompt: &Prompt, sampling: SamplingOptions) -> Result<Request, LineError> {
    Ok(Request::new(token_ids(model, prompt)?, sampling.into_params(defaults(model))))
}

/// What applies where neither line nor command line says anything: what the model's makers recommend.
fn defaults(model: &LoadedModel) -> SamplingParams {
    let (base, made) = (SamplingParams::default(), &model.generation);
    SamplingParams {
        temperature: made.temperature.unwrap_or(base.temperature),
        top_p: made.top_p.unwrap_or(base.top_p),
        top_k: made.top_k.unwrap_or(base.top_k),
        min_p: made.min_p.unwrap_or(base.min_p),
        repetition_penalty: made.repetition_penalty.unwrap_or(base.repetition_penalty),
        ..base
    }
}

/// Adds a prompt's request to the engine.
///
/// # Errors
/// [`LineError`] if the request cannot be made or the engine refuses it, naming the field of a line.
pub(crate) fn add(
    model: &mut LoadedModel,
    prompt: &Prompt,
    sampling: SamplingOptions,
) -> Result<RequestId, LineError> {
    let request = request(model, prompt, sampling)?;
    model.engine.add(request).map_err(|error| line_error(error, prompt.field()))
}

/// The engine sees token ids only; a user has to look at `field`, where they came from.
pub(crate) fn line_error(error: RequestError, field: &'static str) -> LineError {
    let param =
        error.param.map(|param| if matches!(param, "prompt" | "prompt_token_ids") { field } else { param });
    LineError::new(param, error.message)
}

fn token_ids(model: &LoadedModel, prompt: &Prompt) -> Result<Vec<u32>, LineError> {
    let field = prompt.field();
    let refuse = |message: String| LineError::new(Some(field), message);
    let tokenizer = || {
        model.tokenizer.as_ref().ok_or_else(|| {
            refuse("the model has no tokenizer.json, so that only prompt_token_ids can be served".to_owned())
        })
    };
    match prompt {
        Prompt::TokenIds(ids) => Ok(ids.clone()),
        Prompt::Text(text) => tokenizer()?.encode(text, true).map_err(|error| refuse(error.to_string())),
        Prompt::Messages(messages) => {
            let tokenizer = tokenizer()?;
            let template = model.chat_template.as_ref().ok_or_else(|| {
                refuse("the model has no chat template; give a prompt instead of messages".to_owned())
            })?;
            let message = |message: &Message| ChatMessage {
                role: message.role.clone(),
                content: message.content.clone(),
            };
            let messages: Vec<ChatMessage> = messages.iter().map(message).collect();
            let text = template.render(&messages, true).map_err(|error| refuse(error.to_string()))?;
            // The template writes the special tokens itself.
            tokenizer.encode(&text, false).map_err(|error| refuse(error.to_string()))
        }
    }
}
