//! From `config.json`, in any of its spellings, to a [`ModelConfig`]. What would change the mathematics and
//! is not supported is refused by name; nothing is silently ignored. Defaults are those of the `transformers`
//! classes.

use super::{
    Architecture, ModelConfig, ModelError,
    families::{self, Family},
    json::{self, Object},
    layer_windows::layer_windows,
    parse_rope::{self, Rotary},
    refused,
};
use std::path::Path;

// Bounds far above any model, low enough that products of two of them fit 64 bits many times over.
const MAX_VOCAB: usize = 1 << 24;
const MAX_WIDTH: usize = 1 << 20;
const MAX_HEADS: usize = 1 << 12;
const MAX_LAYERS: usize = 1 << 10;
pub(super) const MAX_POSITIONS: usize = 1 << 26;
const MAX_HEAD_DIM: usize = 256;

/// Reads `config.json` of a model directory; also what its user should be told, a sentence each.
pub(super) fn parse_config(directory: &Path) -> Result<(ModelConfig, Vec<String>), ModelError> {
    let path = directory.join("config.json");
    let file = json::read_object(&path)?.ok_or_else(|| ModelError::Missing {
        path,
        hint: "a model directory holds config.json, model.safetensors and tokenizer.json".to_owned(),
    })?;
    let family = families::family(&file)?;
    refused::refuse_unsupported(&file, family)?;
    let names = family.names;

    let vocab_size = file.required_size("vocab_size", MAX_VOCAB)?;
    let hidden_size = file.required_size(names.hidden_size, MAX_WIDTH)?;
    let num_layers = file.required_size(names.layers, MAX_LAYERS)?;
    let q_heads = file.required_size(names.heads, MAX_HEADS)?;
    let kv_heads = kv_heads(&file, q_heads, family)?;
    let head_dim = head_dim(&file, hidden_size, q_heads, family)?;
    let mut max_positions = file.size(names.positions, MAX_POSITIONS)?.unwrap_or(family.default_positions);
    let mut notes = Vec::new();
    let rope = match family.rotary {
        true => {
            let Rotary { config, trained_positions } =
                parse_rope::parse_rope(&file, family, head_dim, max_positions)?;
            if let Some(trained) = trained_positions.filter(|trained| *trained < max_positions) {
                notes.push(format!(
                    "{}: sequences of up to {trained} of its {max_positions} positions are served, with the short \
                     factors of its rotary embedding; the long ones are not supported",
                    file.path.display()
                ));
                max_positions = trained;
            }
            Some(config)
        }
        false => None,
    };
    let biases = biases(&file, family)?;

    let config = ModelConfig {
        architecture: family.architecture,
        vocab_size,
        embedding_size: embedding_size(&file, hidden_size, family)?,
        hidden_size,
        intermediate_size: intermediate_size(&file, hidden_size, family)?,
        activation: families::activation(&file, family)?,
        q_heads,
        kv_heads,
        head_dim,
        max_positions,
        norm_eps: norm_eps(&file, family)?,
        norm_before: norm_before(&file, family)?,
        final_norm: final_norm(&file, family)?,
        rope,
        attention_scale: attention_scale(&file, head_dim, family)?,
        attention_softcap: softcap(&file, "attn_logit_softcapping", 50.0, family)?,
        logit_softcap: softcap(&file, "final_logit_softcapping", 30.0, family)?,
        qkv_bias: biases.qkv,
        output_bias: biases.output,
        mlp_bias: biases.mlp,
        tie_word_embeddings: file.boolean("tie_word_embeddings")?.unwrap_or(family.default_tied),
        layer_windows: layer_windows(&file, family, num_layers)?,
        bos_token_id: file.token_ids("bos_token_id", vocab_size)?.and_then(|ids| ids.first().copied()),
        eos_token_ids: file.token_ids("eos_token_id", vocab_size)?.unwrap_or_default(),
    };
    notes.extend(refused::unknown_fields(&file));
    Ok((config, notes))
}

fn intermediate_size(file: &Object, hidden_size: usize, family: &Family) -> Result<usize, ModelError> {
    let name = family.names.intermediate_size;
    match family.architecture {
        Architecture::Gpt2 => Ok(file.size(name, MAX_WIDTH)?.unwrap_or(4 * hidden_size)),
        _ => file.required_size(name, MAX_WIDTH),
    }
}

fn embedding_size(file: &Object, hidden_size: usize, family: &Family) -> Result<usize, ModelError> {
    match family.architecture {
        Architecture::Opt => Ok(file.size("word_embed_proj_dim", MAX_WIDTH)?.unwrap_or(hidden_size)),
        _ => Ok(hidden_size),
    }
}

