//! Weights under the names that published checkpoints use: other prefixes or none, buffers beside them, an output
//! projection that is the embedding and stands there again. And weights that are made up. The model is the same.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use pagewise_runtime::load::{LoadFormat, LoadOptions, load};
use pagewise_runtime::request::{Request, SamplingParams};
use pagewise_tests::{FIXTURES, fixture};
use serde_json::{Map, Value, json};
use std::path::Path;

fn greedy(dir: &Path, change: impl FnOnce(&mut LoadOptions)) -> Vec<u32> {
    let mut options = LoadOptions::new(dir.to_str().unwrap());
    change(&mut options);
    let mut model = load(&options, &mut |_| {}).unwrap();
    let params =
        SamplingParams { max_tokens: 24, temperature: 0.0, ignore_eos: true, ..SamplingParams::default() };
    let request = Request::new((0..20).map(|i| 2 + i * 37 % 250).collect::<Vec<u32>>(), params);
    model.engine.generate(vec![request]).unwrap().remove(0).unwrap().outputs.remove(0).token_ids
}

/// A copy of a fixture's weights with other names, and with further tensors of one number each behind them.
fn renamed(name: &str, rename: impl Fn(&str) -> String, more: &[&str]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(fixture(name).join("config.json"), dir.path().join("config.json")).unwrap();
    let file = std::fs::read(fixture(name).join("model.safetensors")).unwrap();
    let (length, rest) = file.split_at(8);
    let (header, data) = rest.split_at(u64::from_le_bytes(length.try_into().unwrap()) as usize);
    let header: Map<String, Value> = serde_json::from_slice(header).unwrap();
    let tensors = header.into_iter().filter(|(name, _)| name != "__metadata__");
    let mut header: Map<String, Value> = tensors.map(|(name, entry)| (rename(&name), entry)).collect();
    let mut data = data.to_vec();
    for name in more {
        let begin = data.len();
        data.extend([0; 4]);
        header.insert(
            (*name).to_owned(),
            json!({"dtype": "F32", "shape": [1], "data_offsets": [begin, data.len()]}),
        );
    }
    let header = serde_json::to_vec(&header).unwrap();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend(data);
    std::fs::write(dir.path().join("model.safetensors"), file).unwrap();
    dir
}

#[test]
fn prefixes_and_further_tensors_change_nothing() {
    let cases: [(&str, &str, &str, &[&str]); 8] = [
        ("gpt2", "transformer.", "", &["h.0.attn.bias", "h.0.attn.masked_bias", "lm_head.weight"]),
        ("gpt2", "transformer.", "transformer.", &["transformer.h.0.attn.bias"]),
        ("opt_preln", "model.decoder.", "decoder.", &["lm_head.weight"]),
        ("opt_postln_proj", "model.decoder.", "decoder.", &[]),
        ("opt_preln", "model.decoder.", "", &[]),
        ("llama_rope3", "model.", "", &["layers.0.self_attn.rotary_emb.inv_freq"]),
        ("gemma2", "model.", "", &[]),
        ("phi3", "model.", "", &[]),
    ];
    for (name, usual, other, more) in cases {
        let rename = |tensor: &str| match tensor.strip_prefix(usual) {
            Some(rest) => format!("{other}{rest}"),
            None => tensor.to_owned(),
        };
        let dir = renamed(name, rename, more);
        assert_eq!(greedy(dir.path(), |_| {}), greedy(&fixture(name), |_| {}), "{name}, {other:?}");
    }
}

#[test]
fn made_up_weights_serve_every_family() {
    for name in FIXTURES {
        let dir = tempfile::tempdir().unwrap();
        std::fs::copy(fixture(name).join("config.json"), dir.path().join("config.json")).unwrap();
        let tokens = greedy(dir.path(), |options| options.load_format = LoadFormat::Dummy);
        assert_eq!(tokens.len(), 24, "{name}");
    }
}
