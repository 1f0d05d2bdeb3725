//! From `config.json`, in either of its spellings, to a [`ModelConfig`]. What would change the mathematics and
//! is not supported is refused by name; nothing is silently ignored. Defaults are those of the `transformers`
//! classes.

use super::{
    Architecture, ModelConfig, ModelError,
    json::{self, Object},
    parse_rope,
};
use std::path::Path;

// Bounds far above any model, low enough that products of two of them fit 64 bits many times over.
const MAX_VOCAB: usize = 1 << 24;
const MAX_WIDTH: usize = 1 << 20;
const MAX_HEADS: usize = 1 << 12;
const MAX_LAYERS: usize = 1 << 10;
pub(super) const MAX_POSITIONS: usize = 1 << 26;
const MAX_HEAD_DIM: usize = 256;

/// Class defaults of `transformers` that differ between the families.
struct Family {
    architecture: Architecture,
    class: &'static str,
    model_type: &'static str,
    default_positions: usize,
    default_kv_heads: Option<usize>,
}

const FAMILIES: [Family; 3] = [
    Family {
        architecture: Architecture::Llama,
        class: "LlamaForCausalLM",
        model_type: "llama",
        default_positions: 2048,
        default_kv_heads: None,
    },
    Family {
        architecture: Architecture::Qwen2,
        class: "Qwen2ForCausalLM",
        model_type: "qwen2",
        default_positions: 32768,
        default_kv_heads: Some(32),
    },
    Family {
        architecture: Architecture::Mistral,
        class: "MistralForCausalLM",
        model_type: "mistral",
        default_positions: 4096 * 32,
        default_kv_heads: Some(8),
    },
];

const CLASSES: &str = "supported are LlamaForCausalLM, Qwen2ForCausalLM and MistralForCausalLM";
const DEFAULT_WINDOW: usize = 4096;

/// Values with which a field of [`REFUSED`] asks for nothing.
#[derive(Clone, Copy)]
enum Neutral {
    Absent,
    False,
    Zero,
    One,
}

/// Fields that change what is computed in ways no supported family has.
const REFUSED: &[(&str, Neutral, &str)] = &[
    ("quantization_config", Neutral::Absent, "use the unquantized model"),
    ("compression_config", Neutral::Absent, "use the unquantized model"),
    ("partial_rotary_factor", Neutral::One, "only rotary embeddings of the whole head are"),
    ("rotary_pct", Neutral::One, "only rotary embeddings of the whole head are"),
    ("rope_interleaved", Neutral::False, "only rotary embeddings in halves are"),
    ("rope_traditional", Neutral::False, "only rotary embeddings in halves are"),
    ("no_rope_layers", Neutral::Absent, "every layer has to use rotary embeddings"),
    ("no_rope_layer_interval", Neutral::Absent, "every layer has to use rotary embeddings"),
    ("alibi", Neutral::False, "positions have to be rotary"),
    ("num_experts", Neutral::Zero, "only models without experts are"),
    ("num_local_experts", Neutral::Zero, "only models without experts are"),
    ("n_routed_experts", Neutral::Zero, "only models without experts are"),
    ("kv_lora_rank", Neutral::Absent, "use a model without latent attention"),
    ("v_head_dim", Neutral::Absent, "keys and values need the same head_dim"),
    ("logit_scale", Neutral::One, "logits have to be used as they are"),
    ("logits_scaling", Neutral::One, "logits have to be used as they are"),
    ("final_logit_softcapping", Neutral::Absent, "logits have to be used as they are"),
    ("attn_logit_softcapping", Neutral::Absent, "attention logits have to be used as they are"),
    ("attention_multiplier", Neutral::Absent, "the attention scale has to be 1/sqrt(head_dim)"),
    ("query_pre_attn_scalar", Neutral::Absent, "the attention scale has to be 1/sqrt(head_dim)"),
    ("attn_temperature_tuning", Neutral::False, "the attention scale has to be 1/sqrt(head_dim)"),
    ("embedding_multiplier", Neutral::One, "embeddings have to be used as they are"),
    ("scale_emb", Neutral::One, "embeddings have to be used as they are"),
    ("residual_multiplier", Neutral::One, "residuals have to be used as they are"),
    ("scale_depth", Neutral::Absent, "residuals have to be used as they are"),
    ("qk_norm", Neutral::False, "queries and keys have to be used without norms"),
    ("use_qk_norm", Neutral::False, "queries and keys have to be used without norms"),
    ("qk_layernorm", Neutral::False, "queries and keys have to be used without norms"),
    ("clip_qkv", Neutral::Absent, "queries, keys and values have to be used as they are"),
    ("attention_chunk_size", Neutral::Absent, "attention is full or has a sliding window"),
    ("use_mrope", Neutral::False, "positions have to be one number a token"),
    ("use_parallel_residual", Neutral::False, "attention and MLP have to follow each other"),
    ("is_encoder_decoder", Neutral::False, "only decoders are"),
    ("add_cross_attention", Neutral::False, "only decoders are"),
    ("vision_config", Neutral::Absent, "only text models are"),
    ("audio_config", Neutral::Absent, "only text models are"),
    ("text_config", Neutral::Absent, "only text models are"),
];

