//! What a Llama's `config.json` asks for: features, rotary embeddings, sizes.

use super::Case;
use crate::spoil::*;
use serde_json::json;

pub(super) fn cases() -> Vec<Case> {
    vec![
        // What is not supported
        (
            "unknown architecture",
            config(json!({"architectures": ["FooForCausalLM"]})),
            "DIR/config.json: architecture 'FooForCausalLM' is not supported; supported are LlamaForCausalLM, Qwen2ForCausalLM, MistralForCausalLM, Qwen3ForCausalLM, Phi3ForCausalLM, Gemma2ForCausalLM, OPTForCausalLM, GPT2LMHeadModel",
        ),
        (
            "unknown model type",
            all(vec![without("architectures"), config(json!({"model_type": "gpt9"}))]),
            "DIR/config.json: model_type 'gpt9' is not supported; supported are LlamaForCausalLM, Qwen2ForCausalLM, MistralForCausalLM, Qwen3ForCausalLM, Phi3ForCausalLM, Gemma2ForCausalLM, OPTForCausalLM, GPT2LMHeadModel",
        ),
        (
            "no architecture",
            all(vec![without("architectures"), without("model_type")]),
            "DIR/config.json: 'architectures' must be a list of one class name; it is missing",
        ),
        (
            "architecture of another type",
            config(json!({"model_type": "mistral"})),
            r#"DIR/config.json: 'model_type' must be "llama" for LlamaForCausalLM; found "mistral""#,
        ),
        (
            "architectures of the wrong type",
            config(json!({"architectures": "LlamaForCausalLM"})),
            r#"DIR/config.json: 'architectures' must be a list of strings; found "LlamaForCausalLM""#,
        ),
        (
            "quantized",
            config(json!({"quantization_config": {"bits": 4}})),
            "DIR/config.json: 'quantization_config' is not supported; use the unquantized model",
        ),
        (
            "other activation",
            config(json!({"hidden_act": "relu2"})),
            r#"DIR/config.json: 'hidden_act' = "relu2" is not supported; supported are silu, relu, gelu, gelu_new and gelu_pytorch_tanh"#,
        ),
        (
            "partial rotary embedding",
            config(json!({"partial_rotary_factor": 0.5})),
            "DIR/config.json: 'partial_rotary_factor' = 0.5 is not supported; only rotary embeddings of the whole head are",
        ),
        (
            "experts",
            config(json!({"num_local_experts": 8})),
            "DIR/config.json: 'num_local_experts' = 8 is not supported; only models without experts are",
        ),
        (
            "logit scale",
            config(json!({"logit_scale": 0.0625})),
            "DIR/config.json: 'logit_scale' = 0.0625 is not supported; logits have to be used as they are",
        ),
        (
            "sliding window in a Llama",
            config(json!({"sliding_window": 1024})),
            "DIR/config.json: 'sliding_window' = 1024 is not supported; LlamaForCausalLM attends to all positions",
        ),
        (
            "layer types in a Llama",
            config(json!({"layer_types": ["full_attention", "sliding_attention"]})),
            "DIR/config.json: 'layer_types' is not supported; all layers of this architecture have to be alike",
        ),
        (
            "unknown layer type",
            config(json!({"layer_types": ["full_attention", "linear_attention"]})),
            "DIR/config.json: layer type 'linear_attention' is not supported; supported are full_attention and sliding_attention",
        ),
        (
            "layer types of the wrong length",
            config(json!({"layer_types": ["full_attention"]})),
            "DIR/config.json: 'layer_types' must be a list of 'num_hidden_layers' = 2 entries; found a list of 1",
        ),
        // Rotary embedding
        (
            "unknown rope type",
            config(json!({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}})),
            r#"DIR/config.json: 'rope_parameters.rope_type' = "yarn" is not supported; supported are default, linear, llama3 and longrope"#,
        ),
        (
            "unknown rope type, old spelling",
            config(json!({"rope_parameters": null, "rope_scaling": {"type": "dynamic", "factor": 2.0}})),
            r#"DIR/config.json: 'rope_scaling.type' = "dynamic" is not supported; supported are default, linear, llama3 and longrope"#,
        ),
        (
            "rope without type",
            config(json!({"rope_parameters": {"factor": 2.0}})),
            r#"DIR/config.json: 'rope_parameters.rope_type' must be "default", "linear", "llama3" or "longrope"; it is missing"#,
        ),
        (
            "linear rope without factor",
            config(json!({"rope_parameters": {"rope_type": "linear"}})),
            "DIR/config.json: 'rope_parameters.factor' must be a number above 0; it is missing",
        ),
        (
            "negative rope factor",
            config(json!({"rope_parameters": {"rope_type": "linear", "factor": -2.0}})),
            "DIR/config.json: 'rope_parameters.factor' must be a number above 0; found -2.0",
        ),
        (
            "rope frequencies the wrong way round",
            config(
                json!({"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0, "original_max_position_embeddings": 32}}),
            ),
            "DIR/config.json: 'rope_parameters.high_freq_factor' must be above 'rope_parameters.low_freq_factor' = 4; found 1.0",
        ),
        (
            "rope with a stranger",
            config(json!({"rope_parameters": {"rope_type": "default", "mrope_section": [1, 2]}})),
            "DIR/config.json: 'rope_parameters.mrope_section' is not supported; rope type default has no such parameter",
        ),
        (
            "rope for each layer type",
            config(json!({"rope_parameters": {"full_attention": {"rope_type": "default"}}})),
            "DIR/config.json: 'rope_parameters.full_attention' is not supported; all layers have to share one rotary embedding",
        ),
        (
            "two ropes that differ",
            config(json!({"rope_scaling": {"rope_type": "linear", "factor": 2.0}})),
            "DIR/config.json: 'rope_parameters' and 'rope_scaling' are both given and do not agree",
        ),
        (
            "two thetas that differ",
            config(json!({"rope_theta": 500000.0})),
            "DIR/config.json: 'rope_parameters.rope_theta' must be equal to 'rope_theta' = 500000; found 10000.0",
        ),
        (
            "zero theta",
            config(json!({"rope_parameters": null, "rope_theta": 0})),
            "DIR/config.json: 'rope_theta' must be a number above 0; found 0",
        ),
        // Sizes
        (
            "missing size",
            without("hidden_size"),
            "DIR/config.json: 'hidden_size' must be a whole number from 1 to 1048576; it is missing",
        ),
        (
            "zero size",
            config(json!({"vocab_size": 0})),
            "DIR/config.json: 'vocab_size' must be a whole number from 1 to 16777216; found 0",
        ),
        (
            "negative size",
            config(json!({"intermediate_size": -96})),
            "DIR/config.json: 'intermediate_size' must be a whole number from 1 to 1048576; found -96",
        ),
        (
            "fractional size",
            config(json!({"hidden_size": 64.5})),
            "DIR/config.json: 'hidden_size' must be a whole number from 1 to 1048576; found 64.5",
        ),
        (
            "size as text",
            config(json!({"hidden_size": "64"})),
            r#"DIR/config.json: 'hidden_size' must be a whole number from 1 to 1048576; found "64""#,
        ),
        (
            "absurd number of layers",
            config(json!({"num_hidden_layers": 1_000_000_000_000_000_000u64})),
            "DIR/config.json: 'num_hidden_layers' must be a whole number from 1 to 1024; found 1000000000000000000",
        ),
        (
            "absurd vocabulary",
            config(json!({"vocab_size": 1_099_511_627_776u64})),
            "DIR/config.json: 'vocab_size' must be a whole number from 1 to 16777216; found 1099511627776",
        ),
        (
            "absurd number of positions",
            config(json!({"max_position_embeddings": 1_000_000_000_000u64})),
            "DIR/config.json: 'max_position_embeddings' must be a whole number from 1 to 67108864; found 1000000000000",
        ),
        (
            "heads that do not divide",
            config(json!({"num_key_value_heads": 3})),
            "DIR/config.json: 'num_key_value_heads' must be a divisor of 'num_attention_heads' = 4; found 3",
        ),
        (
            "more key heads than query heads",
            config(json!({"num_key_value_heads": 8})),
            "DIR/config.json: 'num_key_value_heads' must be a divisor of 'num_attention_heads' = 4; found 8",
        ),
        (
            "odd head",
            config(json!({"head_dim": 15})),
            "DIR/config.json: 'head_dim' must be an even number up to 256; found 15",
        ),
        (
            "large head",
            config(json!({"head_dim": 512})),
            "DIR/config.json: 'head_dim' must be an even number up to 256; found 512",
        ),
        (
            "implied head that does not divide",
            all(vec![without("head_dim"), config(json!({"hidden_size": 66}))]),
            "DIR/config.json: 'hidden_size' must be a multiple of 'num_attention_heads' = 4 where 'head_dim' is not given; found 66",
        ),
        (
            "implied head that is odd",
            all(vec![without("head_dim"), config(json!({"hidden_size": 60}))]),
            "DIR/config.json: 'hidden_size' must be such that 'hidden_size' / 'num_attention_heads' = 15, the dimension of a head, is an even number up to 256; found 60",
        ),
        (
            "zero epsilon",
            config(json!({"rms_norm_eps": 0.0})),
            "DIR/config.json: 'rms_norm_eps' must be a number above 0 and below 1; found 0.0",
        ),
        (
            "boolean as text",
            config(json!({"tie_word_embeddings": "no"})),
            r#"DIR/config.json: 'tie_word_embeddings' must be true or false; found "no""#,
        ),
        (
            "end token outside of the vocabulary",
            config(json!({"eos_token_id": [2, 256]})),
            "DIR/config.json: 'eos_token_id' must be a token id below the vocabulary's size 256, or a list of them; found a list of 2",
        ),
        (
            "negative end token",
            fields_of("generation_config.json", json!({"eos_token_id": -1})),
            "DIR/generation_config.json: 'eos_token_id' must be a token id below the vocabulary's size 256, or a list of them; found -1",
        ),
        (
            "negative temperature",
            fields_of("generation_config.json", json!({"temperature": -0.5})),
            "DIR/generation_config.json: 'temperature' must be a number from 0 to 100; found -0.5",
        ),
        (
            "top_p as text",
            fields_of("generation_config.json", json!({"top_p": "0.9"})),
            r#"DIR/generation_config.json: 'top_p' must be a number above 0 and at most 1; found "0.9""#,
        ),
    ]
}
