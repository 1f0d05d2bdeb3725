//! Finds the keys and values of a chunk through the block table, and converts them once where many rows share
//! them.

use super::CHUNK;
use super::elements::Element;
use super::kernel::{Convert, Heads, RowPointers};
use super::lanes::{LANES, Lanes};
use super::run::padded;
use crate::KvStrides;
use std::ops::Range;

/// The keys or the values of one sequence.
pub(super) struct Gather<'a, T> {
    pub(super) cache: &'a [T],
    pub(super) strides: KvStrides,
    /// Elements of a head.
    pub(super) dim: usize,
    /// The sequence's block table.
    pub(super) table: &'a [i32],
    pub(super) block_size: usize,
}

/// Keys or values of a chunk: as they are stored, or a head's converted.
pub(super) enum Source<'a, T> {
    Stored(Heads<'a, T>),
    Converted(RowPointers<f32>),
}

impl<T: Element> Gather<'_, T> {
    /// Whole vectors that a row takes when it is used.
    pub(super) fn vectors(&self) -> usize {
        padded(self.dim) / LANES
    }

    /// Where a head's rows of `keys` lie, the chunk's first key being `first`. Places before the range point
    /// somewhere, those behind it to the last key.
    pub(super) fn pointers(&self, kv_head: usize, first: usize, keys: Range<usize>) -> RowPointers<T> {
        let (shift, place_mask) = (self.block_size.trailing_zeros(), self.block_size - 1);
        let head = kv_head as u64 * self.strides.head;
        let mut last = self.cache.as_ptr();
        let mut pointers: RowPointers<T> = [last; CHUNK + LANES];
        for key in keys.clone() {
            // Validation has checked the entries of all keys that a row can see.
            let block = self.table.get(key >> shift).map_or(0, |&block| block.max(0) as u64);
            let place = (key & place_mask) as u64;
            let at = block * self.strides.block + place * self.strides.token + head;
            last = self.cache.as_ptr().wrapping_add(at as usize);
            pointers[key - first] = last;
        }
        pointers[keys.end - first..].fill(last);
        pointers
    }

    /// Whether the loops must not or need not read the rows as they are stored: they fill no whole vectors, or
    /// so many rows of queries use them that converting once is cheaper.
    pub(super) fn converts(&self, many_rows: bool) -> bool {
        !self.dim.is_multiple_of(LANES) || (many_rows && size_of::<T>() != size_of::<f32>())
    }

    /// The rows of `keys` of the first head converted into `buffer`, `[CHUNK, padded(dim)]`, whose padding is 0.
    pub(super) fn convert<L: Lanes>(
        &self,
        first: usize,
        keys: Range<usize>,
        rows: Heads<'_, T>,
        buffer: &mut [f32],
    ) -> RowPointers<f32> {
        let (dim, width) = (self.dim, padded(self.dim));
        let keys = keys.start - first..keys.end - first;
        debug_assert!(buffer.len() >= CHUNK * width);
        let to = buffer.as_mut_ptr();
        let convert = Convert { rows, keys: keys.clone(), dim, width, to };
        // SAFETY: each key's row lies in the cache (`Inputs::check`) and has a place in the buffer.
        unsafe { L::enter(convert) };
        let mut converted: RowPointers<f32> = [to.cast_const(); CHUNK + LANES];
        for (key, pointer) in converted.iter_mut().enumerate() {
            *pointer = to.wrapping_add(key.clamp(keys.start, keys.end - 1) * width);
        }
        converted
    }
}