/// Reads `config.json` of a model directory.
pub(super) fn parse_config(directory: &Path) -> Result<ModelConfig, ModelError> {
    let path = directory.join("config.json");
    let file = json::read_object(&path)?.ok_or_else(|| ModelError::Missing {
        path,
        hint: "a model directory holds config.json, model.safetensors and tokenizer.json".to_owned(),
    })?;

    let family = family(&file)?;
    refuse_unsupported(&file)?;
    let architecture = family.architecture;

    let vocab_size = file.required_size("vocab_size", MAX_VOCAB)?;
    let hidden_size = file.required_size("hidden_size", MAX_WIDTH)?;
    let intermediate_size = file.required_size("intermediate_size", MAX_WIDTH)?;
    let num_layers = file.required_size("num_hidden_layers", MAX_LAYERS)?;
    let q_heads = file.required_size("num_attention_heads", MAX_HEADS)?;
    let kv_heads = kv_heads(&file, q_heads, family)?;
    let head_dim = head_dim(&file, hidden_size, q_heads)?;
    let max_positions =
        file.size("max_position_embeddings", MAX_POSITIONS)?.unwrap_or(family.default_positions);
    let rms_norm_eps =
        file.number("rms_norm_eps", "a number above 0 and below 1", |eps| eps as f32 > 0.0 && eps < 1.0)?;
    let rope = parse_rope::parse_rope(&file)?;

    let attention_bias = file.boolean("attention_bias")?;
    let mlp_bias = file.boolean("mlp_bias")?.unwrap_or(false);
    if mlp_bias && architecture != Architecture::Llama {
        return Err(file.unsupported("mlp_bias", &format!("{} has none", family.class)));
    }
    let (qkv_bias, output_bias) = match (architecture, attention_bias) {
        (Architecture::Llama, bias) => (bias.unwrap_or(false), bias.unwrap_or(false)),
        (Architecture::Qwen2, Some(false)) => {
            return Err(file.unsupported("attention_bias", "Qwen2ForCausalLM always has biases"));
        }
        (Architecture::Qwen2, _) => (true, false),
        (Architecture::Mistral, Some(true)) => {
            return Err(file.unsupported("attention_bias", "MistralForCausalLM has none"));
        }
        (Architecture::Mistral, _) => (false, false),
    };

    Ok(ModelConfig {
        architecture,
        vocab_size,
        hidden_size,
        intermediate_size,
        q_heads,
        kv_heads,
        head_dim,
        max_positions,
        rms_norm_eps: rms_norm_eps.unwrap_or(1e-6) as f32,
        rope,
        qkv_bias,
        output_bias,
        mlp_bias,
        tie_word_embeddings: file.boolean("tie_word_embeddings")?.unwrap_or(false),
        layer_windows: layer_windows(&file, architecture, num_layers)?,
        bos_token_id: file.token_ids("bos_token_id", vocab_size)?.and_then(|ids| ids.first().copied()),
        eos_token_ids: file.token_ids("eos_token_id", vocab_size)?.unwrap_or_default(),
    })
}

/// `architectures` decides; `model_type` stands in for it and must not contradict.
fn family(file: &Object) -> Result<&'static Family, ModelError> {
    let model_type = file.string("model_type")?;
    let (name, found) = match file.strings("architectures")? {
        Some(classes) => match classes.as_slice() {
            [class] => ("architectures", FAMILIES.iter().find(|family| family.class == *class)),
            _ => return Err(file.invalid("architectures", "a list of one class name")),
        },
        None if model_type.is_some() => {
            ("model_type", FAMILIES.iter().find(|family| Some(family.model_type) == model_type))
        }
        None => return Err(file.invalid("architectures", "a list of one class name")),
    };
    let Some(family) = found else {
        let asked =
            file.strings("architectures")?.and_then(|classes| classes.first().copied()).or(model_type);
        return Err(ModelError::Unsupported {
            path: file.path.clone(),
            feature: format!("{} '{}'", name.trim_end_matches('s'), asked.unwrap_or_default()),
            hint: CLASSES.to_owned(),
        });
    };
    if model_type.is_some_and(|model_type| model_type != family.model_type) {
        return Err(file.invalid("model_type", &format!("\"{}\" for {}", family.model_type, family.class)));
    }
    Ok(family)
}

fn refuse_unsupported(file: &Object) -> Result<(), ModelError> {
    for &(name, neutral, hint) in REFUSED {
        let Some(value) = file.get(name) else { continue };
        let asks_for_nothing = match neutral {
            Neutral::Absent => false,
            Neutral::False => value.as_bool() == Some(false),
            Neutral::Zero => value.as_f64() == Some(0.0),
            Neutral::One => value.as_f64() == Some(1.0),
        };
        if !asks_for_nothing {
            return Err(file.unsupported(name, hint));
        }
    }
    // The first is the name in `config.json`, the second what a few exporters write.
    for name in ["hidden_act", "hidden_activation"] {
        if file.string(name)?.is_some_and(|activation| activation != "silu") {
            return Err(file.unsupported(name, "the activation has to be \"silu\""));
        }
    }
    Ok(())
}

