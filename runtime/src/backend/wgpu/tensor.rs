//! Activations: parts of pooled buffers, which go back to their pool when the last part is dropped. The device works
//! in the order of its commands, so a buffer may be handed out again before what used it has run.

use super::device::{ACTIVATIONS, Gpu, lock};
use crate::backend::BackendError;
use pagewise_attention::wgpu::wgpu::Buffer;
use pagewise_shaders::model::Rows;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};

/// Rows begin at multiples of this many elements, so that kernels read whole vectors.
pub(super) const ALIGNMENT: usize = 8;

/// Rows of f32 on the device. Several may lie side by side in one buffer.
#[derive(Debug)]
pub struct WgpuTensor {
    memory: Arc<Pooled>,
    /// First element of a row, in elements from the row's begin.
    offset: usize,
    stride: usize,
    rows: usize,
    width: usize,
}

/// Free buffers by size; of a size the oldest goes first, so that steps of the same shape get the same buffers.
#[derive(Debug, Default)]
pub(super) struct Pool {
    free: Mutex<Free>,
}

#[derive(Debug, Default)]
struct Free {
    made: u64,
    by_size: HashMap<u64, BTreeMap<u64, Buffer>>,
}

#[derive(Debug)]
struct Pooled {
    buffer: Buffer,
    number: u64,
    pool: Arc<Pool>,
}

impl Drop for Pooled {
    fn drop(&mut self) {
        let (size, buffer) = (self.buffer.size(), self.buffer.clone());
        lock(&self.pool.free).by_size.entry(size).or_default().insert(self.number, buffer);
    }
}

/// Few sizes, none more than a quarter larger than asked for: multiples of an eighth of a power of two.
pub(super) fn size_class(bytes: u64) -> u64 {
    let bytes = bytes.max(1024);
    bytes.next_multiple_of((bytes.next_power_of_two() / 8).max(16))
}

impl Pool {
    fn take(self: &Arc<Self>, gpu: &Gpu, bytes: u64) -> Result<Pooled, BackendError> {
        let size = size_class(bytes).min(gpu.largest_binding().max(bytes)).next_multiple_of(16);
        let pool = Arc::clone(self);
        let mut free = lock(&self.free);
        if let Some((number, buffer)) = free.by_size.get_mut(&size).and_then(BTreeMap::pop_first) {
            return Ok(Pooled { buffer, number, pool });
        }
        free.made += 1;
        let number = free.made;
        drop(free);
        Ok(Pooled { buffer: gpu.storage(ACTIVATIONS, size)?, number, pool })
    }

    /// Tensors of the same rows, side by side.
    pub(super) fn beside<const N: usize>(
        self: &Arc<Self>,
        gpu: &Gpu,
        rows: usize,
        widths: [usize; N],
    ) -> Result<[WgpuTensor; N], BackendError> {
        let stride: usize = widths.iter().map(|width| width.next_multiple_of(ALIGNMENT)).sum();
        let bytes = (rows as u64).saturating_mul(stride as u64).saturating_mul(4);
        let memory = Arc::new(self.take(gpu, bytes)?);
        let mut next = 0;
        Ok(widths.map(|width| {
            let offset = next;
            next += width.next_multiple_of(ALIGNMENT);
            WgpuTensor { memory: Arc::clone(&memory), offset, stride, rows, width }
        }))
    }
}

impl WgpuTensor {
    pub(super) fn buffer(&self) -> &Buffer {
        &self.memory.buffer
    }

    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    pub(super) fn width(&self) -> usize {
        self.width
    }

    pub(super) fn offset(&self) -> usize {
        self.offset
    }

    pub(super) fn stride(&self) -> usize {
        self.stride
    }

    /// As kernels are told; a binding's elements have 32-bit indices.
    pub(super) fn place(&self) -> Rows {
        Rows { offset: self.offset as u32, stride: self.stride as u32 }
    }

    /// Rows that the whole buffer has room for.
    pub(super) fn capacity(&self) -> usize {
        (self.buffer().size() as usize / 4).checked_div(self.stride).unwrap_or(0)
    }

    /// Whether `next` lies right behind this one in the same rows.
    pub(super) fn is_followed_by(&self, next: &Self) -> bool {
        self.buffer() == next.buffer()
            && self.stride == next.stride
            && self.offset + self.width == next.offset
    }
}
