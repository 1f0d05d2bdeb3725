//! The seam between planning and computing: an executor turns a [`StepPlan`] into logits, or the tokens chosen from
//! them.

use crate::backend::{AttentionSpec, Backend, BackendError, BatchLimits, StepBatch};
use crate::models::Model;
use crate::plan::{BlockCopy, BlockOps, StepPlan};
use crate::sampling::Draw;
use std::collections::VecDeque;
use std::time::Instant;

/// Computes steps. One executor owns one model's weights and its cache memory.
///
/// A step is begun and finished; between the two the device works. Where an executor [runs
/// ahead](Self::runs_ahead), a second step may be begun before the first is finished: they are computed, and finished,
/// in their order.
pub trait Executor: Send {
    /// Carries out the block ops, then computes all chunks. `wanted` says what is wanted of each logit row, in their
    /// order; of rows beyond its end the logits are.
    ///
    /// # Errors
    /// [`ExecutorError`] if the plan contradicts itself or the device fails. The cache's content is then undefined,
    /// every running request must be failed, and no step is under way any longer.
    fn begin(&mut self, plan: &StepPlan, wanted: &[RowWanted]) -> Result<(), ExecutorError>;

    /// Waits for the step that was begun first.
    ///
    /// # Errors
    /// As of [`begin`](Self::begin), and if none was begun.
    fn finish(&mut self) -> Result<StepOutput, ExecutorError>;

    /// Begins and finishes a step whose logits are wanted.
    ///
    /// # Errors
    /// As of [`begin`](Self::begin).
    fn execute(&mut self, plan: &StepPlan) -> Result<StepOutput, ExecutorError> {
        self.begin(plan, &[])?;
        self.finish()
    }

    /// Whether the device can choose tokens in this way. Otherwise it must be asked for logits.
    fn samples(&self, sampling: &Sampling) -> bool {
        let _ = sampling;
        false
    }

    /// Whether a step may be begun while the one before it is under way. Its plan may then hold placeholders for the
    /// tokens that the device chooses in that one.
    fn runs_ahead(&self) -> bool {
        false
    }

    /// Measures how fast blocks move between device and host, before anything is in the cache. `None` where that is
    /// not known.
    fn measure_link(&mut self) -> Option<Link> {
        None
    }
}

/// What is wanted of a logit row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RowWanted {
    /// All of it.
    Logits,
    /// The token that is chosen from it.
    Token(Sampling),
}

/// How a device chooses a token: by the sampler's rules, for logits that neither bias nor penalties change.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// As in [`SamplingParams`](crate::request::SamplingParams::temperature).
    pub temperature: f32,
    /// As in [`SamplingParams`](crate::request::SamplingParams::top_k).
    pub top_k: usize,
    /// As in [`SamplingParams`](crate::request::SamplingParams::top_p).
    pub top_p: f32,
    /// As in [`SamplingParams`](crate::request::SamplingParams::min_p).
    pub min_p: f32,
    /// Its random number.
    pub draw: Draw,
}

impl Sampling {
    /// Whether the likeliest token is chosen, whatever the random number.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0 || self.top_k == 1
    }
}

/// The way between device and host.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    /// Bytes of a block in all layers.
    pub block_bytes: f64,
    /// Bytes a second, one way.
    pub bytes_per_second: f64,
}

/// Blocks that are moved to measure the link: enough to fill its caches, few enough to take no time.
const LINK_BLOCKS: usize = 64;

/// What a step gave: one entry a logit row, the rows of the first chunk, then those of the second, and so on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepOutput {
    /// What each row gave.
    pub rows: Vec<RowOutput>,
    /// `[rows, vocab_size]`: those that are [`RowOutput::Logits`].
    pub logits: Vec<f32>,
    /// Length of a row.
    pub vocab_size: usize,
}

/// What a logit row gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowOutput {
    /// Itself: this row of the output's logits.
    Logits(usize),
    /// The chosen token; `None` where there is no usable logit.
    Token(Option<u32>),
}

/// A row of an output.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Row<'a> {
    /// `[vocab_size]`
    Logits(&'a [f32]),
    /// As in [`RowOutput`].
    Token(Option<u32>),
}

impl StepOutput {
    /// An output of logits alone, `[rows, vocab_size]`.
    pub fn of_logits(logits: Vec<f32>, vocab_size: usize) -> Self {
        let rows = logits.len().checked_div(vocab_size).unwrap_or(0);
        Self { rows: (0..rows).map(RowOutput::Logits).collect(), logits, vocab_size }
    }

