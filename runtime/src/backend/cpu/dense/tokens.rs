//! From token ids and positions to rows of a table, and from logits to a token id.

use super::lanes::Weight;
use super::linear::check_dtype;
use super::{DenseError, check_len};
use pagewise_attention::HostTensor;

/// `out[r] = table[ids[r]]`, widened to f32.
///
/// Shapes: table `[vocabulary, width]` in f32, f16 or bf16, out `[ids.len(), width]`; the width follows from
/// the output.
///
/// # Errors
/// A token id outside of the vocabulary, lengths that fit no shape, a table in an fp8 type.
pub fn embed(table: HostTensor<'_>, ids: &[u32], out: &mut [f32]) -> Result<(), DenseError> {
    if ids.is_empty() {
        return check_len("the output", out.len(), 0);
    }
    check_dtype("the embedding", table)?;
    if out.is_empty() || !out.len().is_multiple_of(ids.len()) {
        return Err(DenseError::Rows { what: "the output", len: out.len(), row: ids.len() });
    }
    let width = out.len() / ids.len();
    if !table.len().is_multiple_of(width) {
        return Err(DenseError::Rows { what: "the embedding", len: table.len(), row: width });
    }
    let vocabulary = table.len() / width;
    if let Some(&id) = ids.iter().find(|id| **id as usize >= vocabulary) {
        return Err(DenseError::TokenId { id, vocabulary });
    }
    match table {
        HostTensor::F32(t) => typed(t, ids, out),
        HostTensor::F16(t) => typed(t, ids, out),
        HostTensor::Bf16(t) => typed(t, ids, out),
        HostTensor::F8E4M3(_) | HostTensor::F8E5M2(_) => {}
    }
    Ok(())
}

fn typed<T: Weight>(table: &[T], ids: &[u32], out: &mut [f32]) {
    let width = out.len() / ids.len();
    for (id, out) in ids.iter().zip(out.chunks_exact_mut(width)) {
        let row = &table[*id as usize * width..][..width];
        for (out, weight) in out.iter_mut().zip(row) {
            *out = weight.widen();
        }
    }
}

/// `x[r] += table[positions[r] + offset]`: learned positions.
///
/// Shapes: table `[places, width]` in f32, f16 or bf16, x `[positions.len(), width]`; the width follows from x.
///
/// # Errors
/// A position outside of the table, lengths that fit no shape, a table in an fp8 type.
pub fn add_positions(
    table: HostTensor<'_>,
    positions: &[i32],
    offset: usize,
    x: &mut [f32],
) -> Result<(), DenseError> {
    if positions.is_empty() {
        return check_len("the rows x", x.len(), 0);
    }
    check_dtype("the positions' table", table)?;
    if x.is_empty() || !x.len().is_multiple_of(positions.len()) {
        return Err(DenseError::Rows { what: "the rows x", len: x.len(), row: positions.len() });
    }
    let width = x.len() / positions.len();
    if !table.len().is_multiple_of(width) {
        return Err(DenseError::Rows { what: "the positions' table", len: table.len(), row: width });
    }
    let places = table.len() / width;
    let place = |&position: &i32| usize::try_from(position).ok()?.checked_add(offset).filter(|p| *p < places);
    if let Some(&position) = positions.iter().find(|position| place(position).is_none()) {
        return Err(DenseError::Position { position, places, offset });
    }
    let places = positions.iter().filter_map(place);
    match table {
        HostTensor::F32(t) => add_rows(t, places, x, width),
        HostTensor::F16(t) => add_rows(t, places, x, width),
        HostTensor::Bf16(t) => add_rows(t, places, x, width),
        HostTensor::F8E4M3(_) | HostTensor::F8E5M2(_) => {}
    }
    Ok(())
}

fn add_rows<T: Weight>(table: &[T], places: impl Iterator<Item = usize>, x: &mut [f32], width: usize) {
    for (place, x) in places.zip(x.chunks_exact_mut(width)) {
        for (x, weight) in x.iter_mut().zip(&table[place * width..][..width]) {
            *x += weight.widen();
        }
    }
}

/// Index of the largest logit, the first of equal ones. NaN never wins; `None` if there is nothing else.
pub fn argmax(logits: &[f32]) -> Option<usize> {
    // The maximum in independent lanes, which compile to vector code, then where it stands.
    let mut lanes = [f32::NEG_INFINITY; 16];
    let chunks = logits.chunks_exact(lanes.len());
    let rest = chunks.remainder();
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, *x);
        }
    }
    let largest = lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, larger);
    logits.iter().position(|x| *x == largest)
}
