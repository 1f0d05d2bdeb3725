//! The seam between planning and computing: an executor turns a [`StepPlan`] into logits.

use crate::backend::{AttentionSpec, Backend, BackendError, BatchLimits, StepBatch};
use crate::models::Model;
use crate::plan::{BlockCopy, BlockOps, StepPlan};
use std::time::Instant;

/// Computes steps. One executor owns one model's weights and its cache memory.
pub trait Executor: Send {
    /// Carries out the block ops, then computes all chunks.
    ///
    /// # Errors
    /// [`ExecutorError`] if the plan contradicts itself or the device fails; the cache's content is then
    /// undefined and every running request must be failed.
    fn execute(&mut self, plan: &StepPlan) -> Result<StepOutput, ExecutorError>;

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

/// Blocks that are moved to measure the link: enough to fill its caches, few enough to take no time.
const LINK_BLOCKS: usize = 64;

/// The logits that a step asked for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepOutput {
    /// `[rows, vocab_size]`: the rows of the first chunk, then those of the second, and so on.
    pub logits: Vec<f32>,
    /// Length of a row.
    pub vocab_size: usize,
}

impl StepOutput {
    /// One row of logits.
    pub fn row(&self, index: usize) -> Option<&[f32]> {
        let start = index.checked_mul(self.vocab_size)?;
        self.logits.get(start..start.checked_add(self.vocab_size)?)
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
}

/// A model on one device with its cache.
pub struct ModelExecutor<B: Backend> {
    backend: B,
    model: Box<dyn Model<B>>,
    cache: B::Cache,
    spec: AttentionSpec,
    vocab_size: usize,
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
        Ok(Self { backend, model, cache, spec, vocab_size })
    }
}

impl<B: Backend> Executor for ModelExecutor<B> {
    fn execute(&mut self, plan: &StepPlan) -> Result<StepOutput, ExecutorError> {
        let Self { backend, model, cache, spec, vocab_size } = self;
        let (spec, vocab_size) = (&*spec, *vocab_size);
        let limits = BatchLimits { block_size: spec.block_size, num_groups: spec.groups.len(), vocab_size };
        let batch = StepBatch::new(plan, limits)?;
        let logits = backend.scope(|| {
            backend.block_ops(cache, &plan.block_ops)?;
            if batch.rows() == 0 {
                return Ok(Vec::new());
            }
            let step = backend.prepare(spec, &batch)?;
            let logits = backend.record(&step, || model.forward(backend, &step, cache))?;
            backend.download(logits)
        })?;
        Ok(StepOutput { logits, vocab_size })
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
