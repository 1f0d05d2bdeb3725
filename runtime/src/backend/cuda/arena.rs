//! Where activations lie: one piece of memory, given out from the front and taken back as a whole when a step begins.
//! The same requests in the same order get the same addresses, which is what a captured graph relies on.
//!
//! Owns the arithmetic; the memory is the caller's.

/// Every address is a multiple of this: what the widest reads, and matrix libraries, like best.
pub(super) const ALIGNMENT: u64 = 256;

/// Gives out parts of `capacity` bytes from `base` on.
#[derive(Debug, Default)]
pub(super) struct Arena {
    base: u64,
    capacity: u64,
    used: u64,
    /// The most that any step asked for, what did not fit included.
    peak: u64,
}

impl Arena {
    /// Puts other memory in the place of what there is. `base` is a multiple of [`ALIGNMENT`].
    pub(super) fn replace(&mut self, base: u64, capacity: u64) {
        (self.base, self.capacity) = (base, capacity);
        self.used = 0;
    }

    /// The address of so many bytes, or `None` if they do not fit any more; then they are counted all the same.
    pub(super) fn take(&mut self, bytes: u64) -> Option<u64> {
        let start = self.used;
        let end = start.checked_add(bytes.checked_next_multiple_of(ALIGNMENT)?)?;
        self.used = end;
        self.peak = self.peak.max(end);
        (end <= self.capacity).then_some(self.base + start)
    }

    /// Takes everything back.
    pub(super) fn reset(&mut self) {
        self.used = 0;
    }

    /// Bytes that are given out.
    pub(super) fn used(&self) -> u64 {
        self.used
    }

    /// Takes back what was given out since `used` was so much.
    pub(super) fn rewind(&mut self, used: u64) {
        self.used = self.used.min(used);
    }

    /// Whether the largest step so far would not fit.
    pub(super) fn is_too_small(&self) -> bool {
        self.peak > self.capacity
    }

    /// Bytes of the largest step so far.
    pub(super) fn peak(&self) -> u64 {
        self.peak
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn parts_do_not_overlap_and_repeat(
            sizes in prop::collection::vec(0..5000u64, 1..50),
            capacity in 0..200_000u64,
        ) {
            let mut arena = Arena::default();
            arena.replace(1 << 20, capacity);
            let first: Vec<Option<u64>> = sizes.iter().map(|&bytes| arena.take(bytes)).collect();
            let half = sizes.len() / 2;
            arena.reset();
            let _: Vec<_> = sizes[..half].iter().map(|&bytes| arena.take(bytes)).collect();
            let used = arena.used();
            let rest = |arena: &mut Arena| -> Vec<_> { sizes[half..].iter().map(|&bytes| arena.take(bytes)).collect() };
            let again = rest(&mut arena);
            arena.rewind(used);
            prop_assert_eq!(again, rest(&mut arena));
            arena.reset();
            let second: Vec<Option<u64>> = sizes.iter().map(|&bytes| arena.take(bytes)).collect();
            prop_assert_eq!(&first, &second);
            let mut end = 1 << 20;
            for (address, bytes) in first.iter().zip(&sizes) {
                let Some(address) = address else { continue };
                prop_assert!(*address >= end && address.is_multiple_of(ALIGNMENT));
                end = address + bytes;
                prop_assert!(end <= (1 << 20) + capacity);
            }
            let all: u64 = sizes.iter().map(|bytes| bytes.next_multiple_of(ALIGNMENT)).sum();
            prop_assert_eq!(arena.peak(), all);
            prop_assert_eq!(arena.is_too_small(), all > capacity);
            // With what was found to be needed everything fits.
            arena.replace(0, arena.peak());
            prop_assert!(sizes.iter().all(|&bytes| arena.take(bytes).is_some()));
        }
    }

    #[test]
    fn absurd_sizes_do_not_wrap_around() {
        let mut arena = Arena::default();
        arena.replace(0, u64::MAX);
        assert_eq!(arena.take(u64::MAX), None);
        assert!(arena.take(1 << 40).is_some());
        assert_eq!(arena.take(u64::MAX - 10), None);
    }
}
