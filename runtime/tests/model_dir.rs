//! The reference models and their files are read as they are meant.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking, its helpers too")]

use pagewise_attention::{DType, HostTensor};
use pagewise_runtime::model_dir::{Activation, Architecture, ModelDir, RopeScaling, Weights};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Those whose embedding is called as Llama's.
const MODELS: [&str; 7] = ["llama_gqa", "llama_rope3", "qwen2", "mistral_swa", "qwen3", "phi3", "gemma2"];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name)
}

#[test]
fn both_spellings_of_the_configuration_say_the_same() {
    for name in MODELS {
        let new = ModelDir::open(&fixture(name)).unwrap();
        let directory = tempfile::tempdir().unwrap();
        std::fs::copy(fixture(name).join("config.v4.json"), directory.path().join("config.json")).unwrap();
        let old = ModelDir::open(directory.path()).unwrap();
        assert_eq!(new.config, old.config, "{name}");
        // Without generation_config.json the end tokens are those of config.json.
        assert_eq!(new.generation.eos_token_ids, old.generation.eos_token_ids, "{name}");
        assert_eq!(new.generation.eos_token_ids.len(), 1);
    }
}

#[test]
fn configurations_are_read_as_meant() {
    let open = |name| ModelDir::open(&fixture(name)).unwrap().config;

    let llama = open("llama_gqa");
    assert_eq!(llama.architecture, Architecture::Llama);
    assert_eq!((llama.vocab_size, llama.hidden_size, llama.intermediate_size), (256, 64, 96));
    assert_eq!((llama.q_heads, llama.kv_heads, llama.head_dim, llama.num_layers()), (4, 2, 16, 2));
    assert_eq!((llama.max_positions, llama.norm_eps, llama.rope.unwrap().theta), (128, 1e-5, 10_000.0));
    assert_eq!((llama.qkv_bias, llama.output_bias, llama.mlp_bias), (false, false, false));
    assert!(!llama.tie_word_embeddings);
    assert_eq!((llama.bos_token_id, llama.eos_token_ids.as_slice()), (Some(1), [237].as_slice()));

    let rope3 = open("llama_rope3");
    let scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_positions: 32,
    };
    assert_eq!(rope3.rope.unwrap().scaling, scaling);
    assert!(rope3.tie_word_embeddings);

    let qwen2 = open("qwen2");
    assert_eq!(qwen2.architecture, Architecture::Qwen2);
    assert_eq!((qwen2.qkv_bias, qwen2.output_bias), (true, false));
    assert_eq!((qwen2.layer_windows, qwen2.rope.unwrap().theta, qwen2.head_dim), (vec![None; 2], 1e6, 16));

    let mistral = open("mistral_swa");
    assert_eq!(mistral.architecture, Architecture::Mistral);
    assert_eq!(mistral.layer_windows, vec![Some(8); 2]);
}

#[test]
fn other_families_are_read_as_meant() {
    let open = |name| ModelDir::open(&fixture(name)).unwrap().config;

    let opt = open("opt_postln_proj");
    assert_eq!((opt.architecture, opt.activation), (Architecture::Opt, Activation::Relu));
    assert_eq!((opt.embedding_size, opt.hidden_size, opt.intermediate_size), (32, 64, 128));
    assert_eq!((opt.norm_before, opt.final_norm, opt.norm_eps), (false, false, 1e-5));
    assert_eq!((opt.qkv_bias, opt.output_bias, opt.mlp_bias), (true, true, true));
    assert!(opt.rope.is_none() && opt.tie_word_embeddings);
    assert_eq!((open("opt_heads80").head_dim, open("opt_heads128").head_dim), (80, 128));

    let gpt2 = open("gpt2");
    assert_eq!((gpt2.architecture, gpt2.activation), (Architecture::Gpt2, Activation::GeluTanh));
    assert_eq!((gpt2.kv_heads, gpt2.head_dim, gpt2.max_positions), (4, 16, 128));
    assert!(gpt2.norm_before && gpt2.final_norm && gpt2.rope.is_none());

    let gemma2 = open("gemma2");
    assert_eq!(gemma2.layer_windows, [Some(8), None, Some(8)]);
    assert_eq!((gemma2.attention_softcap, gemma2.logit_softcap), (Some(5.0), Some(10.0)));
    assert_eq!((gemma2.attention_scale, gemma2.activation), (24f64.powf(-0.5) as f32, Activation::GeluTanh));
    let (groups, layers) = gemma2.kv_groups();
    assert_eq!((groups.len(), layers), (2, vec![0, 1, 0]));

    let phi3 = open("phi3");
    let rope = phi3.rope.unwrap();
    assert_eq!((rope.rotary_dim, phi3.head_dim, phi3.max_positions), (12, 16, 128));
    let RopeScaling::LongRope { short_factors, attention_factor } = rope.scaling else { panic!() };
    assert_eq!(short_factors, [1.0, 1.05, 1.1, 1.2, 1.35, 1.5]);
    // Four times the context of the training: sqrt(1 + ln 4 / ln 128).
    assert!((attention_factor - 1.133_893_4).abs() < 1e-6, "{attention_factor}");

    assert_eq!((open("qwen3").head_dim, open("qwen3").attention_scale), (24, 1.0 / 24f32.sqrt()));
}

