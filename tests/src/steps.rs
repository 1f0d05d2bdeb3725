//! Models step by step, below the engine: sequences in the making, whose blocks the test hands out.

use pagewise_attention::DType;
use pagewise_runtime::backend::{AttentionSpec, Backend};
use pagewise_runtime::executor::ModelExecutor;
use pagewise_runtime::model_dir::{ModelDir, Weights};
use pagewise_runtime::models::{WeightSource, load_model};
use pagewise_runtime::plan::{BlockId, Chunk, LogitRows, SequenceId, TokenInput};
use std::path::Path;

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

impl Sequence {
    /// Nothing of it is computed yet.
    pub fn new(id: u64, tokens: &[u32], groups: usize) -> Self {
        Self { id: SequenceId(id), tokens: tokens.to_vec(), computed: 0, tables: vec![Vec::new(); groups] }
    }

    /// The chunk of its next tokens, which count as computed from now on. The blocks that they need come from the end of
    /// `free`.
    ///
    /// # Panics
    /// When none are left, or it has fewer tokens.
    pub fn next_chunk(
        &mut self,
        count: usize,
        block_size: usize,
        free: &mut Vec<BlockId>,
        logits: LogitRows,
    ) -> Chunk {
        let (start, end) = (self.computed, self.computed + count);
        for table in &mut self.tables {
            while table.len() * block_size < end {
                table.push(free.pop().expect("the cache has room for the test"));
            }
        }
        self.computed = end;
        Chunk {
            sequence: self.id,
            tokens: self.tokens[start..end].iter().map(|&token| TokenInput::Known(token)).collect(),
            start,
            block_tables: self.tables.clone(),
            logits,
        }
    }
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
    let ModelDir { config, .. } = ModelDir::open(dir).expect("a model directory");
    let weights = WeightSource::Files { weights: Weights::open(dir).expect("weights"), dtype };
    let model = load_model(&config, &weights, &backend).expect("a model");
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