fn kv_heads(file: &Object, q_heads: usize, family: &Family) -> Result<usize, ModelError> {
    // Absent takes the default of the class, null is multi-head attention.
    let absent = if file.has("num_key_value_heads") { None } else { family.default_kv_heads };
    let kv_heads = file.size("num_key_value_heads", MAX_HEADS)?.or(absent).unwrap_or(q_heads);
    if !q_heads.is_multiple_of(kv_heads) {
        let rule = format!("a divisor of 'num_attention_heads' = {q_heads}");
        return Err(file.invalid("num_key_value_heads", &rule));
    }
    Ok(kv_heads)
}

fn head_dim(file: &Object, hidden_size: usize, q_heads: usize) -> Result<usize, ModelError> {
    let rule = format!("an even number up to {MAX_HEAD_DIM}");
    let Some(explicit) = file.size("head_dim", usize::MAX)? else {
        if !hidden_size.is_multiple_of(q_heads) {
            let rule =
                format!("a multiple of 'num_attention_heads' = {q_heads} where 'head_dim' is not given");
            return Err(file.invalid("hidden_size", &rule));
        }
        let implied = hidden_size / q_heads;
        if !implied.is_multiple_of(2) || implied > MAX_HEAD_DIM {
            let rule = format!(
                "such that 'hidden_size' / 'num_attention_heads' = {implied}, the dimension of a head, is {rule}"
            );
            return Err(file.invalid("hidden_size", &rule));
        }
        return Ok(implied);
    };
    if !explicit.is_multiple_of(2) || explicit > MAX_HEAD_DIM {
        return Err(file.invalid("head_dim", &rule));
    }
    Ok(explicit)
}

/// One entry a layer: how many keys, its own included, a query sees.
fn layer_windows(
    file: &Object,
    architecture: Architecture,
    num_layers: usize,
) -> Result<Vec<Option<usize>>, ModelError> {
    let window = file.size("sliding_window", MAX_POSITIONS)?;
    // Present but null is "none"; absent is the default of the class.
    let window = if file.has("sliding_window") { window } else { Some(DEFAULT_WINDOW) };
    let slides = file.boolean("use_sliding_window")?;
    let first = file.integer("max_window_layers", 0, u64::MAX)?;
    let layer_types = layer_types(file, num_layers)?;

    match architecture {
        Architecture::Llama => {
            if file.get("sliding_window").is_some() && slides != Some(false) {
                return Err(file.unsupported("sliding_window", "LlamaForCausalLM attends to all positions"));
            }
            if slides == Some(true) {
                return Err(
                    file.unsupported("use_sliding_window", "LlamaForCausalLM attends to all positions")
                );
            }
            check_layer_types(file, layer_types, false)?;
            Ok(vec![None; num_layers])
        }
        Architecture::Mistral => {
            if slides == Some(false) && window.is_some() {
                return Err(file.unsupported("use_sliding_window", "set 'sliding_window' to null instead"));
            }
            check_layer_types(file, layer_types, window.is_some())?;
            Ok(vec![window; num_layers])
        }
        Architecture::Qwen2 => {
            let window = window.filter(|_| slides.unwrap_or(false));
            let Some(layer_types) = layer_types else {
                let first = first.unwrap_or(28);
                return Ok((0..num_layers as u64).map(|layer| window.filter(|_| layer >= first)).collect());
            };
            if window.is_none() && layer_types.contains(&true) {
                let rule = "\"full_attention\" everywhere unless 'use_sliding_window' is true and 'sliding_window' is set";
                return Err(file.invalid("layer_types", rule));
            }
            Ok(layer_types.into_iter().map(|slides| window.filter(|_| slides)).collect())
        }
    }
}

/// One entry a layer: whether it has a sliding window.
fn layer_types(file: &Object, num_layers: usize) -> Result<Option<Vec<bool>>, ModelError> {
    let Some(names) = file.strings("layer_types")? else { return Ok(None) };
    if names.len() != num_layers {
        let rule = format!("a list of 'num_hidden_layers' = {num_layers} entries");
        return Err(file.invalid("layer_types", &rule));
    }
    let slides = |name: &&str| match *name {
        "full_attention" => Ok(false),
        "sliding_attention" => Ok(true),
        other => Err(ModelError::Unsupported {
            path: file.path.clone(),
            feature: format!("layer type '{other}'"),
            hint: "supported are full_attention and sliding_attention".to_owned(),
        }),
    };
    names.iter().map(slides).collect::<Result<_, _>>().map(Some)
}

/// Families whose layers are all alike do not read `layer_types`; it must not say otherwise.
fn check_layer_types(file: &Object, layer_types: Option<Vec<bool>>, slides: bool) -> Result<(), ModelError> {
    match layer_types {
        Some(types) if types.iter().any(|layer| *layer != slides) => {
            Err(file.unsupported("layer_types", "all layers of this architecture have to be alike"))
        }
        _ => Ok(()),
    }
}
