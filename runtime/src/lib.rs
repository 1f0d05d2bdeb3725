//! A complete decoding engine on PagedAttention.
//!
//! ```text
//! text ─ tokenizer ─► Engine::add ─► waiting queue
//!                                     │ Scheduler::schedule(&mut CacheManager)
//!                                     ▼
//!                     StepPlan { chunks of tokens, block ops }
//!                                     │ Executor::begin(&StepPlan), finish()
//!                                     ▼
//!      block ops ─► embed ─► [norm, qkv, rope, write_kv, attend, o, mlp] × layers ─► logits
//!                                     │ sampling
//!                                     ▼
//!                     Scheduler::commit ─► events ─► detokenize ─► stream
//! ```
//!
//! One direction, no callbacks upward; what travels between the stages is plain data.

pub mod backend;
pub mod engine;
pub mod executor;
pub mod load;
pub mod model_dir;
pub mod models;
pub mod plan;
pub mod request;
pub mod sampling;
pub mod scheduler;
pub mod text;

/// The example of the crate's README, compiled with the documentation's tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
