//! Settings, counters and errors of the engine.

use crate::scheduler::{Preemption, SchedulerConfig, SchedulerStats};
use pagewise_kvcache::{CacheError, CacheStats, PoolUsage};

/// What an engine is made of, beside its parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// Most sequences in the cache at a time. Each takes a token of the step's budget when it decodes, so
    /// there are never more than `max_batch_tokens`.
    pub max_num_seqs: usize,
    /// Most tokens a step computes.
    pub max_batch_tokens: usize,
    /// Most tokens of a sequence, prompt and completion together.
    pub max_model_len: usize,
    /// Length of a row of logits; token ids are below it.
    pub vocab_size: usize,
    /// The model's end tokens.
    pub eos_token_ids: Vec<u32>,
    /// How requests make room for others when the cache is full.
    pub preemption: Preemption,
}

/// A step's logits for prompt log-probabilities take at most about this much memory.
const PROMPT_LOGITS_BYTES: usize = 64 << 20;

impl EngineConfig {
    pub(super) fn scheduler(&self) -> SchedulerConfig {
        SchedulerConfig {
            max_num_seqs: self.max_num_seqs,
            max_batch_tokens: self.max_batch_tokens,
            max_model_len: self.max_model_len,
            preemption: self.preemption,
            max_prompt_logit_rows: (PROMPT_LOGITS_BYTES / 4 / self.vocab_size.max(1)).max(1),
        }
    }
}

/// Counters since the engine was made, and what it holds now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineStats {
    /// Steps computed.
    pub steps: u64,
    /// Tokens that went through the model: prompts, decodes, and again after a preemption.
    pub computed_tokens: u64,
    /// Tokens sampled.
    pub generated_tokens: u64,
    /// Prompt tokens that the prefix cache had.
    pub cached_tokens: u64,
    /// Requests that came to their end.
    pub finished: u64,
    /// Requests that failed after they were added.
    pub failed: u64,
    /// Requests that were cancelled.
    pub cancelled: u64,
    /// Queue and residents.
    pub scheduler: SchedulerStats,
    /// The device pool.
    pub device_blocks: PoolUsage,
    /// The host pool.
    pub host_blocks: PoolUsage,
    /// The cache manager's counters.
    pub cache: CacheStats,
}

/// The engine's own books are wrong: a bug, never a matter of the requests.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The cache manager contradicts the scheduler.
    #[error("the scheduler and the KV cache disagree: {0}; this is a bug, please report it")]
    Cache(#[from] CacheError),
    /// There are requests, and nothing can be done for any of them.
    #[error(
        "no request can go on, yet none can be refused; this is a bug, please report it with this: {state}"
    )]
    Stalled {
        /// Where every request stands, and what is in the cache.
        state: String,
    },
}
