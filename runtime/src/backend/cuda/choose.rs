//! What the device makes of a step's logits: tokens, which stay there for the next step, log-probabilities and the
//! likeliest tokens; only these go to the host.
//!
//! Owns the memory that they are computed and arrive in, and the order of the launches; what rows ask for is
//! `asked.rs`'s, the kernels are `kernels.rs`'s. All of it is on the computing stream, behind the step's graph.

use std::sync::Arc;

use pagewise_attention::cuda::cudarc::driver::{CudaEvent, result};
use pagewise_attention::cuda::ptx::model::argmax::ArgmaxArgs;
use pagewise_attention::cuda::ptx::model::log_softmax::LogSoftmaxArgs;
use pagewise_attention::cuda::ptx::model::penalize::{Direction, PenalizeArgs};
use pagewise_attention::cuda::ptx::model::sample::SampleArgs;
use pagewise_attention::cuda::ptx::model::top_candidates::TopCandidatesArgs;
use pagewise_attention::cuda::ptx::model::vocab::blocks;

use super::asked::Asked;
use super::gpu::{DeviceMemory, Gpu, PinnedMemory, Purpose, checked};
use super::kernels::{Kernels, small};
use super::staging::Staging;
use super::tensor::CudaTensor;
use crate::backend::{BackendError, EarlierToken};
use crate::executor::RowOutput;

/// Steps whose answers may be under way: two, and room to spare.
const PLACES: usize = 4;

/// Bytes of a row that are zero before and after each launch: its key, and its tickets of both reductions.
const ZERO_BYTES: usize = 8 + 4 + 4;

/// What is chosen and found, on both sides.
#[derive(Debug, Default)]
pub(super) struct Chooser {
    /// Keys and tickets of so many rows.
    zeros: Option<DeviceMemory>,
    rows: usize,
    /// The answers, and behind them what is only needed on the way. The tokens lie at the front.
    scratch: Option<DeviceMemory>,
    lists: Option<Staging>,
    places: Vec<Place>,
    next: usize,
}

#[derive(Debug)]
struct Place {
    memory: PinnedMemory,
    arrived: CudaEvent,
}

/// Answers on their way to the host.
#[derive(Debug)]
pub(super) struct Chosen {
    place: usize,
    asked: Asked,
}

/// Where everything lies in the scratch memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layout {
    draws: u64,
    changes: u64,
    lists: u64,
    factors: u64,
    known: u64,
    /// Up to here it comes from the host.
    sent: u64,
    saved: u64,
    partial: u64,
    end: u64,
}

impl Layout {
    fn new(asked: &Asked, answers: usize, rows: usize, vocab: u32) -> Self {
        let mut end = answers as u64;
        let mut part = |bytes: usize| {
            let start = end.next_multiple_of(16);
            end = start + bytes as u64;
            start
        };
        let draws = part(32 * asked.draws.len());
        let changes = part(16 * asked.changes.len());
        let lists = part(8 * asked.lists.len());
        let factors = part(12 * asked.factors.len());
        let known = part(4 * asked.known.len());
        let sent = part(0);
        let saved = part(if asked.keeps_logits { 4 * asked.changes.len() } else { 0 });
        let partial = part(if asked.logprobs { 8 * rows * blocks(vocab) as usize } else { 0 });
        Self { draws, changes, lists, factors, known, sent, saved, partial, end }
    }

    /// What comes from the host, from the draws on.
    fn sent(&self, asked: &Asked) -> Vec<u8> {
        let mut bytes = vec![0; (self.sent - self.draws) as usize];
        let mut put = |at: u64, part: &[u8]| {
            let at = (at - self.draws) as usize;
            if let Some(place) = bytes.get_mut(at..at + part.len()) {
                place.copy_from_slice(part);
            }
        };
        let draws: Vec<u8> = asked.draws.iter().flat_map(|draw| draw.bytes()).collect();
        let known: Vec<u32> = asked.known.iter().map(|&(_, token)| token).collect();
        put(self.draws, &draws);
        put(self.changes, bytemuck::cast_slice(&asked.changes));
        put(self.lists, bytemuck::cast_slice(&asked.lists));
        put(self.factors, bytemuck::cast_slice(&asked.factors));
        put(self.known, bytemuck::cast_slice(&known));
        bytes
    }
}

impl Chooser {
    /// Makes room for so many rows and so many bytes.
    fn make_room(&mut self, gpu: &Arc<Gpu>, rows: usize, bytes: usize) -> Result<[u64; 2], BackendError> {
        // What is still under way has been computed then, and lies in places that stay until read.
        let zeros = match &mut self.zeros {
            Some(zeros) if self.rows >= rows => zeros,
            zeros => {
                let rows = rows.next_power_of_two().max(256);
                gpu.synchronize()?;
                self.rows = rows;
                zeros.insert(DeviceMemory::zeros(gpu, rows * ZERO_BYTES, Purpose::STEP)?)
            }
        };
        let scratch = match &mut self.scratch {
            Some(scratch) if scratch.bytes() >= bytes => scratch,
            scratch => {
                gpu.synchronize()?;
                let bytes = bytes.next_power_of_two().max(1 << 16);
                scratch.insert(DeviceMemory::zeros(gpu, bytes, Purpose::STEP)?)
            }
        };
        Ok([zeros.address(), scratch.address()])
    }

