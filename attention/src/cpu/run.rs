//! Running a plan: buffers, threads, the choice of the instruction set, and rows in and out.

use super::CHUNK;
use super::io::{Inputs, Outputs};
use super::kernel::{Exp, MergeRow, SCORE_STRIDE, Softmax};
#[cfg(target_arch = "aarch64")]
use super::lanes::Neon;
#[cfg(target_arch = "x86_64")]
use super::lanes::{Avx2, Avx512};
use super::lanes::{LANES, Lanes, Level, Portable};
use super::plan::{Plan, Split, TILE_ROWS, Tile, Unit};
use super::tile;
use crate::{AttentionConfig, HostTensor, HostTensorMut, RowStrides, SequenceView};
use half::{bf16, f16};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A head's elements rounded up to whole vectors.
pub(super) const fn padded(dim: usize) -> usize {
    dim.next_multiple_of(LANES)
}

/// Elements of a partial result: sums and the softmax of each row.
pub(super) const fn partial_len(config: &AttentionConfig, rows: usize) -> usize {
    rows * (padded(config.head_dim_v) + 2)
}

/// Weighted sums and softmax of a tile's rows.
#[derive(Debug)]
pub(super) struct RowStates {
    pub(super) sums: Vec<f32>,
    pub(super) softmax: Vec<Softmax>,
}

impl RowStates {
    fn new(width: usize) -> Self {
        Self { sums: vec![0.0; TILE_ROWS * width], softmax: vec![Softmax::EMPTY; TILE_ROWS] }
    }

    /// Adds a part of a row's keys to those before.
    pub(super) fn add<L: Lanes>(&mut self, row: usize, part: Softmax, part_sums: &[f32]) {
        let columns = row * part_sums.len()..(row + 1) * part_sums.len();
        let (total, total_sums) = (&mut self.softmax[row], &mut self.sums[columns]);
        // SAFETY: it has no conditions.
        unsafe { L::enter(MergeRow { total, total_sums, part, part_sums }) };
    }

    pub(super) fn clear(&mut self) {
        self.sums.fill(0.0);
        self.softmax.fill(Softmax::EMPTY);
    }
}

/// The buffers of one thread.
#[derive(Debug)]
pub(super) struct Workspace {
    /// Queries of the tile, `[TILE_ROWS, padded(head_dim_qk)]`.
    pub(super) q: Vec<f32>,
    /// What each row may see.
    pub(super) visible: Vec<Range<usize>>,
    /// `[TILE_ROWS, SCORE_STRIDE]`
    pub(super) scores: Vec<f32>,
    /// Converted keys, `[CHUNK, padded(head_dim_qk)]`.
    pub(super) k: Vec<f32>,
    /// Converted values, `[CHUNK, padded(head_dim_v)]`.
    pub(super) v: Vec<f32>,
    pub(super) segment: RowStates,
    pub(super) total: RowStates,
}

impl Workspace {
    fn new(config: &AttentionConfig) -> Self {
        let (k_width, v_width) = (padded(config.head_dim_qk), padded(config.head_dim_v));
        Self {
            q: vec![0.0; TILE_ROWS * k_width],
            visible: Vec::with_capacity(TILE_ROWS),
            scores: vec![0.0; TILE_ROWS * SCORE_STRIDE],
            k: vec![0.0; CHUNK * k_width],
            v: vec![0.0; CHUNK * v_width],
            segment: RowStates::new(v_width),
            total: RowStates::new(v_width),
        }
    }

    /// Takes in the queries of a tile and what they see, and forgets the last tile's results.
    pub(super) fn load_rows(&mut self, context: &Context<'_, '_>, tile: &Tile, view: &SequenceView<'_>) {
        let problem = context.plan.problem();
        let config = problem.config();
        let (dim, width) = (config.head_dim_qk, padded(config.head_dim_qk));
        self.total.clear();
        self.visible.clear();
        for (row, to) in self.q.chunks_exact_mut(width).take(tile.rows()).enumerate() {
            let query = tile.query(row);
            self.visible.push(problem.batch().visible(config.mask, view, query));
            let head = tile.q_head(row, config.group());
            load_row(&context.inputs.q, offset(problem.q_strides(), view, query, head), &mut to[..dim]);
        }
    }

