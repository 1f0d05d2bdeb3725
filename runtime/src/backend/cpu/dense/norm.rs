//! RMSNorm (Zhang and Sennrich 2019), rounded as Hugging Face's Llama does it in f32.

use super::instruction_set::{InstructionSet, dispatch};
use super::lanes::{Lanes, Weight};
use super::linear::check_dtype;
use super::share::share_rows;
use super::tile::sum_of_squares;
use super::{DenseError, check_len};
use pagewise_attention::HostTensor;

/// `out[r, i] = weight[i] · (x[r, i] / sqrt(mean(x[r]²) + eps))`.
///
/// Shapes: x and out `[rows, features]`, weight `[features]` in f32, f16 or bf16.
///
/// # Errors
/// Lengths that fit no shape, or a weight in an fp8 type.
pub fn rms_norm(x: &[f32], weight: HostTensor<'_>, eps: f32, out: &mut [f32]) -> Result<(), DenseError> {
    rms_norm_on(InstructionSet::best(), x, weight, eps, out)
}

pub(super) fn rms_norm_on(
    set: InstructionSet,
    x: &[f32],
    weight: HostTensor<'_>,
    eps: f32,
    out: &mut [f32],
) -> Result<(), DenseError> {
    check_len("the output", out.len(), x.len())?;
    check_dtype("the norm's weight", weight)?;
    if x.is_empty() {
        return Ok(());
    }
    if weight.is_empty() || !x.len().is_multiple_of(weight.len()) {
        return Err(DenseError::Rows { what: "the input x", len: x.len(), row: weight.len() });
    }
    match weight {
        HostTensor::F32(w) => typed(set, x, w, eps, out),
        HostTensor::F16(w) => typed(set, x, w, eps, out),
        HostTensor::Bf16(w) => typed(set, x, w, eps, out),
        HostTensor::F8E4M3(_) | HostTensor::F8E5M2(_) => {}
    }
    Ok(())
}

fn typed<T: Weight>(set: InstructionSet, x: &[f32], weight: &[T], eps: f32, out: &mut [f32]) {
    let width = weight.len();
    share_rows(out, width, |start, out| {
        let x = &x[start..start + out.len()];
        // SAFETY: the dispatch's instruction set is there; all else is slices.
        unsafe { dispatch!(set, rows::<T: Weight>(x: &[f32], weight: &[T], eps: f32, out: &mut [f32])) }
    });
}

/// # Safety
/// That of [`Lanes`].
#[inline(always)]
unsafe fn rows<L: Lanes, T: Weight>(x: &[f32], weight: &[T], eps: f32, out: &mut [f32]) {
    let width = weight.len();
    for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        // SAFETY: the caller's.
        let mean = unsafe { sum_of_squares::<L>(x) } / width as f32;
        let scale = 1.0 / (mean + eps).sqrt();
        for ((out, x), w) in out.iter_mut().zip(x).zip(weight) {
            *out = w.widen() * (x * scale);
        }
    }
}
