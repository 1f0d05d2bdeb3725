//! Rotary position embedding (Su et al. 2021), half-split as Hugging Face's Llama lays out its heads.

use super::share::share_rows;
use super::{DenseError, check_len};
use crate::model_dir::{RopeConfig, RopeScaling};

/// Angle per position of each pair of a head's elements: `[head_dim / 2]`, in f32 arithmetic as Hugging Face
/// computes it, so that the bits of the angles agree at any position.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeFrequencies(Vec<f32>);

impl RopeFrequencies {
    /// Frequencies of a configuration.
    pub fn new(config: &RopeConfig, head_dim: usize) -> Self {
        let frequencies = (0..head_dim / 2).map(|i| {
            let exponent = (2 * i) as f32 / head_dim as f32;
            let wavelength = (config.theta as f32 as f64).powf(f64::from(exponent)) as f32;
            scale(1.0 / wavelength, config.scaling)
        });
        Self(frequencies.collect())
    }

    /// The rotations of a step: one row for each token, to be used by all layers.
    pub fn angles(&self, positions: impl IntoIterator<Item = usize>) -> RopeAngles {
        let mut angles = RopeAngles { half: self.0.len(), cos_sin: Vec::new() };
        for position in positions {
            // Rounded to f32 as Hugging Face's is; then cosine and sine, correctly rounded but for rare ties.
            let angle = |f: &f32| f64::from(position as f32 * f);
            angles.cos_sin.extend(self.0.iter().map(|f| angle(f).cos() as f32));
            angles.cos_sin.extend(self.0.iter().map(|f| angle(f).sin() as f32));
        }
        angles
    }
}

/// Cosines and sines of a step's tokens: `[rows, 2, head_dim / 2]`.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeAngles {
    half: usize,
    cos_sin: Vec<f32>,
}

/// Stretches one frequency, in f32 and in the order of operations of Hugging Face's `modeling_rope_utils`.
fn scale(frequency: f32, scaling: RopeScaling) -> f32 {
    match scaling {
        RopeScaling::None => frequency,
        RopeScaling::Linear { factor } => frequency / factor as f32,
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => {
            let original = original_max_positions as f64;
            let wavelength = (2.0 * std::f64::consts::PI) as f32 / frequency;
            if wavelength > (original / low_freq_factor) as f32 {
                return frequency / factor as f32;
            }
            if wavelength < (original / high_freq_factor) as f32 {
                return frequency;
            }
            let smooth = (original as f32 / wavelength - low_freq_factor as f32)
                / (high_freq_factor - low_freq_factor) as f32;
            (1.0 - smooth) * frequency / factor as f32 + smooth * frequency
        }
    }
}

/// Rotates every head of `x`, `[rows, heads, head_dim]`, in place; row `r` by the angles of row `r`. Element
/// `i` of a head's first half is paired with element `i` of its second half.
///
/// # Errors
/// A length of `x` that is not `rows · heads · head_dim`.
pub fn rope(x: &mut [f32], heads: usize, angles: &RopeAngles) -> Result<(), DenseError> {
    let half = angles.half;
    if half == 0 || heads == 0 {
        return Ok(());
    }
    let rows = angles.cos_sin.len() / (2 * half);
    check_len("the heads x", x.len(), rows * heads * 2 * half)?;
    let width = heads * 2 * half;
    share_rows(x, width, |start, x| {
        let angles = angles.cos_sin[start / heads..].chunks_exact(2 * half);
        for (row, cos_sin) in x.chunks_exact_mut(width).zip(angles) {
            let (cos, sin) = cos_sin.split_at(half);
            for head in row.chunks_exact_mut(2 * half) {
                let (first, second) = head.split_at_mut(half);
                for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                }
            }
        }
    });
    Ok(())
}
