//! The CPU backend.

pub mod dense;
