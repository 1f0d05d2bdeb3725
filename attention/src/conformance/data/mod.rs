//! A case's inputs: shapes, block tables, tensors, and poison wherever a backend has no business.

mod attention;
mod blocks;
mod cache;
mod merge;
mod shapes;
mod write;

pub use attention::AttentionData;
pub use blocks::{CopyData, SwapData};
pub use merge::MergeData;
pub use write::WriteData;

/// Blocks that no sequence owns.
const SPARE_BLOCKS: usize = 3;
