//! GPT-2 (Radford et al. 2019): learned positions, LayerNorm before attention and MLP, all matrices stored transposed.
//!
//! ```text
//! tokens ─ embed ─ + positions ─► x ─► [ + attention(norm(x)) ─► + mlp(norm(x)) ] × layers ─► norm ─► output ─► logits
//!
//! attention: q, k, v ─ write k, v into blocks ─ paged attention ─ o
//! mlp:       gelu(up) ─ down
//! ```

use super::blocks::{Attention, Head, Layer, Mlp};
use super::loader::{Loader, Names, Shape};
use super::pass::Pass;
use super::{LoadModelError, Model};
use crate::backend::{Backend, BackendError, Linear};
use crate::model_dir::ModelConfig;

pub(super) const NAMES: Names = Names { prefixes: &["transformer.", ""], embedding: "wte.weight" };

pub(super) struct Gpt2<B: Backend> {
    embedding: B::Weight,
    positions: B::Weight,
    layers: Vec<Layer<B::Weight>>,
    head: Head<B::Weight>,
    config: ModelConfig,
}

impl<B: Backend> Model<B> for Gpt2<B> {
    fn forward(
        &self,
        backend: &B,
        step: &B::Step<'_>,
        cache: &mut B::Cache,
    ) -> Result<B::Tensor, BackendError> {
        let mut pass = Pass::new(&self.config, backend, step, cache)?;
        let mut stream = pass.stream(self.config.hidden_size)?;
        pass.embed(&self.embedding, &mut stream.x)?;
        pass.add_positions(&self.positions, 0, &mut stream.x)?;
        for (index, layer) in self.layers.iter().enumerate() {
            pass.pre_norm_layer(index, layer, &mut stream)?;
        }
        pass.logits(&self.config, &self.head, &stream.x)
    }
}

impl<B: Backend> Gpt2<B> {
    pub(super) fn load(loader: &Loader<'_, B>) -> Result<Self, LoadModelError> {
        let ModelConfig { hidden_size, max_positions, .. } = *loader.config;
        let embedding = loader.embedding()?;
        let positions = loader.weight("wpe.weight", &[max_positions, hidden_size])?;
        let layer = |index| {
            let layer = format!("h.{index}");
            Ok(Layer {
                attention_norm: loader.layer_norm(&format!("{layer}.ln_1"))?,
                attention: attention(loader, &layer)?,
                mlp_norm: loader.layer_norm(&format!("{layer}.ln_2"))?,
                mlp: mlp(loader, &layer)?,
            })
        };
        let layers = loader.layers(layer)?;
        let head = loader.head(&embedding, Some(loader.layer_norm("ln_f")?), None)?;
        Ok(Self { embedding, positions, layers, head, config: loader.config.clone() })
    }
}

fn attention<B: Backend>(
    loader: &Loader<'_, B>,
    layer: &str,
) -> Result<Attention<B::Weight>, LoadModelError> {
    let ModelConfig { hidden_size, qkv_bias: bias, .. } = *loader.config;
    let widths = loader.qkv_widths();
    let shape = Shape { out_features: widths.iter().sum(), in_features: hidden_size, bias };
    let [q, k, v] = loader.transposed(&format!("{layer}.attn.c_attn"), shape, widths)?;
    let [queries, ..] = widths;
    Ok(Attention {
        q,
        k,
        v,
        o: projection(loader, &format!("{layer}.attn.c_proj"), hidden_size, queries)?,
        head_norms: None,
    })
}

fn mlp<B: Backend>(loader: &Loader<'_, B>, layer: &str) -> Result<Mlp<B::Weight>, LoadModelError> {
    let ModelConfig { hidden_size, intermediate_size, activation, .. } = *loader.config;
    Ok(Mlp::Plain {
        activation,
        up: projection(loader, &format!("{layer}.mlp.c_fc"), intermediate_size, hidden_size)?,
        down: projection(loader, &format!("{layer}.mlp.c_proj"), hidden_size, intermediate_size)?,
    })
}

fn projection<B: Backend>(
    loader: &Loader<'_, B>,
    name: &str,
    out_features: usize,
    in_features: usize,
) -> Result<Linear<B::Weight>, LoadModelError> {
    let [linear] =
        loader.transposed(name, Shape { out_features, in_features, bias: true }, [out_features])?;
    Ok(linear)
}
