//! Gemma 2 (Gemma Team 2024): norms before and behind attention and MLP, sliding and full layers in turn, soft caps
//! on attention scores and logits, embeddings scaled by the root of their width. Norms multiply by `1 + weight`.
//!
//! ```text
//! tokens ─ embed · √hidden ─► x ─► [ + norm(attention(norm(x))) ─► + norm(mlp(norm(x))) ] × layers
//!                               ─► norm ─► output ─ soft cap ─► logits
//!
//! attention: q, k, v ─ rotary(q, k) ─ write k, v into blocks ─ paged attention with a soft cap ─ o
//! mlp:       gelu(gate) · up ─ down
//! ```

use super::blocks::{Head, Layer};
use super::llama::PROJECTIONS;
use super::loader::Loader;
use super::pass::{Pass, Stream};
use super::{LoadModelError, Model};
use crate::backend::{Backend, BackendError, Input, Norm};
use crate::model_dir::ModelConfig;

pub(super) struct Gemma2<B: Backend> {
    embedding: B::Weight,
    layers: Vec<NormedLayer<B::Weight>>,
    head: Head<B::Weight>,
    config: ModelConfig,
}

/// A layer with norms behind its parts as well.
struct NormedLayer<W> {
    layer: Layer<W>,
    behind_attention: Norm<W>,
    behind_mlp: Norm<W>,
}

impl<B: Backend> Model<B> for Gemma2<B> {
    fn forward(
        &self,
        backend: &B,
        step: &B::Step<'_>,
        cache: &mut B::Cache,
    ) -> Result<B::Tensor, BackendError> {
        let hidden_size = self.config.hidden_size;
        let mut pass = Pass::new(&self.config, backend, step, cache)?;
        let mut stream = pass.stream(hidden_size)?;
        let Stream { x, normed, delta } = &mut stream;
        pass.embed(&self.embedding, x)?;
        pass.scale((hidden_size as f32).sqrt(), x)?;
        for (index, NormedLayer { layer, behind_attention, behind_mlp }) in self.layers.iter().enumerate() {
            let input = Input::Normed { x, norm: &layer.attention_norm, room: normed };
            pass.attend(index, &layer.attention, input)?;
            pass.attended(&layer.attention, delta)?;
            pass.norm(behind_attention, delta, normed)?;
            pass.add(x, normed)?;

            pass.activate(&layer.mlp, Input::Normed { x, norm: &layer.mlp_norm, room: normed })?;
            pass.activated(&layer.mlp, delta)?;
            pass.norm(behind_mlp, delta, normed)?;
            pass.add(x, normed)?;
        }
        pass.logits(&self.config, &self.head, x)
    }
}

impl<B: Backend> Gemma2<B> {
    pub(super) fn load(loader: &Loader<'_, B>) -> Result<Self, LoadModelError> {
        let embedding = loader.embedding()?;
        let layer = |index| {
            let layer = format!("layers.{index}");
            let norm = |name: &str| loader.rms_norm_plus_one(&format!("{layer}.{name}"));
            Ok(NormedLayer {
                layer: Layer {
                    attention_norm: norm("input_layernorm")?,
                    attention: loader.attention(&layer, PROJECTIONS)?,
                    mlp_norm: norm("pre_feedforward_layernorm")?,
                    mlp: loader.gated_mlp(&layer)?,
                },
                behind_attention: norm("post_attention_layernorm")?,
                behind_mlp: norm("post_feedforward_layernorm")?,
            })
        };
        let layers = loader.layers(layer)?;
        let head = loader.head(&embedding, Some(loader.rms_norm_plus_one("norm")?), None)?;
        Ok(Self { embedding, layers, head, config: loader.config.clone() })
    }
}
