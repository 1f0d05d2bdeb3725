//! Files that are missing or not what their name says: configuration, tokenizer, template.

use super::Case;
use crate::spoil::*;
use serde_json::json;
use std::fs;

pub(super) fn cases() -> Vec<Case> {
    vec![
        // Files
        (
            "no config.json",
            remove("config.json"),
            "DIR/config.json is missing; a model directory holds config.json, model.safetensors and tokenizer.json",
        ),
        (
            "no weights",
            remove("model.safetensors"),
            "DIR/model.safetensors is missing; the weights are expected there or in shards named by model.safetensors.index.json",
        ),
        (
            "a directory as config.json",
            all(vec![remove("config.json"), Box::new(|d| fs::create_dir(d.join("config.json")).unwrap())]),
            "DIR/config.json: it is not a regular file",
        ),
        ("empty config.json", file("config.json", ""), "DIR/config.json: it is empty"),
        (
            "a list as config.json",
            file("config.json", "[]"),
            "DIR/config.json: it must hold a JSON object, not a list",
        ),
        (
            "config.json cut short",
            file("config.json", r#"{"architectures": ["Llama"#),
            "DIR/config.json: it is not valid JSON: EOF while parsing a string at line 1 column 25",
        ),
        (
            "config.json not UTF-8",
            file("config.json", b"{\"a\": \"\xff\"}"),
            "DIR/config.json: it is not UTF-8 text (byte 7)",
        ),
        (
            "config.json deeply nested",
            file("config.json", format!("{}1{}", "[".repeat(100_000), "]".repeat(100_000))),
            "DIR/config.json: it is not valid JSON: recursion limit exceeded at line 1 column 128",
        ),
        // Tokenizer and template
        ("empty tokenizer", file("tokenizer.json", ""), "DIR/tokenizer.json: it is empty"),
        (
            "tokenizer not JSON",
            file("tokenizer.json", "tokens"),
            "DIR/tokenizer.json: it is not a tokenizer: expected ident at line 1 column 2",
        ),
        (
            "tokenizer without a model",
            tokenizer(json!({"version": "1.0"})),
            "DIR/tokenizer.json: it is not a tokenizer: Model missing. at line 1 column 17",
        ),
        (
            "tokenizer of unknown type",
            tokenizer(json!({"version": "1.0", "model": {"type": "Magic", "vocab": {}}})),
            "DIR/tokenizer.json: it is not a tokenizer: data did not match any variant of untagged enum ModelUntagged at line 1 column 53",
        ),
        (
            "merge of unknown tokens",
            tokenizer(
                json!({"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}),
            ),
            "DIR/tokenizer.json: it is not a tokenizer: Token `b` out of vocabulary at line 1 column 77",
        ),
        (
            "vocabulary of the wrong type",
            tokenizer(json!({"version": "1.0", "model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}})),
            "DIR/tokenizer.json: it is not a tokenizer: invalid value: integer `-1`, expected u32 at line 1 column 69",
        ),
        (
            "pattern that does not end",
            tokenizer(
                json!({"version": "1.0", "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": false}, "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}),
            ),
            "DIR/tokenizer.json: it is not a tokenizer: Parsing error at position 2: Opening parenthesis without closing parenthesis at line 1 column 111",
        ),
        (
            "tokenizer deeply nested",
            file("tokenizer.json", format!("{{\"version\": {}", "[".repeat(100_000))),
            "DIR/tokenizer.json: it is not a tokenizer: invalid type: sequence, expected a string at line 1 column 12",
        ),
        (
            "tokenizer config not an object",
            file("tokenizer_config.json", "3"),
            "DIR/tokenizer_config.json: it must hold a JSON object, not a number",
        ),
        (
            "template of the wrong type",
            file("tokenizer_config.json", r#"{"chat_template": 3}"#),
            "DIR/tokenizer_config.json: 'chat_template' must be a template or a list of {name, template}; found 3",
        ),
        (
            "no default template",
            file("tokenizer_config.json", r#"{"chat_template": [{"name": "tools", "template": ""}]}"#),
            "DIR/tokenizer_config.json: 'chat_template' must be a template or a list that has one named 'default'; found a list of 1",
        ),
        (
            "template that does not end",
            file("chat_template.jinja", "{% for m in messages %}"),
            "DIR/chat_template.jinja: its chat template is not valid: syntax error: unexpected end of input, expected end of block (line 1)",
        ),
        (
            "template nested too deeply",
            file("chat_template.jinja", format!("{{{{ {}1 }}}}", "(".repeat(100_000))),
            "DIR/chat_template.jinja: its chat template is not valid: syntax error: template exceeds maximum recursion limits (line 1)",
        ),
        (
            "special token of the wrong type",
            file("tokenizer_config.json", r#"{"bos_token": ["<s>"]}"#),
            "DIR/tokenizer_config.json: 'bos_token' must be a string or an object with a string 'content'; found a list of 1",
        ),
    ]
}
