//! How thread blocks share rows of logits.

use super::MAX_GRID_YZ;
use crate::Error;
use crate::kernel::Launch;

/// Threads of a block.
pub(super) const THREADS: u32 = 256;

/// Logits of a thread at a time.
pub(super) const BATCH: u32 = 8;

/// Logits of a thread block: one round of its threads, so that a row of 128 thousand is shared by 63 blocks.
pub const PER_BLOCK: u32 = THREADS * BATCH;

/// Blocks that share a row of so many logits: words of scratch memory are counted by it.
pub const fn blocks(vocab: u32) -> u32 {
    vocab.div_ceil(PER_BLOCK)
}

/// Grid and block: stretches along x, rows along y.
pub(super) fn stretches(kernel: &'static str, rows: u32, vocab: u32, vector: u32) -> Result<Launch, Error> {
    for (field, value) in [("rows", rows), ("vocab", vocab)] {
        if value == 0 {
            return Err(Error::Zero { kernel, field });
        }
    }
    let limit = i32::MAX as u32;
    if vocab > limit {
        return Err(Error::TooLarge { kernel, field: "vocab", value: vocab, limit });
    }
    if !vocab.is_multiple_of(vector) {
        return Err(Error::NotDivisible { kernel, vector, field: "vocab", value: vocab });
    }
    if rows > MAX_GRID_YZ {
        return Err(Error::GridTooLarge {
            kernel,
            field: "rows",
            value: rows,
            needed: rows,
            limit: MAX_GRID_YZ,
        });
    }
    Ok(Launch { grid: [blocks(vocab), rows, 1], block: [THREADS, 1, 1], dynamic_shared: 0 })
}