    /// Chooses and finds what is asked for.
    pub(super) fn answer(
        &mut self,
        gpu: &Arc<Gpu>,
        kernels: &Kernels,
        logits: &CudaTensor,
        asked: Asked,
    ) -> Result<Chosen, BackendError> {
        let (rows, vocab) = (logits.rows32()?, logits.width32()?);
        let answers = asked.layout();
        let layout = Layout::new(&asked, 4 * answers.words, logits.rows, vocab);
        let [zeros, base] = self.make_room(gpu, logits.rows, layout.end as usize)?;
        let bytes = layout.sent(&asked);
        if !bytes.is_empty() {
            let lists = match &mut self.lists {
                Some(lists) => lists,
                none => none.insert(Staging::new(gpu, PLACES, 1 << 14, Purpose::STEP)?),
            };
            // SAFETY: there is room for all of it; what the step before reads there, it has read when the copy begins.
            unsafe { lists.send(&[(base + layout.draws, &bytes)], &gpu.stream) }?;
        }
        let (keys, tickets) = (zeros, zeros + 8 * self.rows as u64);
        let tokens = base;
        let word = |at: usize| base + 4 * at as u64;
        if !asked.lists.is_empty() {
            let args = TopCandidatesArgs {
                logits: logits.view(),
                vocab,
                wanted: base + layout.lists,
                most: small("candidates", asked.most())?,
                tokens: word(answers.list_tokens),
                values: word(answers.list_values),
            };
            // SAFETY: the lists name rows of the logits, and there is room for so many answers; so it is below.
            unsafe { kernels.top_candidates(small("rows", asked.lists.len())?, &args) }?;
        }
        let mut penalize = PenalizeArgs {
            logits: logits.view(),
            rows,
            vocab,
            changes: base + layout.changes,
            count: small("bias and penalties", asked.changes.len())?,
            factors: base + layout.factors,
            saved: if asked.keeps_logits { base + layout.saved } else { 0 },
            direction: Direction::Forth,
        };
        if !asked.changes.is_empty() {
            // SAFETY: as above; each row has its factors.
            unsafe { kernels.penalize(&penalize) }?;
        }
        if asked.greedy {
            let args = ArgmaxArgs { logits: logits.view(), vocab, keys, tickets, tokens, best: 0 };
            // SAFETY: there is room for as many rows, keys and tickets are zero before and after each launch.
            unsafe { kernels.argmax(rows, &args) }?;
        }
        if !asked.draws.is_empty() {
            let args = SampleArgs { logits: logits.view(), vocab, draws: base + layout.draws, tokens };
            // SAFETY: as above.
            unsafe { kernels.sample(small("draws", asked.draws.len())?, &args) }?;
        }
        if asked.keeps_logits {
            penalize.direction = Direction::Back;
            // SAFETY: as above.
            unsafe { kernels.penalize(&penalize) }?;
        }
        if asked.logprobs {
            let known = asked.known.iter().enumerate();
            let known: Vec<EarlierToken> =
                known.map(|(place, &(row, _))| EarlierToken { row, logit_row: place }).collect();
            for Run { row, logit_row, len } in runs(&known) {
                let (from, to) = (base + layout.known + 4 * logit_row as u64, tokens + 4 * row as u64);
                // SAFETY: as above.
                let copied = unsafe { result::memcpy_dtod_async(to, from, 4 * len, gpu.stream.cu_stream()) };
                checked("cuMemcpyDtoDAsync", copied)?;
            }
            let args = LogSoftmaxArgs {
                logits: logits.view(),
                vocab,
                partial: base + layout.partial,
                tickets: tickets + 4 * self.rows as u64,
                ids: tokens,
                count: 1,
                out: word(answers.logprobs),
                stats: word(answers.stats),
            };
            // SAFETY: as above; a row without a token has any number or none, whose log-probability nobody reads.
            unsafe { kernels.log_softmax(rows, &args) }?;
        }
        let place = self.send_out(gpu, base, 4 * answers.words)?;
        Ok(Chosen { place, asked })
    }

    /// Starts the way of so many bytes to the host.
    fn send_out(&mut self, gpu: &Arc<Gpu>, from: u64, bytes: usize) -> Result<usize, BackendError> {
        if self.places.len() < PLACES {
            let memory = PinnedMemory::new(gpu, bytes.max(1 << 14), Purpose::STEP)?;
            let arrived = checked("cuEventCreate", gpu.stream.context().new_event(None))?;
            self.next = self.places.len();
            self.places.push(Place { memory, arrived });
        } else {
            self.next = (self.next + 1) % PLACES;
        }
        let Some(place) = self.places.get_mut(self.next) else { return Ok(self.next) };
        if place.memory.bytes() < bytes {
            place.memory = PinnedMemory::new(gpu, bytes.next_power_of_two(), Purpose::STEP)?;
        }
        if let Some(target) = place.memory.slice_mut().get_mut(..bytes) {
            // SAFETY: there are as many bytes; the place is read after the event only.
            unsafe { gpu.copy_out(from, target) }?;
        }
        checked("cuEventRecord", place.arrived.record(&gpu.stream))?;
        Ok(self.next)
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
        let Some(scratch) = self.scratch.as_ref().filter(|_| !earlier.is_empty()) else { return Ok(()) };
        let chosen = scratch.address();
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

    /// Waits for answers.
    pub(super) fn arrived(&self, chosen: &Chosen) -> Result<Vec<RowOutput>, BackendError> {
        let Some(place) = self.places.get(chosen.place) else { return Ok(Vec::new()) };
        checked("cuEventSynchronize", place.arrived.synchronize())?;
        Ok(chosen.asked.read(place.memory.slice()))
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