    /// Normalises the rows of a finished tile and writes them, and their `lse`.
    pub(super) fn store_rows<L: Lanes>(
        &mut self,
        context: &Context<'_, '_>,
        tile: &Tile,
        view: &SequenceView<'_>,
    ) {
        let problem = context.plan.problem();
        let config = problem.config();
        let (dim, width) = (config.head_dim_v, padded(config.head_dim_v));
        let rows = self.total.sums.chunks_exact_mut(width).zip(&self.total.softmax);
        for (row, (sums, state)) in rows.take(tile.rows()).enumerate() {
            let (query, head) = (tile.query(row), tile.q_head(row, config.group()));
            let v_scale = context.inputs.v_scale.of(tile.kv_head(row));
            let sums = &mut sums[..dim];
            let mut lse = f32::NEG_INFINITY;
            if state.sum == 0.0 {
                sums.fill(0.0);
            } else {
                let sink = context.inputs.sinks.and_then(|sinks| sinks.get(head).copied());
                let (max, sum, keep) = match sink {
                    None => (state.max, state.sum, 1.0),
                    Some(sink) => {
                        let max = state.max.max(sink);
                        // SAFETY: it has no conditions.
                        let exp = |x: f32| unsafe { L::enter(Exp(x)) };
                        let keep = exp(state.max - max);
                        (max, state.sum * keep + exp(sink - max), keep)
                    }
                };
                lse = max + sum.ln();
                for value in sums.iter_mut() {
                    *value = *value * keep / sum * v_scale;
                }
            }
            let at = offset(problem.out_strides(), view, query, head);
            let lse_at = (view.query_start + query) * config.q_heads + head;
            // SAFETY: the problem's rows do not overlap, each belongs to one tile, a tile is stored by one
            // thread, and `Outputs::check` has seen that the buffers hold them.
            unsafe {
                context.out.store_row(at, sums);
                if let Some(to) = context.lse {
                    to.0.add(lse_at).write(lse);
                }
            }
        }
    }
}

/// Where the row of a query and a query head begins.
fn offset(strides: RowStrides, view: &SequenceView<'_>, query: usize, head: usize) -> usize {
    ((view.query_start + query) as u64 * strides.token + head as u64 * strides.head) as usize
}

fn load_row(from: &HostTensor<'_>, at: usize, to: &mut [f32]) {
    fn convert<T: Copy>(from: &[T], at: usize, to: &mut [f32], to_f32: impl Fn(T) -> f32) {
        let row = from.get(at..).unwrap_or(&[]);
        to.iter_mut().zip(row).for_each(|(to, &from)| *to = to_f32(from));
    }
    match from {
        HostTensor::F32(from) => convert(from, at, to, |x| x),
        HostTensor::F16(from) => convert(from, at, to, f16::to_f32),
        HostTensor::Bf16(from) => convert(from, at, to, bf16::to_f32),
        // Queries are never 8-bit (`AttentionConfig::validate`).
        HostTensor::F8E4M3(_) | HostTensor::F8E5M2(_) => {}
    }
}

/// A pointer that threads share because they write to different places behind it.
#[derive(Clone, Copy)]
pub(super) struct Shared<T>(pub(super) *mut T);

// SAFETY: see the type; every use states why its place is its own.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

/// The output buffer.
#[derive(Clone, Copy)]
pub(super) enum SharedOut {
    F32(Shared<f32>),
    F16(Shared<f16>),
    Bf16(Shared<bf16>),
}

impl SharedOut {
    /// # Safety
    /// The buffer holds `row.len()` elements at `at`, and nobody else uses them.
    unsafe fn store_row(self, at: usize, row: &[f32]) {
        // SAFETY: the caller's.
        unsafe {
            match self {
                Self::F32(to) => std::ptr::copy_nonoverlapping(row.as_ptr(), to.0.add(at), row.len()),
                Self::F16(to) => {
                    row.iter().enumerate().for_each(|(i, &x)| to.0.add(at + i).write(f16::from_f32(x)));
                }
                Self::Bf16(to) => {
                    row.iter().enumerate().for_each(|(i, &x)| to.0.add(at + i).write(bf16::from_f32(x)));
                }
            }
        }
    }
}

