//! The CUDA graphs that are captured when a model is loaded serve the steps of requests: none of those captures one,
//! takes memory, or gives other bits than a step that is launched.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    unreachable_pub,
    reason = "a test fails by panicking, its helpers too"
)]

#[path = "gpu/cuda.rs"]
#[allow(dead_code, reason = "shared with the kernels' tests")]
mod cuda;

use pagewise_attention::DType;
use pagewise_attention::cuda::cudarc::driver::result::mem_get_info;
use pagewise_runtime::backend::cuda::{CudaBackend, CudaOptions};
use pagewise_runtime::backend::{AttentionSpec, StepLimits};
use pagewise_runtime::executor::{Executor, ModelExecutor};
use pagewise_runtime::model_dir::ModelDir;
use pagewise_runtime::plan::LogitRows;
use pagewise_tests::{FIXTURES, Planner, Sequence, executor_after, fixture};

const BLOCK_SIZE: usize = 16;
const NUM_BLOCKS: usize = 1009;
const LIMITS: StepLimits = StepLimits { max_rows: 64, max_sequences: 40, max_seq_len: 512 };

/// Decodes that a sequence takes part in, at most.
const DECODES: usize = 16;

/// A model as `load` makes it ready, and a handle to its device.
struct Ready {
    backend: CudaBackend,
    executor: ModelExecutor<CudaBackend>,
    planner: Planner,
    vocab_size: usize,
    max_seq_len: usize,
}

fn ready(name: &str, dtype: DType, graphs: bool) -> Ready {
    let dir = fixture(name);
    let ModelDir { config, .. } = ModelDir::open(&dir).unwrap();
    let backend = CudaBackend::new(CudaOptions { ordinal: 0, dtype, graphs }).unwrap();
    let mut spec = AttentionSpec::new(&config, dtype, BLOCK_SIZE, NUM_BLOCKS).with_compute_dtype(dtype);
    spec.limits = StepLimits { max_seq_len: LIMITS.max_seq_len.min(spec.limits.max_seq_len), ..LIMITS };
    let max_seq_len = spec.limits.max_seq_len;
    let executor = executor_after(backend.clone(), &dir, Some(dtype), spec, |backend, model, spec| {
        backend.profile(model, spec).unwrap();
    });
    let planner = Planner::new(&config, BLOCK_SIZE, NUM_BLOCKS);
    Ready { backend, executor, planner, vocab_size: config.vocab_size, max_seq_len }
}

impl Ready {
    fn step(&mut self, work: &mut [(&mut Sequence, usize)]) -> Vec<f32> {
        let plan = self.planner.step(work, LogitRows::Last);
        self.executor.execute(&plan).unwrap().logits
    }

    /// Decodes of batches of every size up to the limit, of sequences of all lengths: the bits of all logits.
    fn decode(&mut self, between: &mut dyn FnMut(&CudaBackend, usize)) -> Vec<u32> {
        let most = self.max_seq_len - DECODES;
        let longest = |index: usize| ([300, 40, 5, 1][index % 4] + index % 3).min(most);
        let tokens = |index: usize| -> Vec<u32> {
            (0..longest(index) + DECODES).map(|at| ((at * 31 + index * 7) % self.vocab_size) as u32).collect()
        };
        let mut sequences: Vec<Sequence> = (0..LIMITS.max_sequences)
            .map(|index| self.planner.sequence(index as u64, &tokens(index)))
            .collect();
        for (index, sequence) in sequences.iter_mut().enumerate() {
            let mut left = longest(index);
            while left > 0 {
                let count = left.min(LIMITS.max_rows);
                self.step(&mut [(sequence, count)]);
                left -= count;
            }
        }
        // The first decode may still load what chooses tokens or brings logits back.
        let mut bits = Vec::new();
        for round in 0..6 {
            for rows in [1, 2, 3, 5, 8, 9, 17, 24, 33, LIMITS.max_sequences] {
                // From another place on in every round.
                let first = (round * 7 + rows) % (LIMITS.max_sequences - rows + 1);
                let work = sequences.iter_mut().skip(first).filter(|s| s.computed < s.tokens.len());
                let mut work: Vec<(&mut Sequence, usize)> = work.take(rows).map(|s| (s, 1)).collect();
                let logits = self.step(&mut work);
                bits.extend(logits.iter().map(|x| x.to_bits()));
                between(&self.backend, rows);
            }
        }
        bits
    }
}

#[test]
fn steps_of_requests_replay_what_was_captured_at_load() {
    if cuda::context().is_none() {
        return;
    }
    for name in FIXTURES {
        for dtype in [DType::F32, DType::Bf16] {
            let mut with = ready(name, dtype, true);
            let warm_up = with.executor.capture_graphs().unwrap();
            println!("{name} {dtype}: {warm_up:?}");
            assert_eq!(warm_up.graphs, with.backend.captured_graphs());
            // 1, 2, 4, 8, 16, 24, 32 and 40 sequences.
            assert_eq!(warm_up.buckets, 8);
            assert!(warm_up.graphs >= warm_up.buckets);
            let mut free = None;
            let replayed = with.decode(&mut |backend, rows| {
                assert_eq!(backend.captured_graphs(), warm_up.graphs, "{name} {dtype}: {rows} rows");
                let (now, _) = mem_get_info().unwrap();
                assert!(now >= *free.get_or_insert(now), "{name} {dtype}: memory was taken for {rows} rows");
            });
            drop(with);
            let mut without = ready(name, dtype, false);
            assert_eq!(without.executor.capture_graphs().unwrap().graphs, 0);
            let launched = without.decode(&mut |backend, _| assert_eq!(backend.captured_graphs(), 0));
            assert!(replayed == launched, "{name} {dtype}: graphs change bits");
        }
    }
}
