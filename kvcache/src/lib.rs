//! The KV cache manager of a paged-attention engine, as pure logic: which physical block holds which token
//! of which sequence, who shares it, what has to be copied or moved, and whether a request fits.
//!
//! It owns no memory of keys and values, knows no device and no model, and depends on nothing heavy. A
//! backend keeps, for every layer, one tensor of `device_blocks` blocks (and one of `host_blocks` on the
//! host to swap to) and does what the manager says. The ideas are those of PagedAttention (Kwon et al.,
//! *Efficient Memory Management for Large Language Model Serving with PagedAttention*, SOSP 2023,
//! sections 4.2 to 4.5), with a content-addressed prefix cache and sliding windows added.
//!
//! # One sequence, start to end
//!
//! ```
//! use pagewise_kvcache::{CacheConfig, CacheManager, KvCacheManager, KvGroup, Prompt, SequenceId};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut cache = KvCacheManager::new(CacheConfig {
//!     block_size: 4,
//!     device_blocks: 64,
//!     host_blocks: 0,
//!     groups: vec![KvGroup { window: None }],
//!     watermark: 0.01,
//!     prefix_cache: true,
//! })?;
//!
//! // The prompt gets its slots at once. What an earlier prompt has left in the cache need not be computed.
//! let tokens = [11, 12, 13, 14, 15, 16];
//! let sequence = SequenceId(1);
//! let prompt = Prompt { tokens: &tokens, salt: 0, use_prefix_cache: true };
//! let found = cache.allocate(sequence, prompt)?;
//! assert_eq!(found.cached_tokens, 0);
//!
//! // The step: first what must be copied (nothing here), then the model runs over the tokens, writing token
//! // `i` to slot `table[i / block_size] * block_size + i % block_size`; then both are reported.
//! let ops = cache.take_block_ops();
//! assert!(ops.is_empty());
//! assert_eq!(cache.block_table(sequence, 0), Some(&[0, 1][..]));
//! cache.confirm_block_ops()?;
//! cache.mark_computed(sequence, &tokens[found.cached_tokens..])?;
//!
//! // Each generated token: a slot for it, the step, the report.
//! if cache.can_append(sequence, 1) {
//!     cache.append(sequence, 1)?;
//! } // else preempt a sequence: free it, drop it for recomputation, or swap it out
//! cache.mark_computed(sequence, &[17])?;
//! assert_eq!(cache.computed(sequence), Some(7));
//!
//! // Its full blocks stay findable after it has gone.
//! cache.free(sequence)?;
//! let again = cache.allocate(SequenceId(2), prompt)?;
//! assert_eq!(again.cached_tokens, 4);
//! # Ok(())
//! # }
//! ```
//!
//! # An engine's step
//!
//! 1. **Decide.** For waiting prompts ask [`can_allocate`](CacheManager::can_allocate): `Now`, `Later` (others
//!    must finish first) or `Never` (reject it). For running ones ask [`can_append`](CacheManager::can_append);
//!    if there is no room, preempt: [`swap_out`](CacheManager::swap_out), or
//!    [`drop_for_recompute`](KvCacheManager::drop_for_recompute). Sequences that belong together (samples of one
//!    prompt, beams) are preempted together, so that their sharing survives.
//! 2. **Copy.** [`take_block_ops`](CacheManager::take_block_ops), and let the backend carry them out in their
//!    fixed order: swap out, swap in, copy, and only then the step's own writes. Within one of the three lists
//!    no entry depends on another, so a backend may do each list in one launch.
//! 3. **Run** the model over [`block_table`](CacheManager::block_table)s, one per sequence and KV group.
//! 4. **Report.** [`confirm_block_ops`](CacheManager::confirm_block_ops) once for each take (also if the ops were
//!    empty), and [`mark_computed`](CacheManager::mark_computed) with the tokens that were computed. Should the
//!    device have failed, [`abandon_block_ops`](CacheManager::abandon_block_ops) instead, and free every
//!    sequence that holds a destination of the failed ops.
//!
//! # Rules to know
//!
//! - **All or nothing.** A call that returns an error has changed nothing; `cache == cache_before`.
//! - **Slots belong to whoever holds the block.** [`fork`](CacheManager::fork) shares every block, slots that are
//!   not computed yet included. Both sequences must then compute the same tokens there (samples of one prompt
//!   do); one that goes its own way is cut back to its computed tokens first, with
//!   [`truncate`](CacheManager::truncate), and appends again.
//! - **Copy-on-write** happens in [`append`](CacheManager::append), and only if the last block is partly filled
//!   and someone else holds it too. The last owner writes in place.
//! - **The prefix cache** is content-addressed by full blocks: a chained hash, salted for isolation and verified
//!   token by token, so colliding hashes are harmless. A block enters it when it is *computed*. If its content
//!   is already there, the sequence's table changes to the block that was first and its own is freed (if nobody
//!   else holds it; two sequences that share a block are not parted). Blocks that no sequence holds count as free; the least recently used is evicted first, and of one sequence the tail
//!   before the head. A hit never covers the last prompt token, whose logits are wanted.
//! - **Sliding windows.** A KV group with a window lets go of the blocks behind it as tokens are computed
//!   ([`NO_BLOCK`] in the table) and holds at most `window / block_size + 3` blocks of computed tokens, while
//!   other groups keep theirs. A prefix hit must hold in every group. All groups draw from one pool, so a block
//!   must have the same size in bytes in each of them.
//! - **Pending.** A block being copied is neither free nor usable until the copy is confirmed: it cannot be taken,
//!   found as a prefix or swapped. The sequence that a swap-in or copy-on-write is made for goes on with it in
//!   the same step, which the fixed order makes safe. In particular, what `swap_out` frees can be taken in
//!   the *next* step; dropping for recomputation frees at once.
//! - **Cost.** Each call works in proportion to the blocks it touches, whatever the size of the pools. The one
//!   index that grows (of the prefix tree, and only if windows leave behind more known prefixes than the pool
//!   has blocks) doubles, so its cost is constant per block on average.
//!
//! Numbered examples are in `examples/`: allocate and append, fork and write, prefix hits, swap, recompute.

#![forbid(unsafe_code)]

mod cache_manager;
mod copies;
mod error;
mod geometry;
mod manager;
mod memory;
mod pool;
mod prefix_tree;
mod sequence;
mod types;

pub use cache_manager::CacheManager;
pub use error::CacheError;
pub use manager::{KvCacheManager, PinId, PinnedPrefix, RebuildStep, RecomputePlan};
pub use types::{
    Admission, Allocation, BlockCopy, BlockId, BlockOps, CacheConfig, CacheStats, KvGroup, NO_BLOCK,
    PoolUsage, Prompt, SequenceId,
};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
