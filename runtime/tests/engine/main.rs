//! The engine with a model that is a hash of its context: what it does with requests, and many random
//! schedules.

mod behaviour;
mod sampling;
mod simulation;
mod support;
