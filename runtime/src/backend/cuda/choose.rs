//! Tokens that the device chooses: they stay there for the next step, and only their numbers go to the host.
//!
//! Owns the chosen tokens and the pinned memory that they arrive in; which row is chosen from how is told by the
//! engine, the kernels are `kernels.rs`'s.

use std::sync::Arc;

use pagewise_attention::cuda::cudarc::driver::{CudaEvent, result};
use pagewise_attention::cuda::ptx::model::argmax::{ArgmaxArgs, NO_TOKEN};

use super::gpu::{DeviceMemory, Gpu, PinnedMemory, Purpose, checked};
use super::kernels::Kernels;
use super::tensor::CudaTensor;
use crate::backend::{BackendError, EarlierToken};

/// Steps whose tokens may be under way: two, and room to spare.
const PLACES: usize = 4;

/// Bytes of a row in the device's memory: its token, its key, its ticket.
const ROW_BYTES: usize = 4 + 8 + 4;

/// What is chosen, on both sides.
#[derive(Debug, Default)]
pub(super) struct Chooser {
    device: Option<DeviceMemory>,
    rows: usize,
    places: Vec<Place>,
    next: usize,
}

#[derive(Debug)]
struct Place {
    memory: PinnedMemory,
    arrived: CudaEvent,
}

/// Tokens on their way to the host.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chosen {
    place: usize,
    rows: usize,
}

impl Chooser {
    /// Makes room for so many rows.
    fn make_room(&mut self, gpu: &Arc<Gpu>, rows: usize) -> Result<(), BackendError> {
        if self.rows >= rows && self.device.is_some() {
            return Ok(());
        }
        let rows = rows.next_power_of_two().max(256);
        // Tokens that are still under way have been computed then, and their copies lie in places that stay until read.
        gpu.synchronize()?;
        self.device = Some(DeviceMemory::zeros(gpu, rows * ROW_BYTES, Purpose::STEP)?);
        self.rows = rows;
        Ok(())
    }

    /// Chooses the likeliest token of each row.
    pub(super) fn likeliest(
        &mut self,
        gpu: &Arc<Gpu>,
        kernels: &Kernels,
        logits: &CudaTensor,
    ) -> Result<Chosen, BackendError> {
        self.make_room(gpu, logits.rows)?;
        let Some(device) = &self.device else { return Ok(Chosen { place: 0, rows: 0 }) };
        let (keys, rows) = (device.address(), self.rows as u64);
        let (tickets, tokens) = (keys + 8 * rows, keys + 12 * rows);
        let args =
            ArgmaxArgs { logits: logits.view(), vocab: logits.width32()?, keys, tickets, tokens, best: 0 };
        // SAFETY: there is room for as many rows, keys and tickets are zero before and after each launch.
        unsafe { kernels.argmax(logits.rows32()?, &args) }?;
        if self.places.len() < PLACES {
            let memory = PinnedMemory::new(gpu, 4 * self.rows, Purpose::STEP)?;
            let arrived = checked("cuEventCreate", gpu.stream.context().new_event(None))?;
            self.next = self.places.len();
            self.places.push(Place { memory, arrived });
        } else {
            self.next = (self.next + 1) % PLACES;
        }
        let chosen = Chosen { place: self.next, rows: logits.rows };
        let Some(place) = self.places.get_mut(self.next) else { return Ok(chosen) };
        if place.memory.bytes() < 4 * logits.rows {
            place.memory = PinnedMemory::new(gpu, 4 * self.rows, Purpose::STEP)?;
        }
        if let Some(target) = place.memory.slice_mut().get_mut(..4 * logits.rows) {
            // SAFETY: there are as many tokens; the place is read after the event only.
            unsafe { gpu.copy_out(tokens, target) }?;
        }
        checked("cuEventRecord", place.arrived.record(&gpu.stream))?;
        Ok(chosen)
    }

    /// Puts tokens that the last step chose where this one reads its own, i32 `[rows]` from `tokens` on.
    ///
    /// # Safety
    /// `tokens` is valid for all rows that are named.
    pub(super) unsafe fn place(
        &self,
        gpu: &Gpu,
        earlier: &[EarlierToken],
        tokens: u64,
    ) -> Result<(), BackendError> {
        let Some(device) = self.device.as_ref().filter(|_| !earlier.is_empty()) else { return Ok(()) };
        let chosen = device.address() + 12 * self.rows as u64;
        for Run { row, logit_row, len } in runs(earlier) {
            if logit_row + len > self.rows {
                let what = "the chosen tokens of the last step";
                return Err(BackendError::Shape {
                    what,
                    found: vec![self.rows],
                    needed: vec![logit_row + len],
                });
            }
            let (from, to) = (chosen + 4 * logit_row as u64, tokens + 4 * row as u64);
            // SAFETY: the source was checked, the target is the caller's.
            let copied = unsafe { result::memcpy_dtod_async(to, from, 4 * len, gpu.stream.cu_stream()) };
            checked("cuMemcpyDtoDAsync", copied)?;
        }
        Ok(())
    }

    /// Waits for tokens.
    pub(super) fn arrived(&self, chosen: Chosen) -> Result<Vec<Option<u32>>, BackendError> {
        let Some(place) = self.places.get(chosen.place) else { return Ok(Vec::new()) };
        checked("cuEventSynchronize", place.arrived.synchronize())?;
        let tokens = place.memory.slice().as_chunks().0.iter().take(chosen.rows);
        let token = |bytes: &[u8; 4]| Some(u32::from_ne_bytes(*bytes)).filter(|&token| token != NO_TOKEN);
        Ok(tokens.map(token).collect())
    }
}

/// Rows and logit rows that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    row: usize,
    logit_row: usize,
    len: usize,
}

/// As few runs as there are: a batch that goes on as it was is one.
fn runs(earlier: &[EarlierToken]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for &EarlierToken { row, logit_row } in earlier {
        match runs.last_mut() {
            Some(run) if run.row + run.len == row && run.logit_row + run.len == logit_row => run.len += 1,
            _ => runs.push(Run { row, logit_row, len: 1 }),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_that_follow_each_other_are_copied_together() {
        let earlier = |pairs: &[(usize, usize)]| -> Vec<EarlierToken> {
            pairs.iter().map(|&(row, logit_row)| EarlierToken { row, logit_row }).collect()
        };
        assert_eq!(runs(&earlier(&[])), []);
        let all = earlier(&[(0, 0), (1, 1), (2, 2)]);
        assert_eq!(runs(&all), [Run { row: 0, logit_row: 0, len: 3 }]);
        // The second sequence has ended, and a prompt comes in between.
        let some = earlier(&[(0, 0), (1, 2), (2, 3), (9, 4)]);
        let expected =
            [(0, 0, 1), (1, 2, 2), (9, 4, 1)].map(|(row, logit_row, len)| Run { row, logit_row, len });
        assert_eq!(runs(&some), expected);
    }
}
