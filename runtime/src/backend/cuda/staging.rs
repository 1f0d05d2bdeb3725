//! From pageable to device memory through pinned memory: the host fills one piece while the device takes the other.
//!
//! Owns the pieces and when each may be filled again; what is copied, and where to, is its callers'.

use std::sync::Arc;

use pagewise_attention::cuda::cudarc::driver::{CudaEvent, CudaStream};

use super::gpu::{Gpu, PinnedMemory, Purpose, checked};
use crate::backend::BackendError;

/// Pinned pieces that are used in turns.
#[derive(Debug)]
pub(super) struct Staging {
    gpu: Arc<Gpu>,
    purpose: Purpose,
    pieces: Vec<Piece>,
    next: usize,
}

#[derive(Debug)]
struct Piece {
    memory: PinnedMemory,
    /// When its last copy has completed.
    done: Option<CudaEvent>,
}

impl Staging {
    /// So many pieces of so many bytes each.
    pub(super) fn new(
        gpu: &Arc<Gpu>,
        count: usize,
        bytes: usize,
        purpose: Purpose,
    ) -> Result<Self, BackendError> {
        let piece = |_| Ok(Piece { memory: PinnedMemory::new(gpu, bytes, purpose)?, done: None });
        let pieces = (0..count).map(piece).collect::<Result<_, BackendError>>()?;
        Ok(Self { gpu: Arc::clone(gpu), purpose, pieces, next: 0 })
    }

    /// Puts a copy of each part to its address on a stream. The parts are read before this returns.
    ///
    /// # Safety
    /// Each address is valid for its part's bytes.
    pub(super) unsafe fn send(
        &mut self,
        parts: &[(u64, &[u8])],
        stream: &CudaStream,
    ) -> Result<(), BackendError> {
        let total: usize = parts.iter().map(|(_, bytes)| bytes.len()).sum();
        let (gpu, purpose, next) = (&self.gpu, self.purpose, self.next);
        self.next = (next + 1) % self.pieces.len().max(1);
        let Some(piece) = self.pieces.get_mut(next) else { return Ok(()) };
        if let Some(done) = &piece.done {
            checked("cuEventSynchronize", done.synchronize())?;
        }
        if piece.memory.bytes() < total {
            piece.memory = PinnedMemory::new(gpu, total.next_power_of_two(), purpose)?;
        }
        let mut room = piece.memory.slice_mut();
        for (target, bytes) in parts {
            let Some((front, rest)) = std::mem::take(&mut room).split_at_mut_checked(bytes.len()) else {
                break;
            };
            front.copy_from_slice(bytes);
            // SAFETY: the target is the caller's promise; the piece is filled again only after the event below.
            unsafe { gpu.copy_in(*target, front, stream) }?;
            room = rest;
        }
        if piece.done.is_none() {
            piece.done = Some(checked("cuEventCreate", stream.context().new_event(None))?);
        }
        if let Some(done) = &piece.done {
            checked("cuEventRecord", done.record(stream))?;
        }
        Ok(())
    }

    /// Copies much to one address, piece after piece.
    ///
    /// # Safety
    /// The address is valid for so many bytes.
    pub(super) unsafe fn send_all(
        &mut self,
        target: u64,
        bytes: &[u8],
        stream: &CudaStream,
    ) -> Result<(), BackendError> {
        let piece = self.pieces.first().map_or(1, |piece| piece.memory.bytes().max(1));
        let mut at = target;
        for part in bytes.chunks(piece) {
            // SAFETY: the caller's.
            unsafe { self.send(&[(at, part)], stream) }?;
            at += part.len() as u64;
        }
        Ok(())
    }
}
