//! What a step is told: tokens, positions, slots, tables and work lists, in device memory at addresses that depend on
//! the step's shape alone, filled by one small copy (and one for the block tables of each KV group).
//!
//! Owns the layout of that memory and its growth; what goes in is `step.rs`'s.

use std::sync::Arc;

use super::gpu::{DeviceMemory, Gpu, Purpose};
use super::staging::Staging;
use crate::backend::{AttentionSpec, BackendError};

/// Every part begins at a multiple of this.
const ALIGNMENT: usize = 16;

/// Pinned pieces: steps that can be prepared while the device still copies earlier ones.
const PIECES: usize = 4;

/// Offsets of a step's parts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Layout {
    /// i32 `[rows]`
    pub(super) tokens: usize,
    /// i32 `[rows]`
    pub(super) positions: usize,
    /// i32 `[logit rows]`
    pub(super) logit_rows: usize,
    /// One entry a KV group: i64 `[rows]`.
    pub(super) slots: Vec<usize>,
    /// One entry a KV group: u32 words.
    pub(super) work: Vec<usize>,
    /// Bytes in all.
    pub(super) bytes: usize,
}

impl Layout {
    /// Of so many rows and logit rows, and so many words of work of each group.
    pub(super) fn new(rows: usize, logit_rows: usize, work_words: &[usize]) -> Self {
        let mut bytes = 0usize;
        let mut part = |len: usize| {
            let start = bytes;
            bytes = (start + len).next_multiple_of(ALIGNMENT);
            start
        };
        let (tokens, positions, logit_rows) = (part(4 * rows), part(4 * rows), part(4 * logit_rows));
        let slots = work_words.iter().map(|_| part(8 * rows)).collect();
        let work = work_words.iter().map(|words| part(4 * words)).collect();
        Self { tokens, positions, logit_rows, slots, work, bytes }
    }
}

/// The memory of the steps' inputs and of the attention's partial results.
#[derive(Debug)]
pub(super) struct Inputs {
    gpu: Arc<Gpu>,
    staging: Staging,
    /// The parts of [`Layout`].
    parts: DeviceMemory,
    /// Block tables, one piece a KV group.
    tables: DeviceMemory,
    table_bytes: usize,
    /// Attention's workspace.
    partial_out: DeviceMemory,
    partial_max: DeviceMemory,
    tickets: DeviceMemory,
}

/// Sizes of the attention's workspace, in bytes.
pub(super) type Workspace = pagewise_attention::cuda::ptx::decode::WorkspaceSizes;

/// Bytes to begin with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub(super) work_bytes: usize,
    /// Of all parts together.
    pub(super) least_bytes: usize,
    pub(super) workspace: Workspace,
}

impl Inputs {
    /// For steps within the limits of `spec`.
    pub(super) fn new(gpu: &Arc<Gpu>, spec: &AttentionSpec, sizes: Sizes) -> Result<Self, BackendError> {
        let limits = spec.limits;
        let groups = spec.groups.len().max(1);
        let blocks = limits.max_seq_len.div_ceil(spec.block_size.max(1));
        // No step names more blocks than there are, but for those that sequences share.
        let table_bytes = (4 * limits.max_sequences * blocks).next_multiple_of(ALIGNMENT);
        let words = vec![sizes.work_bytes.div_ceil(4); groups];
        let bytes = Layout::new(limits.max_rows, limits.max_rows, &words).bytes.max(sizes.least_bytes);
        let memory = |bytes: u64| {
            let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
            DeviceMemory::zeros(gpu, bytes, Purpose::STEP)
        };
        Ok(Self {
            gpu: Arc::clone(gpu),
            staging: Staging::new(gpu, PIECES, bytes.min(1 << 20), Purpose::STEP)?,
            parts: DeviceMemory::zeros(gpu, bytes, Purpose::STEP)?,
            tables: DeviceMemory::zeros(gpu, table_bytes * groups, Purpose::STEP)?,
            table_bytes,
            partial_out: memory(sizes.workspace.partial_out)?,
            partial_max: memory(sizes.workspace.partial_max)?,
            tickets: memory(sizes.workspace.tickets)?,
        })
    }

