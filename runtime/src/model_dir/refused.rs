//! Fields of `config.json` that would change what is computed and are refused by name, and those that change nothing.
//! What is in neither list and nobody reads is named in a warning.

use super::{ModelError, families::Family, json::Object};
use serde_json::Value;

/// Values with which a field of [`REFUSED`] asks for nothing.
#[derive(Clone, Copy)]
enum Neutral {
    Absent,
    Empty,
    False,
    True,
    Zero,
    One,
}

/// Fields that change what is computed in ways that a family has to have.
const REFUSED: &[(&str, Neutral, &str)] = &[
    ("quantization_config", Neutral::Absent, "use the unquantized model"),
    ("compression_config", Neutral::Absent, "use the unquantized model"),
    ("partial_rotary_factor", Neutral::One, "only rotary embeddings of the whole head are"),
    ("rotary_pct", Neutral::One, "only rotary embeddings of the whole head are"),
    ("rope_interleaved", Neutral::False, "only rotary embeddings in halves are"),
    ("rope_traditional", Neutral::False, "only rotary embeddings in halves are"),
    ("rope_local_base_freq", Neutral::Absent, "all layers have to share one rotary embedding"),
    ("no_rope_layers", Neutral::Absent, "every layer has to use rotary embeddings"),
    ("no_rope_layer_interval", Neutral::Absent, "every layer has to use rotary embeddings"),
    ("alibi", Neutral::False, "positions have to be rotary or learned"),
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
    ("scale_attn_by_inverse_layer_idx", Neutral::False, "all layers have to share one attention scale"),
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
    ("use_bidirectional_attention", Neutral::False, "only causal attention is"),
    ("use_mrope", Neutral::False, "positions have to be one number a token"),
    ("use_parallel_residual", Neutral::False, "attention and MLP have to follow each other"),
    ("layer_norm_elementwise_affine", Neutral::True, "norms need their weights"),
    ("pruned_heads", Neutral::Empty, "use a model with all of its heads"),
    ("is_encoder_decoder", Neutral::False, "only decoders are"),
    ("add_cross_attention", Neutral::False, "only decoders are"),
    ("vision_config", Neutral::Absent, "only text models are"),
    ("audio_config", Neutral::Absent, "only text models are"),
    ("text_config", Neutral::Absent, "only text models are"),
];

/// Fields that change nothing in what is computed here: where the file comes from, training, heads for other tasks,
/// defaults of sampling, and how `transformers` goes about it.
const HARMLESS: &[&str] = &[
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_name_or_path",
    "activation_dropout",
    "attention_dropout",
    "attn_implementation",
    "attn_pdrop",
    "auto_map",
    "cache_implementation",
    "chunk_size_feed_forward",
    "do_sample",
    "dropout",
    "dtype",
    "embd_pdrop",
    "finetuning_task",
    "gradient_checkpointing",
    "hidden_dropout",
    "id2label",
    "init_std",
    "initializer_range",
    "is_llama_config",
    "label2id",
    "layerdrop",
    "max_length",
    "model_max_length",
    "n_ctx",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "output_past",
    "pad_token_id",
    "prefix",
    "pretraining_tp",
    "problem_type",
    // The same product in another order, for the range of f16; scores are f32 here.
    "reorder_and_upcast_attn",
    "resid_pdrop",
    "return_dict",
    "sep_token_id",
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
    "task_specific_params",
    "tie_encoder_decoder",
    "tokenizer_class",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "unk_token_id",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
    "use_flash_attn",
];

/// Refuses what the family has not got.
pub(super) fn refuse_unsupported(file: &Object, family: &Family) -> Result<(), ModelError> {
    for &(name, neutral, hint) in REFUSED.iter().filter(|(name, ..)| !family.has.contains(name)) {
        let Some(value) = file.get(name) else { continue };
        let asks_for_nothing = match neutral {
            Neutral::Absent => false,
            Neutral::Empty => match value {
                Value::Object(fields) => fields.is_empty(),
                Value::Array(list) => list.is_empty(),
                _ => false,
            },
            Neutral::False => value.as_bool() == Some(false),
            Neutral::True => value.as_bool() == Some(true),
            Neutral::Zero => value.as_f64() == Some(0.0),
            Neutral::One => value.as_f64() == Some(1.0),
        };
        if !asks_for_nothing {
            return Err(file.unsupported(name, hint));
        }
    }
    Ok(())
}

/// A warning, if there are fields that nobody has read and that are not known to be harmless.
pub(super) fn unknown_fields(file: &Object) -> Option<String> {
    const NAMED: usize = 8;
    let unknown: Vec<&str> = file.unasked().filter(|name| !HARMLESS.contains(name)).collect();
    let named = unknown.iter().take(NAMED).map(|name| format!("'{}'", name.escape_debug()));
    let named = named.collect::<Vec<_>>().join(", ");
    let more = match unknown.len() {
        0 => return None,
        n if n > NAMED => format!(" and {} more", n - NAMED),
        _ => String::new(),
    };
    Some(format!(
        "{}: {named}{more} not known here and not heeded; check the answers if it changes what the model computes",
        file.path.display()
    ))
}
