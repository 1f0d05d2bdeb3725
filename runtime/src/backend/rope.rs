//! Rotary position embedding (Su et al. 2021): the angles. A backend applies them.

use crate::model_dir::{RopeConfig, RopeScaling};

/// The frequencies of a model's rotary embedding, stretched as its configuration says.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    inverse_frequencies: Vec<f32>,
}

impl Rope {
    /// Frequencies for heads of `head_dim` elements: `theta^(-2i / head_dim)` for `i < head_dim / 2`.
    pub fn new(config: RopeConfig, head_dim: usize) -> Self {
        let frequency = |i: usize| config.theta.powf(-2.0 * i as f64 / head_dim as f64);
        let inverse_frequencies = (0..head_dim / 2).map(|i| stretch(config.scaling, frequency(i)) as f32).collect();
        Self { inverse_frequencies }
    }

    /// Pairs in a head.
    pub fn half_dim(&self) -> usize {
        self.inverse_frequencies.len()
    }

    /// Cosines and sines of the angles at these positions, `[positions, head_dim / 2]` each. The angle is
    /// rounded to f32 before its cosine is taken, as the reference implementations do.
    pub fn tables(&self, positions: &[i32]) -> (Vec<f32>, Vec<f32>) {
        let angles = || positions.iter().flat_map(|&p| self.inverse_frequencies.iter().map(move |f| p as f32 * f));
        (
            angles().map(|angle| f64::from(angle).cos() as f32).collect(),
            angles().map(|angle| f64::from(angle).sin() as f32).collect(),
        )
    }
}

fn stretch(scaling: RopeScaling, frequency: f64) -> f64 {
    match scaling {
        RopeScaling::None => frequency,
        RopeScaling::Linear { factor } => frequency / factor,
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => {
            let wavelengths_in_context = original_max_positions as f64 * frequency / std::f64::consts::TAU;
            if wavelengths_in_context < low_freq_factor {
                frequency / factor
            } else if wavelengths_in_context > high_freq_factor {
                frequency
            } else {
                let kept = (wavelengths_in_context - low_freq_factor) / (high_freq_factor - low_freq_factor);
                (1.0 - kept) * frequency / factor + kept * frequency
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(scaling: RopeScaling) -> Rope {
        Rope::new(RopeConfig { theta: 10_000.0, scaling }, 16)
    }

    #[test]
    fn frequencies_fall_from_one_by_a_constant_factor() {
        let f = rope(RopeScaling::None).inverse_frequencies;
        assert_eq!(f.len(), 8);
        assert_eq!(f[0], 1.0);
        for pair in f.windows(2) {
            assert!((pair[0] / pair[1] - 10_000f32.powf(1.0 / 8.0)).abs() < 1e-5);
        }
    }

    #[test]
    fn linear_scaling_divides_all_frequencies() {
        let (plain, scaled) = (rope(RopeScaling::None), rope(RopeScaling::Linear { factor: 4.0 }));
        for (a, b) in plain.inverse_frequencies.iter().zip(&scaled.inverse_frequencies) {
            assert!((a / b - 4.0).abs() < 1e-5);
        }
    }

    #[test]
    fn llama3_keeps_short_wavelengths_and_divides_long_ones() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_positions: 32,
        };
        let (plain, scaled) = (rope(RopeScaling::None).inverse_frequencies, rope(scaling).inverse_frequencies);
        // Wavelengths 6.3 (kept), 19.9 (blended), 62.8 and longer (divided).
        assert_eq!(plain[0], scaled[0]);
        let blended = plain[1] / scaled[1];
        assert!(blended > 1.1 && blended < 7.9, "{blended}");
        for (a, b) in plain.iter().zip(&scaled).skip(2) {
            assert!((a / b - 8.0).abs() < 1e-4);
        }
    }

    #[test]
    fn position_zero_is_not_rotated() {
        let (cos, sin) = rope(RopeScaling::None).tables(&[0, 3]);
        assert!(cos[..8].iter().all(|&c| c == 1.0) && sin[..8].iter().all(|&s| s == 0.0));
        assert!((cos[8] - 3f32.cos()).abs() < 1e-6 && (sin[8] - 3f32.sin()).abs() < 1e-6);
    }
}
