//! Numbers that look random, the same in every run.

/// A linear congruential generator (Knuth's MMIX) at a state; the next numbers are its upper half.
#[derive(Clone, Debug)]
pub struct Numbers(pub u64);

impl Numbers {
    /// From 0 up to, not including, `bound`; 0 if that is nothing.
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound.max(1)
    }
}
