//! The engine with a model that is a hash of its context: what it does with requests, and many random
//! schedules; and with small real models, under preemption.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod ahead;
mod audited;
mod beams;
mod behaviour;
mod drains;
mod prefixes;
mod real_model;
mod scheduling;
mod settings;
mod simulation;
mod support;
mod urgency;
