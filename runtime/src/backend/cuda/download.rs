//! Logits on their way to the host, through pinned memory.

use std::sync::Arc;

use pagewise_attention::DType;

use super::choose::Chosen;
use super::gpu::{Gpu, PinnedMemory, Purpose};
use super::tensor::{CudaTensor, shape_error};
use crate::backend::BackendError;

/// The most bytes of pinned memory: more is brought piece by piece.
const PIECE_BYTES: usize = 64 << 20;

/// What a step gives, on its way to the host.
#[derive(Debug, Default)]
pub struct CudaOutput {
    /// All rows, where one is wanted as it is.
    pub(super) logits: Option<CudaTensor>,
    /// What the device makes of the rows, where it does.
    pub(super) chosen: Option<Chosen>,
    /// Rows of which nothing at all is wanted.
    pub(super) nothing: usize,
}

/// Pinned memory that logits arrive in.
#[derive(Debug, Default)]
pub(super) struct Download {
    memory: Option<PinnedMemory>,
}

impl Download {
    /// The rows of a stream, once they are computed.
    pub(super) fn rows(&mut self, gpu: &Arc<Gpu>, x: &CudaTensor) -> Result<Vec<f32>, BackendError> {
        if x.dtype != DType::F32 || x.stride != x.width {
            return Err(shape_error("rows to be downloaded", &[x.rows, x.stride], &[x.rows, x.width]));
        }
        gpu.bind()?;
        let bytes = x.rows * x.width * size_of::<f32>();
        let needed = bytes.min(PIECE_BYTES);
        let memory = match &mut self.memory {
            Some(memory) if memory.bytes() >= needed => memory,
            none => none.insert(PinnedMemory::new(gpu, needed.next_power_of_two(), Purpose::STEP)?),
        };
        let mut rows = Vec::with_capacity(x.rows * x.width);
        let mut at = x.address;
        let end = x.address + bytes as u64;
        while at < end {
            let len = (end - at).min(PIECE_BYTES as u64).min(memory.bytes() as u64) as usize;
            let Some(piece) = memory.slice_mut().get_mut(..len) else { break };
            // SAFETY: the tensor is as large as its shape, and the stream is waited for before the piece is read.
            unsafe { gpu.copy_out(at, piece) }?;
            gpu.synchronize()?;
            rows.extend(piece.as_chunks().0.iter().map(|bytes| f32::from_ne_bytes(*bytes)));
            at += len as u64;
        }
        Ok(rows)
    }
}