fn norm_eps(file: &Object, family: &Family) -> Result<f32, ModelError> {
    let Some(name) = family.names.eps else { return Ok(family.default_eps as f32) };
    let rule = "a number above 0 and below 1";
    let eps = file.number(name, rule, |eps| eps as f32 > 0.0 && eps < 1.0)?;
    Ok(eps.unwrap_or(family.default_eps) as f32)
}

fn norm_before(file: &Object, family: &Family) -> Result<bool, ModelError> {
    match family.architecture {
        Architecture::Opt => Ok(file.boolean("do_layer_norm_before")?.unwrap_or(true)),
        _ => Ok(true),
    }
}

fn final_norm(file: &Object, family: &Family) -> Result<bool, ModelError> {
    match family.architecture {
        Architecture::Opt => {
            let removed = file.boolean("_remove_final_layer_norm")?.unwrap_or(false);
            Ok(norm_before(file, family)? && !removed)
        }
        _ => Ok(true),
    }
}

fn attention_scale(file: &Object, head_dim: usize, family: &Family) -> Result<f32, ModelError> {
    let usual = 1.0 / (head_dim as f32).sqrt();
    match family.architecture {
        Architecture::Gemma2 => {
            let scalar = file.number("query_pre_attn_scalar", "a number above 0", |x| x > 0.0)?;
            Ok(scalar.unwrap_or(256.0).powf(-0.5) as f32)
        }
        Architecture::Gpt2 => Ok(match file.boolean("scale_attn_weights")? {
            Some(false) => 1.0,
            _ => usual,
        }),
        _ => Ok(usual),
    }
}

/// Absent is the default of the class, null is none.
fn softcap(file: &Object, name: &str, default: f32, family: &Family) -> Result<Option<f32>, ModelError> {
    if !family.has.contains(&name) {
        return Ok(None);
    }
    if !file.has(name) {
        return Ok(Some(default));
    }
    let in_range = |cap: f64| cap as f32 > 0.0 && (cap as f32).is_finite();
    Ok(file.number(name, "a number above 0", in_range)?.map(|cap| cap as f32))
}

/// Which projections have biases.
struct Biases {
    qkv: bool,
    output: bool,
    mlp: bool,
}

fn biases(file: &Object, family: &Family) -> Result<Biases, ModelError> {
    let all = |bias| Biases { qkv: bias, output: bias, mlp: bias };
    match family.architecture {
        Architecture::Opt => return Ok(all(file.boolean("enable_bias")?.unwrap_or(true))),
        Architecture::Gpt2 => return Ok(all(true)),
        _ => {}
    }
    let attention = file.boolean("attention_bias")?;
    let mlp = file.boolean("mlp_bias")?.unwrap_or(false);
    if mlp && family.architecture != Architecture::Llama {
        return Err(file.unsupported("mlp_bias", &format!("{} has none", family.class)));
    }
    let (qkv, output) = match (family.architecture, attention) {
        (Architecture::Qwen2, Some(false)) => {
            return Err(file.unsupported("attention_bias", "Qwen2ForCausalLM always has biases"));
        }
        (Architecture::Qwen2, _) => (true, false),
        (Architecture::Mistral | Architecture::Phi3, Some(true)) => {
            return Err(file.unsupported("attention_bias", &format!("{} has none", family.class)));
        }
        (_, bias) => (bias.unwrap_or(false), bias.unwrap_or(false)),
    };
    Ok(Biases { qkv, output, mlp })
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

fn head_dim(file: &Object, hidden_size: usize, q_heads: usize, family: &Family) -> Result<usize, ModelError> {
    // Rotary embeddings pair the elements of a head.
    let (step, kind) = if family.rotary { (2, "an even number") } else { (1, "a number") };
    let rule = format!("{kind} up to {MAX_HEAD_DIM}");
    let (name, heads) = (family.names.hidden_size, family.names.heads);
    let absent = family.default_head_dim.filter(|_| !file.has("head_dim"));
    let Some(explicit) = file.size("head_dim", usize::MAX)?.or(absent) else {
        if !hidden_size.is_multiple_of(q_heads) {
            let rule = format!("a multiple of '{heads}' = {q_heads} where 'head_dim' is not given");
            return Err(file.invalid(name, &rule));
        }
        let implied = hidden_size / q_heads;
        if !implied.is_multiple_of(step) || implied > MAX_HEAD_DIM {
            let rule =
                format!("such that '{name}' / '{heads}' = {implied}, the dimension of a head, is {rule}");
            return Err(file.invalid(name, &rule));
        }
        return Ok(implied);
    };
    if !explicit.is_multiple_of(step) || explicit > MAX_HEAD_DIM {
        return Err(file.invalid("head_dim", &rule));
    }
    Ok(explicit)
}
