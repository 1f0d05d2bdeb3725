//! What a line of `--prompts` may hold, and which field is at fault where it does not.

use pagewise_runtime::request::EarlyStopping;
use serde_json::Value;

use super::{Line, LineError, Message, Prompt};
use crate::options::SamplingOptions;

/// The lines of a file, without the blank ones at its end.
pub(crate) fn split_lines(file: &[u8]) -> Vec<&[u8]> {
    let file = file.strip_prefix(b"\xef\xbb\xbf").unwrap_or(file);
    let end = file.trim_ascii_end().len();
    if end == 0 { Vec::new() } else { file[..end].split(|&byte| byte == b'\n').collect() }
}

/// Reads a line.
///
/// # Errors
/// [`LineError`] naming the field that is unknown, missing or of the wrong type.
pub(crate) fn parse_line(line: &[u8]) -> Result<Line, LineError> {
    let value = serde_json::from_slice(line)
        .map_err(|error| LineError::new(None, format!("the line is not JSON: {error}")))?;
    let Value::Object(fields) = value else {
        let found = kind(&value);
        return Err(LineError::new(None, format!("the line must be a JSON object, not {found}")));
    };
    let mut prompt: Option<Prompt> = None;
    let mut sampling = SamplingOptions::default();
    for (name, value) in &fields {
        let field = Field { name, value };
        // Everywhere null is the same as leaving the field out.
        if value.is_null() && NAMES.contains(&name.as_str()) {
            continue;
        }
        let found = match name.as_str() {
            "prompt" => Prompt::Text(field.text()?),
            "prompt_token_ids" => Prompt::TokenIds(field.list("token ids", token_id)?),
            "messages" => Prompt::Messages(field.messages()?),
            _ => {
                field.sampling(&mut sampling)?;
                continue;
            }
        };
        if let Some(other) = prompt.replace(found) {
            let message = format!("{} and {name} exclude each other; give one of them", other.field());
            return Err(LineError::new(Some(name), message));
        }
    }
    let missing =
        || LineError::new(Some("prompt"), "the line needs one of prompt, prompt_token_ids and messages");
    Ok(Line { prompt: prompt.ok_or_else(missing)?, sampling })
}

const NAMES: [&str; 23] = [
    "prompt",
    "prompt_token_ids",
    "messages",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "n",
    "best_of",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "logprobs",
    "prompt_logprobs",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "beam_width",
    "length_penalty",
    "early_stopping",
];

/// A field of a line, on its way to its type.
#[derive(Clone, Copy)]
struct Field<'a> {
    name: &'a str,
    value: &'a Value,
}

