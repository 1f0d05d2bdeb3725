//! The cpu module.
