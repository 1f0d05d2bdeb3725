//! A step plan as flat arrays, in the form that attention and every device take.

use crate::executor::ExecutorError;
use crate::plan::{Chunk, LogitRows, StepPlan, TokenInput};
use pagewise_attention::PagedBatch;

/// One row a token, chunk after chunk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepBatch {
    /// `[rows]` token ids; 0 where the token is in `earlier`.
    pub tokens: Vec<u32>,
    /// Rows whose tokens the step before this one chooses.
    pub earlier: Vec<EarlierToken>,
    /// `[rows]` positions in their sequences.
    pub positions: Vec<i32>,
    /// `[sequences + 1]` first row of each chunk.
    pub query_start: Vec<i32>,
    /// `[sequences]` keys of each sequence, the step's own included.
    pub seq_lens: Vec<i32>,
    /// One entry a KV group.
    pub groups: Vec<GroupBatch>,
    /// Rows whose logits are wanted, rising.
    pub logit_rows: Vec<usize>,
}

/// A row whose token is chosen by the step before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EarlierToken {
    /// Row of this step.
    pub row: usize,
    /// Logit row of the step before.
    pub logit_row: usize,
}

/// Where one KV group's keys and values are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GroupBatch {
    /// `[sequences + 1]` first entry of each block table in `indices`.
    pub indptr: Vec<i32>,
    /// Block tables, one behind the other; −1 for blocks behind a window.
    pub indices: Vec<i32>,
    /// `[rows]` slot that each row's key and value go to.
    pub slots: Vec<i64>,
}

/// What a plan is checked against.
#[derive(Clone, Copy, Debug)]
pub struct BatchLimits {
    /// Tokens a block.
    pub block_size: usize,
    /// KV groups.
    pub num_groups: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// The step under way, for whose tokens there may be placeholders.
    pub earlier_step: Option<u64>,
}

impl StepBatch {
    /// Flattens a plan.
    ///
    /// # Errors
    /// [`ExecutorError::Plan`] if a token is not known yet or not in the vocabulary, a table is missing or
    /// too short, or a number does not fit the device's 32 bits.
    pub fn new(plan: &StepPlan, limits: BatchLimits) -> Result<Self, ExecutorError> {
        let rows = plan.num_tokens();
        let wrong = |problem: String| ExecutorError::Plan { step: plan.id, problem };
        i32::try_from(rows).map_err(|_| wrong(format!("{rows} tokens are too many for one step")))?;
        let mut batch = Self {
            query_start: vec![0],
            groups: vec![GroupBatch { indptr: vec![0], ..GroupBatch::default() }; limits.num_groups],
            ..Self::default()
        };
        plan.chunks.iter().try_for_each(|chunk| batch.push(chunk, limits).map_err(wrong))?;
        Ok(batch)
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// The batch as attention sees it in one KV group.
    pub fn paged<'a>(&'a self, group: &'a GroupBatch) -> PagedBatch<'a> {
        PagedBatch::csr(&self.query_start, &self.seq_lens, &group.indptr, &group.indices)
    }

    fn push(&mut self, chunk: &Chunk, limits: BatchLimits) -> Result<(), String> {
        let Chunk { sequence, tokens, start, block_tables, logits } = chunk;
        let sequence = sequence.0;
        let end = start + tokens.len();
        let seq_len = i32::try_from(end).map_err(|_| format!("sequence {sequence} has {end} tokens"))?;
        if tokens.is_empty() {
            return Err(format!("sequence {sequence} has an empty chunk"));
        }
        if block_tables.len() != limits.num_groups {
            let (has, needs) = (block_tables.len(), limits.num_groups);
            return Err(format!(
                "sequence {sequence} has {has} block tables; the model has {needs} KV groups"
            ));
        }
        for (group, table) in self.groups.iter_mut().zip(block_tables) {
            group
                .push(table, *start..end, limits.block_size)
                .map_err(|e| format!("sequence {sequence} {e}"))?;
        }
        for token in tokens {
            match *token {
                TokenInput::Known(id) if (id as usize) < limits.vocab_size => self.tokens.push(id),
                TokenInput::Known(id) => {
                    return Err(format!("token {id} is not in the vocabulary of {}", limits.vocab_size));
                }
                TokenInput::Placeholder(place) if Some(place.step) == limits.earlier_step => {
                    self.earlier.push(EarlierToken { row: self.tokens.len(), logit_row: place.row });
                    self.tokens.push(0);
                }
                TokenInput::Placeholder(place) => {
                    return Err(format!(
                        "sequence {sequence} waits for a token of step {}; resolve the plan first",
                        place.step
                    ));
                }
            }
        }
        self.positions.extend((*start..end).map(|position| position as i32));
        let first = self.tokens.len() - tokens.len();
        match logits {
            LogitRows::None => {}
            LogitRows::Last => self.logit_rows.push(self.tokens.len() - 1),
            LogitRows::All => self.logit_rows.extend(first..self.tokens.len()),
        }
        self.query_start.push(self.tokens.len() as i32);
        self.seq_lens.push(seq_len);
        Ok(())
    }
}

impl GroupBatch {
    fn push(&mut self, table: &[u32], rows: std::ops::Range<usize>, block_size: usize) -> Result<(), String> {
        let blocks = rows.end.div_ceil(block_size);
        let Some(table) = table.get(..blocks) else {
            return Err(format!("has a table of {} blocks for {} tokens", table.len(), rows.end));
        };
        for position in rows {
            let block = table.get(position / block_size).copied().unwrap_or(u32::MAX);
            if i32::try_from(block).is_err() {
                return Err(format!("has no block for position {position}"));
            }
            self.slots.push(i64::from(block) * block_size as i64 + (position % block_size) as i64);
        }
        self.indices.extend(table.iter().map(|&block| i32::try_from(block).unwrap_or(-1)));
        let end =
            i32::try_from(self.indices.len()).map_err(|_| "makes the block tables too long".to_owned())?;
        self.indptr.push(end);
        Ok(())
    }
}
