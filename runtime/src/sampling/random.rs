//! Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as
//! 1, 2, 3", section 3.3). No state: the same on every backend, in any order and on any thread.

/// Which number is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Draw {
    /// The request's seed: the generator's key.
    pub seed: u64,
    /// Which of the request's samples.
    pub sample: u32,
    /// Position in the sequence, the prompt counted, of the token that is chosen with it.
    pub position: u64,
}

impl Draw {
    /// A number in `[0, 1)` with 53 random bits. The counter is (position low, position high, sample, 0), the
    /// key (seed low, seed high); the first two words of the output are the number's low and high half.
    pub fn uniform(self) -> f64 {
        let counter = [self.position as u32, (self.position >> 32) as u32, self.sample, 0];
        let [low, high, ..] = philox4x32_10(counter, [self.seed as u32, (self.seed >> 32) as u32]);
        let bits = (u64::from(high) << 32 | u64::from(low)) >> 11;
        bits as f64 * (1.0 / (1u64 << 53) as f64)
    }
}

/// The bijection itself: ten rounds.
pub fn philox4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..10 {
        if round > 0 {
            key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
        }
        let [a, b, c, d] = counter;
        let first = u64::from(a) * 0xD251_1F53;
        let second = u64::from(c) * 0xCD9E_8D57;
        counter = [
            (second >> 32) as u32 ^ b ^ key[0],
            second as u32,
            (first >> 32) as u32 ^ d ^ key[1],
            first as u32,
        ];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers that the authors publish with Random123.
    #[test]
    fn gives_the_published_answers() {
        assert_eq!(philox4x32_10([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox4x32_10([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox4x32_10([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn numbers_are_uniform_and_each_part_of_the_key_matters() {
        let mut cells = [0u32; 100];
        let draws = 100_000u64;
        for position in 0..draws {
            let u = Draw { seed: 7, sample: 3, position }.uniform();
            assert!((0.0..1.0).contains(&u));
            cells[(u * 100.0) as usize] += 1;
        }
        let expected = draws as f64 / 100.0;
        let chi2: f64 = cells.iter().map(|&n| (f64::from(n) - expected).powi(2) / expected).sum();
        // 99 degrees of freedom: mean 99, standard deviation 14; five of them away would be a broken generator.
        assert!(chi2 < 99.0 + 5.0 * 14.0, "chi-square {chi2}");

        let base = Draw { seed: 1, sample: 0, position: 0 };
        let others = [
            Draw { seed: 1 << 40, ..base },
            Draw { seed: 2, ..base },
            Draw { sample: 1, ..base },
            Draw { position: 1, ..base },
            Draw { position: 1 << 40, ..base },
        ];
        for other in others {
            assert_ne!(base.uniform(), other.uniform(), "{other:?}");
        }
    }
}
