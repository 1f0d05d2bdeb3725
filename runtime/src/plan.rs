//! What one step computes: plain data that can be printed, recorded, replayed and broadcast to ranks.

pub use pagewise_kvcache::{BlockCopy, BlockId, BlockOps, SequenceId};

/// A token to be computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenInput {
    /// Its id.
    Known(u32),
    /// A token that an earlier step, still under way, samples: lets step n + 1 be scheduled while n runs.
    Placeholder(TokenPlace),
}

/// Where a token is sampled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TokenPlace {
    /// [`StepPlan::id`] of the step.
    pub step: u64,
    /// Its logit row.
    pub row: usize,
}

/// For which tokens of a chunk logits are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitRows {
    /// For none: a prompt's chunk that is not its last.
    None,
    /// For the last token, from which the next one is sampled.
    Last,
    /// For every token: prompt log-probabilities.
    All,
}

/// Consecutive tokens of one sequence: a decode (one token) or a piece of a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Whose.
    pub sequence: SequenceId,
    /// What goes in; at least one token.
    pub tokens: Vec<TokenInput>,
    /// Position of the first of them: how many tokens of the sequence are in the cache when the step begins. What another
    /// chunk of the same step computes is not there yet.
    pub start: usize,
    /// The sequence's block table in each KV group, with room for `start + tokens.len()` tokens.
    pub block_tables: Vec<Vec<BlockId>>,
    /// Which logits come out.
    pub logits: LogitRows,
}

impl Chunk {
    /// Logit rows that this chunk adds to the step's output.
    pub fn logit_rows(&self) -> usize {
        match self.logits {
            LogitRows::None => 0,
            LogitRows::Last => 1,
            LogitRows::All => self.tokens.len(),
        }
    }
}

/// One step: first the block ops in their fixed order, then all chunks in one batch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepPlan {
    /// Rises by one a step.
    pub id: u64,
    /// What happens to the cache before anything is computed.
    pub block_ops: BlockOps,
    /// What is computed; may be empty when only blocks move.
    pub chunks: Vec<Chunk>,
}

impl StepPlan {
    /// Tokens that the step computes.
    pub fn num_tokens(&self) -> usize {
        self.chunks.iter().map(|chunk| chunk.tokens.len()).sum()
    }

    /// Puts the tokens that step `step` has sampled in the place of their placeholders: `token` gives that of a row.
    pub fn resolve(&mut self, step: u64, token: impl Fn(usize) -> Option<u32>) {
        for input in self.chunks.iter_mut().flat_map(|chunk| &mut chunk.tokens) {
            if let TokenInput::Placeholder(place) = *input
                && place.step == step
                && let Some(token) = token(place.row)
            {
                *input = TokenInput::Known(token);
            }
        }
    }
}
