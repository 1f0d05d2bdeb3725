//! A weight in host memory: a piece of a mapped file, or memory of its own. Cheap to clone.

use super::made_up::{Lazy, MadeUp};
use half::{bf16, f16, slice::HalfFloatSliceExt};
use memmap2::Mmap;
use pagewise_attention::{DType, HostTensor};
use std::{ops::Range, sync::Arc};

#[cfg(target_endian = "big")]
compile_error!("safetensors files are little-endian and are used as they lie in the file");

/// Elements of a weight, row-major, with their shape.
#[derive(Clone, Debug)]
pub struct WeightTensor {
    shape: Arc<[usize]>,
    data: Data,
}

#[derive(Clone, Debug)]
enum Data {
    /// `bytes` lies inside of `map`, is aligned for `dtype` and a multiple of its size: see
    /// [`WeightTensor::from_map`].
    Mapped {
        map: Arc<Mmap>,
        bytes: Range<usize>,
        dtype: DType,
    },
    F32(Arc<[f32]>),
    F16(Arc<[f16]>),
    Bf16(Arc<[bf16]>),
    MadeUp(Lazy),
}

impl WeightTensor {
    /// Elements of a mapped file. Where their address is not a multiple of their size they are copied once.
    /// `bytes` must be what `shape` and `dtype` ask for; a range outside of the map gives an empty tensor.
    pub(super) fn from_map(map: Arc<Mmap>, bytes: Range<usize>, dtype: DType, shape: &[usize]) -> Self {
        let stored = map.get(bytes.clone()).unwrap_or_default();
        let aligned = stored.as_ptr().align_offset(dtype.size()) == 0;
        let data = match dtype {
            _ if aligned && stored.len() == bytes.len() => Data::Mapped { map, bytes, dtype },
            DType::F16 => Data::F16(stored.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b)).collect()),
            DType::Bf16 => Data::Bf16(stored.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b)).collect()),
            _ => Data::F32(stored.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()),
        };
        Self { shape: shape.into(), data }
    }

    /// A weight that comes from no file.
    pub fn from_f32(elements: Vec<f32>, shape: &[usize]) -> Self {
        Self { shape: shape.into(), data: Data::F32(elements.into()) }
    }

    /// A weight that is made up where it is needed: on the device, or on the host when its elements are first asked
    /// for.
    pub fn of_made_up(made: MadeUp, dtype: DType, shape: &[usize]) -> Self {
        Self { shape: shape.into(), data: Data::MadeUp(Lazy::new(made, dtype, shape.iter().product())) }
    }

    /// How the weight is made up, if it is.
    pub fn made_up(&self) -> Option<MadeUp> {
        match &self.data {
            Data::MadeUp(lazy) => Some(lazy.made),
            _ => None,
        }
    }

    /// Some of the rows (of the slowest extent), as far as there are that many. Mapped elements stay where they are.
    #[must_use]
    pub fn rows(&self, rows: Range<usize>) -> Self {
        let (count, rest) = self.shape.split_first().map_or((0, &[][..]), |(count, rest)| (*count, rest));
        let rows = rows.start.min(count)..rows.end.clamp(rows.start.min(count), count);
        let row: usize = rest.iter().product();
        let elements = rows.start * row..rows.end * row;
        let data = match &self.data {
            Data::Mapped { map, bytes, dtype } => {
                let at = |element: usize| bytes.start + element * dtype.size();
                Data::Mapped { map: map.clone(), bytes: at(elements.start)..at(elements.end), dtype: *dtype }
            }
            Data::F32(x) => Data::F32(x.get(elements).unwrap_or_default().into()),
            Data::F16(x) => Data::F16(x.get(elements).unwrap_or_default().into()),
            Data::Bf16(x) => Data::Bf16(x.get(elements).unwrap_or_default().into()),
            Data::MadeUp(lazy) => {
                let made = MadeUp { first: lazy.made.first + elements.start as u64, ..lazy.made };
                Data::MadeUp(Lazy::new(made, lazy.dtype, elements.len()))
            }
        };
        Self { shape: std::iter::once(rows.len()).chain(rest.iter().copied()).collect(), data }
    }

    /// A copy of a matrix with rows and columns exchanged; anything but a matrix stays as it is. One that is made up is
    /// made up in the new shape.
    #[must_use]
    pub fn transposed(self) -> Self {
        let [rows, columns] = *self.shape else { return self };
        if let Data::MadeUp(_) = &self.data {
            return Self { shape: [columns, rows].into(), data: self.data };
        }
        let data = match self.host() {
            HostTensor::F32(x) => Data::F32(transpose(x, rows, columns).into()),
            HostTensor::F16(x) => Data::F16(transpose(x, rows, columns).into()),
            HostTensor::Bf16(x) => Data::Bf16(transpose(x, rows, columns).into()),
            // No constructor makes one.
            HostTensor::F8E4M3(_) | HostTensor::F8E5M2(_) => return self,
        };
        Self { shape: [columns, rows].into(), data }
    }

    /// The numbers plus 1, in f32.
    #[must_use]
    pub fn plus_one(self) -> Self {
        if let Data::MadeUp(lazy) = &self.data {
            let made = MadeUp { center: 1.0 + lazy.made.center, ..lazy.made };
            return Self::of_made_up(made, DType::F32, &self.shape);
        }
        let elements: Vec<f32> = to_f32(self.host()).iter().map(|x| 1.0 + x).collect();
        Self { shape: self.shape, data: Data::F32(elements.into()) }
    }

    /// The elements.
    pub fn host(&self) -> HostTensor<'_> {
        match &self.data {
            Data::Mapped { map, bytes, dtype } => {
                let bytes = map.get(bytes.clone()).unwrap_or_default();
                match dtype {
                    DType::F32 => HostTensor::F32(bytemuck::cast_slice(bytes)),
                    DType::F16 => HostTensor::F16(bytemuck::cast_slice(bytes)),
                    DType::Bf16 => HostTensor::Bf16(bytemuck::cast_slice(bytes)),
                    DType::F8E4M3 => HostTensor::F8E4M3(bytes),
                    DType::F8E5M2 => HostTensor::F8E5M2(bytes),
                }
            }
            Data::F32(elements) => HostTensor::F32(elements),
            Data::F16(elements) => HostTensor::F16(elements),
            Data::Bf16(elements) => HostTensor::Bf16(elements),
            Data::MadeUp(lazy) => lazy.host(),
        }
    }

    /// Type of the elements.
    pub fn dtype(&self) -> DType {
        match &self.data {
            Data::Mapped { dtype, .. } => *dtype,
            Data::F32(_) => DType::F32,
            Data::F16(_) => DType::F16,
            Data::Bf16(_) => DType::Bf16,
            Data::MadeUp(lazy) => lazy.dtype,
        }
    }

    /// Extents, slowest first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The same numbers as f32, f16 or bf16, rounded to the nearest (ties to even). A tensor that already has the
    /// type is handed back as it is; so is one when an fp8 type is asked for, which no weight has.
    pub fn to_dtype(self, dtype: DType) -> Self {
        if self.dtype() == dtype {
            return self;
        }
        if let (Data::MadeUp(lazy), false) = (&self.data, dtype.is_fp8()) {
            return Self::of_made_up(lazy.made, dtype, &self.shape);
        }
        let data = match dtype {
            DType::F32 => Data::F32(to_f32(self.host()).into()),
            DType::F16 => {
                let wide = to_f32(self.host());
                let mut narrow = vec![f16::ZERO; wide.len()];
                narrow.convert_from_f32_slice(&wide);
                Data::F16(narrow.into())
            }
            DType::Bf16 => {
                let wide = to_f32(self.host());
                let mut narrow = vec![bf16::ZERO; wide.len()];
                narrow.convert_from_f32_slice(&wide);
                Data::Bf16(narrow.into())
            }
            DType::F8E4M3 | DType::F8E5M2 => return self,
        };
        Self { shape: self.shape, data }
    }
}

