//! The memory of a step's activations: taken piece by piece while a step is put together, and taken back as a whole when
//! the next one begins.
//!
//! Owns the memory and its growth; how it is given out is `arena.rs`'s.

use pagewise_attention::DType;

use super::arena::Arena;
use super::gpu::{DeviceMemory, Purpose};
use super::tensor::{CudaTensor, shape_error};
use super::{CudaBackend, lock, step};
use crate::backend::BackendError;

/// What a step's activations lie in.
#[derive(Debug, Default)]
pub(super) struct Activations {
    arena: Arena,
    memory: Option<DeviceMemory>,
    /// What did not fit, until the next step begins.
    beyond: Vec<DeviceMemory>,
    /// Whether the memory stays as it is: the largest step has been seen.
    sealed: bool,
}

impl CudaBackend {
    /// Takes the last step's activations back.
    pub(super) fn begin_step(&self) -> Result<(), BackendError> {
        let mut activations = lock(&self.shared.activations);
        if !activations.beyond.is_empty() {
            self.gpu().synchronize()?;
            activations.beyond.clear();
        }
        if activations.arena.is_too_small() && !activations.sealed {
            self.gpu().synchronize()?;
            activations.memory = None;
            let bytes = usize::try_from(activations.arena.peak()).unwrap_or(usize::MAX);
            let memory = DeviceMemory::zeros(self.gpu(), bytes, Purpose::STEP)?;
            activations.arena.replace(memory.address(), memory.bytes() as u64);
            activations.memory = Some(memory);
            drop(activations);
            return self.forget_graphs();
        }
        activations.arena.reset();
        Ok(())
    }

    /// `forward`, each time with the memory that it had the first time: it may be called again when its capture failed.
    pub(super) fn repeatable<T>(&self, mut forward: impl FnMut() -> T) -> impl FnMut() -> T {
        let used = lock(&self.shared.activations).arena.used();
        move || {
            lock(&self.shared.activations).arena.rewind(used);
            forward()
        }
    }

    /// Keeps the memory of activations as it is from now on: what a later step needs beyond it (the logits of a whole
    /// prompt) is allocated for that step alone.
    pub(super) fn seal(&self) -> Result<(), BackendError> {
        self.begin_step()?;
        lock(&self.shared.activations).sealed = true;
        Ok(())
    }

    pub(super) fn new_tensor(
        &self,
        rows: usize,
        width: usize,
        dtype: DType,
    ) -> Result<CudaTensor, BackendError> {
        let address = self.take(rows, width, dtype)?;
        Ok(CudaTensor { address, rows, width, stride: width, dtype })
    }

    /// Memory for so many elements until the next step begins.
    fn take(&self, rows: usize, width: usize, dtype: DType) -> Result<u64, BackendError> {
        let bytes = rows.checked_mul(width).and_then(|elements| elements.checked_mul(dtype.size()));
        let bytes = bytes.unwrap_or(usize::MAX);
        let mut activations = lock(&self.shared.activations);
        if let Some(address) = activations.arena.take(bytes as u64) {
            return Ok(address);
        }
        let memory = DeviceMemory::new(self.gpu(), bytes, Purpose::STEP)?;
        let address = memory.address();
        activations.beyond.push(memory);
        Ok(address)
    }

    /// Tensors of these widths side by side in memory, where all of them stay aligned.
    pub(super) fn new_tensors_beside<const N: usize>(
        &self,
        rows: usize,
        widths: [usize; N],
    ) -> Result<[CudaTensor; N], BackendError> {
        let dtype = self.dtype();
        let all: usize = widths.iter().sum();
        let apart = !step::side_by_side(widths, dtype.size());
        let mut address = if apart { 0 } else { self.take(rows, all, dtype)? };
        let mut tensors = Vec::with_capacity(N);
        for width in widths {
            if apart {
                tensors.push(self.new_tensor(rows, width, dtype)?);
            } else {
                tensors.push(CudaTensor { address, rows, width, stride: all, dtype });
                address += (width * dtype.size()) as u64;
            }
        }
        let made = tensors.len();
        <[CudaTensor; N]>::try_from(tensors).map_err(|_| shape_error("tensors", &[made], &[N]))
    }
}
