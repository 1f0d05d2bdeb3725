//! From named weights to blocks on a device: prefixes, fused projections, transposed matrices. Owns no
//! architecture: which blocks there are, and what their weights are called, the models say.

use super::blocks::{Attention, Head, HeadNorms, Mlp};
use super::{LoadModelError, WeightSource};
use crate::backend::{Backend, BackendError, Linear, Norm};
use crate::model_dir::{ModelConfig, WeightTensor};

type Result<T> = std::result::Result<T, LoadModelError>;

/// How files name the weights of an architecture.
#[derive(Clone, Copy, Debug)]
pub(super) struct Names {
    /// What may stand before all names but that of the output projection; the first is the usual one.
    pub(super) prefixes: &'static [&'static str],
    /// The embedding, behind the prefix.
    pub(super) embedding: &'static str,
}

impl Names {
    /// The prefix of these weights: the one with which they have an embedding.
    pub(super) fn prefix(&self, weights: &WeightSource) -> &'static str {
        let has = |prefix: &&&str| weights.contains(&format!("{prefix}{}", self.embedding));
        self.prefixes.iter().find(has).or(self.prefixes.first()).copied().unwrap_or_default()
    }
}

/// Finds the weights of one model and brings them to a device.
pub(super) struct Loader<'a, B> {
    pub(super) config: &'a ModelConfig,
    weights: &'a WeightSource,
    backend: &'a B,
    names: Names,
    prefix: &'static str,
}

/// How wide a projection is, and whether it has a bias.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) out_features: usize,
    pub(super) in_features: usize,
    pub(super) bias: bool,
}

impl<'a, B: Backend> Loader<'a, B> {
    pub(super) fn new(
        config: &'a ModelConfig,
        weights: &'a WeightSource,
        backend: &'a B,
        names: Names,
    ) -> Self {
        Self { config, weights, backend, names, prefix: names.prefix(weights) }
    }

    /// `make(layer)` for each layer.
    pub(super) fn layers<T>(&self, make: impl FnMut(usize) -> Result<T>) -> Result<Vec<T>> {
        (0..self.config.num_layers()).map(make).collect()
    }

    /// A weight by its name behind the prefix.
    pub(super) fn weight(&self, name: &str, shape: &[usize]) -> Result<B::Weight> {
        self.upload(self.tensor(name, shape)?)
    }

    /// The token embedding.
    pub(super) fn embedding(&self) -> Result<B::Weight> {
        self.weight(self.names.embedding, &[self.config.vocab_size, self.config.embedding_size])
    }

    /// The way to logits: the output projection is the embedding, where the configuration says so.
    pub(super) fn head(
        &self,
        embedding: &B::Weight,
        norm: Option<Norm<B::Weight>>,
        project: Option<Linear<B::Weight>>,
    ) -> Result<Head<B::Weight>> {
        let ModelConfig { vocab_size, embedding_size, logit_softcap, .. } = *self.config;
        let weight = match self.config.tie_word_embeddings {
            true => embedding.clone(),
            // It stands beside the model, not in it.
            false => self.upload(self.weights.tensor("lm_head.weight", &[vocab_size, embedding_size])?)?,
        };
        let output = Linear { weight, bias: None, out_features: vocab_size };
        Ok(Head { norm, project, output, softcap: logit_softcap })
    }

    /// `name.weight` and, where the shape has one, `name.bias`.
    pub(super) fn linear(&self, name: &str, shape: Shape) -> Result<Linear<B::Weight>> {
        let [linear] = self.linears([(name, shape)])?;
        Ok(linear)
    }

    /// Projections of the same rows.
    fn linears<const N: usize>(&self, named: [(&str, Shape); N]) -> Result<[Linear<B::Weight>; N]> {
        let mut found = Vec::with_capacity(N);
        for (name, Shape { out_features, in_features, bias }) in named {
            let bias = bias.then(|| self.tensor(&format!("{name}.bias"), &[out_features])).transpose()?;
            let weight = self.tensor(&format!("{name}.weight"), &[out_features, in_features])?;
            found.push(Linear { weight, bias, out_features });
        }
        self.upload_linears(found)
    }

    /// Projections of the stream that the file holds as one, row after row, each so wide.
    pub(super) fn fused<const N: usize>(
        &self,
        name: &str,
        widths: [usize; N],
    ) -> Result<[Linear<B::Weight>; N]> {
        let shape = [widths.iter().sum(), self.config.hidden_size];
        self.upload_linears(split(&self.tensor(&format!("{name}.weight"), &shape)?, None, widths))
    }

    /// Projections with biases, so wide each, that the file holds as one and transposed: `[in_features, out_features]`.
    pub(super) fn transposed<const N: usize>(
        &self,
        name: &str,
        shape: Shape,
        widths: [usize; N],
    ) -> Result<[Linear<B::Weight>; N]> {
        let Shape { out_features, in_features, bias } = shape;
        let weight = self.tensor(&format!("{name}.weight"), &[in_features, out_features])?.transposed();
        let bias = bias.then(|| self.tensor(&format!("{name}.bias"), &[out_features])).transpose()?;
        self.upload_linears(split(&weight, bias.as_ref(), widths))
    }

    /// Attention's projections by these names, queries, keys, values and output, each with the layer's before it.
    pub(super) fn attention(&self, layer: &str, [q, k, v, o]: [&str; 4]) -> Result<Attention<B::Weight>> {
        let ModelConfig { hidden_size, qkv_bias, .. } = *self.config;
        let [queries, keys, values] = self.qkv_widths();
        let [q, k, v] = [q, k, v].map(|name| format!("{layer}.{name}"));
        let shape = |out_features| Shape { out_features, in_features: hidden_size, bias: qkv_bias };
        let [q, k, v] = self.linears([(&q, shape(queries)), (&k, shape(keys)), (&v, shape(values))])?;
        Ok(Attention { q, k, v, o: self.attention_output(&format!("{layer}.{o}"))?, head_norms: None })
    }

