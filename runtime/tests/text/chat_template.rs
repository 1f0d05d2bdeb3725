//! Chat templates give the texts that `transformers` gives, and cannot do harm.

use crate::{fixture, smollm2};
use pagewise_runtime::text::{ChatMessage, ChatTemplate, TemplateError};
use serde_json::{Value, json};

fn message(role: &str, content: &str) -> ChatMessage {
    ChatMessage { role: role.to_owned(), content: content.to_owned() }
}

fn open(config: &Value) -> ChatTemplate {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    ChatTemplate::open(directory.path()).unwrap().unwrap()
}

/// What a template makes of one message "hi" of the user.
fn render(template: &str) -> Result<String, TemplateError> {
    let config = json!({"chat_template": template, "bos_token": "<s>", "eos_token": {"content": "</s>"}});
    open(&config).render(&[message("user", "hi")], true)
}

#[test]
fn smollm2_prompts_are_those_of_the_reference() {
    let Some(directory) = smollm2("smollm2_prompts_are_those_of_the_reference") else { return };
    let template = ChatTemplate::open(&directory).unwrap().unwrap();
    let golden = fixture("smollm2_golden.json");
    let mut checked = 0;
    for item in golden["items"].as_array().unwrap() {
        let text = item["text"].as_str().unwrap();
        // Prompts that consist of one question; the template adds the system's message itself.
        let Some((_, question)) = text.split_once("<|im_start|>user\n") else { continue };
        let Some(question) = question.strip_suffix("<|im_end|>\n<|im_start|>assistant\n") else { continue };
        if text.starts_with("<|im_start|>system\nYou are a helpful AI") && !question.contains("<|im_start|>")
        {
            assert_eq!(template.render(&[message("user", question)], true).unwrap(), text);
            checked += 1;
        }
    }
    assert!(checked > 0);
}

#[test]
fn the_language_is_that_of_transformers() {
    let cases = [
        (
            "{{ bos_token }}{{ messages[0]['role'] }}: {{ messages[0].content }}{{ eos_token }}",
            "<s>user: hi</s>",
        ),
        // Lines that hold only a block leave nothing behind.
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),
        (
            "{% for m in messages %}\n{{- m.role | upper }} {{ m.content.strip().title() }}\n{% endfor %}",
            "USER Hi\n",
        ),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "13"),
        ("{% for i in range(5) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        (
            "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
            "1",
        ),
        ("{{ messages[1:] | length }}{{ messages[::-1][0].role }}", "0user"),
        ("{% generation %}a{%- endgeneration -%} b", "ab"),
        (
            "{{ tools is none }} {{ documents }} {{ add_generation_prompt }} {{ nothing }}.",
            "True None True .",
        ),
        ("{{ '<&\\'>' }}", "<&'>"),
        (
            "{{ {'a': [1, 2.5, none, true], 'é': '<\"&\\n'} | tojson }}",
            r#"{"a": [1, 2.5, null, true], "é": "<\"&\n"}"#,
        ),
        ("{{ {'a': [1], 'b': {}} | tojson(indent=2) }}", "{\n  \"a\": [\n    1\n  ],\n  \"b\": {}\n}"),
        (
            "{{ {'b': 1, 'a': 'é'} | tojson(sort_keys=true, ensure_ascii=true, separators=[',', ':']) }}",
            r#"{"a":"\u00e9","b":1}"#,
        ),
        ("{{ messages[0].get('tool_calls') is none }}{{ 'tool_calls' in messages[0] }}", "TrueFalse"),
    ];
    for (template, expected) in cases {
        assert_eq!(render(template).as_deref(), Ok(expected), "{template}");
    }
    let date = render("{{ strftime_now('%Y-%m-%d') }}").unwrap();
    assert!(date.len() == 10 && date.starts_with("20"), "{date}");
}

#[test]
fn the_template_is_found_wherever_it_may_lie() {
    let named =
        json!({"chat_template": [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]});
    assert_eq!(open(&named).render(&[], true).unwrap(), "d");

    let directory = tempfile::tempdir().unwrap();
    assert!(ChatTemplate::open(directory.path()).unwrap().is_none());
    std::fs::write(directory.path().join("tokenizer_config.json"), r#"{"bos_token": "<s>"}"#).unwrap();
    assert!(ChatTemplate::open(directory.path()).unwrap().is_none());
    // A file of its own is newer than the tokenizer's configuration and wins.
    std::fs::write(directory.path().join("chat_template.jinja"), "{{ bos_token }}j").unwrap();
    assert_eq!(ChatTemplate::open(directory.path()).unwrap().unwrap().render(&[], true).unwrap(), "<s>j");
}

#[test]
fn refusals_and_failures_say_why() {
    let refused = render("{{ raise_exception('roles must alternate') }}").unwrap_err();
    assert_eq!(
        refused.to_string(),
        "the model's chat template does not accept these messages: roles must alternate"
    );
    let failed = render("{{ messages[0].nothing.more }}").unwrap_err();
    assert_eq!(
        failed.to_string(),
        "the model's chat template failed: undefined value: `messages[0].nothing` is undefined (line 1)"
    );
    let failed = render("\n{{ strftime_now('%') }}").unwrap_err().to_string();
    assert!(failed.starts_with("the model's chat template failed: invalid operation: "), "{failed}");
}

/// Each would run for ever, fill the memory or overflow the stack.
#[test]
fn hostile_templates_fail() {
    let (open, close) = ("[".repeat(20), "]".repeat(20));
    let nest = |times: usize, rest: &str| {
        let step = format!("{{% set ns.x = {open}ns.x{close} %}}");
        format!("{{% set ns = namespace(x=[]) %}}{{% for i in range({times}) %}}{step}{{% endfor %}}{rest}")
    };
    let hostile = [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}".to_owned(),
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}".to_owned(),
        "{{ 'a' * 1000000000000 }}".to_owned(),
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}"
            .to_owned(),
        "{{ ([1] * 1000000000) | tojson }}".to_owned(),
        "{{ ([1] * 1000000000) | join }}".to_owned(),
        "{{ '%1000000000d' | format(1) }}".to_owned(),
        nest(25000, "{{ ns.x | tojson }}"),
        nest(25000, "{{ ns.x }}{{ nothing.more }}"),
        nest(25000, "{{ ns.x == [ns.x] }}{{ nothing.more }}"),
        nest(99999, ""),
        "{{ strftime_now('%2000000000Y') }}".to_owned(),
    ];
    for template in hostile {
        let result = render(&template);
        assert!(matches!(result, Err(TemplateError::Failed(_))), "{template}: {result:.200?}");
    }
}
