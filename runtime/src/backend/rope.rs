//! Rotary position embedding (Su et al. 2021): the frequencies. A backend turns them into angles and rotates.

use crate::model_dir::{RopeConfig, RopeScaling};

/// The frequencies of a model's rotary embedding, stretched as its configuration says. Computed in f32 and in
/// the order of operations of the reference implementation, so that the bits of the angles agree with it at
/// any position.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    frequencies: Vec<f32>,
    head_dim: usize,
    magnitude: f32,
}

impl Rope {
    /// Frequencies for heads of `head_dim` elements, the first `dim = rotary_dim` of which are rotated:
    /// `theta^(-2i / dim)` for `i < dim / 2`, stretched.
    pub fn new(config: &RopeConfig, head_dim: usize) -> Self {
        let dim = config.rotary_dim;
        let frequencies = (0..dim / 2).map(|i| {
            let exponent = (2 * i) as f32 / dim as f32;
            let wavelength = f64::from(config.theta as f32).powf(f64::from(exponent)) as f32;
            match &config.scaling {
                RopeScaling::LongRope { short_factors, .. } => {
                    1.0 / (short_factors.get(i).map_or(1.0, |&factor| factor as f32) * wavelength)
                }
                scaling => stretch(1.0 / wavelength, scaling),
            }
        });
        let magnitude = match config.scaling {
            RopeScaling::LongRope { attention_factor, .. } => attention_factor as f32,
            _ => 1.0,
        };
        Self { frequencies: frequencies.collect(), head_dim, magnitude }
    }

    /// Radians per position of each pair of a head's rotated elements, `[rotary_dim / 2]`.
    pub fn frequencies(&self) -> &[f32] {
        &self.frequencies
    }

    /// Elements of a head.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Factor of the rotated elements.
    pub fn magnitude(&self) -> f32 {
        self.magnitude
    }
}

fn stretch(frequency: f32, scaling: &RopeScaling) -> f32 {
    match *scaling {
        RopeScaling::None | RopeScaling::LongRope { .. } => frequency,
        RopeScaling::Linear { factor } => frequency / factor as f32,
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => {
            let original = original_max_positions as f64;
            let wavelength = std::f64::consts::TAU as f32 / frequency;
            if wavelength > (original / low_freq_factor) as f32 {
                return frequency / factor as f32;
            }
            if wavelength < (original / high_freq_factor) as f32 {
                return frequency;
            }
            let kept = (original as f32 / wavelength - low_freq_factor as f32)
                / (high_freq_factor - low_freq_factor) as f32;
            (1.0 - kept) * frequency / factor as f32 + kept * frequency
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(scaling: RopeScaling) -> Rope {
        Rope::new(&RopeConfig { rotary_dim: 16, theta: 10_000.0, scaling }, 16)
    }

    #[test]
    fn frequencies_fall_from_one_by_a_constant_factor() {
        let f = rope(RopeScaling::None).frequencies;
        assert_eq!(f.len(), 8);
        assert_eq!(f[0], 1.0);
        for pair in f.windows(2) {
            assert!((pair[0] / pair[1] - 10_000f32.powf(1.0 / 8.0)).abs() < 1e-5);
        }
    }

    #[test]
    fn linear_scaling_divides_all_frequencies() {
        let (plain, scaled) = (rope(RopeScaling::None), rope(RopeScaling::Linear { factor: 4.0 }));
        for (a, b) in plain.frequencies.iter().zip(&scaled.frequencies) {
            assert!((a / b - 4.0).abs() < 1e-5);
        }
    }

    #[test]
    fn long_rope_divides_each_frequency_by_its_own_factor() {
        let short_factors = vec![1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5];
        let scaling = RopeScaling::LongRope { short_factors: short_factors.clone(), attention_factor: 1.2 };
        let (plain, scaled) = (rope(RopeScaling::None), rope(scaling));
        assert_eq!((plain.magnitude(), scaled.magnitude()), (1.0, 1.2));
        for ((a, b), factor) in plain.frequencies.iter().zip(&scaled.frequencies).zip(short_factors) {
            assert!((f64::from(a / b) - factor).abs() < 1e-5);
        }
    }

    #[test]
    fn part_of_a_head_has_the_frequencies_of_a_smaller_head() {
        let config = RopeConfig { rotary_dim: 16, theta: 10_000.0, scaling: RopeScaling::None };
        let partial = Rope::new(&config, 24);
        assert_eq!((partial.head_dim(), partial.frequencies()), (24, rope(RopeScaling::None).frequencies()));
    }

    #[test]
    fn llama3_keeps_short_wavelengths_and_divides_long_ones() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_positions: 32,
        };
        let (plain, scaled) = (rope(RopeScaling::None).frequencies, rope(scaling).frequencies);
        // Wavelengths 6.3 (kept), 19.9 (blended), 62.8 and longer (divided).
        assert_eq!(plain[0], scaled[0]);
        let blended = plain[1] / scaled[1];
        assert!(blended > 1.1 && blended < 7.9, "{blended}");
        for (a, b) in plain.iter().zip(&scaled).skip(2) {
            assert!((a / b - 8.0).abs() < 1e-4);
        }
    }
}
