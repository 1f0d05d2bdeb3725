//! The seam between planning and computing: an executor turns a [`StepPlan`] into logits.

use crate::plan::StepPlan;

/// Computes steps. One executor owns one model's weights and its cache memory.
pub trait Executor: Send {
    /// Carries out the block ops, then computes all chunks.
    ///
    /// # Errors
    /// [`ExecutorError`] if the plan contradicts itself or the device fails; the cache's content is then
    /// undefined and every running request must be failed.
    fn execute(&mut self, plan: &StepPlan) -> Result<StepOutput, ExecutorError>;
}

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
    /// The attention problem was refused.
    #[error(transparent)]
    Attention(#[from] pagewise_attention::ProblemError),
}
