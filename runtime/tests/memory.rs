//! What a run of the binary keeps in memory at most: the weights (mapped pages counted), the KV cache it was
//! allowed, and 150 MB for everything else.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use serde_json::json;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

const MB: u64 = 1_000_000;
const CACHE_MIB: u64 = 64;

/// The largest resident size of a process so far, in bytes; `None` once it has gone.
fn peak(process: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// Peak memory of a batch of prompts, computed in full steps, some with log-probabilities of every token.
fn peak_of_a_batch(model: &Path, vocab_size: u64) -> u64 {
    let mut child = Command::new(env!("CARGO_BIN_EXE_pagewise"))
        .args(["generate", "--prompts", "-", "--json", "--kv-memory", &format!("{CACHE_MIB}MiB"), "--model"])
        .arg(model)
        .env("HF_HUB_OFFLINE", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    for line in 0..4u64 {
        let tokens: Vec<u64> = (0..120).map(|i| (i * 7919 + line * 104_729) % vocab_size).collect();
        let mut request =
            json!({ "prompt_token_ids": tokens, "max_tokens": 4, "temperature": 0, "ignore_eos": true });
        if line == 3 {
            request["prompt_logprobs"] = json!(1);
        }
        writeln!(input, "{request}").unwrap();
    }
    drop(input);
    let mut output = child.stdout.take().unwrap();
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        output.read_to_string(&mut text).unwrap();
        text
    });
    let mut largest = 0;
    while child.try_wait().unwrap().is_none() {
        largest = largest.max(peak(child.id()).unwrap_or(0));
        std::thread::sleep(Duration::from_millis(1));
    }
    let text = reader.join().unwrap();
    assert!(child.wait().unwrap().success(), "{text}");
    assert_eq!(text.lines().filter(|line| line.contains("token_ids")).count(), 4, "{text}");
    largest
}

fn check(model: &Path, vocab_size: u64) {
    let weights = std::fs::metadata(model.join("model.safetensors")).unwrap().len();
    let largest = peak_of_a_batch(model, vocab_size);
    let allowed = weights + (CACHE_MIB << 20) + 150 * MB;
    let shown = format!("{}: {} MB, allowed {} MB", model.display(), largest / MB, allowed / MB);
    assert!(largest > 0 && largest <= allowed, "{shown}");
    eprintln!("{shown}");
}

#[test]
fn a_small_model() {
    check(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/llama_gqa"), 256);
}

#[test]
fn smollm2() {
    let cache = || {
        let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache"));
        let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(home)?;
        Some(cache.join("pagewise/models/SmolLM2-135M-Instruct-f32"))
    };
    let directory = std::env::var_os("PAGEWISE_SMOLLM2").map(PathBuf::from).or_else(cache);
    match directory.filter(|directory| directory.join("model.safetensors").is_file()) {
        Some(directory) => check(&directory, 49_152),
        None => {
            let missing = "SmolLM2 is not there; run scripts/fetch-smollm2 --dtype f32";
            assert!(std::env::var("CI").as_deref() != Ok("true"), "{missing}");
            eprintln!("SKIPPED: {missing}");
        }
    }
}
