//! Bytes on their way from the device to the host.

use super::device::Gpu;
use crate::backend::BackendError;
use bytemuck::{AnyBitPattern, NoUninit};
use pagewise_attention::wgpu::wgpu::{Buffer, BufferAsyncError, CommandEncoder, MapMode, SubmissionIndex};
use std::sync::mpsc::{Receiver, channel};

/// A part of a buffer that is wanted on the host.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece<'a> {
    pub(super) buffer: &'a Buffer,
    pub(super) start: u64,
    pub(super) bytes: u64,
}

/// Bytes on their way to the host.
#[derive(Debug)]
pub(super) struct Reading {
    submission: SubmissionIndex,
    mapped: Option<(Buffer, Receiver<Result<(), BufferAsyncError>>)>,
    bytes: u64,
}

impl Reading {
    /// Submits an encoder whose last commands copy so many bytes to `readback`, if any.
    pub(super) fn start(
        gpu: &Gpu,
        encoder: CommandEncoder,
        readback: Option<Buffer>,
        bytes: u64,
    ) -> Result<Self, BackendError> {
        let submission = gpu.context.queue().submit([encoder.finish()]);
        gpu.check()?;
        let mapped = readback.map(|readback| {
            let (sender, receiver) = channel();
            readback.slice(..bytes).map_async(MapMode::Read, move |mapped| {
                // Nobody listens where waiting failed.
                let _ = sender.send(mapped);
            });
            (readback, receiver)
        });
        Ok(Self { submission, mapped, bytes })
    }

    /// Waits, and gives the buffer back with what was in it.
    pub(super) fn finish<T: AnyBitPattern + NoUninit>(
        self,
        gpu: &Gpu,
    ) -> Result<(Vec<T>, Option<Buffer>), BackendError> {
        let Self { submission, mapped, bytes } = self;
        gpu.wait(Some(submission))?;
        let Some((readback, mapped)) = mapped else { return Ok((Vec::new(), None)) };
        let failed = |reason: String| BackendError::Device { reason };
        match mapped.try_recv() {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(failed(error.to_string())),
            Err(_) => return Err(failed("a buffer was not mapped in time".to_owned())),
        }
        let words = match readback.slice(..bytes).get_mapped_range() {
            Ok(view) => bytemuck::pod_collect_to_vec(&view),
            Err(error) => return Err(failed(error.to_string())),
        };
        readback.unmap();
        gpu.check()?;
        Ok((words, Some(readback)))
    }
}