/// A fixture's configuration with some fields changed; null in `change` is null in the file.
fn changed(name: &str, change: Value) -> Result<ModelDir, String> {
    let mut config: Value =
        serde_json::from_slice(&std::fs::read(fixture(name).join("config.json")).unwrap()).unwrap();
    for (field, value) in change.as_object().unwrap() {
        config[field] = value.clone();
    }
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("config.json"), config.to_string()).unwrap();
    ModelDir::open(directory.path()).map_err(|error| error.to_string())
}

#[test]
fn spellings_of_published_configurations() {
    let config = |name, change| changed(name, change).unwrap().config;
    let full = vec![None; 2];
    assert_eq!(config("mistral_swa", json!({"sliding_window": null})).layer_windows, full);
    let windows = json!({"use_sliding_window": true, "sliding_window": 32, "max_window_layers": 1, "layer_types": null});
    assert_eq!(config("qwen2", windows).layer_windows, [None, Some(32)]);
    let off = json!({"use_sliding_window": false, "sliding_window": 131_072, "max_window_layers": 28, "layer_types": null});
    assert_eq!(config("qwen2", off).layer_windows, full);
    assert_eq!(config("phi3", json!({"sliding_window": 2047})).layer_windows, [Some(2047); 2]);

    // As Gemma 2 was first published: no layer types, and the activation under both names.
    let early = json!({"layer_types": null, "hidden_act": "gelu_pytorch_tanh"});
    assert_eq!(config("gemma2", early), config("gemma2", json!({})));
    let plain = config("gemma2", json!({"attn_logit_softcapping": null, "final_logit_softcapping": null}));
    assert_eq!((plain.attention_softcap, plain.logit_softcap), (None, None));

    let biases = config("llama_gqa", json!({"attention_bias": true, "mlp_bias": true}));
    assert_eq!((biases.qkv_bias, biases.output_bias, biases.mlp_bias), (true, true, true));

    // As Phi-3's first long models were published.
    let ones = vec![1.0; 6];
    let su = json!({"rope_parameters": null, "partial_rotary_factor": 0.75,
        "rope_scaling": {"type": "su", "short_factor": ones, "long_factor": ones}});
    let rope = config("phi3", su).rope.unwrap();
    assert!(matches!(rope.scaling, RopeScaling::LongRope { .. }), "{rope:?}");

    // Galactica is an OPT without biases and with GELU.
    let galactica = config("opt_preln", json!({"enable_bias": false, "activation_function": "gelu"}));
    assert_eq!(
        (galactica.qkv_bias, galactica.mlp_bias, galactica.activation),
        (false, false, Activation::Gelu)
    );
    assert!(!config("opt_preln", json!({"_remove_final_layer_norm": true})).final_norm);

    let gpt2 = config("gpt2", json!({"n_inner": null, "n_ctx": 128, "reorder_and_upcast_attn": true}));
    assert_eq!(gpt2.intermediate_size, 256);
    assert_eq!(config("gpt2", json!({"scale_attn_weights": false})).attention_scale, 1.0);
}

#[test]
fn what_is_not_known_or_not_served_is_said() {
    for name in
        ["llama_gqa", "qwen2", "mistral_swa", "qwen3", "gemma2", "opt_preln", "opt_postln_proj", "gpt2"]
    {
        assert_eq!(ModelDir::open(&fixture(name)).unwrap().notes, [""; 0], "{name}");
    }
    let notes = changed("llama_gqa", json!({"cosine_attention": true, "nothing": null})).unwrap().notes;
    let [note] = notes.as_slice() else { panic!("{notes:?}") };
    assert!(note.contains("'cosine_attention'") && !note.contains("nothing'"), "{note}");

    let notes = ModelDir::open(&fixture("phi3")).unwrap().notes;
    let [note] = notes.as_slice() else { panic!("{notes:?}") };
    assert!(note.contains("up to 128 of its 512 positions"), "{note}");
}

#[test]
fn weights_are_found_by_name_and_shape() {
    for name in MODELS {
        let weights = Weights::open(&fixture(name)).unwrap();
        let tensor = weights.tensor("model.embed_tokens.weight", &[256, 64]).unwrap();
        assert_eq!((tensor.dtype(), tensor.shape()), (DType::F32, [256, 64].as_slice()));
        let HostTensor::F32(elements) = tensor.host() else { panic!("{name}") };
        assert_eq!(elements.len(), 256 * 64);
        assert!(elements.iter().all(|x| x.is_finite()) && elements.iter().any(|x| *x != 0.0));
        let length = fixture(name).join("model.safetensors").metadata().unwrap().len();
        assert_eq!(weights.file_bytes(), length);
        assert!(weights.contains("model.norm.weight") && !weights.contains("model.norm"));
        assert_eq!(weights.contains("lm_head.weight"), ["llama_gqa", "phi3"].contains(&name));
    }
}
