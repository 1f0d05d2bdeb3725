//! The cuda module.
