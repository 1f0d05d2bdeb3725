//! The families of models: how each spells its `config.json`, and the defaults of its class in `transformers`.

use super::{Activation, Architecture, ModelError, json::Object};

/// What differs between the families in reading their configuration.
pub(super) struct Family {
    pub(super) architecture: Architecture,
    pub(super) class: &'static str,
    model_type: &'static str,
    pub(super) names: &'static Names,
    pub(super) default_positions: usize,
    /// `None` is as many as there are query heads.
    pub(super) default_kv_heads: Option<usize>,
    /// `None` is `hidden_size / num_attention_heads`.
    pub(super) default_head_dim: Option<usize>,
    pub(super) default_activation: Activation,
    pub(super) default_eps: f64,
    pub(super) default_tied: bool,
    pub(super) rotary: bool,
    /// Fields that are refused unless the family has them, as this one has.
    pub(super) has: &'static [&'static str],
}

/// How the sizes are called.
pub(super) struct Names {
    pub(super) hidden_size: &'static str,
    pub(super) intermediate_size: &'static str,
    pub(super) layers: &'static str,
    pub(super) heads: &'static str,
    pub(super) positions: &'static str,
    pub(super) activation: &'static str,
    /// `None` where it cannot be chosen.
    pub(super) eps: Option<&'static str>,
}

const LLAMA_NAMES: Names = Names {
    hidden_size: "hidden_size",
    intermediate_size: "intermediate_size",
    layers: "num_hidden_layers",
    heads: "num_attention_heads",
    positions: "max_position_embeddings",
    activation: "hidden_act",
    eps: Some("rms_norm_eps"),
};

const LLAMA: Family = Family {
    architecture: Architecture::Llama,
    class: "LlamaForCausalLM",
    model_type: "llama",
    names: &LLAMA_NAMES,
    default_positions: 2048,
    default_kv_heads: None,
    default_head_dim: None,
    default_activation: Activation::Silu,
    default_eps: 1e-6,
    default_tied: false,
    rotary: true,
    has: &[],
};

const FAMILIES: [Family; 8] = [
    LLAMA,
    Family {
        architecture: Architecture::Qwen2,
        class: "Qwen2ForCausalLM",
        model_type: "qwen2",
        default_positions: 32768,
        default_kv_heads: Some(32),
        ..LLAMA
    },
    Family {
        architecture: Architecture::Mistral,
        class: "MistralForCausalLM",
        model_type: "mistral",
        default_positions: 4096 * 32,
        default_kv_heads: Some(8),
        ..LLAMA
    },
    Family {
        architecture: Architecture::Qwen3,
        class: "Qwen3ForCausalLM",
        model_type: "qwen3",
        default_positions: 32768,
        default_kv_heads: Some(32),
        default_head_dim: Some(128),
        ..LLAMA
    },
    Family {
        architecture: Architecture::Phi3,
        class: "Phi3ForCausalLM",
        model_type: "phi3",
        default_positions: 4096,
        default_eps: 1e-5,
        has: &["partial_rotary_factor"],
        ..LLAMA
    },
    Family {
        architecture: Architecture::Gemma2,
        class: "Gemma2ForCausalLM",
        model_type: "gemma2",
        names: &Names { activation: "hidden_activation", ..LLAMA_NAMES },
        default_positions: 8192,
        default_kv_heads: Some(4),
        default_head_dim: Some(256),
        default_activation: Activation::GeluTanh,
        default_tied: true,
        has: &["query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"],
        ..LLAMA
    },
    Family {
        architecture: Architecture::Opt,
        class: "OPTForCausalLM",
        model_type: "opt",
        names: &Names {
            intermediate_size: "ffn_dim",
            activation: "activation_function",
            eps: None,
            ..LLAMA_NAMES
        },
        default_activation: Activation::Relu,
        default_eps: 1e-5,
        default_tied: true,
        rotary: false,
        ..LLAMA
    },
    Family {
        architecture: Architecture::Gpt2,
        class: "GPT2LMHeadModel",
        model_type: "gpt2",
        names: &Names {
            hidden_size: "n_embd",
            intermediate_size: "n_inner",
            layers: "n_layer",
            heads: "n_head",
            positions: "n_positions",
            activation: "activation_function",
            eps: Some("layer_norm_epsilon"),
        },
        default_positions: 1024,
        default_activation: Activation::GeluTanh,
        default_eps: 1e-5,
        default_tied: true,
        rotary: false,
        ..LLAMA
    },
];

/// `architectures` decides; `model_type` stands in for it and must not contradict.
pub(super) fn family(file: &Object) -> Result<&'static Family, ModelError> {
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
            hint: format!("supported are {}", FAMILIES.each_ref().map(|family| family.class).join(", ")),
        });
    };
    if model_type.is_some_and(|model_type| model_type != family.model_type) {
        return Err(file.invalid("model_type", &format!("\"{}\" for {}", family.model_type, family.class)));
    }
    Ok(family)
}

/// The function inside of the MLP, by any of its names in `transformers`.
pub(super) fn activation(file: &Object, family: &Family) -> Result<Activation, ModelError> {
    let name = family.names.activation;
    for other in ["hidden_act", "hidden_activation", "activation_function"] {
        let differs = file.get(other).is_some() && file.get(other) != file.get(name);
        // Files of Gemma 2 have both, and its class in transformers reads only its own.
        if differs && family.architecture != Architecture::Gemma2 {
            return Err(file.unsupported(other, &format!("{} reads '{name}'", family.class)));
        }
    }
    match file.string(name)? {
        None => Ok(family.default_activation),
        Some("silu" | "swish") => Ok(Activation::Silu),
        Some("relu") => Ok(Activation::Relu),
        Some("gelu" | "gelu_python") => Ok(Activation::Gelu),
        Some("gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" | "gelu_python_tanh") => Ok(Activation::GeluTanh),
        Some(_) => {
            Err(file.unsupported(name, "supported are silu, relu, gelu, gelu_new and gelu_pytorch_tanh"))
        }
    }
}
