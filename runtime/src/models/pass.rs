//! One forward pass: what a device does with the blocks of a model, a function each, and the memory that all layers
//! share. Owns no weights and no order of blocks: that is the models'.

use super::blocks::{Attention, Head, Layer, Mlp, Norm};
use crate::backend::{Backend, BackendError, Linear};
use crate::model_dir::ModelConfig;

/// A device, a step and its cache, with room for what lies between the blocks.
pub(super) struct Pass<'a, 's, B: Backend> {
    backend: &'a B,
    step: &'a B::Step<'s>,
    cache: &'a mut B::Cache,
    room: Room<B::Tensor>,
}

/// Tensors of the step's rows that every layer uses again.
struct Room<T> {
    q: T,
    k: T,
    v: T,
    attended: T,
    /// As wide as the keys.
    normed_k: T,
    gate: T,
    up: T,
    activated: T,
}

/// The residual stream and what is added to it, `[rows, hidden_size]`.
pub(super) struct Stream<T> {
    pub(super) x: T,
    pub(super) normed: T,
    pub(super) delta: T,
}

impl<'a, 's, B: Backend> Pass<'a, 's, B> {
    pub(super) fn new(
        config: &ModelConfig,
        backend: &'a B,
        step: &'a B::Step<'s>,
        cache: &'a mut B::Cache,
    ) -> Self {
        let rows = backend.rows(step);
        let tensor = |width| backend.tensor(rows, width);
        let (queries, keys) = (config.q_heads * config.head_dim, config.kv_heads * config.head_dim);
        let inner = config.intermediate_size;
        let room = Room {
            q: tensor(queries),
            k: tensor(keys),
            v: tensor(keys),
            attended: tensor(queries),
            normed_k: tensor(keys),
            gate: tensor(inner),
            up: tensor(inner),
            activated: tensor(inner),
        };
        Self { backend, step, cache, room }
    }

    /// A tensor of the step's rows with undefined content.
    pub(super) fn tensor(&self, width: usize) -> B::Tensor {
        self.backend.tensor(self.backend.rows(self.step), width)
    }

    /// A stream with undefined content.
    pub(super) fn stream(&self, hidden_size: usize) -> Stream<B::Tensor> {
        let tensor = || self.tensor(hidden_size);
        Stream { x: tensor(), normed: tensor(), delta: tensor() }
    }

    /// `x = table[tokens]`
    pub(super) fn embed(&self, table: &B::Weight, x: &mut B::Tensor) -> Result<(), BackendError> {
        self.backend.embed(self.step, table, x)
    }

    /// `x += table[offset + positions]`
    pub(super) fn add_positions(
        &self,
        table: &B::Weight,
        offset: usize,
        x: &mut B::Tensor,
    ) -> Result<(), BackendError> {
        self.backend.add_positions(self.step, table, offset, x)
    }

    /// `x *= factor`
    pub(super) fn scale(&self, factor: f32, x: &mut B::Tensor) -> Result<(), BackendError> {
        self.backend.scale(factor, x)
    }

    /// `x += delta`
    pub(super) fn add(&self, x: &mut B::Tensor, delta: &B::Tensor) -> Result<(), BackendError> {
        self.backend.add(x, delta)
    }

    /// `out = linear(x)`
    pub(super) fn linear(
        &self,
        linear: &Linear<B::Weight>,
        x: &B::Tensor,
        out: &mut B::Tensor,
    ) -> Result<(), BackendError> {
        self.backend.linear(x, &mut [(linear, out)])
    }

    /// `out = norm(x)`
    pub(super) fn norm(
        &self,
        norm: &Norm<B::Weight>,
        x: &B::Tensor,
        out: &mut B::Tensor,
    ) -> Result<(), BackendError> {
        apply_norm(self.backend, norm, x, out)
    }

