//! Random cases of `merge_states` with strides, and the plain code that says what they must give.

use std::fmt;

use pagewise_attention::cuda::MergeStatesCall;
use pagewise_attention::{DType, RowStrides};

use super::encode::{decode, encode};
use super::random::Random;

/// A case, wholly determined by these: print it, and it can be run again.
#[derive(Clone, Copy, Debug)]
pub struct MergeCase {
    /// Type of the parts.
    pub part: DType,
    /// Type of the merged output.
    pub out: DType,
    /// Every offset, stride and the head dimension is a multiple of so many elements.
    pub unit: usize,
    pub seed: u64,
}

impl fmt::Display for MergeCase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {} {}", self.part, self.out, self.unit, self.seed)
    }
}

/// The tensors of a case in host memory.
#[derive(Clone, Debug)]
pub struct MergeTensors {
    pub case: MergeCase,
    pub parts: usize,
    pub rows: usize,
    pub heads: usize,
    pub dim: usize,
    /// Parts' outputs and LSE; poison between them, and in the outputs of empty parts.
    pub part_out: Vec<u8>,
    pub part_lse: Vec<f32>,
    pub part_out_strides: RowStrides,
    pub part_lse_strides: RowStrides,
    /// From a part to the next; where part 0 begins.
    pub part_out_stride: i64,
    pub part_lse_stride: i64,
    pub part_out_first: usize,
    pub part_lse_first: usize,
    pub out_strides: RowStrides,
    pub lse_strides: RowStrides,
    pub with_lse: bool,
}

/// Where they have been copied to.
#[derive(Clone, Copy, Debug)]
pub struct MergeAddresses {
    pub part_out: u64,
    pub part_lse: u64,
    pub out: u64,
    pub lse: u64,
}

impl MergeCase {
    pub fn build(&self) -> MergeTensors {
        let mut random = Random::new(self.seed);
        let unit = self.unit;
        let parts = random.pick(&[1, 2, 2, 3, 4, 5, 9]);
        let (rows, heads) = (1 + random.below(20), 1 + random.below(9));
        let dim = unit * (1 + random.below(256 / unit));
        let gap = |random: &mut Random| if random.one_in(2) { 0 } else { unit * random.below(4) };
        let mut strides = |dim: usize, unit: usize| {
            let head = (dim + gap(&mut random)).next_multiple_of(unit);
            RowStrides { head: head as u64, token: (heads * head + gap(&mut random)) as u64 }
        };
        let (part_out_strides, out_strides) = (strides(dim, unit), strides(dim, unit));
        let (part_lse_strides, lse_strides) = (strides(1, 1), strides(1, 1));
        let block = |strides: RowStrides, random: &mut Random| {
            let rows = strides.token as usize * rows;
            rows.next_multiple_of(unit) + gap(random)
        };
        // Backwards sometimes, as two buffers may lie.
        let (out_block, lse_block) =
            (block(part_out_strides, &mut random), block(part_lse_strides, &mut random));
        let backwards = random.one_in(3);
        let first = |block: usize| if backwards { block * (parts - 1) } else { 0 };
        let signed = |block: usize| if backwards { -(block as i64) } else { block as i64 };
        let mut tensors = MergeTensors {
            case: *self,
            parts,
            rows,
            heads,
            dim,
            part_out: vec![0xff; out_block * parts * self.part.size()],
            part_lse: vec![f32::NAN; lse_block * parts],
            part_out_strides,
            part_lse_strides,
            part_out_stride: signed(out_block),
            part_lse_stride: signed(lse_block),
            part_out_first: first(out_block),
            part_lse_first: first(lse_block),
            out_strides,
            lse_strides,
            with_lse: !random.one_in(4),
        };
        let reach = random.pick(&[0.5, 8.0, 60.0, 1000.0]);
        let size = self.part.size();
        for (row, head) in (0..rows).flat_map(|row| (0..heads).map(move |head| (row, head))) {
            let dead = random.one_in(9);
            for part in 0..parts {
                let (out_at, lse_at) = tensors.places(part, row, head);
                let empty = dead || random.one_in(4);
                tensors.part_lse[lse_at] =
                    if empty { f32::NEG_INFINITY } else { (random.unit() * reach) as f32 };
                if empty {
                    continue;
                }
                for element in 0..dim {
                    let at = (out_at + element) * size;
                    let value = encode(self.part, (random.unit() * 1.5 + 0.5) as f32);
                    tensors.part_out[at..at + size].copy_from_slice(&value);
                }
            }
        }
        tensors
    }
}

