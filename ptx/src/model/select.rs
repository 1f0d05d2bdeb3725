//! How a thread block works on a row of logits of its own.

use super::MAX_GRID_YZ;
use crate::Error;
use crate::kernel::Launch;

/// Threads of a block.
pub const THREADS: u32 = 1024;

/// Logits of a thread at a time.
pub(super) const BATCH: u32 = 8;

/// The most logits of a row: so many weights of 2^44 units each can be added up in 64 bits.
pub const MAX_VOCAB: u32 = 1 << 19;

/// Static shared memory: bins, sums, maxima.
pub(super) const SHARED: u32 = 16_384 + 256 + 256;

/// Grid and block: a block for each of so many rows.
pub(super) fn blocks_of_rows(
    kernel: &'static str,
    count: u32,
    vocab: u32,
    vector: u32,
) -> Result<Launch, Error> {
    for (field, value) in [("count", count), ("vocab", vocab)] {
        if value == 0 {
            return Err(Error::Zero { kernel, field });
        }
    }
    for (field, value, limit) in [("count", count, MAX_GRID_YZ), ("vocab", vocab, MAX_VOCAB)] {
        if value > limit {
            return Err(Error::TooLarge { kernel, field, value, limit });
        }
    }
    if !vocab.is_multiple_of(vector) {
        return Err(Error::NotDivisible { kernel, vector, field: "vocab", value: vocab });
    }
    Ok(Launch { grid: [count, 1, 1], block: [THREADS, 1, 1], dynamic_shared: 0 })
}
