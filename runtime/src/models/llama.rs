//! The LLaMA family (Touvron et al. 2023): Llama, Qwen2 (biases on q, k, v), Mistral (sliding windows), Qwen3 (norms of
//! each head of q and k) and Phi-3 (projections fused in the file).
//!
//! ```text
//! tokens ─ embed ─► x ─► [ + attention(norm(x)) ─► + mlp(norm(x)) ] × layers ─► norm ─► output ─► logits
//!
//! attention: q, k, v ─ (norms of heads) ─ rotary(q, k) ─ write k, v into blocks ─ paged attention ─ o
//! mlp:       silu(gate) · up ─ down
//! ```

use super::blocks::{Attention, Head, Layer, Mlp};
use super::loader::{Loader, Names};
use super::pass::Pass;
use super::{LoadModelError, Model};
use crate::backend::{Backend, BackendError};
use crate::model_dir::{Architecture, ModelConfig};

pub(super) const NAMES: Names = Names { prefixes: &["model.", ""], embedding: "embed_tokens.weight" };

/// Queries, keys, values and output.
pub(super) const PROJECTIONS: [&str; 4] =
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"];

pub(super) struct Llama<B: Backend> {
    embedding: B::Weight,
    layers: Vec<Layer<B::Weight>>,
    head: Head<B::Weight>,
    config: ModelConfig,
}

impl<B: Backend> Model<B> for Llama<B> {
    fn forward(
        &self,
        backend: &B,
        step: &B::Step<'_>,
        cache: &mut B::Cache,
    ) -> Result<B::Tensor, BackendError> {
        let mut pass = Pass::new(&self.config, backend, step, cache)?;
        let mut stream = pass.stream(self.config.hidden_size)?;
        pass.embed(&self.embedding, &mut stream.x)?;
        for (index, layer) in self.layers.iter().enumerate() {
            pass.pre_norm_layer(index, layer, &mut stream)?;
        }
        pass.logits(&self.config, &self.head, &stream.x)
    }
}

impl<B: Backend> Llama<B> {
    pub(super) fn load(loader: &Loader<'_, B>) -> Result<Self, LoadModelError> {
        let embedding = loader.embedding()?;
        let layer = |index| {
            let layer = format!("layers.{index}");
            Ok(Layer {
                attention_norm: loader.rms_norm(&format!("{layer}.input_layernorm"))?,
                attention: attention(loader, &layer)?,
                mlp_norm: loader.rms_norm(&format!("{layer}.post_attention_layernorm"))?,
                mlp: mlp(loader, &layer)?,
            })
        };
        let layers = loader.layers(layer)?;
        let head = loader.head(&embedding, Some(loader.rms_norm("norm")?), None)?;
        Ok(Self { embedding, layers, head, config: loader.config.clone() })
    }
}

fn attention<B: Backend>(
    loader: &Loader<'_, B>,
    layer: &str,
) -> Result<Attention<B::Weight>, LoadModelError> {
    match loader.config.architecture {
        Architecture::Phi3 => {
            let [q, k, v] = loader.fused(&format!("{layer}.self_attn.qkv_proj"), loader.qkv_widths())?;
            Ok(Attention {
                q,
                k,
                v,
                o: loader.attention_output(&format!("{layer}.self_attn.o_proj"))?,
                head_norms: None,
            })
        }
        Architecture::Qwen3 => {
            let attention = loader.attention(layer, PROJECTIONS)?;
            Ok(Attention { head_norms: Some(loader.head_norms(layer)?), ..attention })
        }
        _ => loader.attention(layer, PROJECTIONS),
    }
}

fn mlp<B: Backend>(loader: &Loader<'_, B>, layer: &str) -> Result<Mlp<B::Weight>, LoadModelError> {
    match loader.config.architecture {
        Architecture::Phi3 => {
            let width = loader.config.intermediate_size;
            let [gate, up] = loader.fused(&format!("{layer}.mlp.gate_up_proj"), [width, width])?;
            Ok(Mlp::Gated {
                activation: loader.config.activation,
                gate,
                up,
                down: loader.mlp_down(&format!("{layer}.mlp.down_proj"))?,
            })
        }
        _ => loader.gated_mlp(layer),
    }
}