impl Field<'_> {
    fn sampling(self, options: &mut SamplingOptions) -> Result<(), LineError> {
        match self.name {
            "max_tokens" => options.max_tokens = Some(self.count()?),
            "temperature" => options.temperature = Some(self.number()?),
            "top_p" => options.top_p = Some(self.number()?),
            "top_k" => options.top_k = Some(self.count()?),
            "min_p" => options.min_p = Some(self.number()?),
            "seed" => options.seed = Some(self.value.as_u64().ok_or_else(|| self.wrong(COUNT))?),
            "n" => options.n = Some(self.count()?),
            "best_of" => options.best_of = Some(self.count()?),
            "stop" => options.stop = Some(self.texts()?),
            "stop_token_ids" => options.stop_token_ids = Some(self.list("token ids", token_id)?),
            "ignore_eos" => options.ignore_eos = Some(self.truth()?),
            "logprobs" => options.logprobs = Some(self.count()?),
            "prompt_logprobs" => options.prompt_logprobs = Some(self.count()?),
            "repetition_penalty" => options.repetition_penalty = Some(self.number()?),
            "presence_penalty" => options.presence_penalty = Some(self.number()?),
            "frequency_penalty" => options.frequency_penalty = Some(self.number()?),
            "logit_bias" => options.logit_bias = Some(self.biases()?),
            "beam_width" => options.beam_width = Some(self.count()?),
            "length_penalty" => options.length_penalty = Some(self.number()?),
            "early_stopping" => options.early_stopping = Some(self.early_stopping()?),
            unknown => {
                let message = format!("unknown field {unknown:?}; known are {}", NAMES.join(", "));
                return Err(LineError::new(Some(unknown), message));
            }
        }
        Ok(())
    }

    fn wrong(self, expected: &str) -> LineError {
        let message = format!("{} must be {expected}, not {}", self.name, kind(self.value));
        LineError::new(Some(self.name), message)
    }

    fn count(self) -> Result<usize, LineError> {
        self.value.as_u64().and_then(|count| count.try_into().ok()).ok_or_else(|| self.wrong(COUNT))
    }

    fn number(self) -> Result<f32, LineError> {
        finite(self.value).ok_or_else(|| self.wrong("a finite number"))
    }

    fn truth(self) -> Result<bool, LineError> {
        self.value.as_bool().ok_or_else(|| self.wrong("true or false"))
    }

    fn text(self) -> Result<String, LineError> {
        self.value.as_str().map(str::to_owned).ok_or_else(|| self.wrong("a string"))
    }

    fn list<T>(self, of: &str, read: fn(&Value) -> Option<T>) -> Result<Vec<T>, LineError> {
        let items = self.value.as_array().ok_or_else(|| self.wrong(&format!("a list of {of}")))?;
        let read = |(at, item): (usize, &Value)| {
            let message = || format!("{}[{at}]: {} is not one of {of}", self.name, shown(item));
            read(item).ok_or_else(|| LineError::new(Some(self.name), message()))
        };
        items.iter().enumerate().map(read).collect()
    }

    fn texts(self) -> Result<Vec<String>, LineError> {
        match self.value {
            Value::String(text) => Ok(vec![text.clone()]),
            Value::Array(_) => self.list("strings", |item| item.as_str().map(str::to_owned)),
            _ => Err(self.wrong("a string or a list of strings")),
        }
    }

    fn biases(self) -> Result<Vec<(u32, f32)>, LineError> {
        let biases =
            self.value.as_object().ok_or_else(|| self.wrong("an object of token ids and numbers"))?;
        let read = |(id, bias): (&String, &Value)| {
            let message =
                || format!("logit_bias: {id:?}: {} is not a token id with a finite number", shown(bias));
            let pair = id.parse().ok().zip(finite(bias));
            pair.ok_or_else(|| LineError::new(Some(self.name), message()))
        };
        biases.iter().map(read).collect()
    }

    fn early_stopping(self) -> Result<EarlyStopping, LineError> {
        match self.value {
            Value::Bool(true) => Ok(EarlyStopping::True),
            Value::Bool(false) => Ok(EarlyStopping::False),
            Value::String(text) if text == "never" => Ok(EarlyStopping::Never),
            _ => Err(self.wrong("true, false or \"never\"")),
        }
    }

    fn messages(self) -> Result<Vec<Message>, LineError> {
        if self.value.as_array().is_some_and(Vec::is_empty) {
            return Err(self.wrong("at least one message"));
        }
        self.list("messages, which have a role and a content, both strings, and nothing else", |item| {
            let fields = item.as_object()?;
            let text = |name| fields.get(name).and_then(Value::as_str).map(str::to_owned);
            let message = Message { role: text("role")?, content: text("content")? };
            (fields.len() == 2).then_some(message)
        })
    }
}

const COUNT: &str = "a whole number that is not negative";

fn token_id(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| id.try_into().ok())
}

/// As f32, where it is finite too.
fn finite(value: &Value) -> Option<f32> {
    value.as_f64().map(|number| number as f32).filter(|number| number.is_finite())
}

