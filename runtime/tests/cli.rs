//! The binary `pagewise` as a user runs it: what goes in, what comes out on which stream, and the exit code.
//! The models are the small random ones of `tests/fixtures`.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking, its helpers too")]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name)
}

/// A run of the binary.
#[derive(Debug)]
struct Run {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

/// The binary. Mesa's software Vulkan, which `--backend auto` asks about, complains on standard error where a session has
/// no such folder.
fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pagewise"));
    command.env("XDG_RUNTIME_DIR", env!("CARGO_TARGET_TMPDIR"));
    command
}

fn pagewise(args: &[&str], input: &str) -> Run {
    let mut child = command()
        .args(args)
        .env_remove("RUST_LOG")
        .env("HF_HUB_OFFLINE", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A command that reads no input may have gone already.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let Output { status, stdout, stderr } = child.wait_with_output().unwrap();
    Run {
        code: status.code(),
        stdout: String::from_utf8(stdout).unwrap(),
        stderr: String::from_utf8(stderr).unwrap(),
    }
}

/// Runs `generate --prompts - --json` on lines and reads the lines that come back.
fn batch(model: &Path, lines: &[String], options: &[&str]) -> (Run, Vec<Value>) {
    let mut args = vec!["generate", "--prompts", "-", "--json", "--model", model.to_str().unwrap()];
    args.extend(options);
    let run = pagewise(&args, &(lines.join("\n") + "\n"));
    let out = run.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    (run, out)
}

fn golden(name: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(fixture(name).join("golden.json")).unwrap();
    let golden: Value = serde_json::from_str(&text).unwrap();
    golden["prompts"].as_array().unwrap().clone()
}

fn greedy_lines(golden: &[Value]) -> Vec<String> {
    let line = |item: &Value| {
        let max_tokens = item["greedy"].as_array().unwrap().len();
        json!({"prompt_token_ids": item["prompt"], "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true})
    };
    golden.iter().map(|item| line(item).to_string()).collect()
}

/// `llama_gqa` with a tokenizer of its 256 bytes and a chat template, for what needs text.
fn model_with_text() -> TempDir {
    let dir = TempDir::new().unwrap();
    for name in ["config.json", "generation_config.json", "model.safetensors"] {
        std::fs::copy(fixture("llama_gqa").join(name), dir.path().join(name)).unwrap();
    }
    // GPT-2's table: printable bytes stand for themselves, the others for characters from 256 on.
    let is_printable = |byte: u32| (33..=126).contains(&byte) || (161..=172).contains(&byte) || byte >= 174;
    let mut others = 256..;
    let vocab: serde_json::Map<String, Value> = (0..256u32)
        .map(|byte| {
            let code = if is_printable(byte) { byte } else { others.next().unwrap() };
            (char::from_u32(code).unwrap().to_string(), byte.into())
        })
        .collect();
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": []},
    });
    let template = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}\
                    {% if add_generation_prompt %}assistant:{% endif %}";
    let config = json!({"tokenizer_class": "GPT2Tokenizer", "chat_template": template});
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    dir
}

#[test]
fn golden_tokens_come_out_in_order() {
    for model in ["llama_gqa", "llama_rope3", "qwen2", "mistral_swa"] {
        let golden = golden(model);
        let (run, out) = batch(&fixture(model), &greedy_lines(&golden), &["--dtype", "f32"]);
        assert_eq!((run.code, run.stderr.as_str()), (Some(0), ""), "{model}");
        assert_eq!(out.len(), golden.len());
        for (index, (line, item)) in out.iter().zip(&golden).enumerate() {
            assert_eq!(line["index"], index);
            let [output] = line["outputs"].as_array().unwrap().as_slice() else { panic!("{line}") };
            assert_eq!(output["token_ids"], item["greedy"], "{model}, prompt {index}");
            assert_eq!((&output["finish_reason"], &output["text"]), (&json!("length"), &Value::Null));
            assert_eq!(output.get("logprobs"), None);
            let (prompt, new) =
                (item["prompt"].as_array().unwrap().len(), item["greedy"].as_array().unwrap().len());
            assert_eq!(
                (&line["usage"]["prompt_tokens"], &line["usage"]["completion_tokens"]),
                (&prompt.into(), &new.into())
            );
            assert!(line["usage"]["cached_tokens"].is_u64());
        }
    }
}

