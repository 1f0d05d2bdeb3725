//! Buffers that become larger when a step needs them to.

use super::device::{ACTIVATIONS, Gpu};
use super::tensor::size_class;
use crate::backend::BackendError;
use pagewise_attention::wgpu::wgpu::Buffer;

/// A buffer that becomes larger when a step needs it to. What was in it is then lost to later steps; those under way
/// keep the old one.
#[derive(Debug, Default)]
pub(super) struct Growing(Option<Buffer>);

impl Growing {
    pub(super) fn with_room(&mut self, gpu: &Gpu, bytes: u64) -> Result<&Buffer, BackendError> {
        match &mut self.0 {
            Some(buffer) if buffer.size() >= bytes => {}
            kept => *kept = Some(gpu.storage(ACTIVATIONS, size_class(bytes).max(1024))?),
        }
        match &self.0 {
            Some(buffer) => Ok(buffer),
            None => Err(BackendError::Device { reason: "a buffer was not made".to_owned() }),
        }
    }

    /// Puts words at its begin, once what was submitted before has read the old ones.
    pub(super) fn write(&mut self, gpu: &Gpu, words: &[u32]) -> Result<&Buffer, BackendError> {
        let buffer = self.with_room(gpu, size_of_val(words) as u64)?;
        gpu.context.queue().write_buffer(buffer, 0, bytemuck::cast_slice(words));
        Ok(buffer)
    }

    pub(super) fn get(&self) -> Result<&Buffer, BackendError> {
        let missing = || BackendError::Device { reason: "an operation came before its step".to_owned() };
        self.0.as_ref().ok_or_else(missing)
    }
}