/// In tiles, so that neither side is walked through a page at a time.
fn transpose<T: Copy>(x: &[T], rows: usize, columns: usize) -> Vec<T> {
    const TILE: usize = 32;
    let mut out = x.to_vec();
    for row in (0..rows).step_by(TILE) {
        for column in (0..columns).step_by(TILE) {
            for r in row..rows.min(row + TILE) {
                for c in column..columns.min(column + TILE) {
                    if let (Some(to), Some(from)) = (out.get_mut(c * rows + r), x.get(r * columns + c)) {
                        *to = *from;
                    }
                }
            }
        }
    }
    out
}

/// The numbers in f32, which holds every f16 and bf16 exactly.
fn to_f32(host: HostTensor<'_>) -> Vec<f32> {
    match host {
        HostTensor::F32(elements) => elements.to_vec(),
        HostTensor::F16(elements) => {
            let mut wide = vec![0.0; elements.len()];
            elements.convert_to_f32_slice(&mut wide);
            wide
        }
        HostTensor::Bf16(elements) => elements.iter().map(|x| x.to_f32()).collect(),
        // No constructor makes one.
        HostTensor::F8E4M3(_) | HostTensor::F8E5M2(_) => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_to_the_nearest_even() {
        // 1 + 2^-8 lies half way between two bf16 numbers, 1 + 3 * 2^-8 as well.
        let ties = vec![1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, f32::NAN, f32::INFINITY, -0.0];
        let tensor = WeightTensor::from_f32(ties, &[5]).to_dtype(DType::Bf16);
        let HostTensor::Bf16(x) = tensor.host() else { panic!("{:?}", tensor.dtype()) };
        assert_eq!((x[0].to_f32(), x[1].to_f32()), (1.0, 1.0 + 4.0 / 256.0));
        assert!(x[2].is_nan() && x[3] == bf16::INFINITY && x[4].to_bits() == 0x8000);

        let ties = vec![1.0 + 1.0 / 2048.0, 1.0 + 3.0 / 2048.0, 65520.0];
        let tensor = WeightTensor::from_f32(ties, &[3]).to_dtype(DType::F16);
        let HostTensor::F16(x) = tensor.host() else { panic!("{:?}", tensor.dtype()) };
        assert_eq!((x[0].to_f32(), x[1].to_f32()), (1.0, 1.0 + 4.0 / 2048.0));
        assert_eq!(x[2], f16::INFINITY);
    }

    #[test]
    fn rows_and_columns_are_taken_and_exchanged() {
        let (rows, columns) = (37, 65);
        let tensor =
            WeightTensor::from_f32((0..rows * columns).map(|i| i as f32).collect(), &[rows, columns]);
        for dtype in [DType::F32, DType::F16] {
            let tensor = tensor.clone().to_dtype(dtype);
            let turned = tensor.clone().transposed();
            assert_eq!((turned.shape(), turned.dtype()), ([columns, rows].as_slice(), dtype));
            let (x, y) = (to_f32(tensor.host()), to_f32(turned.host()));
            assert!(
                (0..rows).all(|r| (0..columns).all(|c| x[r * columns + c] == y[c * rows + r])),
                "{dtype}"
            );
            let some = tensor.rows(5..9);
            assert_eq!(some.shape(), [4, columns]);
            assert_eq!(to_f32(some.host()), x[5 * columns..9 * columns]);
            assert_eq!(tensor.rows(36..99).shape(), [1, columns]);
            assert_eq!(tensor.rows(99..100).host().len(), 0);
        }
    }

    #[test]
    fn made_up_weights_are_the_same_in_parts_and_in_other_types() {
        let made = MadeUp { seed: 7, first: 0, center: 0.5, spread: 0.25 };
        let whole = WeightTensor::of_made_up(made, DType::F32, &[37, 65]);
        let x = to_f32(whole.host());
        assert!(x.iter().all(|x| (0.25..0.75).contains(x)));
        assert!((x.iter().sum::<f32>() / x.len() as f32 - 0.5).abs() < 0.02);
        let part = whole.rows(5..9);
        assert_eq!((part.shape(), part.dtype()), ([4, 65].as_slice(), DType::F32));
        assert_eq!(to_f32(part.host()), x[5 * 65..9 * 65]);
        let narrow = whole.clone().to_dtype(DType::Bf16);
        assert_eq!(narrow.made_up(), Some(made));
        assert_eq!(to_f32(narrow.host()), x.iter().map(|x| bf16::from_f32(*x).to_f32()).collect::<Vec<_>>());
        assert_eq!(whole.clone().transposed().shape(), [65, 37]);
        assert_eq!(to_f32(whole.plus_one().host())[0], 1.0 + x[0]);
    }

    #[test]
    fn narrow_types_widen_exactly() {
        let numbers = vec![0.0, -1.5, 3.140_625, 6.1e-5, f32::INFINITY];
        for dtype in [DType::F16, DType::Bf16] {
            let narrow = WeightTensor::from_f32(numbers.clone(), &[5]).to_dtype(dtype);
            let wide = narrow.clone().to_dtype(DType::F32);
            let back = wide.clone().to_dtype(dtype);
            assert_eq!(format!("{:?}", narrow.host()), format!("{:?}", back.host()));
            assert_eq!(wide.shape(), [5]);
        }
    }
}
