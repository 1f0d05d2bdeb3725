//! Cases of the dense kernels in WGSL, one function a kernel: each runs random shapes and panics with what was wrong.

pub mod elementwise;
pub mod faults;
pub mod likeliest;
pub mod machine;
pub mod made_up;
pub mod products;
pub mod rows;
pub mod sampling;

/// Cases of each variant that are drawn anew.
const CASES: usize = 4;
