//! Rotary position embedding (Su et al. 2021), half-split as Hugging Face's Llama lays out its heads.

use super::share::share_rows;
use super::{DenseError, check_len};

/// Cosines and sines of a step's tokens, made once and used by all layers: `[rows, 2, head_dim / 2]`.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeAngles {
    half: usize,
    cos_sin: Vec<f32>,
}

impl RopeAngles {
    /// The rotations at these positions, one row each. `frequencies` are radians per position for each pair of
    /// a head's elements, `[head_dim / 2]`.
    pub fn new(frequencies: &[f32], positions: &[i32]) -> Self {
        let mut cos_sin = Vec::with_capacity(2 * frequencies.len() * positions.len());
        for &position in positions {
            // The angle is rounded to f32 as Hugging Face's is, its cosine and sine are correct to the last bit
            // but for rare ties.
            let angle = |f: &f32| f64::from(position as f32 * f);
            cos_sin.extend(frequencies.iter().map(|f| angle(f).cos() as f32));
            cos_sin.extend(frequencies.iter().map(|f| angle(f).sin() as f32));
        }
        Self { half: frequencies.len(), cos_sin }
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
