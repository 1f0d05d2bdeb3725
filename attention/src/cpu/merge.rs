//! `merge_states`: attention over parts of the keys, put together by their LSE.

use super::elements::Element;
use super::io::{Outputs, check_len};
use crate::{HostTensor, HostTensorMut, ProblemError};
use half::{bf16, f16};

/// Attention over a part of the keys: what [`Plan::run`](super::Plan::run) wrote.
#[derive(Clone, Copy, Debug)]
pub struct Partial<'a> {
    /// `[rows, head_dim]`, f32, f16 or bf16.
    pub out: HostTensor<'a>,
    /// `[rows]`; −∞ where the part has no key, and then `out` is not read.
    pub lse: &'a [f32],
}

/// Puts attention over disjoint sets of keys together:
/// `lse = ln Σ exp(lseᵢ)`, `out = Σ exp(lseᵢ − lse) · outᵢ`. Rows are (query, head) pairs without gaps; their
/// number is the length of the first part's `lse`. A row that no part has keys for gives 0 and −∞.
///
/// The parts are added in their order, so the same parts give the same bits.
///
/// # Errors
/// [`ProblemError`] if there is no part, a buffer is too short, or one is 8-bit; nothing has been written then.
pub fn merge_states(
    head_dim: usize,
    parts: &[Partial<'_>],
    outputs: &mut Outputs<'_>,
) -> Result<(), ProblemError> {
    let Some(first) = parts.first() else {
        let problem = "there is no partial result to merge; give at least one".to_owned();
        return Err(ProblemError::Input { input: "parts", problem });
    };
    let rows = first.lse.len();
    let needed = (rows as u64).saturating_mul(head_dim as u64);
    for part in parts {
        check_len("a part's lse", part.lse.len(), rows as u64)?;
        check_len("a part's out", part.out.len(), needed)?;
        check_not_fp8(part.out.dtype())?;
    }
    check_len("out", outputs.out.len(), needed)?;
    check_not_fp8(outputs.out.dtype())?;
    if let Some(lse) = &outputs.lse {
        check_len("lse", lse.len(), rows as u64)?;
    }
    if head_dim == 0 {
        return Err(ProblemError::HeadDim { field: "head_dim", value: 0, max: crate::MAX_HEAD_DIM });
    }
    let mut sum = vec![0.0f32; head_dim];
    for row in 0..rows {
        let lse_of = |part: &Partial<'_>| part.lse.get(row).copied().unwrap_or(f32::NEG_INFINITY);
        let largest = parts.iter().map(lse_of).fold(f32::NEG_INFINITY, f32::max);
        let mut total = 0.0f32;
        sum.fill(0.0);
        for part in parts {
            let lse = lse_of(part);
            if lse == f32::NEG_INFINITY {
                continue;
            }
            let weight = (lse - largest).exp();
            total += weight;
            add_row(part.out, row * head_dim, weight, &mut sum);
        }
        let empty = largest == f32::NEG_INFINITY && total == 0.0;
        if !empty {
            sum.iter_mut().for_each(|x| *x /= total);
        }
        store_row(&mut outputs.out, row * head_dim, &sum);
        if let Some(lse) = outputs.lse.as_mut().and_then(|lse| lse.get_mut(row)) {
            *lse = if empty { f32::NEG_INFINITY } else { largest + total.ln() };
        }
    }
    Ok(())
}

fn check_not_fp8(dtype: crate::DType) -> Result<(), ProblemError> {
    match dtype.is_fp8() {
        true => Err(ProblemError::QueryDType { dtype }),
        false => Ok(()),
    }
}

fn add_row(from: HostTensor<'_>, at: usize, weight: f32, sum: &mut [f32]) {
    fn add<T: Element>(from: &[T], at: usize, weight: f32, sum: &mut [f32]) {
        let row = from.get(at..).unwrap_or(&[]);
        sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += weight * x.to_f32());
    }
    match from {
        HostTensor::F32(from) => add(from, at, weight, sum),
        HostTensor::F16(from) => add(from, at, weight, sum),
        HostTensor::Bf16(from) => add(from, at, weight, sum),
        HostTensor::F8E4M3(_) | HostTensor::F8E5M2(_) => {}
    }
}

fn store_row(to: &mut HostTensorMut<'_>, at: usize, row: &[f32]) {
    fn store<T: Element>(to: &mut [T], at: usize, row: &[f32]) {
        let to = to.get_mut(at..).unwrap_or(&mut []);
        to.iter_mut().zip(row).for_each(|(to, &x)| *to = T::from_f32(x));
    }
    match to {
        HostTensorMut::F32(to) => store::<f32>(to, at, row),
        HostTensorMut::F16(to) => store::<f16>(to, at, row),
        HostTensorMut::Bf16(to) => store::<bf16>(to, at, row),
        HostTensorMut::F8E4M3(_) | HostTensorMut::F8E5M2(_) => {}
    }
}
