//! Activations and weights: views of device memory.

use std::sync::Arc;

use pagewise_attention::DType;
use pagewise_attention::cuda::ptx::model::Rows;

use super::blaslt::Matrix;
use super::gpu::DeviceMemory;
use super::kernels::small;
use crate::backend::BackendError;

/// Rows of activations, `[rows, width]`. The memory is the step's: what it holds is undefined once the next step is
/// prepared.
#[derive(Debug)]
pub struct CudaTensor {
    pub(super) address: u64,
    pub(super) rows: usize,
    pub(super) width: usize,
    /// Elements from a row to the next.
    pub(super) stride: usize,
    pub(super) dtype: DType,
}

impl CudaTensor {
    /// For kernels.
    pub(super) fn view(&self) -> Rows {
        Rows { address: self.address, stride: self.stride as u64 }
    }

    /// For products.
    pub(super) fn matrix(&self) -> Matrix {
        Matrix { address: self.address, stride: self.stride, dtype: self.dtype }
    }

    /// The number of rows as kernels count it.
    pub(super) fn rows32(&self) -> Result<u32, BackendError> {
        small("the rows of a step", self.rows)
    }

    /// The width as kernels count it.
    pub(super) fn width32(&self) -> Result<u32, BackendError> {
        small("the width of a tensor", self.width)
    }
}

/// A weight in device memory; a clone is another handle to it.
#[derive(Clone, Debug)]
pub struct CudaWeight {
    /// Keeps the memory.
    pub(super) _memory: Arc<DeviceMemory>,
    /// The elements in the compute type.
    pub(super) address: u64,
    /// The elements of a vector in f32.
    pub(super) in_f32: Option<u64>,
    pub(super) dtype: DType,
    pub(super) shape: Box<[usize]>,
}

impl CudaWeight {
    /// Rows and columns; a vector is one row.
    pub(super) fn matrix(&self) -> (usize, usize) {
        match *self.shape {
            [columns] => (1, columns),
            [rows, columns] => (rows, columns),
            _ => (0, 0),
        }
    }

    /// The address of a vector of so many elements in f32.
    pub(super) fn vector(&self, what: &'static str, len: usize) -> Result<u64, BackendError> {
        match (self.in_f32, &*self.shape) {
            (Some(address), [found]) if *found == len => Ok(address),
            _ => Err(shape_error(what, &self.shape, &[len])),
        }
    }
}

/// What is said when shapes do not fit.
pub(super) fn shape_error(what: &'static str, found: &[usize], needed: &[usize]) -> BackendError {
    BackendError::Shape { what, found: found.to_vec(), needed: needed.to_vec() }
}

impl CudaTensor {
    /// Another view of the same rows.
    pub(super) fn again(&self) -> Self {
        Self { ..*self }
    }

    /// The first rows alone.
    pub(super) fn first_rows(self, rows: usize) -> Self {
        Self { rows: rows.min(self.rows), ..self }
    }
}
