//! What an engine did and how long it took: one struct for logs and for a server's metrics. Plain data; the engine
//! fills it. Times are those of the engine's clock.

use super::config::EngineStats;
use crate::request::RequestId;
use std::time::Duration;

/// Refreshed at the end of every step; see [`Engine::metrics`](super::Engine::metrics).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metrics {
    /// Counters since the engine was made, and what it holds now.
    pub stats: EngineStats,
    /// The last step that did something.
    pub step: StepMetrics,
    /// Requests that ended in the last step or were cancelled before it, in the order of their ends.
    pub ended: Vec<RequestMetrics>,
}

/// One step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepMetrics {
    /// [`StepPlan::id`](crate::plan::StepPlan::id)
    pub id: u64,
    /// When it began.
    pub started: Duration,
    /// Planning it.
    pub schedule: Duration,
    /// Computing it.
    pub execute: Duration,
    /// Choosing tokens, and what follows from them.
    pub sample: Duration,
    /// Sequences that it computed tokens of.
    pub sequences: usize,
    /// Tokens of sequences that had several to compute: prompts, and what a preemption made one.
    pub prefill_tokens: usize,
    /// Tokens of sequences that had one.
    pub decode_tokens: usize,
    /// Requests that made room.
    pub preempted: usize,
    /// Blocks moved to the host.
    pub swapped_out_blocks: usize,
    /// Blocks moved back.
    pub swapped_in_blocks: usize,
    /// Blocks copied because a shared one was written.
    pub copied_blocks: usize,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Outcome {
    /// It has not.
    #[default]
    Running,
    /// With its completions.
    Finished,
    /// With an error.
    Failed,
    /// Because its caller wanted so.
    Cancelled,
}

/// One request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RequestMetrics {
    /// Which.
    pub request: RequestId,
    /// How it ended.
    pub outcome: Outcome,
    /// Tokens of its prompt.
    pub prompt_tokens: usize,
    /// Of those, found in the prefix cache when it was first admitted.
    pub cached_tokens: usize,
    /// Tokens generated, all of its sequences together.
    pub generated_tokens: usize,
    /// How often it made room for others.
    pub preemptions: u32,
    /// When it was added.
    pub arrived: Duration,
    /// When it first came into the cache.
    pub admitted: Option<Duration>,
    /// When its first token was there.
    pub first_token: Option<Duration>,
    /// When it ended.
    pub ended: Option<Duration>,
}

impl RequestMetrics {
    /// Time in the queue before it was first admitted.
    pub fn queued(&self) -> Option<Duration> {
        self.admitted.map(|at| at.saturating_sub(self.arrived))
    }

    /// From its arrival to its first token.
    pub fn time_to_first_token(&self) -> Option<Duration> {
        self.first_token.map(|at| at.saturating_sub(self.arrived))
    }

    /// From its arrival to its end.
    pub fn latency(&self) -> Option<Duration> {
        self.ended.map(|at| at.saturating_sub(self.arrived))
    }
}
