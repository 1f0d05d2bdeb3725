//! What models are made of: weights on a device, grouped as a diagram draws them. Owns no computation (`pass`) and no
//! names of weights (the models, `loader`).

use crate::backend::{Linear, Norm};
use crate::model_dir::Activation;

/// Attention: projections to queries, keys and values, and back.
#[derive(Debug)]
pub(super) struct Attention<W> {
    pub(super) q: Linear<W>,
    pub(super) k: Linear<W>,
    pub(super) v: Linear<W>,
    pub(super) o: Linear<W>,
    /// Norms of each head of queries and keys, before they are rotated.
    pub(super) head_norms: Option<HeadNorms<W>>,
}

/// Norms of `head_dim` elements.
#[derive(Debug)]
pub(super) struct HeadNorms<W> {
    pub(super) q: Norm<W>,
    pub(super) k: Norm<W>,
}

/// The feed-forward part of a layer.
#[derive(Debug)]
pub(super) enum Mlp<W> {
    /// `down(f(gate(x)) · up(x))`
    Gated { activation: Activation, gate: Linear<W>, up: Linear<W>, down: Linear<W> },
    /// `down(f(up(x)))`
    Plain { activation: Activation, up: Linear<W>, down: Linear<W> },
}

impl<W> Mlp<W> {
    /// The last product.
    pub(super) fn down(&self) -> &Linear<W> {
        match self {
            Self::Gated { down, .. } | Self::Plain { down, .. } => down,
        }
    }
}

/// A layer: attention, then MLP, each with a norm before it or behind its sum.
#[derive(Debug)]
pub(super) struct Layer<W> {
    pub(super) attention_norm: Norm<W>,
    pub(super) attention: Attention<W>,
    pub(super) mlp_norm: Norm<W>,
    pub(super) mlp: Mlp<W>,
}

/// From the residual stream to logits.
#[derive(Debug)]
pub(super) struct Head<W> {
    pub(super) norm: Option<Norm<W>>,
    /// To the width of the embedding, where that is another.
    pub(super) project: Option<Linear<W>>,
    pub(super) output: Linear<W>,
    /// `cap · tanh(logit / cap)`
    pub(super) softcap: Option<f32>,
}
