//! What only some families have, and what others are asked for in vain.

use super::Case;
use crate::spoil::*;
use serde_json::json;

pub(super) fn cases() -> Vec<(&'static str, Case)> {
    let with = |fixture: &'static str, cases: Vec<Case>| cases.into_iter().map(move |case| (fixture, case));
    with("opt_postln_proj", opt())
        .chain(with("gpt2", gpt2()))
        .chain(with("gemma2", gemma2()))
        .chain(with("phi3", phi3()))
        .chain(with("qwen3", qwen3()))
        .chain(with("mistral_swa", mistral()))
        .chain(with("qwen2", qwen2()))
        .collect()
}

fn opt() -> Vec<Case> {
    vec![
        (
            "norms without weights",
            config(json!({"layer_norm_elementwise_affine": false})),
            "DIR/config.json: 'layer_norm_elementwise_affine' = false is not supported; norms need their weights",
        ),
        (
            "unknown activation",
            config(json!({"activation_function": "mish"})),
            r#"DIR/config.json: 'activation_function' = "mish" is not supported; supported are silu, relu, gelu, gelu_new and gelu_pytorch_tanh"#,
        ),
        (
            "activation by another family's name",
            config(json!({"hidden_act": "gelu"})),
            r#"DIR/config.json: 'hidden_act' = "gelu" is not supported; OPTForCausalLM reads 'activation_function'"#,
        ),
        (
            "window",
            config(json!({"sliding_window": 8})),
            "DIR/config.json: 'sliding_window' = 8 is not supported; OPTForCausalLM attends to all positions",
        ),
        (
            "no width of the MLP",
            without("ffn_dim"),
            "DIR/config.json: 'ffn_dim' must be a whole number from 1 to 1048576; it is missing",
        ),
        (
            "norm order as text",
            config(json!({"do_layer_norm_before": "no"})),
            r#"DIR/config.json: 'do_layer_norm_before' must be true or false; found "no""#,
        ),
        (
            "norms before, with the weights of norms behind",
            config(json!({"do_layer_norm_before": true})),
            "DIR/model.safetensors: tensor 'model.decoder.final_layer_norm.weight' of shape [64] is missing",
        ),
        (
            "fewer positions than the table has",
            config(json!({"max_position_embeddings": 64})),
            "DIR/model.safetensors: tensor 'model.decoder.embed_positions.weight' has shape [130, 64]; the configuration asks for [66, 64]",
        ),
        (
            "wider embedding than the table's",
            config(json!({"word_embed_proj_dim": null})),
            "DIR/model.safetensors: tensor 'model.decoder.embed_tokens.weight' has shape [256, 32]; the configuration asks for [256, 64]",
        ),
        (
            "pickled weights only",
            all(vec![remove("model.safetensors"), file("pytorch_model.bin", b"PK")]),
            "DIR/pytorch_model.bin: a model without safetensors weights is not supported; write model.safetensors with transformers: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(DIR), or take a revision of the model that has it",
        ),
    ]
}

fn gpt2() -> Vec<Case> {
    vec![
        (
            "scale by layer",
            config(json!({"scale_attn_by_inverse_layer_idx": true})),
            "DIR/config.json: 'scale_attn_by_inverse_layer_idx' = true is not supported; all layers have to share one attention scale",
        ),
        (
            "cross attention",
            config(json!({"add_cross_attention": true})),
            "DIR/config.json: 'add_cross_attention' = true is not supported; only decoders are",
        ),
        (
            "heads that do not divide",
            config(json!({"n_head": 5})),
            "DIR/config.json: 'n_embd' must be a multiple of 'n_head' = 5 where 'head_dim' is not given; found 64",
        ),
        (
            "large head",
            config(json!({"n_embd": 512, "n_head": 1})),
            "DIR/config.json: 'n_embd' must be such that 'n_embd' / 'n_head' = 512, the dimension of a head, is a number up to 256; found 512",
        ),
        (
            "matrices the other way round",
            config(json!({"n_inner": 96})),
            "DIR/model.safetensors: tensor 'transformer.h.0.mlp.c_fc.weight' has shape [64, 128]; the configuration asks for [64, 96]",
        ),
        (
            "pruned heads",
            config(json!({"pruned_heads": {"0": [1]}})),
            "DIR/config.json: 'pruned_heads' is not supported; use a model with all of its heads",
        ),
        (
            "an untied head that is not there",
            config(json!({"tie_word_embeddings": false})),
            "DIR/model.safetensors: tensor 'lm_head.weight' of shape [256, 64] is missing",
        ),
    ]
}

fn gemma2() -> Vec<Case> {
    vec![
        (
            "both directions",
            config(json!({"use_bidirectional_attention": true})),
            "DIR/config.json: 'use_bidirectional_attention' = true is not supported; only causal attention is",
        ),
        (
            "soft cap of nothing",
            config(json!({"attn_logit_softcapping": 0.0})),
            "DIR/config.json: 'attn_logit_softcapping' must be a number above 0; found 0.0",
        ),
        (
            "negative soft cap of logits",
            config(json!({"final_logit_softcapping": -30.0})),
            "DIR/config.json: 'final_logit_softcapping' must be a number above 0; found -30.0",
        ),
        (
            "scale of nothing",
            config(json!({"query_pre_attn_scalar": 0})),
            "DIR/config.json: 'query_pre_attn_scalar' must be a number above 0; found 0",
        ),
        (
            "windows switched off in a way that the class does not read",
            config(json!({"use_sliding_window": false})),
            "DIR/config.json: 'use_sliding_window' = false is not supported; set 'sliding_window' to null instead",
        ),
    ]
}