/// The partial results of split tiles, and how many units of each are still to come.
#[derive(Debug, Default)]
pub(super) struct Partials {
    elements: Vec<f32>,
    missing: Vec<AtomicUsize>,
}

/// What all threads of a run share.
pub(super) struct Context<'r, 'p> {
    pub(super) plan: &'r Plan<'p>,
    pub(super) inputs: &'r Inputs<'r>,
    out: SharedOut,
    lse: Option<Shared<f32>>,
    partials: Shared<f32>,
    missing: &'r [AtomicUsize],
}

impl Context<'_, '_> {
    /// A segment's place among the partial results.
    ///
    /// # Safety
    /// No other reference to that place exists.
    #[expect(clippy::mut_from_ref, reason = "threads share the buffer and own places in it")]
    pub(super) unsafe fn partial(&self, split: Split, index: usize, rows: usize) -> &mut [f32] {
        let len = partial_len(self.plan.problem().config(), rows);
        // SAFETY: the plan has counted the places of all segments of all split tiles.
        unsafe { std::slice::from_raw_parts_mut(self.partials.0.add(split.offset + index * len), len) }
    }

    /// Notes that a unit of a split tile is done; true for the last one.
    pub(super) fn completes(&self, split: Split) -> bool {
        // Releases this unit's partial results and acquires those of the others.
        self.missing.get(split.index).is_some_and(|missing| missing.fetch_sub(1, Ordering::AcqRel) == 1)
    }
}

/// Runs a plan on checked inputs and outputs.
pub(super) fn run(plan: &Plan<'_>, inputs: &Inputs<'_>, outputs: &mut Outputs<'_>) {
    let out = match &mut outputs.out {
        HostTensorMut::F32(out) => SharedOut::F32(Shared(out.as_mut_ptr())),
        HostTensorMut::F16(out) => SharedOut::F16(Shared(out.as_mut_ptr())),
        HostTensorMut::Bf16(out) => SharedOut::Bf16(Shared(out.as_mut_ptr())),
        // Outputs are never 8-bit (`AttentionConfig::validate`).
        HostTensorMut::F8E4M3(_) | HostTensorMut::F8E5M2(_) => return,
    };
    let lse = outputs.lse.as_mut().map(|lse| Shared(lse.as_mut_ptr()));
    let mut partials = lock(&plan.partials).pop().unwrap_or_default();
    partials.elements.resize(plan.partial_elements, 0.0);
    partials.missing.clear();
    partials.missing.extend(plan.splits.iter().map(|&units| AtomicUsize::new(units)));
    let elements = Shared(partials.elements.as_mut_ptr());
    let context = Context { plan, inputs, out, lse, partials: elements, missing: &partials.missing };

    let next = AtomicUsize::new(0);
    let work = || {
        let mut workspace =
            lock(&plan.workspaces).pop().unwrap_or_else(|| Workspace::new(plan.problem().config()));
        while let Some(unit) = plan.units.get(next.fetch_add(1, Ordering::Relaxed)) {
            compute(&context, unit, &mut workspace);
        }
        lock(&plan.workspaces).push(workspace);
    };
    if plan.workers == 1 {
        work();
    } else {
        rayon::scope(|scope| {
            (1..plan.workers).for_each(|_| scope.spawn(|_| work()));
            work();
        });
    }
    lock(&plan.partials).push(partials);
}

/// A plan's level is one that the processor has (`Plan::new`, `Plan::with_level`).
fn compute(context: &Context<'_, '_>, unit: &Unit, workspace: &mut Workspace) {
    match context.plan.level {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => tile::compute::<Avx512>(context, unit, workspace),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => tile::compute::<Avx2>(context, unit, workspace),
        #[cfg(target_arch = "aarch64")]
        Level::Neon => tile::compute::<Neon>(context, unit, workspace),
        _ => tile::compute::<Portable>(context, unit, workspace),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // The lists of spare buffers are sound at every moment, so a thread that died with the lock does no harm.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
