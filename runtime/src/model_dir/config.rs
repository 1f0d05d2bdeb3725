//! `config.json` in one normal form, whichever spelling the file has.

use pagewise_kvcache::KvGroup;

/// A model family that a file of `models/` implements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// `LlamaForCausalLM`
    Llama,
    /// `Qwen2ForCausalLM`
    Qwen2,
    /// `MistralForCausalLM`
    Mistral,
    /// `Qwen3ForCausalLM`
    Qwen3,
    /// `Phi3ForCausalLM`
    Phi3,
    /// `Gemma2ForCausalLM`
    Gemma2,
    /// `OPTForCausalLM`
    Opt,
    /// `GPT2LMHeadModel`
    Gpt2,
}

/// The function inside of an MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x · sigmoid(x)`
    Silu,
    /// `max(x, 0)`
    Relu,
    /// `x · Φ(x)`
    Gelu,
    /// GELU with Φ approximated by a hyperbolic tangent.
    GeluTanh,
}

/// The shape of a model. Sizes are positive and bounded, `q_heads` is a multiple of `kv_heads`.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Family.
    pub architecture: Architecture,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the embedding. Where it is not `hidden_size`, projections lead from one to the other and back.
    pub embedding_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside of the MLP.
    pub intermediate_size: usize,
    /// Function inside of the MLP.
    pub activation: Activation,
    /// Query heads.
    pub q_heads: usize,
    /// Key-value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Longest sequence that is served as the model was made.
    pub max_positions: usize,
    /// Added to the mean square or the variance in norms.
    pub norm_eps: f32,
    /// Whether norms stand before attention and MLP; else behind the sums that follow these.
    pub norm_before: bool,
    /// Whether a norm stands before the output projection.
    pub final_norm: bool,
    /// Rotary embedding; without one, positions are learned.
    pub rope: Option<RopeConfig>,
    /// Factor of the attention scores.
    pub attention_scale: f32,
    /// `cap · tanh(score / cap)` is what the softmax gets.
    pub attention_softcap: Option<f32>,
    /// `cap · tanh(logit / cap)` is what the model gives.
    pub logit_softcap: Option<f32>,
    /// Whether the query, key and value projections have a bias.
    pub qkv_bias: bool,
    /// Whether the attention's output projection has a bias.
    pub output_bias: bool,
    /// Whether the MLP's projections have biases.
    pub mlp_bias: bool,
    /// Whether the output projection is the embedding.
    pub tie_word_embeddings: bool,
    /// One entry a layer: how many keys, its own included, a query sees; `None` is all.
    pub layer_windows: Vec<Option<usize>>,
    /// Beginning of a sequence, where the file names one.
    pub bos_token_id: Option<u32>,
    /// End tokens that the file names.
    pub eos_token_ids: Vec<u32>,
}

/// Rotary position embedding (Su et al. 2021).
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Elements of a head that are rotated, the first ones: an even number.
    pub rotary_dim: usize,
    /// Base of the geometric series of wavelengths.
    pub theta: f64,
    /// How it is stretched beyond the trained context.
    pub scaling: RopeScaling,
}

/// Stretching of the rotary embedding.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// As trained.
    None,
    /// All frequencies divided by `factor`.
    Linear {
        /// Above 0.
        factor: f64,
    },
    /// Llama 3: long wavelengths divided by `factor`, short ones kept, a blend in between.
    Llama3 {
        /// Above 0.
        factor: f64,
        /// Wavelengths above `original_max_positions / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_positions / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context of the training.
        original_max_positions: usize,
    },
    /// LongRoPE (Ding et al. 2024) within the context of the training.
    LongRope {
        /// `[rotary_dim / 2]` divisors of the frequencies.
        short_factors: Vec<f64>,
        /// Factor of what has been rotated.
        attention_factor: f64,
    },
}

impl ModelConfig {
    /// Number of layers.
    pub fn num_layers(&self) -> usize {
        self.layer_windows.len()
    }

    /// Layers that share a window share block tables: the distinct windows in order of first appearance, and
    /// each layer's index into them.
    pub fn kv_groups(&self) -> (Vec<KvGroup>, Vec<usize>) {
        let mut groups: Vec<KvGroup> = Vec::new();
        let group_of = |window: &Option<usize>| {
            let group = KvGroup { window: *window };
            groups.iter().position(|g| *g == group).unwrap_or_else(|| {
                groups.push(group);
                groups.len() - 1
            })
        };
        let layers = self.layer_windows.iter().map(group_of).collect();
        (groups, layers)
    }
}