    /// Bytes of all parts together.
    pub(super) fn bytes(&self) -> usize {
        self.parts.bytes()
    }

    /// The address of a part.
    pub(super) fn part(&self, offset: usize) -> u64 {
        self.parts.address() + offset as u64
    }

    /// The address of a group's block tables.
    pub(super) fn table(&self, group: usize) -> u64 {
        self.tables.address() + (group * self.table_bytes) as u64
    }

    /// Addresses of the attention's workspace: partial outputs, maxima, tickets.
    pub(super) fn workspace(&self) -> [u64; 3] {
        [self.partial_out.address(), self.partial_max.address(), self.tickets.address()]
    }

    /// Makes room for a step beyond what was foreseen; `true` if addresses have changed.
    pub(super) fn make_room(
        &mut self,
        parts: usize,
        table_bytes: usize,
        workspace: Workspace,
    ) -> Result<bool, BackendError> {
        let gpu = Arc::clone(&self.gpu);
        let groups = self.tables.bytes() / self.table_bytes.max(1);
        let mut changed = false;
        let mut grow = |memory: &mut DeviceMemory, bytes: usize| -> Result<(), BackendError> {
            if memory.bytes() >= bytes {
                return Ok(());
            }
            // Earlier steps may still read it.
            gpu.synchronize()?;
            tracing::debug!(from = memory.bytes(), to = bytes, "the inputs of a step grow");
            *memory = DeviceMemory::zeros(&gpu, bytes, Purpose::STEP)?;
            changed = true;
            Ok(())
        };
        grow(&mut self.parts, parts)?;
        if table_bytes > self.table_bytes {
            let table_bytes = table_bytes.next_multiple_of(ALIGNMENT);
            grow(&mut self.tables, table_bytes * groups)?;
            self.table_bytes = table_bytes;
        }
        for (memory, bytes) in [
            (&mut self.partial_out, workspace.partial_out),
            (&mut self.partial_max, workspace.partial_max),
            (&mut self.tickets, workspace.tickets),
        ] {
            grow(memory, usize::try_from(bytes).unwrap_or(usize::MAX))?;
        }
        Ok(changed)
    }

    /// Puts the copies of a step on the computing stream.
    pub(super) fn send(&mut self, parts: &[u8], tables: &[&[i32]]) -> Result<(), BackendError> {
        let mut copies = vec![(self.parts.address(), parts)];
        for (group, table) in tables.iter().enumerate() {
            copies.push((self.table(group), bytemuck::cast_slice(table)));
        }
        let fits = parts.len() <= self.parts.bytes()
            && tables.iter().all(|table| size_of_val(*table) <= self.table_bytes)
            && tables.len() * self.table_bytes <= self.tables.bytes();
        if !fits {
            let found = vec![self.parts.bytes(), self.table_bytes];
            let needed = vec![parts.len(), tables.iter().map(|table| size_of_val(*table)).max().unwrap_or(0)];
            return Err(BackendError::Shape { what: "the memory of a step's inputs", found, needed });
        }
        // SAFETY: both pieces of memory are as large as was just checked.
        unsafe { self.staging.send(&copies, &self.gpu.stream) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn parts_lie_one_behind_the_other(
            rows in 0..300usize,
            logit_rows in 0..300usize,
            words in prop::collection::vec(0..2000usize, 1..4),
        ) {
            let layout = Layout::new(rows, logit_rows, &words);
            let mut parts = vec![
                (layout.tokens, 4 * rows), (layout.positions, 4 * rows), (layout.logit_rows, 4 * logit_rows),
            ];
            parts.extend(layout.slots.iter().map(|&at| (at, 8 * rows)));
            parts.extend(layout.work.iter().zip(&words).map(|(&at, words)| (at, 4 * words)));
            let mut end = 0;
            for (at, len) in parts {
                prop_assert!(at >= end && at % ALIGNMENT == 0);
                end = at + len;
            }
            prop_assert!(layout.bytes >= end && layout.bytes < end + ALIGNMENT);
            // Nothing but the shape decides.
            prop_assert_eq!(layout, Layout::new(rows, logit_rows, &words));
        }
    }
}