fn phi3() -> Vec<Case> {
    let rope = |change: serde_json::Value| {
        let mut rope = json!({"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.0, 1.0, 1.0, 1.0, 1.0], "long_factor": [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]});
        for (name, value) in change.as_object().unwrap() {
            rope[name] = value.clone();
        }
        config(json!({"rope_parameters": rope}))
    };
    vec![
        (
            "too few short factors",
            rope(json!({"short_factor": [1.0, 2.0]})),
            "DIR/config.json: 'rope_parameters.short_factor' must be a list of 6 numbers above 0; found a list of 2",
        ),
        (
            "long factors of nothing",
            rope(json!({"long_factor": [1.0, 1.0, 1.0, 1.0, 1.0, 0.0]})),
            "DIR/config.json: 'rope_parameters.long_factor' must be a list of 6 numbers above 0; found a list of 6",
        ),
        (
            "no short factors",
            rope(json!({"short_factor": null})),
            "DIR/config.json: 'rope_parameters.short_factor' must be a list of 6 numbers above 0; found null",
        ),
        (
            "two contexts of the training that differ",
            rope(json!({"original_max_position_embeddings": 64})),
            "DIR/config.json: 'rope_parameters.original_max_position_embeddings' must be equal to 'original_max_position_embeddings' = 128; found 64",
        ),
        (
            "two partial factors that differ",
            config(json!({"partial_rotary_factor": 0.5})),
            "DIR/config.json: 'rope_parameters.partial_rotary_factor' must be equal to 'partial_rotary_factor' = 0.5; found 0.75",
        ),
        (
            "an odd part of a head",
            rope(json!({"partial_rotary_factor": 0.7})),
            "DIR/config.json: 'rope_parameters.partial_rotary_factor' must be such that it makes an even number of a head's 16 elements; found 0.7",
        ),
        (
            "more than a head",
            rope(json!({"partial_rotary_factor": 1.5})),
            "DIR/config.json: 'rope_parameters.partial_rotary_factor' must be a number above 0 and at most 1; found 1.5",
        ),
        (
            "biases",
            config(json!({"attention_bias": true})),
            "DIR/config.json: 'attention_bias' = true is not supported; Phi3ForCausalLM has none",
        ),
        (
            "fused projections of another width",
            config(json!({"num_key_value_heads": 4})),
            "DIR/model.safetensors: tensor 'model.layers.0.self_attn.qkv_proj.weight' has shape [128, 64]; the configuration asks for [192, 64]",
        ),
    ]
}

fn qwen3() -> Vec<Case> {
    vec![
        (
            "biases that are not there",
            config(json!({"attention_bias": true})),
            "DIR/model.safetensors: tensor 'model.layers.0.self_attn.q_proj.bias' of shape [96] is missing",
        ),
        (
            "experts",
            config(json!({"num_experts": 8})),
            "DIR/config.json: 'num_experts' = 8 is not supported; only models without experts are",
        ),
        (
            "experts by class",
            config(json!({"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"})),
            "DIR/config.json: architecture 'Qwen3MoeForCausalLM' is not supported; supported are LlamaForCausalLM, Qwen2ForCausalLM, MistralForCausalLM, Qwen3ForCausalLM, Phi3ForCausalLM, Gemma2ForCausalLM, OPTForCausalLM, GPT2LMHeadModel",
        ),
        (
            "head of the class's default, with the weights of another",
            without("head_dim"),
            "DIR/model.safetensors: tensor 'model.layers.0.self_attn.q_proj.weight' has shape [96, 64]; the configuration asks for [512, 64]",
        ),
    ]
}

fn mistral() -> Vec<Case> {
    vec![
        (
            "window switched off in a way that the class does not read",
            config(json!({"use_sliding_window": false})),
            "DIR/config.json: 'use_sliding_window' = false is not supported; set 'sliding_window' to null instead",
        ),
        (
            "biases",
            config(json!({"attention_bias": true})),
            "DIR/config.json: 'attention_bias' = true is not supported; MistralForCausalLM has none",
        ),
    ]
}

fn qwen2() -> Vec<Case> {
    vec![
        (
            "biases switched off",
            config(json!({"attention_bias": false})),
            "DIR/config.json: 'attention_bias' = false is not supported; Qwen2ForCausalLM always has biases",
        ),
        (
            "windows without a size",
            config(json!({"layer_types": ["full_attention", "sliding_attention"]})),
            "DIR/config.json: 'layer_types' must be \"full_attention\" everywhere unless 'use_sliding_window' is true and 'sliding_window' is set; found a list of 2",
        ),
    ]
}