#[test]
fn an_end_token_ends_and_is_kept() {
    let golden = golden("llama_gqa");
    let prompt = &golden[0]["prompt"];
    let greedy = golden[0]["greedy"].as_array().unwrap();
    let end = greedy.iter().position(|token| *token == 237).unwrap();
    let line = json!({"prompt_token_ids": prompt, "max_tokens": 32, "temperature": 0}).to_string();
    let (_, out) = batch(&fixture("llama_gqa"), &[line], &[]);
    assert_eq!(out[0]["outputs"][0]["token_ids"], json!(greedy[..=end]));
    assert_eq!(out[0]["outputs"][0]["finish_reason"], "stop");
}

#[test]
fn a_bad_line_is_reported_in_its_place() {
    let golden = golden("llama_gqa");
    let good = greedy_lines(&golden);
    let too_long = json!({"prompt_token_ids": vec![5; 129], "max_tokens": 1}).to_string();
    let out_of_vocabulary = json!({"prompt_token_ids": [256]}).to_string();
    let bad: Vec<(&str, Value)> = vec![
        ("nonsense", Value::Null),
        ("", Value::Null),
        (r#"{"prompt_token_ids": [1], "max_tokens": "many"}"#, json!("max_tokens")),
        (r#"{"prompt_token_ids": [1], "temprature": 1}"#, json!("temprature")),
        (r#"{"prompt_token_ids": [1], "temperature": -1}"#, json!("temperature")),
        (r#"{"prompt_token_ids": [1], "top_p": 2}"#, json!("top_p")),
        (r#"{"prompt_token_ids": [1], "max_tokens": 0}"#, json!("max_tokens")),
        (r#"{"prompt_token_ids": [1], "n": 0}"#, json!("n")),
        (r#"{"prompt_token_ids": [1], "n": 18446744073709551615}"#, json!("n")),
        (r#"{"prompt_token_ids": [1], "best_of": 9999999999}"#, json!("best_of")),
        (r#"{"messages": []}"#, json!("messages")),
        (r#"{"prompt_token_ids": []}"#, json!("prompt_token_ids")),
        (r#"{"prompt": "there is no tokenizer"}"#, json!("prompt")),
        (r#"{"messages": [{"role": "user", "content": "hi"}]}"#, json!("messages")),
        (r#"{"max_tokens": 4}"#, json!("prompt")),
        (&too_long, json!("prompt_token_ids")),
        (&out_of_vocabulary, json!("prompt_token_ids")),
    ];
    let mut lines = good.clone();
    let bad_lines = bad.iter().map(|(line, _)| (*line).to_owned());
    lines.splice(1..1, bad_lines);
    let (run, out) = batch(&fixture("llama_gqa"), &lines, &[]);
    assert_eq!(run.code, Some(1), "{}", run.stderr);
    assert_eq!(out.len(), lines.len(), "{}", run.stdout);
    for (index, line) in out.iter().enumerate() {
        assert_eq!(line["index"], index);
        if let Some((text, param)) = index.checked_sub(1).and_then(|index| bad.get(index)) {
            assert_eq!(line["error"]["param"], *param, "{text}: {line}");
            assert!(line["error"]["message"].as_str().unwrap().len() > 10, "{line}");
            assert_eq!(line.get("outputs"), None);
        } else {
            let item = &golden[index.saturating_sub(bad.len())];
            assert_eq!(line["outputs"][0]["token_ids"], item["greedy"], "line {index}");
        }
    }
}

#[test]
fn options_are_the_defaults_of_the_lines() {
    let lines = [
        r#"{"prompt_token_ids": [146]}"#,
        r#"{"prompt_token_ids": [146], "max_tokens": 3, "ignore_eos": false}"#,
    ];
    let lines = lines.map(str::to_owned);
    let (_, out) =
        batch(&fixture("llama_gqa"), &lines, &["--temperature", "0", "--max-tokens", "9", "--ignore-eos"]);
    let tokens = |line: &Value| line["outputs"][0]["token_ids"].as_array().unwrap().clone();
    let greedy = golden("llama_gqa")[0]["greedy"].as_array().unwrap().clone();
    assert_eq!(tokens(&out[0]), greedy[..9]);
    assert_eq!(tokens(&out[1]), greedy[..3]);
    // Without any, 16 tokens are sampled.
    let (_, out) = batch(&fixture("llama_gqa"), &lines[..1], &["--ignore-eos"]);
    assert_eq!(tokens(&out[0]).len(), 16);
}

#[test]
fn log_probabilities_read_back_to_their_f32() {
    let prompt = [1, 2, 3];
    let line = json!({"prompt_token_ids": prompt, "max_tokens": 2, "temperature": 0, "ignore_eos": true, "logprobs": 3,
        "prompt_logprobs": 0});
    let (run, out) = batch(&fixture("llama_gqa"), &[line.to_string()], &[]);
    let entries = out[0]["outputs"][0]["logprobs"].as_array().unwrap();
    assert_eq!(entries.len(), 2);
    for (entry, token) in entries.iter().zip(out[0]["outputs"][0]["token_ids"].as_array().unwrap()) {
        assert_eq!(entry["token_id"], *token);
        assert_eq!(entry["top"].as_array().unwrap().len(), 3);
        assert_eq!(entry["top"][0], json!({"token_id": token, "logprob": entry["logprob"]}));
    }
    let prompt_entries = out[0]["prompt_logprobs"].as_array().unwrap();
    assert_eq!((prompt_entries.len(), &prompt_entries[0]), (prompt.len(), &Value::Null));
    assert_eq!(prompt_entries[1]["token_id"], 2);
    for digits in run.stdout.split("\"logprob\":").skip(1) {
        let digits = digits.split([',', '}']).next().unwrap();
        let number: f32 = digits.parse().unwrap();
        assert!(number <= 0.0 && number.is_finite());
        // Rust prints the shortest digits that read back to the same f32.
        assert_eq!(format!("{number:?}").trim_end_matches(".0"), digits.trim_end_matches(".0"));
    }
}

#[test]
fn a_seed_makes_sampling_repeatable() {
    let line =
        json!({"prompt_token_ids": [7], "max_tokens": 12, "n": 3, "seed": 5, "ignore_eos": true}).to_string();
    let (_, out) = batch(&fixture("qwen2"), &[line.clone(), line], &["--no-prefix-cache"]);
    assert_eq!(out[0]["outputs"].as_array().unwrap().len(), 3);
    assert_eq!(out[0]["outputs"], out[1]["outputs"]);
    assert_ne!(out[0]["outputs"][0], out[0]["outputs"][1]);
}

#[test]
fn a_dummy_model_needs_a_configuration_only() {
    let dir = TempDir::new().unwrap();
    std::fs::copy(fixture("llama_gqa").join("config.json"), dir.path().join("config.json")).unwrap();
    let line = json!({"prompt_token_ids": [1, 2], "max_tokens": 4, "ignore_eos": true}).to_string();
    let (run, out) = batch(dir.path(), &[line], &["--load-format", "dummy"]);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    assert_eq!(out[0]["outputs"][0]["token_ids"].as_array().unwrap().len(), 4);
}

#[test]
fn an_empty_batch_is_done_at_once() {
    let (run, out) = batch(&fixture("llama_gqa"), &[], &[]);
    assert_eq!((run.code, out.len(), run.stderr.as_str()), (Some(0), 0, ""));
}

#[test]
fn text_streams_and_is_the_text_of_the_json() {
    let dir = model_with_text();
    let model = dir.path().to_str().unwrap();
    let args =
        ["generate", "Hello", "--model", model, "--temperature", "0", "--max-tokens", "24", "--ignore-eos"];
    let plain = pagewise(&args, "");
    assert_eq!((plain.code, plain.stderr.as_str()), (Some(0), ""));
    let json = pagewise(&[&args[..], &["--json"]].concat(), "");
    let line: Value = serde_json::from_str(&json.stdout).unwrap();
    assert_eq!(plain.stdout, format!("{}\n", line["outputs"][0]["text"].as_str().unwrap()));
    assert_eq!(line["usage"]["prompt_tokens"], 5);
    // Text and its bytes as ids are the same prompt.
    let ids = json!({"prompt_token_ids": "Hello".bytes().collect::<Vec<_>>(), "max_tokens": 24}).to_string();
    let (_, out) = batch(dir.path(), &[ids], &["--temperature", "0", "--ignore-eos"]);
    assert_eq!(out[0]["outputs"], line["outputs"]);
}

#[test]
fn a_chat_goes_through_the_template() {
    let dir = model_with_text();
    let model = dir.path().to_str().unwrap();
    let greedy = ["--model", model, "--temperature", "0", "--max-tokens", "5", "--ignore-eos"];
    let one_turn = pagewise(&[&["chat", "Hi", "--system", "S"], &greedy[..]].concat(), "");
    assert_eq!(one_turn.code, Some(0), "{}", one_turn.stderr);

    let messages =
        json!({"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]});
    let (_, out) = batch(dir.path(), &[messages.to_string()], &greedy[2..]);
    let rendered = json!({"prompt": "system:S;user:Hi;assistant:"}).to_string();
    let (_, same) = batch(dir.path(), &[rendered], &greedy[2..]);
    assert_eq!(out[0]["outputs"], same[0]["outputs"]);
    assert_eq!(one_turn.stdout, format!("{}\n", out[0]["outputs"][0]["text"].as_str().unwrap()));

    // A conversation: the same first turn, then one that remembers it, then one that has forgotten.
    let input = "Hi\nMore\n/clear\nHi\n/what\n/quit\nnot read\n";
    let talk = pagewise(&[&["chat", "--system", "S"], &greedy[..]].concat(), input);
    assert_eq!(talk.code, Some(0), "{}", talk.stderr);
    let answer = one_turn.stdout.trim_end_matches('\n');
    let second =
        json!({"prompt": format!("system:S;user:Hi;assistant:{answer};user:More;assistant:")}).to_string();
    let (_, second) = batch(dir.path(), &[second], &greedy[2..]);
    let second = second[0]["outputs"][0]["text"].as_str().unwrap();
    assert_eq!(talk.stdout, format!("{answer}\n{second}\n{answer}\n"));
    assert!(talk.stderr.contains("/what is unknown"), "{}", talk.stderr);
}

#[test]
fn caches_of_fp8_are_another_rounding_of_the_same_answer() {
    let llama = fixture("llama_gqa");
    let logprobs = |dtype: &str| {
        let args = ["generate", "--prompts", "-", "--json", "--model", llama.to_str().unwrap()];
        let options = ["--backend", "cpu", "--kv-dtype", dtype];
        let prompt = r#"{"prompt_token_ids": [5, 6, 7, 8, 9, 10, 11, 12], "max_tokens": 1, "temperature": 0, "logprobs": 1}"#;
        let run = pagewise(&[&args[..], &options].concat(), prompt);
        assert_eq!(run.code, Some(0), "{}", run.stderr);
        let line: Value = serde_json::from_str(&run.stdout).unwrap();
        line["outputs"][0]["logprobs"][0]["logprob"].as_f64().unwrap()
    };
    let [exact, fp8, e4m3, e5m2] = ["auto", "fp8", "fp8_e4m3", "fp8_e5m2"].map(logprobs);
    assert_eq!(fp8, e4m3, "fp8 is short for fp8_e4m3");
    assert!(exact != e4m3 && exact != e5m2 && e4m3 != e5m2, "{exact} {e4m3} {e5m2}");
}

#[test]
fn failures_are_one_message_an_exit_code_and_an_empty_stdout() {
    let llama = fixture("llama_gqa");
    let llama = llama.to_str().unwrap();
    let text = model_with_text();
    let text = text.path().to_str().unwrap();
    let empty = TempDir::new().unwrap();
    let empty = empty.path().to_str().unwrap();
    let long = "x".repeat(129);
    // Arguments, exit code, and a part of the message.
    let table: &[(&[&str], i32, &str)] = &[
        (&[], 2, "Usage"),
        (&["frobnicate"], 2, "frobnicate"),
        (&["generate"], 2, "--model"),
        (&["generate", "--model", llama], 2, "PROMPT"),
        (&["generate", "hi"], 2, "--model"),
        (&["generate", "hi", "--prompts", "x", "--model", llama], 2, "--prompts"),
        (&["generate", "hi", "--model", llama, "--backend", "tpu"], 2, "tpu"),
        (&["generate", "hi", "--model", llama, "--dtype", "int4"], 2, "int4"),
        (&["generate", "hi", "--model", llama, "--kv-dtype", "int4"], 2, "fp8_e4m3"),
        (&["generate", "hi", "--model", llama, "--temperature", "warm"], 2, "warm"),
        (&["generate", "hi", "--model", llama, "--temperature", "nan"], 2, "nan"),
        (&["generate", "hi", "--model", llama, "--max-tokens", "-3"], 2, "-3"),
        (&["generate", "hi", "--model", llama, "--max-num-seqs", "0"], 2, "max-num-seqs"),
        (&["generate", "hi", "--model", llama, "--kv-memory", "lots"], 2, "lots"),
        (&["generate", "hi", "--model", llama, "--kv-memory", "1GiB", "--kv-blocks", "9"], 2, "--kv-blocks"),
        (&["generate", "hi", "--model", llama, "--early-stopping", "soon"], 2, "soon"),
        (&["generate", "hi", "--model", llama, "--frobnicate"], 2, "--frobnicate"),
        (&["chat", "hi", "--model", text, "-n", "2"], 2, "--n"),
        (&["generate", "hi", "--model", "/no/such/model"], 1, "/no/such/model"),
        (&["generate", "hi", "--model", empty], 1, "config.json"),
        (&["generate", "hi", "--model", llama], 1, "tokenizer.json"),
        (&["chat", "hi", "--model", llama], 1, "tokenizer.json"),
        (&["generate", "--prompts", "/no/such/file", "--model", llama], 1, "/no/such/file"),
        (&["generate", &long, "--model", text], 1, "129"),
        (&["generate", "hi", "--model", text, "--temperature", "-1"], 2, "--temperature"),
        (&["generate", "hi", "--model", text, "--json", "--top-p", "2"], 2, "--top-p"),
        (&["generate", "hi", "--model", text, "--block-size", "12"], 2, "--block-size"),
        (&["generate", "hi", "--model", text, "--max-model-len", "4096"], 1, "--max-model-len"),
        (&["generate", "hi", "--model", text, "--kv-blocks", "0"], 2, "--kv-blocks"),
        (&["generate", "hi", "--model", text, "--kv-memory", "1000TiB"], 1, "--kv-memory"),
        (&["generate", "hi", "--model", text, "--n", "18446744073709551615"], 1, "max-num-seqs"),
        (&["generate", "hi", "--model", text, "--threads", "100000"], 1, "--threads"),
        (&["generate", "hi", "--model", text, "--swap-space", "1000TiB"], 1, "--swap-space"),
        (&["generate", "hi", "--model", text, "--swap-space", "7"], 1, "--swap-space"),
        (&["generate", "hi", "--model", text, "--preemption", "swap"], 1, "--swap-space"),
        (&["generate", "hi", "--model", text, "--beam-width", "2", "--n", "3"], 2, "--n"),
        (&["generate", "hi", "--model", text, "--beam-width", "9", "--max-num-seqs", "8"], 1, "beam_width"),
    ];
    for (args, code, part) in table {
        let run = pagewise(args, "");
        assert_eq!((run.code, run.stdout.as_str()), (Some(*code), ""), "{args:?}: {}", run.stderr);
        assert!(run.stderr.contains(part), "{args:?}: {}", run.stderr);
        assert!(!run.stderr.contains("panicked"), "{args:?}: {}", run.stderr);
        if *code == 1 {
            assert!(run.stderr.starts_with("error: "), "{args:?}: {}", run.stderr);
            assert_eq!(run.stderr.lines().count(), 1, "{args:?}: {}", run.stderr);
        }
    }
}

#[test]
fn a_backend_that_is_not_there_is_refused() {
    let text = model_with_text();
    for (backend, hidden_by, value) in
        [("cuda", "CUDA_VISIBLE_DEVICES", ""), ("wgpu", "PAGEWISE_WGPU_ADAPTER", "no such adapter")]
    {
        let model = text.path().to_str().unwrap();
        let mut command = command();
        command.args(["generate", "hi", "--model", model, "--backend", backend]).env(hidden_by, value);
        let Output { status, stdout, stderr } = command.output().unwrap();
        let stderr = String::from_utf8(stderr).unwrap();
        assert_eq!((status.code(), stdout.as_slice()), (Some(1), b"".as_slice()), "{stderr}");
        assert!(stderr.starts_with(&format!("error: --backend: {backend} cannot be had: ")), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
    }
}

/// The searches of the golden file whose end token is the model's own, in one batch with a greedy line, in a cache so
/// small that requests are swapped out.
#[test]
fn beams_through_the_command_line() {
    let name = "llama_gqa";
    let golden = golden(name);
    let searches: Vec<(&Value, &Value)> = golden
        .iter()
        .flat_map(|item| item["beam"].as_array().unwrap().iter().map(move |beam| (item, beam)))
        .filter(|(_, beam)| !beam["eos_token_id"].is_null())
        .collect();
    let line = |(item, beam): &(&Value, &Value)| {
        json!({
            "prompt_token_ids": item["prompt"], "max_tokens": beam["max_new_tokens"], "n": 3,
            "beam_width": beam["num_beams"], "length_penalty": beam["length_penalty"],
            "early_stopping": beam["early_stopping"],
        })
        .to_string()
    };
    let mut lines: Vec<String> = searches.iter().map(line).collect();
    lines.push(json!({"prompt_token_ids": [5, 6], "max_tokens": 3, "temperature": 0}).to_string());
    lines.push(json!({"prompt_token_ids": [5], "beam_width": 2, "stop": "x"}).to_string());
    lines.push(json!({"prompt_token_ids": [5], "beam_width": 40}).to_string());
    let options = ["--kv-blocks", "48", "--block-size", "4", "--swap-space", "1MiB", "--preemption", "swap"];
    let options = [&options[..], &["--max-num-seqs", "32"]].concat();
    let (run, out) = batch(&fixture(name), &lines, &options);
    assert_eq!((run.code, out.len()), (Some(1), lines.len()), "{}", run.stderr);
    for ((_, beam), found) in searches.iter().zip(&out) {
        let outputs = found["outputs"].as_array().unwrap();
        assert_eq!(outputs.len(), 3);
        for (at, output) in outputs.iter().enumerate() {
            assert_eq!(output["token_ids"], beam["sequences"][at]);
            let [score, expected] =
                [&output["score"], &beam["scores"][at]].map(|score| score.as_f64().unwrap());
            assert!((score - expected).abs() < 1e-4, "{score}, golden {expected}");
        }
    }
    let [greedy, stop, wide] = &out[searches.len()..] else { panic!("{out:?}") };
    assert!(greedy["outputs"][0].get("score").is_none());
    assert_eq!((&stop["error"]["param"], &wide["error"]["param"]), (&json!("stop"), &json!("beam_width")));
}

#[test]
fn help_and_version_go_to_stdout() {
    for command in ["generate", "chat"] {
        let run = pagewise(&[command, "--help"], "");
        assert_eq!((run.code, run.stderr.as_str()), (Some(0), ""));
        assert!(run.stdout.contains("Examples:") && run.stdout.contains("--model"), "{}", run.stdout);
    }
    let run = pagewise(&["--version"], "");
    assert_eq!(run.stdout, format!("pagewise {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn doctor_speaks_of_every_backend() {
    let run = pagewise(&["doctor"], "");
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    for part in ["--backend auto", "cpu", "threads: ", "cuda", "wgpu", "write_kv "] {
        assert!(run.stdout.contains(part), "{part}: {}", run.stdout);
    }
}

#[test]
fn verbose_speaks_on_stderr_only() {
    let (run, out) = batch(&fixture("llama_gqa"), &[r#"{"prompt_token_ids": [1]}"#.to_owned()], &["-v"]);
    assert_eq!((run.code, out.len()), (Some(0), 1));
    assert!(run.stderr.contains("model loaded"), "{}", run.stderr);
}

#[test]
fn a_reader_that_goes_away_is_no_panic() {
    let model = fixture("llama_gqa");
    let mut child = command()
        .args(["generate", "--prompts", "-", "--json", "--model", model.to_str().unwrap()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    child.stdin.take().unwrap().write_all(b"{\"prompt_token_ids\": [1]}\n").unwrap();
    let Output { status, stderr, .. } = child.wait_with_output().unwrap();
    assert_eq!((status.code(), String::from_utf8_lossy(&stderr).as_ref()), (Some(1), ""));
}

#[test]
fn conformance_counts_its_cases_and_names_what_is_not_there() {
    let case = "attention q=f32 kv=f32 heads=4/2 dim=64 block=16 mask=causal sequences=4:70,1:9";
    let run = pagewise(&["conformance", "--backend", "cpu", "--case", case, "--json"], "");
    assert_eq!(run.code, Some(0), "{run:?}");
    let lines: Vec<Value> = run.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let [report, sums] = lines.as_slice() else { panic!("{run:?}") };
    assert_eq!(*sums, json!({"passed": 1, "failed": 0, "skipped": 0}));
    assert!(report["subject"].as_str().unwrap().starts_with("cpu"), "{report}");

    let run = pagewise(&["conformance", "--case", "attention dim=0"], "");
    assert_eq!((run.code, run.stdout.as_str()), (Some(2), ""), "{run:?}");
    let run = pagewise(&["conformance", "--backend", "cuda"], "");
    assert_eq!((run.code, run.stdout.as_str()), (Some(2), ""), "{run:?}");
}
