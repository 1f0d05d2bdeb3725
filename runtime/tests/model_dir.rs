//! The reference models and their files are read as they are meant.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking, its helpers too")]

use pagewise_attention::{DType, HostTensor};
use pagewise_runtime::model_dir::{Architecture, ModelDir, RopeScaling, Weights};
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
