//! Walks the rows of a step's output in the order of its chunks.

use crate::executor::{Row, StepOutput};

/// Where the next chunk's rows begin.
pub(super) struct LogitCursor<'a> {
    output: &'a StepOutput,
    next: usize,
}

/// The rows of one chunk.
pub(super) struct Rows<'a> {
    output: &'a StepOutput,
    first: usize,
    count: usize,
}

impl<'a> LogitCursor<'a> {
    pub(super) fn new(output: &'a StepOutput) -> Self {
        Self { output, next: 0 }
    }

    pub(super) fn take(&mut self, count: usize) -> Rows<'a> {
        let first = self.next;
        self.next += count;
        Rows { output: self.output, first, count }
    }
}

impl<'a> Rows<'a> {
    pub(super) fn get(&self, index: usize) -> Option<Row<'a>> {
        if index < self.count { self.output.row(self.first + index) } else { None }
    }

    pub(super) fn last(&self) -> Option<Row<'a>> {
        self.get(self.count.checked_sub(1)?)
    }
}
