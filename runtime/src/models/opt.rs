//! OPT (Zhang et al. 2022): learned positions, LayerNorm before attention and MLP. Its 350m form has them behind the
//! sums instead, and an embedding narrower than the stream.
//!
//! ```text
//! tokens ─ embed ─ (project) ─ + positions ─► x
//!
//! x ─► [ + attention(norm(x)) ─► + mlp(norm(x)) ] × layers ─► norm ─► output ─► logits
//! x ─► [ norm(x + attention(x)) ─► norm(x + mlp(x)) ] × layers ─► (project) ─► output ─► logits      (350m)
//!
//! attention: q, k, v ─ write k, v into blocks ─ paged attention ─ o
//! mlp:       relu(up) ─ down
//! ```

use super::blocks::{Head, Layer, Mlp};
use super::loader::{Loader, Names, Shape};
use super::pass::{Pass, Stream};
use super::{LoadModelError, Model};
use crate::backend::{Backend, BackendError, Input, Linear};
use crate::model_dir::ModelConfig;

pub(super) const NAMES: Names =
    Names { prefixes: &["model.decoder.", "decoder.", ""], embedding: "embed_tokens.weight" };

/// Queries, keys, values and output.
const PROJECTIONS: [&str; 4] =
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"];

/// Rows of the table of positions before that of position 0.
const OFFSET: usize = 2;

pub(super) struct Opt<B: Backend> {
    embedding: B::Weight,
    project: Option<Linear<B::Weight>>,
    positions: B::Weight,
    layers: Vec<Layer<B::Weight>>,
    head: Head<B::Weight>,
    config: ModelConfig,
}

impl<B: Backend> Model<B> for Opt<B> {
    fn forward(
        &self,
        backend: &B,
        step: &B::Step<'_>,
        cache: &mut B::Cache,
    ) -> Result<B::Tensor, BackendError> {
        let mut pass = Pass::new(&self.config, backend, step, cache)?;
        let mut stream = pass.stream(self.config.hidden_size)?;
        match &self.project {
            None => pass.embed(&self.embedding, &mut stream.x)?,
            Some(project) => {
                let mut narrow = pass.wide(self.config.embedding_size)?;
                pass.embed(&self.embedding, &mut narrow)?;
                pass.linear(project, &narrow, &mut stream.x)?;
            }
        }
        pass.add_positions(&self.positions, OFFSET, &mut stream.x)?;
        if self.config.norm_before {
            for (index, layer) in self.layers.iter().enumerate() {
                pass.pre_norm_layer(index, layer, &mut stream)?;
            }
        } else {
            let mut between = pass.wide(self.config.hidden_size)?;
            for (index, layer) in self.layers.iter().enumerate() {
                post_norm_layer(&mut pass, index, layer, &mut stream, &mut between)?;
            }
        }
        pass.logits(&self.config, &self.head, &stream.x)
    }
}

/// `x = norm(x + attention(x)); x = norm(x + mlp(x))`
fn post_norm_layer<B: Backend>(
    pass: &mut Pass<'_, '_, B>,
    index: usize,
    layer: &Layer<B::Weight>,
    Stream { x, delta, .. }: &mut Stream<B::Tensor>,
    between: &mut B::Tensor,
) -> Result<(), BackendError> {
    pass.attend(index, &layer.attention, Input::Rows(x))?;
    pass.add_attended(&layer.attention, delta, x)?;
    pass.norm(&layer.attention_norm, x, between)?;

    pass.activate(&layer.mlp, Input::Rows(between))?;
    pass.add_activated(&layer.mlp, delta, between)?;
    pass.norm(&layer.mlp_norm, between, x)
}

impl<B: Backend> Opt<B> {
    pub(super) fn load(loader: &Loader<'_, B>) -> Result<Self, LoadModelError> {
        let ModelConfig { embedding_size, hidden_size, max_positions, final_norm, .. } = *loader.config;
        let projection = |name: &str, out_features, in_features| {
            let shape = Shape { out_features, in_features, bias: false };
            (embedding_size != hidden_size).then(|| loader.linear(name, shape)).transpose()
        };
        let embedding = loader.embedding()?;
        let project = projection("project_in", hidden_size, embedding_size)?;
        let positions = loader.weight("embed_positions.weight", &[max_positions + OFFSET, hidden_size])?;
        let layer = |index| {
            let layer = format!("layers.{index}");
            Ok(Layer {
                attention_norm: loader.layer_norm(&format!("{layer}.self_attn_layer_norm"))?,
                attention: loader.attention(&layer, PROJECTIONS)?,
                mlp_norm: loader.layer_norm(&format!("{layer}.final_layer_norm"))?,
                mlp: mlp(loader, &layer)?,
            })
        };
        let layers = loader.layers(layer)?;
        let norm = final_norm.then(|| loader.layer_norm("final_layer_norm")).transpose()?;
        let head = loader.head(&embedding, norm, projection("project_out", embedding_size, hidden_size)?)?;
        Ok(Self { embedding, project, positions, layers, head, config: loader.config.clone() })
    }
}

fn mlp<B: Backend>(loader: &Loader<'_, B>, layer: &str) -> Result<Mlp<B::Weight>, LoadModelError> {
    let ModelConfig { hidden_size, intermediate_size, activation, mlp_bias: bias, .. } = *loader.config;
    let linear = |name: &str, out_features, in_features| {
        loader.linear(&format!("{layer}.{name}"), Shape { out_features, in_features, bias })
    };
    Ok(Mlp::Plain {
        activation,
        up: linear("fc1", intermediate_size, hidden_size)?,
        down: linear("fc2", hidden_size, intermediate_size)?,
    })
}
