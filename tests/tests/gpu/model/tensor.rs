//! Tensors of the cases: views with gaps, in which everything that is no element is NaN.

use pagewise_attention::DType;
use pagewise_attention::cuda::ptx;
use pagewise_attention::cuda::ptx::model::Rows;

use super::super::encode::{decode, encode};
use super::super::random::Random;
use super::Device;

/// Rounding to f32 changes a number by at most this part of it.
pub const F32: f64 = 1.0 / (1 << 24) as f64;

pub fn dtype(dtype: ptx::DType) -> DType {
    match dtype {
        ptx::DType::F32 => DType::F32,
        ptx::DType::F16 => DType::F16,
        ptx::DType::Bf16 => DType::Bf16,
        other => panic!("{other} is no compute type"),
    }
}

/// `[rows, width]` in memory, with a stride and a first element.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub dtype: DType,
    pub rows: usize,
    pub width: usize,
    pub stride: usize,
    first: usize,
    bytes: Vec<u8>,
    address: u64,
}

impl Tensor {
    /// All NaN. Stride and first element are multiples of `unit`, which is 1 or at least 16 bytes.
    pub fn poisoned(random: &mut Random, dtype: DType, rows: usize, width: usize, unit: usize) -> Self {
        let gap = |random: &mut Random| if random.one_in(2) { 0 } else { unit * random.below(5) };
        let stride = width.next_multiple_of(unit) + gap(random);
        let first = gap(random);
        let bytes = vec![0xff; (first + rows * stride) * dtype.size()];
        Self { dtype, rows, width, stride, first, bytes, address: 0 }
    }

    /// Each element as `value` says, rounded.
    pub fn filled(mut self, mut value: impl FnMut(usize, usize) -> f64) -> Self {
        let size = self.dtype.size();
        for row in 0..self.rows {
            for column in 0..self.width {
                let at = self.place(row, column);
                self.bytes[at..at + size].copy_from_slice(&encode(self.dtype, value(row, column) as f32));
            }
        }
        self
    }

    /// Random numbers in ± `reach`.
    pub fn random(
        random: &mut Random,
        dtype: DType,
        rows: usize,
        width: usize,
        unit: usize,
        reach: f64,
    ) -> Self {
        let tensor = Self::poisoned(random, dtype, rows, width, unit);
        tensor.filled(|_, _| random.unit() * reach)
    }

    fn place(&self, row: usize, column: usize) -> usize {
        (self.first + row * self.stride + column) * self.dtype.size()
    }

    pub fn get(&self, row: usize, column: usize) -> f64 {
        let at = self.place(row, column);
        decode(self.dtype, &self.bytes[at..at + self.dtype.size()])
    }

    pub fn upload(&mut self, device: &mut dyn Device) -> Rows {
        self.address = device.upload(&self.bytes);
        Rows { address: self.address + (self.first * self.dtype.size()) as u64, stride: self.stride as u64 }
    }

    /// Compares with what the device holds now. `expected` gives each element's exact value and how far from it the
    /// kernel's f32 arithmetic may be before it is rounded to the element's type. The largest error relative to the
    /// largest value. Gaps must be as they were.
    pub fn compare(
        &self,
        device: &dyn Device,
        mut expected: impl FnMut(usize, usize) -> (f64, f64),
    ) -> Result<f64, String> {
        let mut found = self.clone();
        found.bytes = device.download(self.address);
        // Memory is never empty, tensors may be.
        found.bytes.truncate(self.bytes.len());
        let size = self.dtype.size();
        let (mut worst, mut largest) = (0.0f64, f64::MIN_POSITIVE);
        for row in 0..self.rows {
            for column in 0..self.width {
                let (value, error) = expected(row, column);
                let got = found.get(row, column);
                let nearest = |value: f64| decode(self.dtype, &encode(self.dtype, value as f32));
                // Rounding keeps order: the result lies between the bounds, rounded.
                let is_fine = if value.is_finite() {
                    (nearest(value - error)..=nearest(value + error)).contains(&got)
                } else {
                    got == value || (got.is_nan() && value.is_nan())
                };
                if !is_fine {
                    return Err(format!(
                        "row {row} of {}, element {column} of {}: expected {value} ± {error:e}, found {got}",
                        self.rows, self.width
                    ));
                }
                if value.is_finite() {
                    worst = worst.max((got - value).abs());
                    largest = largest.max(value.abs());
                }
                let at = self.place(row, column);
                found.bytes[at..at + size].copy_from_slice(&self.bytes[at..at + size]);
            }
        }
        if found.bytes != self.bytes {
            return Err("an element was written that belongs to no result".to_owned());
        }
        Ok(worst / largest)
    }
}

/// f32 numbers on the device, and their values.
pub fn vector(device: &mut dyn Device, values: &[f32]) -> u64 {
    device.upload(&values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>())
}

pub fn words(device: &mut dyn Device, values: &[u32]) -> u64 {
    device.upload(&values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>())
}

/// Random f32 numbers in ± `reach` around `center`.
pub fn numbers(random: &mut Random, count: usize, center: f64, reach: f64) -> Vec<f32> {
    (0..count).map(|_| (center + random.unit() * reach) as f32).collect()
}
