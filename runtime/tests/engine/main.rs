//! The engine with a model that is a hash of its context: what it does with requests, and many random
//! schedules.

mod behaviour;
mod scheduling;
mod simulation;
mod support;
