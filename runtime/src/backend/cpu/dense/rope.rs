//! Rotary position embedding (Su et al. 2021), half-split as Hugging Face's Llama lays out its heads, of whole heads
//! or of their first elements.

use super::share::share_rows;
use super::{DenseError, check_len};

/// Cosines and sines of a step's tokens, made once and used by all layers: `[rows, 2, rotary_dim / 2]`.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeAngles {
    head_dim: usize,
    half: usize,
    cos_sin: Vec<f32>,
}

impl RopeAngles {
    /// The rotations at these positions, one row each. `frequencies` are radians per position for each pair of
    /// a head's elements, `[head_dim / 2]`: whole heads are rotated.
    pub fn new(frequencies: &[f32], positions: &[i32]) -> Self {
        let mut cos_sin = Vec::with_capacity(2 * frequencies.len() * positions.len());
        for &position in positions {
            // The angle is rounded to f32 as Hugging Face's is, its cosine and sine are correct to the last bit
            // but for rare ties.
            let angle = |f: &f32| f64::from(position as f32 * f);
            cos_sin.extend(frequencies.iter().map(|f| angle(f).cos() as f32));
            cos_sin.extend(frequencies.iter().map(|f| angle(f).sin() as f32));
        }
        Self { head_dim: 2 * frequencies.len(), half: frequencies.len(), cos_sin }
    }

    /// `[rows, 2, rotary_dim / 2]`: the cosines of each row, then its sines.
    pub fn cos_sin(&self) -> &[f32] {
        &self.cos_sin
    }

    /// The same rotations of the first elements of heads that are longer; a shorter `head_dim` changes nothing.
    #[must_use]
    pub fn in_heads_of(mut self, head_dim: usize) -> Self {
        self.head_dim = head_dim.max(2 * self.half);
        self
    }

    /// What is rotated becomes longer by this factor.
    #[must_use]
    pub fn stretched(mut self, factor: f32) -> Self {
        if factor != 1.0 {
            self.cos_sin.iter_mut().for_each(|x| *x *= factor);
        }
        self
    }
}

/// Rotates every head of `x`, `[rows, heads, head_dim]`, in place; row `r` by the angles of row `r`. Of the
/// elements that are rotated, number `i` of the first half is paired with number `i` of the second half.
///
/// # Errors
/// A length of `x` that is not `rows · heads · head_dim`.
pub fn rope(x: &mut [f32], heads: usize, angles: &RopeAngles) -> Result<(), DenseError> {
    let RopeAngles { head_dim, half, .. } = *angles;
    if half == 0 || heads == 0 {
        return Ok(());
    }
    let rows = angles.cos_sin.len() / (2 * half);
    let width = heads * head_dim;
    check_len("the heads x", x.len(), rows * width)?;
    share_rows(x, width, |start, x| {
        let angles = angles.cos_sin.chunks_exact(2 * half).skip(start / width);
        for (row, cos_sin) in x.chunks_exact_mut(width).zip(angles) {
            let (cos, sin) = cos_sin.split_at(half);
            for head in row.chunks_exact_mut(head_dim) {
                let (first, second) = head.split_at_mut(half);
                for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                }
            }
        }
    });
    Ok(())
}