    /// `out = attention(x)`: q, k, v ─ norms of heads ─ rotary ─ write k, v into blocks ─ paged attention ─ o
    pub(super) fn attention(
        &mut self,
        index: usize,
        attention: &Attention<B::Weight>,
        x: &B::Tensor,
        out: &mut B::Tensor,
    ) -> Result<(), BackendError> {
        let Attention { q, k, v, o, head_norms } = attention;
        let (backend, step) = (self.backend, self.step);
        backend.linear(x, &mut [(q, &mut self.room.q), (k, &mut self.room.k), (v, &mut self.room.v)])?;
        if let Some(norms) = head_norms {
            // Nothing is attended yet: that room takes the queries.
            self.norm_heads(&norms.q, |room| (&mut room.q, &mut room.attended))?;
            self.norm_heads(&norms.k, |room| (&mut room.k, &mut room.normed_k))?;
        }
        let Room { q, k, v, attended, .. } = &mut self.room;
        backend.rotary(step, q, k)?;
        backend.write_kv(step, self.cache, index, k, v)?;
        backend.attention(step, self.cache, index, q, attended)?;
        backend.linear(attended, &mut [(o, out)])
    }

    /// Norms the heads of the first of two tensors; what was in the second is lost.
    fn norm_heads(
        &mut self,
        norm: &Norm<B::Weight>,
        choose: impl FnOnce(&mut Room<B::Tensor>) -> (&mut B::Tensor, &mut B::Tensor),
    ) -> Result<(), BackendError> {
        let backend = self.backend;
        let (heads, room) = choose(&mut self.room);
        apply_norm(backend, norm, heads, room)?;
        std::mem::swap(heads, room);
        Ok(())
    }

    /// `out = mlp(x)`
    pub(super) fn mlp(
        &mut self,
        mlp: &Mlp<B::Weight>,
        x: &B::Tensor,
        out: &mut B::Tensor,
    ) -> Result<(), BackendError> {
        let (backend, Room { gate: inner, up: factor, activated, .. }) = (self.backend, &mut self.room);
        let down = match mlp {
            Mlp::Gated { activation, gate, up, down } => {
                backend.linear(x, &mut [(gate, inner), (up, factor)])?;
                backend.gated_activation(*activation, inner, factor, activated)?;
                down
            }
            Mlp::Plain { activation, up, down } => {
                backend.linear(x, &mut [(up, inner)])?;
                backend.activate(*activation, inner, activated)?;
                down
            }
        };
        backend.linear(activated, &mut [(down, out)])
    }

    /// `x += attention(norm(x)); x += mlp(norm(x))`
    pub(super) fn pre_norm_layer(
        &mut self,
        index: usize,
        layer: &Layer<B::Weight>,
        stream: &mut Stream<B::Tensor>,
    ) -> Result<(), BackendError> {
        let Stream { x, normed, delta } = stream;
        self.norm(&layer.attention_norm, x, normed)?;
        self.attention(index, &layer.attention, normed, delta)?;
        self.add(x, delta)?;
        self.norm(&layer.mlp_norm, x, normed)?;
        self.mlp(&layer.mlp, normed, delta)?;
        self.add(x, delta)
    }

    /// The logits that the step asks for: last rows ─ norm ─ projection ─ output ─ soft cap
    pub(super) fn logits(
        &self,
        config: &ModelConfig,
        head: &Head<B::Weight>,
        x: &B::Tensor,
    ) -> Result<B::Tensor, BackendError> {
        let tensor = |width| self.backend.tensor(self.backend.logit_rows(self.step), width);
        let mut last = self.backend.gather_logit_rows(self.step, x);
        if let Some(norm) = &head.norm {
            let mut normed = tensor(config.hidden_size);
            self.norm(norm, &last, &mut normed)?;
            last = normed;
        }
        if let Some(project) = &head.project {
            let mut projected = tensor(project.out_features);
            self.linear(project, &last, &mut projected)?;
            last = projected;
        }
        let mut logits = tensor(head.output.out_features);
        self.linear(&head.output, &last, &mut logits)?;
        if let Some(cap) = head.softcap {
            self.backend.softcap(cap, &mut logits)?;
        }
        Ok(logits)
    }
}

fn apply_norm<B: Backend>(
    backend: &B,
    norm: &Norm<B::Weight>,
    x: &B::Tensor,
    out: &mut B::Tensor,
) -> Result<(), BackendError> {
    match norm {
        Norm::Rms { weight, eps } => backend.rms_norm(x, weight, *eps, out),
        Norm::Layer { weight, bias, eps } => backend.layer_norm(x, weight, bias, *eps, out),
    }
}
