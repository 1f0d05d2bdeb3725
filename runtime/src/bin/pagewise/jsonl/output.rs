//! The lines that `--json` writes.

use pagewise_runtime::request::{
    Completion, FinishReason, PositionLogprobs, RequestOutput, TokenLogprob, Usage,
};
use serde::Serialize;
use serde_json::Map;

use super::LineError;

/// The line of a prompt that was served.
pub(crate) fn output_line(index: usize, output: &RequestOutput) -> String {
    let line = OutputLine {
        index,
        outputs: output.outputs.iter().map(JsonCompletion::new).collect(),
        prompt_logprobs: output
            .prompt_logprobs
            .as_ref()
            .map(|entries| entries.iter().map(|entry| entry.as_ref().map(JsonPosition::new)).collect()),
        usage: JsonUsage::new(output.usage),
    };
    to_line(&line)
}

/// The line of a prompt that was not.
pub(crate) fn error_line(index: usize, error: &LineError) -> String {
    let mut line = Map::new();
    line.insert("index".into(), index.into());
    let mut inner = Map::new();
    inner.insert("message".into(), error.message.as_str().into());
    inner.insert("param".into(), error.param.as_deref().into());
    line.insert("error".into(), inner.into());
    to_line(&line)
}

/// Maps of strings and numbers always serialise; f32 in the shortest digits that read back to it, and what JSON
/// has no number for (an infinity) as null.
fn to_line(line: &impl Serialize) -> String {
    serde_json::to_string(line).unwrap_or_default()
}

#[derive(Serialize)]
struct OutputLine<'a> {
    index: usize,
    outputs: Vec<JsonCompletion<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<Vec<Option<JsonPosition>>>,
    usage: JsonUsage,
}

#[derive(Serialize)]
struct JsonCompletion<'a> {
    text: Option<&'a str>,
    token_ids: &'a [u32],
    finish_reason: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<Vec<JsonPosition>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    score: Option<f32>,
}

impl<'a> JsonCompletion<'a> {
    fn new(completion: &'a Completion) -> Self {
        Self {
            text: completion.text.as_deref(),
            token_ids: &completion.token_ids,
            finish_reason: match completion.finish_reason {
                FinishReason::Stop => "stop",
                FinishReason::Length => "length",
            },
            logprobs: completion.logprobs.as_ref().map(|all| all.iter().map(JsonPosition::new).collect()),
            score: completion.score,
        }
    }
}

#[derive(Serialize)]
struct JsonPosition {
    token_id: u32,
    logprob: f32,
    top: Vec<JsonToken>,
}

impl JsonPosition {
    fn new(position: &PositionLogprobs) -> Self {
        let TokenLogprob { token_id, logprob } = position.token;
        let token = |&TokenLogprob { token_id, logprob }: &TokenLogprob| JsonToken { token_id, logprob };
        Self { token_id, logprob, top: position.top.iter().map(token).collect() }
    }
}

#[derive(Serialize)]
struct JsonToken {
    token_id: u32,
    logprob: f32,
}

#[derive(Serialize)]
struct JsonUsage {
    prompt_tokens: usize,
    completion_tokens: usize,
    cached_tokens: usize,
}

impl JsonUsage {
    fn new(usage: Usage) -> Self {
        let Usage { prompt_tokens, completion_tokens, cached_tokens } = usage;
        Self { prompt_tokens, completion_tokens, cached_tokens }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_out() {
        let token = |token_id, logprob| TokenLogprob { token_id, logprob };
        let position = PositionLogprobs {
            token: token(5, -0.1),
            top: vec![token(5, -0.1), token(6, f32::NEG_INFINITY)],
        };
        let output = RequestOutput {
            outputs: vec![Completion {
                text: None,
                token_ids: vec![5, 6],
                finish_reason: FinishReason::Length,
                logprobs: Some(vec![position.clone()]),
                score: Some(-1.0 / 3.0),
            }],
            prompt_logprobs: Some(vec![None, Some(position)]),
            usage: Usage { prompt_tokens: 2, completion_tokens: 2, cached_tokens: 0 },
        };
        let position = r#"{"token_id":5,"logprob":-0.1,"top":[{"token_id":5,"logprob":-0.1},{"token_id":6,"logprob":null}]}"#;
        let expected = format!(
            r#"{{"index":3,"outputs":[{{"text":null,"token_ids":[5,6],"finish_reason":"length","logprobs":[{position}],"score":-0.33333334}}],"prompt_logprobs":[null,{position}],"usage":{{"prompt_tokens":2,"completion_tokens":2,"cached_tokens":0}}}}"#
        );
        assert_eq!(output_line(3, &output), expected);
        let error = LineError::new(None, "no \"good\"");
        assert_eq!(error_line(0, &error), r#"{"index":0,"error":{"message":"no \"good\"","param":null}}"#);
    }
}