/// A value in a message, unless it is long.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() <= 60 { text } else { kind(value).to_owned() }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        Value::Number(number) if number.as_f64().is_some_and(|x| number.is_f64() && x.fract() == 0.0) => {
            "a number of that size or form"
        }
        Value::Number(number) if number.is_f64() => "a fraction",
        Value::Number(number) if number.is_i64() && !number.is_u64() => "a negative number",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_line() {
        let line = br#"{"prompt_token_ids": [1, 2], "max_tokens": 3, "temperature": 0, "top_p": 0.5, "top_k": 4,
            "min_p": 0.1, "seed": 18446744073709551615, "n": 2, "best_of": 3, "stop": "x", "stop_token_ids": [9],
            "ignore_eos": true, "logprobs": 0, "prompt_logprobs": 1, "repetition_penalty": 1.5,
            "presence_penalty": -1, "frequency_penalty": 1, "logit_bias": {"7": -100}, "beam_width": 4,
            "length_penalty": 0.0, "early_stopping": "never"}"#;
        let Line { prompt, sampling } = parse_line(line).unwrap();
        assert_eq!(prompt, Prompt::TokenIds(vec![1, 2]));
        let expected = SamplingOptions {
            max_tokens: Some(3),
            temperature: Some(0.0),
            top_p: Some(0.5),
            top_k: Some(4),
            min_p: Some(0.1),
            seed: Some(u64::MAX),
            n: Some(2),
            best_of: Some(3),
            stop: Some(vec!["x".into()]),
            stop_token_ids: Some(vec![9]),
            ignore_eos: Some(true),
            logprobs: Some(0),
            prompt_logprobs: Some(1),
            repetition_penalty: Some(1.5),
            presence_penalty: Some(-1.0),
            frequency_penalty: Some(1.0),
            logit_bias: Some(vec![(7, -100.0)]),
            beam_width: Some(4),
            length_penalty: Some(0.0),
            early_stopping: Some(EarlyStopping::Never),
        };
        assert_eq!(sampling, expected);
    }

    #[test]
    fn the_other_prompts_and_null() {
        let line = parse_line(br#"{"prompt": "a\u0000b", "seed": null, "messages": null}"#).unwrap();
        assert_eq!(line.prompt, Prompt::Text("a\0b".into()));
        assert_eq!(line.sampling, SamplingOptions::default());
        let line =
            parse_line(br#"{"messages": [{"role": "user", "content": "hi"}], "stop": ["a", "b"]}"#).unwrap();
        assert_eq!(
            line.prompt,
            Prompt::Messages(vec![Message { role: "user".into(), content: "hi".into() }])
        );
        assert_eq!(line.sampling.stop, Some(vec!["a".into(), "b".into()]));
    }

    #[test]
    fn bad_lines_name_their_field() {
        let table: &[(&str, Option<&str>, &str)] = &[
            ("", None, "the line is not JSON"),
            ("{", None, "the line is not JSON"),
            ("\u{fffd}", None, "the line is not JSON"),
            ("[1]", None, "the line must be a JSON object, not a list"),
            ("{}", Some("prompt"), "the line needs one of prompt, prompt_token_ids and messages"),
            (r#"{"prompt": 7}"#, Some("prompt"), "prompt must be a string, not a number"),
            (
                r#"{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}"#,
                Some("messages"),
                "prompt and messages exclude each other",
            ),
            (
                r#"{"prompt_token_ids": "1"}"#,
                Some("prompt_token_ids"),
                "must be a list of token ids, not a string",
            ),
            (r#"{"prompt_token_ids": [1, -1]}"#, Some("prompt_token_ids"), "prompt_token_ids[1]: -1"),
            (
                r#"{"prompt_token_ids": [4294967296]}"#,
                Some("prompt_token_ids"),
                "prompt_token_ids[0]: 4294967296",
            ),
            (r#"{"prompt": "a", "max_token": 1}"#, Some("max_token"), "unknown field \"max_token\""),
            (r#"{"prompt": "a", "max_tokens": -1}"#, Some("max_tokens"), "not a negative number"),
            (r#"{"prompt": "a", "max_tokens": 1.5}"#, Some("max_tokens"), "not a fraction"),
            (r#"{"prompt": "a", "max_tokens": "1"}"#, Some("max_tokens"), "not a string"),
            (
                r#"{"prompt": "a", "temperature": "hot"}"#,
                Some("temperature"),
                "a finite number, not a string",
            ),
            (r#"{"prompt": "a", "temperature": 1e39}"#, Some("temperature"), "a finite number"),
            (r#"{"prompt": "a", "seed": -1}"#, Some("seed"), "whole number"),
            (r#"{"prompt": "a", "stop": [1]}"#, Some("stop"), "stop[0]: 1 is not one of strings"),
            (r#"{"prompt": "a", "stop": 1}"#, Some("stop"), "a string or a list of strings"),
            (r#"{"prompt": "a", "ignore_eos": 1}"#, Some("ignore_eos"), "true or false"),
            (r#"{"prompt": "a", "logit_bias": {"x": 1}}"#, Some("logit_bias"), "\"x\": 1"),
            (r#"{"prompt": "a", "logit_bias": [1]}"#, Some("logit_bias"), "an object"),
            (r#"{"prompt": "a", "early_stopping": "yes"}"#, Some("early_stopping"), "\"never\""),
            (r#"{"messages": [{"role": "user"}]}"#, Some("messages"), "messages[0]"),
            (r#"{"messages": []}"#, Some("messages"), "at least one message"),
            (r#"{"messages": [{"role": "user", "content": "a", "x": 1}]}"#, Some("messages"), "messages[0]"),
        ];
        for (line, param, message) in table {
            let error = parse_line(line.as_bytes()).unwrap_err();
            assert_eq!(error.param.as_deref(), *param, "{line}");
            assert!(error.message.contains(message), "{line}: {}", error.message);
        }
        assert!(parse_line(b"{\"prompt\": \"\xff\"}").is_err());
        let deep = "[".repeat(100_000);
        assert!(parse_line(deep.as_bytes()).is_err());
    }

    #[test]
    fn every_known_field_is_read() {
        for name in NAMES {
            let line = format!(r#"{{"{name}": {{}}}}"#);
            let error = parse_line(line.as_bytes()).map(|_| ()).err();
            let unknown = error.is_some_and(|error| error.message.starts_with("unknown field"));
            assert!(!unknown, "{name}");
        }
    }

    #[test]
    fn blank_lines_at_the_end_are_none() {
        assert_eq!(split_lines(b""), Vec::<&[u8]>::new());
        assert_eq!(split_lines(b"\n \n"), Vec::<&[u8]>::new());
        assert_eq!(split_lines(b"a\r\n\nb\n\n"), [&b"a\r"[..], b"", b"b"]);
        assert_eq!(split_lines(b"\xef\xbb\xbfa"), [&b"a"[..]]);
    }
}