impl MergeTensors {
    /// Where a row of a part begins: element of the outputs, element of the LSE.
    fn places(&self, part: usize, row: usize, head: usize) -> (usize, usize) {
        let place = |first: usize, stride: i64, rows: RowStrides| {
            (first as i64 + stride * part as i64) as usize
                + rows.token as usize * row
                + rows.head as usize * head
        };
        (
            place(self.part_out_first, self.part_out_stride, self.part_out_strides),
            place(self.part_lse_first, self.part_lse_stride, self.part_lse_strides),
        )
    }

    /// Poisoned outputs.
    pub fn outputs(&self) -> (Vec<u8>, Vec<f32>) {
        let elements = self.out_strides.token as usize * self.rows;
        (
            vec![0xff; elements * self.case.out.size()],
            vec![f32::NAN; self.lse_strides.token as usize * self.rows],
        )
    }

    pub fn call(&self, at: MergeAddresses) -> MergeStatesCall {
        MergeStatesCall {
            parts: self.parts,
            rows: self.rows,
            heads: self.heads,
            head_dim: self.dim,
            part_dtype: self.case.part,
            part_out: at.part_out + (self.part_out_first * self.case.part.size()) as u64,
            part_out_strides: self.part_out_strides,
            part_out_stride: self.part_out_stride,
            part_lse: at.part_lse + 4 * self.part_lse_first as u64,
            part_lse_strides: self.part_lse_strides,
            part_lse_stride: self.part_lse_stride,
            out_dtype: self.case.out,
            out: at.out,
            out_strides: self.out_strides,
            lse: if self.with_lse { at.lse } else { 0 },
            lse_strides: self.lse_strides,
        }
    }

    /// Compares results with the definition, in f64; gives the largest error relative to the largest magnitude that
    /// a row can have (2). What belongs to no result must be as it was.
    pub fn compare(&self, out: &[u8], lse: &[f32]) -> Result<f64, String> {
        let (mut out, mut lse) = (out.to_vec(), lse.to_vec());
        let (part_size, size, dtype) = (self.case.part.size(), self.case.out.size(), self.case.out);
        let unit_roundoff = 2f64.powi(-24);
        let mut worst = 0.0f64;
        for (row, head) in (0..self.rows).flat_map(|row| (0..self.heads).map(move |head| (row, head))) {
            let what = format!("row {row}, head {head}");
            let states: Vec<(usize, f64)> = (0..self.parts)
                .map(|part| self.places(part, row, head))
                .map(|(out_at, lse_at)| (out_at, f64::from(self.part_lse[lse_at])))
                .filter(|(_, lse)| lse.is_finite())
                .collect();
            let largest = states.iter().map(|state| state.1).fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = states.iter().map(|state| (state.1 - largest).exp()).sum();
            // An exponent is rounded to f32 three times; its magnitude is below 104 where it gives more than 0.
            let spread = states.iter().map(|state| (largest - state.1).min(104.0)).fold(0.0, f64::max);
            let relative = unit_roundoff * (8.0 * spread + 32.0);
            let first = self.out_strides.token as usize * row + self.out_strides.head as usize * head;
            for element in 0..self.dim {
                let (mut sum, mut weight) = (0.0, 0.0);
                for (out_at, lse) in &states {
                    let at = (out_at + element) * part_size;
                    let value = decode(self.case.part, &self.part_out[at..at + part_size]);
                    let share = (lse - largest).exp() / total;
                    sum += share * value;
                    weight += share * value.abs();
                }
                let at = (first + element) * size;
                let found = decode(dtype, &out[at..at + size]);
                let nearest = |value: f64| decode(dtype, &encode(dtype, value as f32));
                // Rounding keeps order: the result lies between the bounds, rounded.
                let error = relative * weight;
                if !(nearest(sum - error)..=nearest(sum + error)).contains(&found) {
                    return Err(format!(
                        "{what}, element {element}: expected {sum} ± {error:e}, found {found}"
                    ));
                }
                worst = worst.max((found - sum).abs() / 2.0);
                out[at..at + size].fill(0xff);
            }
            if self.with_lse {
                let at = self.lse_strides.token as usize * row + self.lse_strides.head as usize * head;
                let found = f64::from(std::mem::replace(&mut lse[at], f32::NAN));
                let expected = largest + total.ln();
                let fine = match states.is_empty() {
                    true => found == f64::NEG_INFINITY,
                    false => (found - expected).abs() <= relative + 4.0 * unit_roundoff * expected.abs(),
                };
                if !fine {
                    return Err(format!("{what}: expected lse {expected}, found {found}"));
                }
            }
        }
        if out.iter().any(|&byte| byte != 0xff) || lse.iter().any(|value| !value.is_nan()) {
            return Err("an element was written that belongs to no result".to_owned());
        }
        Ok(worst)
    }
}
