//! What becomes of a step's logits on the device: tokens are chosen, which stay there for the next step, log-probabilities
//! and candidates are found, and only what was asked for goes to the host. Which jobs that takes is `wanted`'s.

use super::device::Gpu;
use super::growing::Growing;
use super::kernels::Kernel;
use super::reading::{Piece, Reading};
use super::recorder::{Dispatch, Recorder};
use super::tensor::WgpuTensor;
use super::wanted::{Jobs, Listed};
use crate::backend::{BackendError, EarlierToken};
use crate::executor::{RowWanted, StepOutput};
use pagewise_attention::wgpu::wgpu::Buffer;
use pagewise_shaders::model::argmax::ArgmaxArgs;
use pagewise_shaders::model::candidates::CandidatesArgs;
use pagewise_shaders::model::log_softmax::LogSoftmaxArgs;
use pagewise_shaders::model::penalties::PenaltiesArgs;
use pagewise_shaders::model::sample::SampleArgs;

/// The buffers of what is made of logits, and for which rows of the last step tokens are there.
#[derive(Debug, Default)]
pub(super) struct Chooser {
    ids: Growing,
    jobs: Growing,
    saved: Growing,
    out: Growing,
    chosen: Vec<bool>,
}

/// What a step gives, on its way to the host: the chosen tokens of all rows if there are any, what else the kernels
/// wrote, then rows of logits.
#[derive(Debug)]
pub struct WgpuOutput {
    reading: Reading,
    jobs: Jobs,
    ids: usize,
    /// Of a row of logits, and from one to the next.
    width: [usize; 2],
}

impl Chooser {
    /// Opens a step whose tokens are partly those that the step before it chose: puts them among `tokens`.
    pub(super) fn place(
        &self,
        gpu: &Gpu,
        recorder: &mut Recorder,
        earlier: &[EarlierToken],
        tokens: &Buffer,
    ) -> Result<(), BackendError> {
        if earlier.is_empty() {
            return Ok(());
        }
        if let Some(missing) = earlier.iter().find(|token| self.chosen.get(token.logit_row) != Some(&true)) {
            let what = "the tokens that the last step chose";
            let (found, needed) = (vec![self.chosen.len()], vec![missing.logit_row + 1]);
            return Err(BackendError::Shape { what, found, needed });
        }
        let ids = self.ids.get()?;
        let follow = |this: &EarlierToken, next: &EarlierToken| {
            next.row == this.row + 1 && next.logit_row == this.logit_row + 1
        };
        recorder.open(gpu, |encoder| {
            for run in earlier.chunk_by(follow) {
                let Some(&EarlierToken { row, logit_row }) = run.first() else { continue };
                let bytes = 4 * run.len() as u64;
                encoder.copy_buffer_to_buffer(ids, 4 * logit_row as u64, tokens, 4 * row as u64, bytes);
            }
        });
        Ok(())
    }

    /// Ends a step: records what is wanted of its logits, submits it, and starts the answers' way to the host.
    pub(super) fn end(
        &mut self,
        gpu: &Gpu,
        recorder: &mut Recorder,
        logits: Option<&WgpuTensor>,
        wanted: &[RowWanted],
    ) -> Result<WgpuOutput, BackendError> {
        let jobs = Jobs::new(wanted, logits.map_or(0, WgpuTensor::rows));
        self.chosen.clear();
        if logits.is_none() {
            // Only blocks have moved: what is recorded is of a step that failed.
            recorder.restart();
        }
        let Some(logits) = logits.filter(|logits| logits.rows() > 0) else {
            return Ok(WgpuOutput { reading: recorder.submit(gpu, &[])?, jobs, ids: 0, width: [0, 0] });
        };
        let has_tokens = !jobs.tokens.is_empty();
        let ids = self.ids.with_room(gpu, 4 * logits.rows() as u64)?.clone();
        let out = self.out.with_room(gpu, 4 * u64::from(jobs.out_words))?.clone();
        if has_tokens && jobs.only_likeliest {
            likeliest(gpu, recorder, logits, &ids)?;
        }
        if jobs.out_words > 0 || (has_tokens && !jobs.only_likeliest) {
            let listed = jobs.list();
            let list = self.jobs.write(gpu, &listed.words)?;
            let saved = self.saved.with_room(gpu, 4 * jobs.changes.len() as u64)?;
            let buffers = Buffers { list, saved, ids: &ids, out: &out };
            Run { gpu, recorder, logits, buffers }.all(&jobs, &listed)?;
        }
        let mut pieces = Vec::new();
        let mut piece = |buffer, start, bytes| match pieces.last_mut() {
            Some(Piece { buffer: last, start: first, bytes: length })
                if *last == buffer && *first + *length == start =>
            {
                *length += bytes;
            }
            _ => pieces.push(Piece { buffer, start, bytes }),
        };
        if has_tokens {
            piece(&ids, 0, 4 * logits.rows() as u64);
        }
        if jobs.out_words > 0 {
            piece(&out, 0, 4 * u64::from(jobs.out_words));
        }
        let row_bytes = 4 * logits.stride() as u64;
        jobs.whole_rows().for_each(|row| piece(logits.buffer(), row as u64 * row_bytes, row_bytes));
        let reading = recorder.submit(gpu, &pieces)?;
        self.chosen.extend(jobs.chosen());
        let ids = if has_tokens { logits.rows() } else { 0 };
        Ok(WgpuOutput { reading, jobs, ids, width: [logits.width(), logits.stride()] })
    }
}

