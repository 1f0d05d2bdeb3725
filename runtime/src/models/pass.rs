//! One forward pass: what a device does with the blocks of a model, a function each, and the memory that all layers
//! share. Owns no weights and no order of blocks: that is the models'.

use super::blocks::{Attention, Head, Layer, Mlp};
use crate::backend::{Activated, Backend, BackendError, Heads, Input, Linear, Norm};
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
    /// Queries, keys and values.
    heads: [T; 3],
    attended: T,
    /// Gate and up.
    inner: [T; 2],
    activated: T,
}

/// The residual stream and what is added to it, `[rows, hidden_size]`.
pub(super) struct Stream<T> {
    /// In f32.
    pub(super) x: T,
    pub(super) normed: T,
    pub(super) delta: T,
}

/// What goes into a block.
type BlockInput<'a, B> = Input<'a, <B as Backend>::Weight, <B as Backend>::Tensor>;

impl<'a, 's, B: Backend> Pass<'a, 's, B> {
    pub(super) fn new(
        config: &ModelConfig,
        backend: &'a B,
        step: &'a B::Step<'s>,
        cache: &'a mut B::Cache,
    ) -> Result<Self, BackendError> {
        let rows = backend.rows(step);
        let (queries, keys) = (config.q_heads * config.head_dim, config.kv_heads * config.head_dim);
        let inner = config.intermediate_size;
        let room = Room {
            heads: backend.beside(rows, [queries, keys, keys])?,
            attended: backend.tensor(rows, queries)?,
            inner: backend.beside(rows, [inner, inner])?,
            activated: backend.tensor(rows, inner)?,
        };
        Ok(Self { backend, step, cache, room })
    }

    /// A stream of the step's rows with undefined content.
    pub(super) fn wide(&self, width: usize) -> Result<B::Tensor, BackendError> {
        self.backend.stream(self.backend.rows(self.step), width)
    }

    /// The residual stream with undefined content.
    pub(super) fn stream(&self, hidden_size: usize) -> Result<Stream<B::Tensor>, BackendError> {
        let tensor = || self.backend.tensor(self.backend.rows(self.step), hidden_size);
        Ok(Stream { x: self.wide(hidden_size)?, normed: tensor()?, delta: tensor()? })
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

    /// `out = norm(x)`
    pub(super) fn norm(
        &self,
        norm: &Norm<B::Weight>,
        x: &B::Tensor,
        out: &mut B::Tensor,
    ) -> Result<(), BackendError> {
        self.backend.norm(x, norm, out)
    }

    /// `out = linear(x)`
    pub(super) fn linear(
        &self,
        linear: &Linear<B::Weight>,
        x: &B::Tensor,
        out: &mut B::Tensor,
    ) -> Result<(), BackendError> {
        self.backend.linear(Input::Rows(x), &mut [(linear, out)])
    }

    /// Attention up to its output projection: q, k, v ─ norms of heads ─ rotary ─ write k, v into blocks ─ paged
    /// attention
    pub(super) fn attend(
        &mut self,
        index: usize,
        attention: &Attention<B::Weight>,
        input: BlockInput<'_, B>,
    ) -> Result<(), BackendError> {
        let (backend, step) = (self.backend, self.step);
        let Room { heads: [q, k, v], attended, .. } = &mut self.room;
        backend.linear(input, &mut [(&attention.q, q), (&attention.k, k), (&attention.v, v)])?;
        if let Some(norms) = &attention.head_norms {
            backend.norm_in_place(q, &norms.q)?;
            backend.norm_in_place(k, &norms.k)?;
        }
        backend.write_kv(step, self.cache, index, Heads { q, k, v })?;
        backend.attention(step, self.cache, index, q, attended)
    }

    /// `out = o(attended)`, behind [`attend`](Self::attend)
    pub(super) fn attended(
        &self,
        attention: &Attention<B::Weight>,
        out: &mut B::Tensor,
    ) -> Result<(), BackendError> {
        self.linear(&attention.o, &self.room.attended, out)
    }

    /// `x += o(attended)`, behind [`attend`](Self::attend)
    pub(super) fn add_attended(
        &self,
        attention: &Attention<B::Weight>,
        room: &mut B::Tensor,
        x: &mut B::Tensor,
    ) -> Result<(), BackendError> {
        self.backend.linear_add(&self.room.attended, &attention.o, room, x)
    }

    /// An MLP up to its last product: f(gate) · up, or f(up)
    pub(super) fn activate(
        &mut self,
        mlp: &Mlp<B::Weight>,
        input: BlockInput<'_, B>,
    ) -> Result<(), BackendError> {
        let activated = match mlp {
            Mlp::Gated { activation, gate, up, .. } => Activated::Gated { activation: *activation, gate, up },
            Mlp::Plain { activation, up, .. } => Activated::Plain { activation: *activation, up },
        };
        self.backend.activated_linear(input, activated, &mut self.room.inner, &mut self.room.activated)
    }

    /// `out = down(activated)`, behind [`activate`](Self::activate)
    pub(super) fn activated(&self, mlp: &Mlp<B::Weight>, out: &mut B::Tensor) -> Result<(), BackendError> {
        self.linear(mlp.down(), &self.room.activated, out)
    }

    /// `x += down(activated)`, behind [`activate`](Self::activate)
    pub(super) fn add_activated(
        &self,
        mlp: &Mlp<B::Weight>,
        room: &mut B::Tensor,
        x: &mut B::Tensor,
    ) -> Result<(), BackendError> {
        self.backend.linear_add(&self.room.activated, mlp.down(), room, x)
    }

    /// `x += attention(norm(x)); x += mlp(norm(x))`
    pub(super) fn pre_norm_layer(
        &mut self,
        index: usize,
        layer: &Layer<B::Weight>,
        stream: &mut Stream<B::Tensor>,
    ) -> Result<(), BackendError> {
        let Stream { x, normed, delta } = stream;
        self.attend(index, &layer.attention, Input::Normed { x, norm: &layer.attention_norm, room: normed })?;
        self.add_attended(&layer.attention, delta, x)?;
        self.activate(&layer.mlp, Input::Normed { x, norm: &layer.mlp_norm, room: normed })?;
        self.add_activated(&layer.mlp, delta, x)
    }

    /// The logits that the step asks for: last rows ─ norm ─ projection ─ output ─ soft cap
    pub(super) fn logits(
        &self,
        config: &ModelConfig,
        head: &Head<B::Weight>,
        x: &B::Tensor,
    ) -> Result<B::Tensor, BackendError> {
        let (backend, rows) = (self.backend, self.backend.logit_rows(self.step));
        let last = backend.gather_logit_rows(self.step, x)?;
        let mut normed = backend.tensor(rows, config.hidden_size)?;
        let mut logits = backend.stream(rows, head.output.out_features)?;
        let input = match &head.norm {
            Some(norm) => Input::Normed { x: &last, norm, room: &mut normed },
            None => Input::Rows(&last),
        };
        match &head.project {
            Some(project) => {
                let mut projected = backend.tensor(rows, project.out_features)?;
                backend.linear(input, &mut [(project, &mut projected)])?;
                self.linear(&head.output, &projected, &mut logits)?;
            }
            None => backend.linear(input, &mut [(&head.output, &mut logits)])?,
        }
        if let Some(cap) = head.softcap {
            backend.softcap(cap, &mut logits)?;
        }
        Ok(logits)
    }
}
