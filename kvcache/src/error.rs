//! What can go wrong, said so that the caller knows what to do.

use crate::SequenceId;

/// Why a call was refused. Nothing has changed when one is returned.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum CacheError {
    /// The configuration makes no sense.
    #[error("cache configuration: {0}")]
    Config(String),
    /// The id names no sequence.
    #[error("sequence {} is not in the cache", .0.0)]
    UnknownSequence(SequenceId),
    /// The id is taken.
    #[error("sequence {} is already in the cache", .0.0)]
    SequenceExists(SequenceId),
    /// A prompt must have at least one token.
    #[error("sequence {} has an empty prompt; it needs at least one token", .0.0)]
    EmptyPrompt(SequenceId),
    /// The device pool is too full.
    #[error("{wanted} blocks wanted but {free} free on the device; free or preempt a sequence first")]
    OutOfBlocks {
        /// Blocks the call needs.
        wanted: usize,
        /// Blocks it could have.
        free: usize,
    },
    /// The host pool is too full.
    #[error(
        "{wanted} blocks wanted but {free} free on the host; preempt by recomputation or give more swap space"
    )]
    OutOfHostBlocks {
        /// Blocks the call needs.
        wanted: usize,
        /// Blocks it could have.
        free: usize,
    },
    /// The sequence is swapped out.
    #[error("sequence {} is not on the device; swap it in first", .0.0)]
    NotOnDevice(SequenceId),
    /// The sequence is not swapped out.
    #[error("sequence {} is not swapped out", .0.0)]
    NotOnHost(SequenceId),
    /// More tokens than there are slots.
    #[error("sequence {} has slots for {len} tokens, not {wanted}; append first", .sequence.0)]
    BeyondAllocated {
        /// Which.
        sequence: SequenceId,
        /// Slots it has.
        len: usize,
        /// Tokens asked for.
        wanted: usize,
    },
    /// A copy of the sequence's blocks is still under way.
    #[error("blocks of sequence {} are still being copied; confirm the block ops first, or free the sequence", .0.0)]
    Pending(SequenceId),
    /// A group names each of its sequences once.
    #[error("sequence {} is named twice in the group; name it once", .0.0)]
    NamedTwice(SequenceId),
    /// Nothing of the prefix is cached.
    #[error("no full block of this prefix is cached; compute it first")]
    NotCached,
    /// The pin was removed, or never was.
    #[error("pin {0} does not exist; it was unpinned before or belongs to another cache")]
    UnknownPin(u64),
    /// Blocks before the cut that the sliding window would see again are gone.
    #[error("sequence {} cannot be cut back to {len} tokens: blocks that its window would see again are freed", .sequence.0)]
    BehindWindow {
        /// Which.
        sequence: SequenceId,
        /// Length asked for.
        len: usize,
    },
    /// Confirmed more often than taken.
    #[error("no block ops are waiting for confirmation")]
    NothingToConfirm,
    /// The prefix cache cannot be reset while sequences use its blocks.
    #[error("{used} blocks are in use; the prefix cache can be reset only when no sequence holds one")]
    InUse {
        /// Blocks in use.
        used: usize,
    },
}