impl WgpuOutput {
    /// Waits for the answers.
    pub(super) fn read(self, gpu: &Gpu, recorder: &mut Recorder) -> Result<StepOutput, BackendError> {
        let Self { reading, jobs, ids, width: [vocab_size, stride] } = self;
        let words = recorder.receive(gpu, reading)?;
        let (ids, words) = words.split_at_checked(ids).unwrap_or_default();
        let (out, words) = words.split_at_checked(jobs.out_words as usize).unwrap_or_default();
        let row =
            |row: &[u32]| row.iter().take(vocab_size).map(|&bits| f32::from_bits(bits)).collect::<Vec<_>>();
        let logits = words.chunks_exact(stride.max(1)).flat_map(row).collect();
        Ok(StepOutput { rows: jobs.answers(ids, out), logits, vocab_size })
    }
}

/// Records the choice of the likeliest token of each row.
fn likeliest(
    gpu: &Gpu,
    recorder: &mut Recorder,
    logits: &WgpuTensor,
    ids: &Buffer,
) -> Result<(), BackendError> {
    let (rows, width) = (logits.rows() as u32, logits.width() as u32);
    let args = ArgmaxArgs { rows, width, x: logits.place(), out: 0 };
    let (uniform, workgroups) = (args.uniform(), args.workgroups(gpu.per_dimension()));
    let buffers = [logits.buffer(), ids];
    recorder.dispatch(gpu, Dispatch { kernel: Kernel::Argmax, buffers: &buffers, uniform, workgroups })
}

/// What the kernels read and write beside the logits.
#[derive(Clone, Copy)]
struct Buffers<'a> {
    list: &'a Buffer,
    saved: &'a Buffer,
    ids: &'a Buffer,
    out: &'a Buffer,
}

/// The kernels over the rows of a step.
struct Run<'a> {
    gpu: &'a Gpu,
    recorder: &'a mut Recorder,
    logits: &'a WgpuTensor,
    buffers: Buffers<'a>,
}

impl Run<'_> {
    /// What needs logits as they are comes before they are changed.
    fn all(&mut self, jobs: &Jobs, listed: &Listed) -> Result<(), BackendError> {
        let (width, x) = (self.logits.width() as u32, self.logits.place());
        let logits = self.logits.buffer();
        let Buffers { list, saved, ids, out } = self.buffers;
        let per_dimension = self.gpu.per_dimension();
        if !jobs.sums.is_empty() {
            let args = LogSoftmaxArgs { count: jobs.sums.len() as u32, width, x, jobs: listed.sums };
            let (uniform, workgroups) = (args.uniform(), args.workgroups(per_dimension));
            let buffers = &[logits, list, out];
            self.dispatch(Dispatch { kernel: Kernel::LogSoftmax, buffers, uniform, workgroups })?;
        }
        self.candidates(jobs.plain.len(), listed.plain)?;
        if !jobs.changes.is_empty() {
            let count = jobs.changes.len() as u32;
            let args = PenaltiesArgs { count, width, x, changes: listed.changes, saved: 0 };
            let (uniform, workgroups) = (args.uniform(), args.workgroups(per_dimension));
            let buffers = &[logits, list, out, saved];
            self.dispatch(Dispatch { kernel: Kernel::Penalties, buffers, uniform, workgroups })?;
        }
        self.candidates(jobs.changed.len(), listed.changed)?;
        if !jobs.tokens.is_empty() && !jobs.only_likeliest {
            let count = jobs.tokens.len() as u32;
            let args = SampleArgs { count, width, x, jobs: listed.tokens, ids: 0 };
            let (uniform, workgroups) = (args.uniform(), args.workgroups(per_dimension));
            let buffers = &[logits, list, saved, ids, out];
            self.dispatch(Dispatch { kernel: Kernel::Sample, buffers, uniform, workgroups })?;
        }
        Ok(())
    }

    fn candidates(&mut self, count: usize, jobs: u32) -> Result<(), BackendError> {
        if count == 0 {
            return Ok(());
        }
        let (width, x) = (self.logits.width() as u32, self.logits.place());
        let args = CandidatesArgs { count: count as u32, width, x, jobs };
        let (uniform, workgroups) = (args.uniform(), args.workgroups(self.gpu.per_dimension()));
        let Buffers { list, saved, out, .. } = self.buffers;
        let buffers = &[self.logits.buffer(), list, saved, out];
        self.dispatch(Dispatch { kernel: Kernel::Candidates, buffers, uniform, workgroups })
    }

    fn dispatch(&mut self, dispatch: Dispatch<'_>) -> Result<(), BackendError> {
        self.recorder.dispatch(self.gpu, dispatch)
    }
}
