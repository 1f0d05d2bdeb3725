//! RMSNorm (Zhang and Sennrich 2019), rounded as Hugging Face's Llama does it in f32, and LayerNorm (Ba et al. 2016).

use super::instruction_set::{InstructionSet, dispatch};
use super::lanes::{LANES, Lanes, Weight};
use super::linear::check_dtype;
use super::share::share_rows;
use super::tile::sum_of_squares;
use super::{DenseError, check_len};
use pagewise_attention::HostTensor;

/// `out[r, i] = weight[i] · (x[r, i] / sqrt(mean(x[r]²) + eps))`.
///
/// Shapes: x and out `[rows, features]`, weight `[features]` in f32, f16 or bf16. Heads are rows as well: with a
/// weight of one head's length each is normed by itself.
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
    if check_rows(x, weight, out)? == 0 {
        return Ok(());
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

/// `out[r, i] = (x[r, i] - mean(x[r])) / sqrt(variance(x[r]) + eps) · weight[i] + bias[i]`.
///
/// Shapes: x and out `[rows, features]`, weight and bias `[features]`, each in f32, f16 or bf16.
///
/// # Errors
/// Lengths that fit no shape, or a weight or bias in an fp8 type.
pub fn layer_norm(
    x: &[f32],
    weight: HostTensor<'_>,
    bias: HostTensor<'_>,
    eps: f32,
    out: &mut [f32],
) -> Result<(), DenseError> {
    layer_norm_on(InstructionSet::best(), x, weight, bias, eps, out)
}

pub(super) fn layer_norm_on(
    set: InstructionSet,
    x: &[f32],
    weight: HostTensor<'_>,
    bias: HostTensor<'_>,
    eps: f32,
    out: &mut [f32],
) -> Result<(), DenseError> {
    check_dtype("the norm's bias", bias)?;
    check_len("the norm's bias", bias.len(), weight.len())?;
    if check_rows(x, weight, out)? == 0 {
        return Ok(());
    }
    match weight {
        HostTensor::F32(w) => with_bias(set, x, w, bias, eps, out),
        HostTensor::F16(w) => with_bias(set, x, w, bias, eps, out),
        HostTensor::Bf16(w) => with_bias(set, x, w, bias, eps, out),
        HostTensor::F8E4M3(_) | HostTensor::F8E5M2(_) => {}
    }
    Ok(())
}

fn with_bias<W: Weight>(
    set: InstructionSet,
    x: &[f32],
    weight: &[W],
    bias: HostTensor<'_>,
    eps: f32,
    out: &mut [f32],
) {
    match bias {
        HostTensor::F32(b) => share_layer_norm(set, x, weight, b, eps, out),
        HostTensor::F16(b) => share_layer_norm(set, x, weight, b, eps, out),
        HostTensor::Bf16(b) => share_layer_norm(set, x, weight, b, eps, out),
        HostTensor::F8E4M3(_) | HostTensor::F8E5M2(_) => {}
    }
}

fn share_layer_norm<W: Weight, V: Weight>(
    set: InstructionSet,
    x: &[f32],
    weight: &[W],
    bias: &[V],
    eps: f32,
    out: &mut [f32],
) {
    share_rows(out, weight.len(), |start, out| {
        let x = &x[start..start + out.len()];
        // SAFETY: the dispatch's instruction set is there; all else is slices.
        unsafe {
            dispatch!(
                set,
                layer_norm_rows::<W: Weight, V: Weight>(
                    x: &[f32], weight: &[W], bias: &[V], eps: f32, out: &mut [f32],
                )
            );
        }
    });
}

/// # Safety
/// That of [`Lanes`].
#[inline(always)]
unsafe fn layer_norm_rows<L: Lanes, W: Weight, V: Weight>(
    x: &[f32],
    weight: &[W],
    bias: &[V],
    eps: f32,
    out: &mut [f32],
) {
    let width = weight.len();
    for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        let mean = sum(x) / width as f32;
        for (out, x) in out.iter_mut().zip(x) {
            *out = x - mean;
        }
        // SAFETY: the caller's.
        let variance = unsafe { sum_of_squares::<L>(out) } / width as f32;
        let scale = 1.0 / (variance + eps).sqrt();
        for ((out, w), b) in out.iter_mut().zip(weight).zip(bias) {
            *out = L::multiply_add_scalar(*out * scale, w.widen(), b.widen());
        }
    }
}

/// Sixteen lanes, one tree: additions only, so that every instruction set gives the same bits.
#[inline(always)]
fn sum(x: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += x;
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane += x;
    }
    let mut half = LANES / 2;
    while half > 0 {
        let (low, high) = lanes.split_at_mut(half);
        for (low, high) in low.iter_mut().zip(high) {
            *low += *high;
        }
        half /= 2;
    }
    let [sum, ..] = lanes;
    sum
}

/// Number of rows, when input, output and weight are of shapes that fit.
fn check_rows(x: &[f32], weight: HostTensor<'_>, out: &[f32]) -> Result<usize, DenseError> {
    check_len("the output", out.len(), x.len())?;
    check_dtype("the norm's weight", weight)?;
    if x.is_empty() {
        return Ok(0);
    }
    if weight.is_empty() || !x.len().is_multiple_of(weight.len()) {
        return Err(DenseError::Rows { what: "the input x", len: x.len(), row: weight.len() });
    }
    Ok(x.len() / weight.len())
}
