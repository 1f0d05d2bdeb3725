//! The wgpu module.