    /// The projection from attention's heads back to the stream.
    pub(super) fn attention_output(&self, name: &str) -> Result<Linear<B::Weight>> {
        let [queries, ..] = self.qkv_widths();
        let ModelConfig { hidden_size, output_bias, .. } = *self.config;
        self.linear(name, Shape { out_features: hidden_size, in_features: queries, bias: output_bias })
    }

    /// Widths of queries, keys and values.
    pub(super) fn qkv_widths(&self) -> [usize; 3] {
        let ModelConfig { q_heads, kv_heads, head_dim, .. } = *self.config;
        [q_heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    }

    /// Norms of each head of queries and keys.
    pub(super) fn head_norms(&self, layer: &str) -> Result<HeadNorms<B::Weight>> {
        let norm = |name: &str| self.rms_norm_of(&format!("{layer}.self_attn.{name}"), self.config.head_dim);
        Ok(HeadNorms { q: norm("q_norm")?, k: norm("k_norm")? })
    }

    /// `mlp.gate_proj`, `mlp.up_proj` and `mlp.down_proj` of a layer.
    pub(super) fn gated_mlp(&self, layer: &str) -> Result<Mlp<B::Weight>> {
        let ModelConfig { hidden_size, intermediate_size, mlp_bias: bias, .. } = *self.config;
        let shape = Shape { out_features: intermediate_size, in_features: hidden_size, bias };
        let [gate, up] = ["gate_proj", "up_proj"].map(|name| format!("{layer}.mlp.{name}"));
        let [gate, up] = self.linears([(&gate, shape), (&up, shape)])?;
        Ok(Mlp::Gated {
            activation: self.config.activation,
            gate,
            up,
            down: self.mlp_down(&format!("{layer}.mlp.down_proj"))?,
        })
    }

    /// The projection from the MLP's width back to the stream.
    pub(super) fn mlp_down(&self, name: &str) -> Result<Linear<B::Weight>> {
        let ModelConfig { hidden_size, intermediate_size, mlp_bias: bias, .. } = *self.config;
        self.linear(name, Shape { out_features: hidden_size, in_features: intermediate_size, bias })
    }

    /// `name.weight`, as wide as the stream.
    pub(super) fn rms_norm(&self, name: &str) -> Result<Norm<B::Weight>> {
        self.rms_norm_of(name, self.config.hidden_size)
    }

    fn rms_norm_of(&self, name: &str, width: usize) -> Result<Norm<B::Weight>> {
        Ok(Norm::Rms { weight: self.weight(&format!("{name}.weight"), &[width])?, eps: self.config.norm_eps })
    }

    /// `1 + name.weight`, as wide as the stream.
    pub(super) fn rms_norm_plus_one(&self, name: &str) -> Result<Norm<B::Weight>> {
        let weight = self.tensor(&format!("{name}.weight"), &[self.config.hidden_size])?.plus_one();
        Ok(Norm::Rms { weight: self.upload(weight)?, eps: self.config.norm_eps })
    }

    /// `name.weight` and `name.bias`, as wide as the stream.
    pub(super) fn layer_norm(&self, name: &str) -> Result<Norm<B::Weight>> {
        let vector = |part: &str| self.weight(&format!("{name}.{part}"), &[self.config.hidden_size]);
        Ok(Norm::Layer { weight: vector("weight")?, bias: vector("bias")?, eps: self.config.norm_eps })
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<WeightTensor> {
        Ok(self.weights.tensor(&format!("{}{name}", self.prefix), shape)?)
    }

    fn upload(&self, tensor: WeightTensor) -> Result<B::Weight> {
        Ok(self.backend.upload(tensor)?)
    }

    fn upload_linears<const N: usize>(
        &self,
        linears: Vec<Linear<WeightTensor>>,
    ) -> Result<[Linear<B::Weight>; N]> {
        let widths: Vec<usize> = linears.iter().map(|linear| linear.out_features).collect();
        let (weights, biases): (Vec<_>, Vec<_>) =
            linears.into_iter().map(|linear| (linear.weight, linear.bias)).unzip();
        let weights = self.backend.upload_together(weights)?;
        let biases = match biases.into_iter().collect() {
            Some(biases) => self.backend.upload_together(biases)?.into_iter().map(Some).collect(),
            None => vec![None; widths.len()],
        };
        let uploaded = weights.into_iter().zip(biases).zip(widths);
        let linears: Vec<_> =
            uploaded.map(|((weight, bias), out_features)| Linear { weight, bias, out_features }).collect();
        let lost = |left: Vec<_>| BackendError::LostWeights { sent: N, left: left.len() };
        Ok(linears.try_into().map_err(lost)?)
    }
}

/// Cuts projections that a file holds as one into those that are so wide each.
fn split<const N: usize>(
    weight: &WeightTensor,
    bias: Option<&WeightTensor>,
    widths: [usize; N],
) -> Vec<Linear<WeightTensor>> {
    let mut taken = 0;
    let mut next = |out_features| {
        let rows = taken..taken + out_features;
        taken = rows.end;
        Linear { weight: weight.rows(rows.clone()), bias: bias.map(|bias| bias.rows(rows)), out_features }
    };
    widths.map(&mut next).into()
}
