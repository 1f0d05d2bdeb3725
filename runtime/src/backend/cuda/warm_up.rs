//! The graphs of all decodes that are to be expected, captured when a model is loaded, so that no step of a request is the
//! one that captures: for every bucket of sequences up to the most that may run, and for every size of attention's launch
//! that sequences of any length give it.
//!
//! Owns which shapes these are. The graphs share the memory of one step: capturing one takes what its launches are written
//! down in, and nothing else.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::buckets::all_buckets;
use super::step::GraphKey;
use super::{CudaBackend, CudaCache, lock, profile};
use crate::backend::{AttentionSpec, BackendError};
use crate::executor::ModelExecutor;
use crate::models::Model;

/// What capturing took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WarmUp {
    /// Graphs that there are now.
    pub graphs: usize,
    /// Buckets of sequences that they serve.
    pub buckets: usize,
    /// Device memory that they take, as far as the driver says.
    pub bytes: usize,
    /// Time that it took.
    pub time: Duration,
}

impl ModelExecutor<CudaBackend> {
    /// Captures the graphs of all decodes within the limits of the executor's cache: to be done once, before the first
    /// step. A backend that was made without graphs captures none.
    ///
    /// # Errors
    /// [`BackendError`] if the device fails, or has no memory left for them.
    pub fn capture_graphs(&mut self) -> Result<WarmUp, BackendError> {
        let (backend, model, spec, cache) = self.parts();
        backend.capture_all(model, spec, cache)
    }
}

impl CudaBackend {
    fn capture_all(
        &self,
        model: &dyn Model<Self>,
        spec: &AttentionSpec,
        cache: &mut CudaCache,
    ) -> Result<WarmUp, BackendError> {
        if !self.shared.options.graphs {
            return Ok(WarmUp::default());
        }
        let started = Instant::now();
        let (free_before, _) = self.memory()?;
        let limits = spec.limits;
        let buckets = all_buckets(limits.max_sequences.min(limits.max_rows), limits.max_sequences);
        for &rows in &buckets {
            let batch = profile::decode(spec, rows, 1);
            // As it is, once: this loads every kernel and chooses every algorithm.
            let step = self.prepare_step(spec, &batch, &[])?;
            model.forward(self, &step, cache)?;
            for grids in self.launch_sizes(spec, rows)? {
                let step = self.prepare_step(spec, &batch, &grids)?;
                let Some(key) = &step.key else { continue };
                debug_assert_eq!(key, &GraphKey { rows, grids });
                lock(&self.shared.graphs).foresee(self.gpu(), key, || model.forward(self, &step, cache))?;
            }
        }
        self.gpu().synchronize()?;
        let (free, _) = self.memory()?;
        let (buckets, bytes) = (buckets.len(), free_before.saturating_sub(free));
        let warm_up = WarmUp { graphs: self.captured_graphs(), buckets, bytes, time: started.elapsed() };
        tracing::info!(
            graphs = warm_up.graphs,
            buckets,
            mib = bytes >> 20,
            seconds = warm_up.time.as_secs_f64(),
            "captured the CUDA graphs of decodes"
        );
        Ok(warm_up)
    }

    /// The sizes of each group's launch for so many sequences, of every length that the cache has room for.
    fn launch_sizes(&self, spec: &AttentionSpec, rows: usize) -> Result<BTreeSet<Vec<u32>>, BackendError> {
        let room = spec.num_blocks.saturating_mul(spec.block_size) / rows.max(1);
        let lens = lengths(spec.limits.max_seq_len.min(room).max(1));
        let sizes = |len: usize| -> Result<Vec<u32>, BackendError> {
            let batch = profile::decode(spec, rows, len);
            let groups = spec.groups.iter().zip(&batch.groups);
            let size = |(config, group)| {
                self.plan_group(spec, config, batch.paged(group), Some(0)).map(|(_, _, size)| size)
            };
            groups.map(size).collect()
        };
        lens.into_iter().map(sizes).collect()
    }
}

/// Lengths up to the longest, two for each power of two: close enough that no size of a launch lies between two of them.
fn lengths(longest: usize) -> Vec<usize> {
    let mut lens: Vec<usize> = (0..usize::BITS)
        .map(|power| 1usize << power)
        .take_while(|&len| len < longest)
        .flat_map(|len| [len, len + len / 2])
        .filter(|&len| len < longest)
        .collect();
    lens.dedup();
    lens.push(longest);
    lens
}

#[cfg(test)]
mod tests {
    use super::lengths;

    #[test]
    fn lengths_are_close_to_each_other_and_end_with_the_longest() {
        assert_eq!(lengths(1), [1]);
        assert_eq!(lengths(20), [1, 2, 3, 4, 6, 8, 12, 16, 20]);
        let lens = lengths(131_072);
        assert_eq!(lens.last(), Some(&131_072));
        assert!(lens.is_sorted() && lens.windows(2).all(|pair| pair[1] <= 2 * pair[0]));
        assert_eq!(lens.len(), 34);
    }
}
