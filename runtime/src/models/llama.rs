//! The LLaMA family (Touvron et al. 2023): Llama, Qwen2 (biases on q, k, v) and Mistral (sliding windows).
//!
//! ```text
//! tokens ─ embed ─► x ─► [ + attention(norm(x)) ─► + mlp(norm(x)) ] × layers ─► norm ─► output ─► logits
//!
//! attention: q, k, v ─ rotary(q, k) ─ write k, v into blocks ─ paged attention ─ o
//! mlp:       silu(gate) · up ─ down
//! ```

use super::{LoadModelError, Model, WeightSource};
use crate::backend::{Backend, BackendError, Linear};
use crate::model_dir::ModelConfig;

pub(super) struct Llama<B: Backend> {
    embedding: B::Weight,
    layers: Vec<Layer<B::Weight>>,
    norm: B::Weight,
    output: Linear<B::Weight>,
    config: ModelConfig,
}

struct Layer<W> {
    attention_norm: W,
    q: Linear<W>,
    k: Linear<W>,
    v: Linear<W>,
    o: Linear<W>,
    mlp_norm: W,
    gate: Linear<W>,
    up: Linear<W>,
    down: Linear<W>,
}

impl<B: Backend> Model<B> for Llama<B> {
    fn forward(
        &self,
        backend: &B,
        step: &B::Step<'_>,
        cache: &mut B::Cache,
    ) -> Result<B::Tensor, BackendError> {
        let ModelConfig { hidden_size, intermediate_size, q_heads, kv_heads, head_dim, .. } = self.config;
        let eps = self.config.rms_norm_eps;
        let rows = backend.rows(step);
        let tensor = |width| backend.tensor(rows, width);
        let (mut x, mut normed, mut delta) = (tensor(hidden_size), tensor(hidden_size), tensor(hidden_size));
        let (mut q, mut attended) = (tensor(q_heads * head_dim), tensor(q_heads * head_dim));
        let (mut k, mut v) = (tensor(kv_heads * head_dim), tensor(kv_heads * head_dim));
        let (mut gate, mut up) = (tensor(intermediate_size), tensor(intermediate_size));
        let mut activated = tensor(intermediate_size);

        backend.embed(step, &self.embedding, &mut x)?;
        for (index, layer) in self.layers.iter().enumerate() {
            backend.rms_norm(&x, &layer.attention_norm, eps, &mut normed)?;
            backend.linear(&normed, &mut [(&layer.q, &mut q), (&layer.k, &mut k), (&layer.v, &mut v)])?;
            backend.rotary(step, &mut q, &mut k)?;
            backend.write_kv(step, cache, index, &k, &v)?;
            backend.attention(step, cache, index, &q, &mut attended)?;
            backend.linear(&attended, &mut [(&layer.o, &mut delta)])?;
            backend.add(&mut x, &delta)?;

            backend.rms_norm(&x, &layer.mlp_norm, eps, &mut normed)?;
            backend.linear(&normed, &mut [(&layer.gate, &mut gate), (&layer.up, &mut up)])?;
            backend.silu_mul(&gate, &up, &mut activated)?;
            backend.linear(&activated, &mut [(&layer.down, &mut delta)])?;
            backend.add(&mut x, &delta)?;
        }
        let last = backend.gather_logit_rows(step, &x);
        let wanted = backend.logit_rows(step);
        let (mut normed, mut logits) =
            (backend.tensor(wanted, hidden_size), backend.tensor(wanted, self.output.out_features));
        backend.rms_norm(&last, &self.norm, eps, &mut normed)?;
        backend.linear(&normed, &mut [(&self.output, &mut logits)])?;
        Ok(logits)
    }
}

impl<B: Backend> Llama<B> {
    pub(super) fn load(
        config: &ModelConfig,
        weights: &WeightSource,
        backend: &B,
    ) -> Result<Self, LoadModelError> {
        let ModelConfig { vocab_size, hidden_size, .. } = *config;
        let weight = |name: &str, shape: &[usize]| -> Result<B::Weight, LoadModelError> {
            Ok(backend.upload(weights.tensor(name, shape)?)?)
        };
        let embedding_shape = [vocab_size, hidden_size];
        let embedding = weight("model.embed_tokens.weight", &embedding_shape)?;
        let output = match config.tie_word_embeddings {
            true => embedding.clone(),
            false => weight("lm_head.weight", &embedding_shape)?,
        };
        Ok(Self {
            embedding,
            layers: (0..config.num_layers())
                .map(|index| Layer::load(config, index, &weight))
                .collect::<Result<_, _>>()?,
            norm: weight("model.norm.weight", &[hidden_size])?,
            output: Linear { weight: output, bias: None, out_features: vocab_size },
            config: config.clone(),
        })
    }
}

impl<W> Layer<W> {
    fn load(
        config: &ModelConfig,
        index: usize,
        weight: &impl Fn(&str, &[usize]) -> Result<W, LoadModelError>,
    ) -> Result<Self, LoadModelError> {
        let ModelConfig { hidden_size, intermediate_size, q_heads, kv_heads, head_dim, .. } = *config;
        let ModelConfig { qkv_bias, output_bias, mlp_bias, .. } = *config;
        let norm = |name: &str| weight(&format!("model.layers.{index}.{name}.weight"), &[hidden_size]);
        let linear = |name: &str, out_features: usize, in_features: usize, bias: bool| {
            let name = format!("model.layers.{index}.{name}");
            let bias = bias.then(|| weight(&format!("{name}.bias"), &[out_features])).transpose()?;
            let weight = weight(&format!("{name}.weight"), &[out_features, in_features])?;
            Ok::<_, LoadModelError>(Linear { weight, bias, out_features })
        };
        Ok(Self {
            attention_norm: norm("input_layernorm")?,
            q: linear("self_attn.q_proj", q_heads * head_dim, hidden_size, qkv_bias)?,
            k: linear("self_attn.k_proj", kv_heads * head_dim, hidden_size, qkv_bias)?,
            v: linear("self_attn.v_proj", kv_heads * head_dim, hidden_size, qkv_bias)?,
            o: linear("self_attn.o_proj", hidden_size, q_heads * head_dim, output_bias)?,
            mlp_norm: norm("post_attention_layernorm")?,
            gate: linear("mlp.gate_proj", intermediate_size, hidden_size, mlp_bias)?,
            up: linear("mlp.up_proj", intermediate_size, hidden_size, mlp_bias)?,
            down: linear("mlp.down_proj", hidden_size, intermediate_size, mlp_bias)?,
        })
    }
}
