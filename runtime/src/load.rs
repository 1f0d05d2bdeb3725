//! From a model directory to a running engine.
