//! The conformance module.