    /// One row.
    pub fn row(&self, index: usize) -> Option<Row<'_>> {
        match *self.rows.get(index)? {
            RowOutput::Logits(row) => {
                let start = row.checked_mul(self.vocab_size)?;
                Some(Row::Logits(self.logits.get(start..start.checked_add(self.vocab_size)?)?))
            }
            RowOutput::Token(token) => Some(Row::Token(token)),
        }
    }
}

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExecutorError {
    /// The plan does not fit the model or the cache.
    #[error("step {step}: {problem}")]
    Plan {
        /// Which step.
        step: u64,
        /// What is wrong with it.
        problem: String,
    },
    /// The device failed or refused.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// A step was to be finished that was never begun.
    #[error("no step was begun that could be finished")]
    NothingBegun,
}

/// A model on one device with its cache.
pub struct ModelExecutor<B: Backend> {
    backend: B,
    model: Box<dyn Model<B>>,
    cache: B::Cache,
    spec: AttentionSpec,
    vocab_size: usize,
    /// Steps that were begun, the first one first.
    begun: VecDeque<B::Output>,
    last_step: Option<u64>,
}

impl<B: Backend> ModelExecutor<B> {
    /// Makes the cache and takes model and device into one hand.
    ///
    /// # Errors
    /// [`BackendError`] if the cache cannot be had.
    pub fn new(
        backend: B,
        model: Box<dyn Model<B>>,
        spec: AttentionSpec,
        vocab_size: usize,
    ) -> Result<Self, BackendError> {
        let cache = backend.cache(&spec)?;
        Ok(Self { backend, model, cache, spec, vocab_size, begun: VecDeque::new(), last_step: None })
    }

    fn try_begin(&mut self, plan: &StepPlan, wanted: &[RowWanted]) -> Result<B::Output, ExecutorError> {
        let Self { backend, model, cache, spec, vocab_size, .. } = self;
        let spec = &*spec;
        let limits = BatchLimits {
            block_size: spec.block_size,
            num_groups: spec.groups.len(),
            vocab_size: *vocab_size,
            earlier_step: self.last_step.filter(|_| backend.runs_ahead()),
        };
        let batch = StepBatch::new(plan, limits)?;
        let output = backend.scope(|| {
            backend.block_ops(cache, &plan.block_ops)?;
            if batch.rows() == 0 {
                return backend.output(None, &[]);
            }
            let step = backend.prepare(spec, &batch)?;
            let logits = backend.record(&step, || model.forward(backend, &step, cache))?;
            backend.output(Some(logits), wanted)
        })?;
        Ok(output)
    }
}

impl<B: Backend> Executor for ModelExecutor<B> {
    fn begin(&mut self, plan: &StepPlan, wanted: &[RowWanted]) -> Result<(), ExecutorError> {
        let begun = self.try_begin(plan, wanted);
        self.last_step = Some(plan.id);
        match begun {
            Ok(output) => self.begun.push_back(output),
            Err(error) => {
                self.begun.clear();
                return Err(error);
            }
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<StepOutput, ExecutorError> {
        let output = self.begun.pop_front().ok_or(ExecutorError::NothingBegun)?;
        let output = self.backend.wait(output).inspect_err(|_| self.begun.clear())?;
        Ok(StepOutput { vocab_size: self.vocab_size, ..output })
    }

    fn samples(&self, sampling: &Sampling) -> bool {
        self.backend.samples(sampling)
    }

    fn runs_ahead(&self) -> bool {
        self.backend.runs_ahead()
    }

    fn measure_link(&mut self) -> Option<Link> {
        let blocks = LINK_BLOCKS.min(self.spec.num_blocks).min(self.spec.host_blocks) as u32;
        let copies: Vec<BlockCopy> = (0..blocks).map(|id| BlockCopy { group: 0, src: id, dst: id }).collect();
        let ops = BlockOps { swap_out: copies, ..BlockOps::default() };
        // The first time touches the pages.
        let mut seconds = 0.0;
        for _ in 0..2 {
            let started = Instant::now();
            self.backend.block_ops(&mut self.cache, &ops).ok()?;
            self.backend.synchronize().ok()?;
            seconds = started.elapsed().as_secs_f64();
        }
        let block_bytes = self.spec.block_bytes() as f64;
        let bytes_per_second = f64::from(blocks) * block_bytes / seconds.max(1e-9);
        (blocks > 0).then_some(Link { block_bytes, bytes_per_second })
    }
}
