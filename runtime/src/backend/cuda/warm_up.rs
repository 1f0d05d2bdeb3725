//! The graphs of all decodes that are to be expected, captured when a model is loaded, so that no step of a request is the
//! one that captures: for every bucket of sequences up to the most that may run, and for every size of attention's launch
//! that sequences of any length give it.
//!
//! Owns which shapes these are. The graphs share the memory of one step: capturing one takes what its launches are written
//! down in, and nothing else.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::buckets::all_buckets;
use super::step::{GraphKey, LaunchSize, Launching, Planner};
use super::{CudaBackend, CudaCache, lock, profile};
use crate::backend::{AttentionSpec, BackendError, StepBatch};
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
            let batch = profile::decode(spec, &vec![1; rows]);
            // As it is, once: this loads every kernel and chooses every algorithm.
            let step = self.prepare_step(spec, &batch, &[])?;
            model.forward(self, &step, cache)?;
            for launches in launch_sizes(self.planner(spec), rows)? {
                let step = self.prepare_step(spec, &batch, &launches)?;
                let Some(key) = &step.key else { continue };
                debug_assert_eq!(key, &GraphKey { rows, launches });
                let forward = self.repeatable(|| model.forward(self, &step, cache));
                lock(&self.shared.graphs).foresee(self.gpu(), key, forward)?;
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
}

/// The sizes of each group's launch for so many sequences, of all lengths that the cache has room for: every size of one
/// group with every size of another, because a window does not let one follow from the other. Models have one group or two.
fn launch_sizes(planner: Planner<'_>, rows: usize) -> Result<Vec<Vec<LaunchSize>>, BackendError> {
    let spec = planner.spec;
    let room = spec.num_blocks.saturating_mul(spec.block_size).max(rows);
    let longest = spec.limits.max_seq_len.max(1);
    let lens = lengths(longest).into_iter().flat_map(|len| mixtures(rows, len));
    let batches: Vec<StepBatch> = lens
        .filter(|lens| lens.iter().sum::<usize>() <= room)
        .map(|lens| profile::decode(spec, &lens))
        .collect();
    let mut all = vec![Vec::new()];
    for (index, config) in spec.groups.iter().enumerate() {
        let groups = batches.iter().filter_map(|batch| Some(batch.paged(batch.groups.get(index)?)));
        let size =
            |batch| planner.plan_group(config, batch, Launching::Repeatably).map(|planned| planned.size);
        let sizes: BTreeSet<LaunchSize> = groups.map(size).collect::<Result<_, _>>()?;
        let with = |before: &Vec<LaunchSize>, size: LaunchSize| [before.as_slice(), &[size]].concat();
        all = all.iter().flat_map(|before| sizes.iter().map(move |&size| with(before, size))).collect();
    }
    Ok(all)
}

/// Sequences of which the longest has a length: all of it, one alone, half of them, and each half as long as the one before
/// it. What a launch takes depends on the keys in all, and on how they are spread.
fn mixtures(rows: usize, len: usize) -> Vec<Vec<usize>> {
    let each = |len_of: &dyn Fn(usize) -> usize| (0..rows).map(|row| len_of(row).max(1)).collect();
    let mut mixtures: Vec<Vec<usize>> = vec![each(&|_| len)];
    if rows > 1 {
        mixtures.push(each(&|row| if row == 0 { len } else { 1 }));
        mixtures.push(each(&|row| if row % 2 == 0 { len } else { 1 }));
        mixtures.push(each(&|row| len.checked_shr(row as u32).unwrap_or(0)));
    }
    mixtures
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
    use super::*;
    use crate::backend::cuda::buckets::bucket;
    use crate::backend::{GroupBatch, StepLimits};
    use pagewise_attention::cuda::{Device, Order};
    use pagewise_attention::{AttentionConfig, DType, Mask};
    use proptest::prelude::*;

    #[test]
    fn lengths_are_close_to_each_other_and_end_with_the_longest() {
        assert_eq!(lengths(1), [1]);
        assert_eq!(lengths(20), [1, 2, 3, 4, 6, 8, 12, 16, 20]);
        let lens = lengths(131_072);
        assert_eq!(lens.last(), Some(&131_072));
        assert!(lens.is_sorted() && lens.windows(2).all(|pair| pair[1] <= 2 * pair[0]));
        assert_eq!(lens.len(), 34);
    }

    /// Llama 3 8B, and the same with a window in every second layer, in what is left of an H100's memory.
    fn spec(window: bool) -> AttentionSpec {
        let full = AttentionConfig::new(32, 8, 128, DType::Bf16);
        let mut groups = vec![full.clone()];
        if window {
            groups.push(AttentionConfig { mask: Mask::Window { size: 4096 }, ..full });
        }
        AttentionSpec {
            layer_groups: (0..32).map(|layer| layer % groups.len()).collect(),
            groups,
            rope: None,
            block_size: 16,
            num_blocks: 27_000,
            host_blocks: 0,
            limits: StepLimits { max_rows: 8192, max_sequences: 256, max_seq_len: 131_072 },
        }
    }

    #[test]
    fn graphs_of_a_large_model_are_not_many() {
        let device = Device::h100();
        for (window, most) in [(false, 150), (true, 300)] {
            let spec = spec(window);
            let planner = Planner { spec: &spec, device: &device, order: Order::Dependent };
            let started = Instant::now();
            let count = |rows| launch_sizes(planner, rows).unwrap().len();
            let each: Vec<(usize, usize)> =
                all_buckets(256, 256).into_iter().map(|rows| (rows, count(rows))).collect();
            let all: usize = each.iter().map(|(_, count)| count).sum();
            println!("{all} graphs, planned in {:?}: {each:?}", started.elapsed());
            assert!(all <= most, "{all} graphs: {each:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn decodes_find_their_graph(
            window in any::<bool>(),
            longest in (0..18u32).prop_map(|power| 1usize << power),
            shares in prop::collection::vec(0.0..1.0f64, 1..=256),
            even in any::<bool>(),
        ) {
            let device = Device::h100();
            let spec = spec(window);
            let planner = Planner { spec: &spec, device: &device, order: Order::Dependent };
            let longest = longest.min(spec.limits.max_seq_len);
            let share = |share: f64| if even { 0.5 + share / 2.0 } else { share.powi(4) };
            let mut lens: Vec<usize> =
                shares.iter().map(|&of| ((longest as f64 * share(of)) as usize).max(1)).collect();
            let room = spec.num_blocks * spec.block_size;
            while lens.iter().sum::<usize>() > room {
                lens.iter_mut().for_each(|len| *len = len.div_ceil(2));
            }
            let rows = bucket(lens.len(), 256).unwrap();
            let mut batch = profile::decode(&spec, &lens);
            crate::backend::cuda::buckets::fill_up(&mut batch, rows);
            let groups = spec.groups.iter().zip(&batch.groups);
            let size = |(config, group): (&AttentionConfig, &GroupBatch)| {
                planner.plan_group(config, batch.paged(group), Launching::Repeatably).unwrap().size
            };
            let found: Vec<LaunchSize> = groups.map(size).collect();
            let sizes = launch_sizes(planner, rows).unwrap();
            prop_assert!(sizes.contains(&found), "{} rows, {lens:?}: {found:?} of {sizes:?}", lens.len());
        }
    }
}
