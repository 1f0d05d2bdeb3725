//! A thread's asynchronous copies to shared memory: done when they are waited for, as late as a GPU may be. Until then
//! their target holds NaN, as a GPU may also be early.

use std::collections::VecDeque;

use super::memory::Memory;

/// One `cp.async`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Copy {
    pub(super) to: u64,
    pub(super) from: u64,
    /// Bytes of the target; those that are not read are zeros.
    pub(super) size: usize,
    /// Bytes that are read.
    pub(super) read: usize,
    /// Whether the thread had waited for the kernels before its own when the copy began: it may be done at once.
    pub(super) waited: bool,
}

impl Copy {
    /// Bytes of the source; of none at all the address may be any.
    fn source(self, memory: &Memory) -> Result<Vec<u8>, String> {
        if self.read > self.size {
            return Err(format!("{} bytes are read into {}", self.read, self.size));
        }
        if self.read == 0 {
            return Ok(Vec::new());
        }
        if !self.from.is_multiple_of(self.size as u64) {
            return Err(format!("{} bytes at {:#x}: misaligned", self.size, self.from));
        }
        memory.seen(self.from, self.read, self.waited).map(|bytes| bytes.to_vec())
    }
}

#[derive(Debug, Default)]
pub(super) struct Copies {
    open: Vec<Copy>,
    groups: VecDeque<Vec<Copy>>,
}

impl Copies {
    /// Begins a copy. What it may not touch it is refused now.
    pub(super) fn begin(&mut self, copy: Copy, memory: &mut Memory) -> Result<(), String> {
        copy.source(memory)?;
        memory.shared_slice(copy.to, copy.size)?.fill(0xff);
        self.open.push(copy);
        Ok(())
    }

    pub(super) fn commit(&mut self) {
        self.groups.push_back(std::mem::take(&mut self.open));
    }

    /// Does all but the latest groups.
    pub(super) fn wait(&mut self, latest: usize, memory: &mut Memory) -> Result<(), String> {
        while self.groups.len() > latest {
            for copy in self.groups.pop_front().unwrap_or_default() {
                let mut bytes = copy.source(memory)?;
                bytes.resize(copy.size, 0);
                memory.shared_slice(copy.to, copy.size)?.copy_from_slice(&bytes);
            }
        }
        Ok(())
    }
}
