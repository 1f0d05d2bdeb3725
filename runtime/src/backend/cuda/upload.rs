//! Weights on their way to the device: the host reads the next piece of a mapped file into pinned memory while the
//! device takes the last one.
//!
//! Owns where weights lie: matrices in the compute type, those of one product one behind the other; vectors in f32 as
//! well, as norms and sums read them.

use std::sync::Arc;

use pagewise_attention::cuda::ptx::model::fill_weights::FillWeightsArgs;
use pagewise_attention::{DType, HostTensor};

use super::CudaBackend;
use super::gpu::{DeviceMemory, Purpose};
use super::staging::Staging;
use super::tensor::CudaWeight;
use crate::backend::BackendError;
use crate::model_dir::{MadeUp, WeightTensor};

/// Bytes of a pinned piece, of which there are two: large enough for the link's full speed.
const PIECE_BYTES: usize = 16 << 20;

/// What a weight begins at a multiple of, in bytes, if it does not follow another one at once.
const ALIGNMENT: usize = 256;

/// What kernels read at once: weights that follow each other begin at multiples of it, or not at once.
const VECTOR: usize = 16;

/// The pinned pieces, made with the first weight and given back when the last one has arrived.
#[derive(Debug, Default)]
pub(super) struct Uploads {
    staging: Option<Staging>,
}

/// Places in one piece of memory.
#[derive(Debug, Default, PartialEq, Eq)]
struct Places {
    /// Offsets of the compute-type elements.
    narrow: Vec<usize>,
    /// Offsets of the f32 elements of vectors.
    wide: Vec<Option<usize>>,
    bytes: usize,
}

impl Places {
    /// Of weights of these shapes: first all in the compute type, then vectors in f32, each row of places without gaps
    /// where that leaves every weight aligned.
    fn new(shapes: &[&[usize]], dtype: DType) -> Self {
        let mut places = Self::default();
        for shape in shapes {
            places.bytes = places.bytes.next_multiple_of(VECTOR);
            places.narrow.push(places.bytes);
            places.bytes += shape.iter().product::<usize>() * dtype.size();
        }
        if dtype == DType::F32 {
            places.wide =
                places.narrow.iter().zip(shapes).map(|(&at, s)| (s.len() == 1).then_some(at)).collect();
            return places;
        }
        places.bytes = places.bytes.next_multiple_of(ALIGNMENT);
        for shape in shapes {
            let [len] = **shape else {
                places.wide.push(None);
                continue;
            };
            places.bytes = places.bytes.next_multiple_of(VECTOR);
            places.wide.push(Some(places.bytes));
            places.bytes += len * size_of::<f32>();
        }
        places
    }
}

impl CudaBackend {
    /// Brings weights to the device, one behind the other.
    pub(super) fn upload_all(&self, weights: Vec<WeightTensor>) -> Result<Vec<CudaWeight>, BackendError> {
        let dtype = self.dtype();
        let shapes: Vec<&[usize]> = weights.iter().map(WeightTensor::shape).collect();
        let places = Places::new(&shapes, dtype);
        let memory = Arc::new(DeviceMemory::new(self.gpu(), places.bytes, Purpose::WEIGHTS)?);
        let mut uploaded = Vec::with_capacity(weights.len());
        for ((weight, narrow), wide) in weights.into_iter().zip(places.narrow).zip(places.wide) {
            let address = memory.address() + narrow as u64;
            let in_f32 = wide.map(|offset| memory.address() + offset as u64);
            let shape: Box<[usize]> = weight.shape().into();
            if let Some(at) = in_f32.filter(|_| dtype != DType::F32) {
                self.put(at, weight.clone(), DType::F32)?;
            }
            self.put(address, weight, dtype)?;
            uploaded.push(CudaWeight { _memory: Arc::clone(&memory), address, in_f32, dtype, shape });
        }
        Ok(uploaded)
    }

    /// Puts the elements of a weight at an address, in this type.
    fn put(&self, address: u64, weight: WeightTensor, dtype: DType) -> Result<(), BackendError> {
        if let Some(MadeUp { seed, first, center, spread }) = weight.made_up() {
            let count = weight.shape().iter().product::<usize>() as u64;
            if count == 0 {
                return Ok(());
            }
            let args = FillWeightsArgs { out: address, count, first, seed, center, spread };
            // SAFETY: the memory has room for so many elements of this type.
            return unsafe { self.kernels().fill_weights(dtype, &args) };
        }
        let weight = weight.to_dtype(dtype);
        let bytes: &[u8] = match weight.host() {
            HostTensor::F32(x) => bytemuck::cast_slice(x),
            HostTensor::F16(x) => bytemuck::cast_slice(x),
            HostTensor::Bf16(x) => bytemuck::cast_slice(x),
            HostTensor::F8E4M3(x) | HostTensor::F8E5M2(x) => x,
        };
        let mut uploads = self.uploads();
        let gpu = self.gpu();
        let staging = match &mut uploads.staging {
            Some(staging) => staging,
            none => none.insert(Staging::new(gpu, 2, PIECE_BYTES, Purpose::WEIGHTS)?),
        };
        // SAFETY: the memory has room for so many elements of this type.
        unsafe { staging.send_all(address, bytes, &gpu.copies) }
    }

    /// Waits until all weights are there, and gives the pinned memory back.
    pub(super) fn finish_uploads(&self) -> Result<(), BackendError> {
        super::gpu::checked("cuStreamSynchronize", self.gpu().copies.synchronize())?;
        self.uploads().staging = None;
        self.gpu().synchronize()
    }

    /// The same if there are weights that came after the cache was made: a step must find them all.
    pub(super) fn finish_new_uploads(&self) -> Result<(), BackendError> {
        let under_way = self.uploads().staging.is_some();
        if under_way { self.finish_uploads() } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_multiplied_together_lies_together() {
        let shapes: [&[usize]; 3] = [&[64, 32], &[16, 32], &[16, 32]];
        let places = Places::new(&shapes, DType::Bf16);
        assert_eq!(places.narrow, [0, 64 * 64, 80 * 64]);
        assert_eq!(places.wide, [None, None, None]);
        // Biases: the same in both types.
        let shapes: [&[usize]; 3] = [&[64], &[16], &[16]];
        let places = Places::new(&shapes, DType::F16);
        assert_eq!(places.narrow, [0, 128, 160]);
        assert_eq!(places.wide, [Some(256), Some(512), Some(576)]);
        assert_eq!(places.bytes, 640);
        let places = Places::new(&shapes, DType::F32);
        assert_eq!(places.wide, [Some(0), Some(256), Some(320)]);
        assert_eq!(places.bytes, 384);
    }

    #[test]
    fn odd_sizes_stay_aligned_and_do_not_overlap() {
        let shapes: [&[usize]; 3] = [&[3, 5], &[7], &[1, 1]];
        let places = Places::new(&shapes, DType::Bf16);
        assert_eq!(places.narrow, [0, 32, 48]);
        assert_eq!(places.wide, [None, Some(256), None]);
    }
}
