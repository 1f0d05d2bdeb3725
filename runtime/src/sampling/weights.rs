//! Softmax weights in vector instructions, and the draw from them.
//!
//! The exponential is written out here rather than taken from the system's library: it is the same to the bit on
//! every platform, so a seed gives the same tokens from the same logits everywhere, and the compiler turns it
//! into vector code.

/// How far apart two logits are makes their weights' ratio: the weight of the largest logit is 1.
#[derive(Clone, Copy, Debug)]
pub(super) struct Softmax {
    max: f32,
    inverse_temperature: f32,
}

impl Softmax {
    /// `max` is the row's largest logit, `temperature` above 0.
    pub(super) fn new(max: f32, temperature: f32) -> Self {
        Self { max, inverse_temperature: 1.0 / temperature }
    }

    /// ln of the weight, from −∞ to 0; NaN for NaN. Subtracting before dividing keeps a tiny temperature from
    /// overflowing; where the maximum is infinite the logits equal to it have weight 1, the others 0.
    fn exponent(self, logit: f32) -> f32 {
        let exponent = (logit - self.max) * self.inverse_temperature;
        if logit == self.max { 0.0 } else { exponent }
    }

    /// The weight of a logit; 0 for NaN.
    pub(super) fn weight(self, logit: f32) -> f32 {
        exp_of_negative(self.exponent(logit))
    }

    /// Overwrites `weights` with those of a whole row.
    pub(super) fn weigh(self, row: &[f32], weights: &mut Vec<f32>) {
        weights.clear();
        weights.extend(row.iter().map(|&logit| self.weight(logit)));
    }

    /// Sorts logits roughly: a larger logit is never in a later bin. For logits of positive weight.
    pub(super) fn bin(self, logit: f32) -> usize {
        ((self.exponent(logit) * -BINS_PER_NAT) as usize).min(BINS - 1)
    }
}

/// Number of bins; with eight a factor e they reach to the smallest weights.
pub(super) const BINS: usize = 720;
const BINS_PER_NAT: f32 = 8.0;

/// eˣ for x ≤ 0, within 2 units of the last place down to the smallest normal number and 0 below it; 0 for NaN.
///
/// x = n·ln 2 + r with |r| ≤ ln 2 / 2; eʳ by its Taylor polynomial of degree 7, whose next term is below
/// 6·10⁻⁹, and 2ⁿ put into the exponent's bits.
fn exp_of_negative(x: f32) -> f32 {
    const LN_2_HIGH: f32 = 0.693_145_75;
    const LN_2_LOW: f32 = 1.428_606_8e-6;
    // Added and subtracted it rounds to a whole number, which its low bits then hold.
    const ROUND: f32 = 12_582_912.0;
    const LOWEST: f32 = -87.3;
    let in_range = x >= LOWEST;
    let x = if in_range { x } else { 0.0 };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN_2_HIGH) - n * LN_2_LOW;
    let mut sum = 1.0 / 5040.0;
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        sum = sum * r + coefficient;
    }
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    let result = sum * f32::from_bits(exponent);
    if in_range { result } else { 0.0 }
}

/// The index that a uniform number picks: the first whose cumulated weight passes `uniform` × total. `None`
/// without a positive weight. `sums` is working memory.
pub(super) fn pick(weights: &[f32], uniform: f64, sums: &mut Vec<f64>) -> Option<usize> {
    const STRETCH: usize = 256;
    sums.clear();
    sums.extend(weights.chunks(STRETCH).map(sum));
    let target = uniform * sums.iter().sum::<f64>();
    // Whole stretches first, then one by one.
    let mut before = 0.0;
    let mut start = 0;
    for sum in sums.iter() {
        if before + sum > target {
            break;
        }
        before += sum;
        start += STRETCH;
    }
    let mut last = None;
    for (index, &weight) in weights.iter().enumerate().skip(start) {
        before += f64::from(weight);
        if before > target {
            return Some(index);
        }
        if weight > 0.0 {
            last = Some(index);
        }
    }
    // Sums in another order may differ in their last bit; then the number has fallen off the end.
    last.or_else(|| weights.iter().rposition(|&weight| weight > 0.0))
}

/// Σ in f64, in eight partial sums.
pub(super) fn sum(weights: &[f32]) -> f64 {
    let mut lanes = [0.0f64; 8];
    let chunks = weights.chunks_exact(lanes.len());
    let rest: f64 = chunks.remainder().iter().map(|&weight| f64::from(weight)).sum();
    for chunk in chunks {
        for (lane, &weight) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(weight);
        }
    }
    lanes.iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::Draw;

    #[test]
    fn the_exponential_is_within_two_units_of_the_last_place() {
        let mut worst: f64 = 0.0;
        for step in 0..2_000_000u32 {
            let x = -(step as f32) * (87.3 / 2_000_000.0);
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp_of_negative(x)) - exact).abs() / exact);
        }
        // A unit of the last place is at most 2⁻²³ of the number.
        assert!(worst <= 2.0 * f64::from(f32::EPSILON), "relative error {worst:e}");
        assert_eq!(exp_of_negative(0.0), 1.0);
        assert_eq!(exp_of_negative(-0.0), 1.0);
        for x in [-87.4, f32::MIN, f32::NEG_INFINITY, f32::NAN] {
            assert_eq!(exp_of_negative(x), 0.0, "{x}");
        }
    }

    #[test]
    fn bins_keep_the_order() {
        for temperature in [1e-3, 0.7, 1.0, 30.0] {
            let softmax = Softmax::new(20.0, temperature);
            let mut previous = 0;
            for step in 0..10_000u16 {
                let logit = 20.0 - f32::from(step) * 0.01;
                if softmax.weight(logit) > 0.0 {
                    let bin = softmax.bin(logit);
                    assert!(bin >= previous && bin < BINS);
                    previous = bin;
                }
            }
        }
    }

    #[test]
    fn picks_the_stretch_that_holds_the_number() {
        let mut sums = Vec::new();
        for case in 0..200u64 {
            let mut position = 0;
            let mut uniform = || {
                position += 1;
                Draw { seed: case, sample: 0, position }.uniform()
            };
            let len = 1 + (uniform() * 1500.0) as usize;
            // Whole numbers add up exactly.
            let weights: Vec<f32> = (0..len).map(|_| (uniform() * 4.0).floor() as f32).collect();
            let total: f64 = weights.iter().map(|&w| f64::from(w)).sum();
            for u in [0.0, uniform(), uniform(), 0.999_999_999] {
                let mut cumulated = 0.0;
                let expected = weights.iter().position(|&w| {
                    cumulated += f64::from(w);
                    cumulated > u * total
                });
                assert_eq!(pick(&weights, u, &mut sums), expected, "case {case}");
            }
        }
        assert_eq!(pick(&[], 0.5, &mut sums), None);
        assert_eq!(pick(&[0.0; 3], 0.5, &mut sums), None);
    }
}
