//! The seam between planning and computing: an executor turns a [`StepPlan`] into logits, or what is chosen from them.

mod rows;

pub use rows::{
    CandidatesOutput, CandidatesWanted, LogitChanges, Row, RowOutput, RowWanted, Sampling, StepOutput,
    TokenChange, TokenOutput, TokenWanted,
};

use crate::backend::{AttentionSpec, Backend, BackendError, BatchLimits, StepBatch};
use crate::models::Model;
use crate::plan::{BlockCopy, BlockOps, StepPlan};
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

    /// Whether the device can answer this itself, for a row of the vocabulary's size. What it cannot must be asked for
    /// as logits.
    fn answers(&self, wanted: &RowWanted) -> bool {
        matches!(wanted, RowWanted::Logits)
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

/// The way between device and host.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    /// Bytes of a block in all layers.
    pub block_bytes: f64,
    /// Bytes a second, one way.
    pub bytes_per_second: f64,
}

/// Beyond so many logits a row is the host's: devices add up weights in 64 bits, of which there may not be more.
const MAX_DEVICE_VOCAB: usize = 1 << 19;

/// Blocks that are moved to measure the link: enough to fill its caches, few enough to take no time.
const LINK_BLOCKS: usize = 64;

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

    /// What it computes with, and the cache that it computes in.
    #[cfg(feature = "cuda")]
    pub(crate) fn parts(&mut self) -> (&B, &dyn Model<B>, &AttentionSpec, &mut B::Cache) {
        (&self.backend, &*self.model, &self.spec, &mut self.cache)
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

    fn answers(&self, wanted: &RowWanted) -> bool {
        match wanted {
            RowWanted::Logits => true,
            wanted => self.vocab_size <= MAX_DEVICE_VOCAB && self.backend.answers(wanted),
        }
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
