//! Block-table KV cache manager as pure logic.
#![forbid(unsafe_code)]

mod cache_manager;
mod error;
mod types;

pub use cache_manager::CacheManager;
pub use error::CacheError;
pub use types::{
    Admission, Allocation, BlockCopy, BlockId, BlockOps, CacheConfig, CacheStats, KvGroup, NO_BLOCK, PoolUsage, Prompt,
    SequenceId,
};
