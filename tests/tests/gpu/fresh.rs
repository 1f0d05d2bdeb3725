//! What the kernels before a dependent decode may still write: the last keys of each sequence. Where they are, and what a
//! cache is before them.

use std::collections::BTreeSet;
use std::ops::Range;

use pagewise_attention::Problem;
use pagewise_attention::cuda::ptx::decode::FRESH_KEYS;

/// Which of the two caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    K,
    V,
}

impl Side {
    pub const BOTH: [Self; 2] = [Self::K, Self::V];
}

/// Slots of the keys that a step has just written, as many as there may be: of each sequence the last [`FRESH_KEYS`] that a
/// row sees, or one a query row if those are more. Slots that another sequence shares are fresh if they are so for both.
pub fn fresh_slots(problem: &Problem<'_>) -> Vec<u64> {
    let (config, block_size) = (problem.config(), problem.layout().block_size);
    let (mut fresh, mut settled) = (BTreeSet::new(), BTreeSet::new());
    for sequence in (0..problem.num_sequences()).map(|index| problem.sequence(index)) {
        let first = sequence.len.saturating_sub(sequence.query_len.max(FRESH_KEYS as usize));
        // Of other keys the block table may say anything.
        for row in 0..sequence.query_len {
            for key in problem.batch().visible(config.mask, &sequence, row) {
                let slot = sequence.table[key / block_size] as usize * block_size + key % block_size;
                if key < first { &mut settled } else { &mut fresh }.insert(slot as u64);
            }
        }
    }
    fresh.difference(&settled).copied().collect()
}

/// The bytes of a slot's row in a cache, head by head.
pub fn row_bytes(problem: &Problem<'_>, side: Side, slot: u64) -> impl Iterator<Item = Range<usize>> + use<> {
    let (config, layout) = (problem.config(), problem.layout());
    let (strides, dim) = match side {
        Side::K => (layout.k, config.head_dim_qk),
        Side::V => (layout.v, config.head_dim_v),
    };
    let size = config.kv_dtype.size();
    let block_size = layout.block_size as u64;
    let row = slot / block_size * strides.block + slot % block_size * strides.token;
    (0..config.kv_heads as u64).map(move |head| {
        let first = (row + head * strides.head) as usize;
        first * size..(first + dim) * size
    })
}

/// A cache before the rows of these slots are written: NaN is there.
pub fn before(problem: &Problem<'_>, side: Side, cache: &[u8], slots: &[u64]) -> Vec<u8> {
    let mut before = cache.to_vec();
    for range in slots.iter().flat_map(|&slot| row_bytes(problem, side, slot)) {
        before[range].fill(0xff);
    }
    before
}
