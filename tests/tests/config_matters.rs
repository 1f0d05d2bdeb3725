//! Whatever a configuration can say and the code reads changes the logits: a field of a fixture's `config.json` is
//! changed, and the goldens must not be met any more. It shows that the goldens see every feature of every family.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use pagewise_attention::DType;
use pagewise_runtime::load::{LoadOptions, load};
use pagewise_runtime::request::{Request, SamplingParams};
use pagewise_tests::fixture;
use serde_json::{Value, json};

/// Log-probabilities of a greedy continuation and of its prompt, with some fields of the configuration changed.
fn logprobs(name: &str, change: &Value) -> Vec<f32> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    let mut config: Value =
        serde_json::from_slice(&std::fs::read(fixture(name).join("config.json")).unwrap()).unwrap();
    for (field, value) in change.as_object().unwrap() {
        config[field] = value.clone();
    }
    std::fs::write(path, config.to_string()).unwrap();
    std::fs::copy(fixture(name).join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
    let mut options = LoadOptions::new(dir.path().to_str().unwrap());
    options.kv_dtype = Some(DType::F32);
    let mut model = load(&options, &mut |_| {}).unwrap();
    let prompt: Vec<u32> = (0..40).map(|i| 2 + i * 37 % 250).collect();
    let params = SamplingParams {
        max_tokens: 4,
        temperature: 0.0,
        ignore_eos: true,
        prompt_logprobs: Some(0),
        ..SamplingParams::default()
    };
    let output = model.engine.generate(vec![Request::new(prompt, params)]).unwrap().remove(0).unwrap();
    let entries = output.prompt_logprobs.unwrap().into_iter().flatten();
    entries.map(|entry| entry.token.logprob).collect()
}

#[test]
fn every_field_that_is_read_changes_the_logits() {
    let cases = [
        ("llama_gqa", json!({"rms_norm_eps": 0.1})),
        ("llama_gqa", json!({"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}})),
        ("llama_gqa", json!({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}})),
        ("llama_gqa", json!({"hidden_act": "relu"})),
        ("llama_gqa", json!({"hidden_act": "gelu"})),
        ("llama_gqa", json!({"tie_word_embeddings": true})),
        ("llama_rope3", json!({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}})),
        ("mistral_swa", json!({"sliding_window": null})),
        ("mistral_swa", json!({"sliding_window": 9})),
        (
            "qwen2",
            json!({"use_sliding_window": true, "sliding_window": 4, "max_window_layers": 1, "layer_types": null}),
        ),
        (
            "qwen3",
            json!({"use_sliding_window": true, "sliding_window": 4, "max_window_layers": 1, "layer_types": null}),
        ),
        ("phi3", json!({"sliding_window": 16})),
        (
            "phi3",
            json!({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}}),
        ),
        ("phi3", json!({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}})),
        ("phi3", json!({"max_position_embeddings": 1024})),
        ("gemma2", json!({"attn_logit_softcapping": null})),
        ("gemma2", json!({"final_logit_softcapping": null})),
        ("gemma2", json!({"query_pre_attn_scalar": 16})),
        ("gemma2", json!({"sliding_window": null})),
        ("gemma2", json!({"layer_types": ["full_attention", "sliding_attention", "full_attention"]})),
        ("gemma2", json!({"hidden_activation": "gelu"})),
        ("opt_preln", json!({"_remove_final_layer_norm": true})),
        ("opt_preln", json!({"do_layer_norm_before": false})),
        ("opt_preln", json!({"activation_function": "gelu"})),
        ("opt_preln", json!({"enable_bias": false})),
        ("gpt2", json!({"activation_function": "gelu"})),
        ("gpt2", json!({"scale_attn_weights": false})),
        ("gpt2", json!({"layer_norm_epsilon": 0.1})),
    ];
    for (name, change) in cases {
        let (before, after) = (logprobs(name, &json!({})), logprobs(name, &change));
        assert_eq!((before.len(), after.len()), (39, 39), "{name}");
        let largest = before.iter().zip(&after).fold(0.0f32, |largest, (a, b)| largest.max((a - b).abs()));
        // GELU and its approximation differ by 5e-4 at most: the smallest change of all.
        assert!(largest > 1e-4, "{name}: {change} changes {largest}");
    }
}
