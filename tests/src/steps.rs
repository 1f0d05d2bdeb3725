//! Models step by step, below the engine: sequences in the making, and plans that hand out the blocks of a cache.

use pagewise_attention::DType;
use pagewise_runtime::backend::{AttentionSpec, Backend};
use pagewise_runtime::executor::{ModelExecutor, StepOutput};
use pagewise_runtime::model_dir::{ModelConfig, ModelDir, Weights};
use pagewise_runtime::models::{Model, WeightSource, load_model};
use pagewise_runtime::plan::{BlockId, BlockOps, Chunk, LogitRows, SequenceId, StepPlan, TokenInput};
use std::path::Path;

use crate::Numbers;

/// Tokens, how many of them are computed, and a block table a KV group.
#[derive(Clone, Debug)]
pub struct Sequence {
    /// Its number.
    pub id: SequenceId,
    /// All that are known.
    pub tokens: Vec<u32>,
    /// How many of them the cache holds.
    pub computed: usize,
    /// Its blocks.
    pub tables: Vec<Vec<BlockId>>,
}

/// The plans of steps of a model: numbers them, and hands out the blocks of its cache in a scrambled order.
#[derive(Clone, Debug)]
pub struct Planner {
    /// Blocks that nobody has; the last one is the next to be taken. None comes back by itself.
    pub free: Vec<BlockId>,
    groups: usize,
    block_size: usize,
    steps: u64,
}

impl Planner {
    /// For an empty cache of so many blocks.
    pub fn new(config: &ModelConfig, block_size: usize, num_blocks: usize) -> Self {
        let mut free: Vec<BlockId> = (0..num_blocks as BlockId).collect();
        let mut numbers = Numbers(7);
        for i in (1..free.len()).rev() {
            free.swap(i, numbers.below(i + 1));
        }
        Self { free, groups: config.kv_groups().0.len(), block_size, steps: 0 }
    }

    /// A sequence of which nothing is computed yet.
    pub fn sequence(&self, id: u64, tokens: &[u32]) -> Sequence {
        let tables = vec![Vec::new(); self.groups];
        Sequence { id: SequenceId(id), tokens: tokens.to_vec(), computed: 0, tables }
    }

    /// A step of the next tokens of some sequences, so many of each, which count as computed from now on.
    ///
    /// # Panics
    /// When a sequence has fewer tokens, or no blocks are left.
    pub fn step(&mut self, work: &mut [(&mut Sequence, usize)], logits: LogitRows) -> StepPlan {
        let mut plan = self.moves(BlockOps::default());
        plan.chunks = work.iter_mut().map(|(sequence, count)| self.chunk(sequence, *count, logits)).collect();
        plan
    }

    /// A step that moves blocks and computes nothing.
    pub fn moves(&mut self, block_ops: BlockOps) -> StepPlan {
        let plan = StepPlan { id: self.steps, block_ops, chunks: Vec::new() };
        self.steps += 1;
        plan
    }

    fn chunk(&mut self, sequence: &mut Sequence, count: usize, logits: LogitRows) -> Chunk {
        let (start, end) = (sequence.computed, sequence.computed + count);
        for table in &mut sequence.tables {
            while table.len() * self.block_size < end {
                table.push(self.free.pop().expect("the cache has room for the test"));
            }
        }
        sequence.computed = end;
        Chunk {
            sequence: sequence.id,
            tokens: sequence.tokens[start..end].iter().map(|&token| TokenInput::Known(token)).collect(),
            start,
            block_tables: sequence.tables.clone(),
            logits,
        }
    }
}

/// The rows of logits of a step that asked for all of them, by sequence.
pub fn rows_by_sequence(plan: &StepPlan, output: &StepOutput) -> Vec<Vec<Vec<f32>>> {
    let mut rows = output.logits.chunks(output.vocab_size).map(<[f32]>::to_vec);
    plan.chunks.iter().map(|chunk| rows.by_ref().take(chunk.tokens.len()).collect()).collect()
}

/// A model of a directory on a backend; its weights as they are stored, or in another type.
///
/// # Panics
/// When it cannot be loaded.
pub fn executor<B: Backend>(
    backend: B,
    dir: &Path,
    dtype: Option<DType>,
    spec: AttentionSpec,
) -> ModelExecutor<B> {
    executor_after(backend, dir, dtype, spec, |_, _, _| {})
}

/// The same, after something was done with the model that has no cache yet.
///
/// # Panics
/// When it cannot be loaded.
pub fn executor_after<B: Backend>(
    backend: B,
    dir: &Path,
    dtype: Option<DType>,
    spec: AttentionSpec,
    prepare: impl FnOnce(&B, &dyn Model<B>, &AttentionSpec),
) -> ModelExecutor<B> {
    let ModelDir { config, .. } = ModelDir::open(dir).expect("a model directory");
    let weights = WeightSource::Files { weights: Weights::open(dir).expect("weights"), dtype };
    let model = load_model(&config, &weights, &backend).expect("a model");
    prepare(&backend, &*model, &spec);
    ModelExecutor::new(backend, model, spec, config.vocab_size).expect("a cache")
}

/// The likeliest token of a row, the first of equals.
///
/// # Panics
/// When the row is empty.
pub fn argmax(row: &[f32]) -> u32 {
    let best = row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1).then(b.0.cmp(&a.0)));
    best.expect("a row of logits").0 as u32
}
