//! What one step asks for: ragged queries, the length of each sequence, and its block table.

use std::ops::Range;

use super::{AttentionConfig, CacheLayout, Mask, ProblemError};

/// Block tables of a batch. Entries that hold no key which a query of the sequence can see (past its length,
/// or behind its sliding window) may have any value and are never followed.
#[derive(Clone, Copy, Debug)]
pub enum BlockTables<'a> {
    /// `[sequences, max_blocks]`.
    Padded {
        /// Row after row.
        entries: &'a [i32],
        /// Length of a row.
        max_blocks: usize,
    },
    /// Sequence `i` owns `indices[indptr[i]..indptr[i + 1]]`.
    Csr {
        /// `[sequences + 1]`, rising.
        indptr: &'a [i32],
        /// All tables, one behind the other.
        indices: &'a [i32],
    },
}

/// One bit per (query row, key): bit `j % 32` of `words[row * row_words + j / 32]` says whether the row sees
/// key `j`.
#[derive(Clone, Copy, Debug)]
pub struct MaskBits<'a> {
    /// `[total_queries, row_words]`.
    pub words: &'a [u32],
    /// At least `ceil(max(seq_lens) / 32)`.
    pub row_words: usize,
}

impl MaskBits<'_> {
    /// The smallest range that holds every key of `keys` that a row sees; empty if it sees none.
    #[cfg(feature = "cuda")]
    pub(crate) fn seen_within(&self, row: usize, keys: Range<usize>) -> Range<usize> {
        let words = self.words.get(row * self.row_words..(row + 1) * self.row_words).unwrap_or_default();
        // The bits of a word that stand for keys of the range.
        let word = |index: usize| {
            let first = index * 32;
            let low = keys.start.saturating_sub(first).min(32);
            let high = keys.end.saturating_sub(first).min(32);
            let within = ((1u64 << high) - 1) & !((1u64 << low) - 1);
            words.get(index).map_or(0, |&word| word & within as u32)
        };
        let mut places = keys.start / 32..keys.end.div_ceil(32);
        let Some(first) = places.find(|&index| word(index) != 0) else { return keys.start..keys.start };
        let last = places.rfind(|&index| word(index) != 0).unwrap_or(first);
        let start = first * 32 + word(first).trailing_zeros() as usize;
        start..last * 32 + 32 - word(last).leading_zeros() as usize
    }

    /// Whether a row sees a key.
    pub fn sees(&self, row: usize, key: usize) -> bool {
        self.words.get(row * self.row_words + key / 32).is_some_and(|word| word >> (key % 32) & 1 == 1)
    }
}

/// Ragged queries over a paged cache. Lives in the caller's memory; nothing is copied.
#[derive(Clone, Copy, Debug)]
pub struct PagedBatch<'a> {
    /// `[sequences + 1]`: sequence `i` owns query rows `query_start[i]..query_start[i + 1]`.
    pub query_start: &'a [i32],
    /// `[sequences]`: keys of each sequence, those of its new tokens included.
    pub seq_lens: &'a [i32],
    /// Where the keys and values are.
    pub block_tables: BlockTables<'a>,
    /// `[total_queries]`: positions of the query rows, if they are not the last ones of their sequence in
    /// order (trees of speculated tokens, cascades).
    pub query_positions: Option<&'a [i32]>,
    /// For [`Mask::Bits`] only.
    pub mask_bits: Option<MaskBits<'a>>,
}

/// One sequence of a checked batch.
#[derive(Clone, Copy, Debug)]
pub struct SequenceView<'a> {
    /// First of its query rows.
    pub query_start: usize,
    /// Number of its query rows.
    pub query_len: usize,
    /// Number of its keys.
    pub len: usize,
    /// Its block table; at least `ceil(len / block_size)` entries.
    pub table: &'a [i32],
}

impl<'a> PagedBatch<'a> {
    /// A batch with padded tables and the usual positions.
    pub fn padded(
        query_start: &'a [i32],
        seq_lens: &'a [i32],
        entries: &'a [i32],
        max_blocks: usize,
    ) -> Self {
        let block_tables = BlockTables::Padded { entries, max_blocks };
        Self { query_start, seq_lens, block_tables, query_positions: None, mask_bits: None }
    }

    /// A batch with CSR tables and the usual positions.
    pub fn csr(query_start: &'a [i32], seq_lens: &'a [i32], indptr: &'a [i32], indices: &'a [i32]) -> Self {
        let block_tables = BlockTables::Csr { indptr, indices };
        Self { query_start, seq_lens, block_tables, query_positions: None, mask_bits: None }
    }

    /// Number of query rows of all sequences together.
    pub fn total_queries(&self) -> usize {
        self.query_start.last().map_or(0, |&end| end.max(0) as usize)
    }

    /// Position of query row `row`, the `index`-th of its sequence.
    pub fn position(&self, sequence: &SequenceView<'_>, index: usize) -> i64 {
        match self.query_positions.and_then(|p| p.get(sequence.query_start + index)) {
            Some(&position) => i64::from(position),
            None => sequence.len as i64 - sequence.query_len as i64 + index as i64,
        }
    }

    /// The range of keys outside of which the `index`-th query of `sequence` sees nothing; with
    /// [`Mask::Bits`] some inside may be hidden too.
    pub fn visible(&self, mask: Mask, sequence: &SequenceView<'_>, index: usize) -> Range<usize> {
        let len = sequence.len;
        match mask {
            Mask::None | Mask::Bits => 0..len,
            Mask::Causal => 0..clamp(self.position(sequence, index) + 1, len),
            Mask::Window { size } => {
                let end = self.position(sequence, index).saturating_add(1);
                let start = end.saturating_sub(i64::try_from(size).unwrap_or(i64::MAX));
                let end = clamp(end, len);
                clamp(start, len).min(end)..end
            }
        }
    }

    pub(super) fn sequence(&self, index: usize) -> SequenceView<'a> {
        let at = |values: &[i32], i: usize| values.get(i).map_or(0, |&v| v.max(0) as usize);
        let query_start = at(self.query_start, index);
        let query_len = at(self.query_start, index + 1).saturating_sub(query_start);
        let (start, end, entries) = match self.block_tables {
            BlockTables::Padded { entries, max_blocks } => {
                (index * max_blocks, (index + 1) * max_blocks, entries)
            }
            BlockTables::Csr { indptr, indices } => (at(indptr, index), at(indptr, index + 1), indices),
        };
        let table = entries.get(start..end).unwrap_or(&[]);
        SequenceView { query_start, query_len, len: at(self.seq_lens, index), table }
    }

    pub(super) fn validate(
        &self,
        config: &AttentionConfig,
        layout: &CacheLayout,
    ) -> Result<(), ProblemError> {
        let sequences = self.seq_lens.len();
        if self.query_start.len() != sequences + 1 {
            return Err(ProblemError::SequenceCount { starts: self.query_start.len(), sequences });
        }
        let mut previous = 0;
        for (index, &value) in self.query_start.iter().enumerate() {
            if value < previous || (index == 0 && value != 0) {
                return Err(ProblemError::QueryStart { index, value });
            }
            previous = value;
        }
        if let Some((sequence, &value)) = self.seq_lens.iter().enumerate().find(|&(_, &len)| len < 0) {
            return Err(ProblemError::SeqLen { sequence, value });
        }
        self.validate_table_shape(sequences)?;
        let total_queries = self.total_queries();
        if let Some(positions) = self.query_positions
            && positions.len() != total_queries
        {
            return Err(ProblemError::QueryPositions { rows: positions.len(), total_queries });
        }
        self.validate_mask_bits(config.mask, total_queries)?;
        (0..sequences).try_for_each(|i| self.validate_sequence(i, config.mask, layout))
    }

    fn validate_table_shape(&self, sequences: usize) -> Result<(), ProblemError> {
        let wrong = |text: String| Err(ProblemError::TableShape(text));
        match self.block_tables {
            BlockTables::Padded { entries, max_blocks } => match sequences.checked_mul(max_blocks) {
                Some(needed) if entries.len() >= needed => Ok(()),
                _ => wrong(format!(
                    "{} entries for {sequences} sequences of {max_blocks} blocks; each sequence needs a full row",
                    entries.len()
                )),
            },
            BlockTables::Csr { indptr, indices } => {
                if indptr.len() != sequences + 1 {
                    return wrong(format!("indptr has {} entries; it needs {}", indptr.len(), sequences + 1));
                }
                let mut previous = 0;
                for (i, &value) in indptr.iter().enumerate() {
                    if value < previous {
                        return wrong(format!("indptr[{i}] is {value}; it must not fall or be negative"));
                    }
                    previous = value;
                }
                match previous as usize > indices.len() {
                    true => {
                        wrong(format!("indptr ends at {previous} but indices has {} entries", indices.len()))
                    }
                    false => Ok(()),
                }
            }
        }
    }

    fn validate_mask_bits(&self, mask: Mask, total_queries: usize) -> Result<(), ProblemError> {
        let wrong = |text: String| Err(ProblemError::MaskBits(text));
        let longest = self.seq_lens.iter().copied().max().unwrap_or(0).max(0) as usize;
        match (mask, self.mask_bits) {
            (Mask::Bits, None) => wrong("the mask is Bits, but the batch carries none".into()),
            (Mask::Bits, Some(bits)) => {
                let needed = longest.div_ceil(32);
                if bits.row_words < needed {
                    wrong(format!("row_words is {}; {longest} keys need {needed}", bits.row_words))
                } else if total_queries.checked_mul(bits.row_words).is_none_or(|n| bits.words.len() < n) {
                    wrong(format!(
                        "{} words for {total_queries} rows of {}",
                        bits.words.len(),
                        bits.row_words
                    ))
                } else {
                    Ok(())
                }
            }
            (_, Some(_)) => wrong(format!("the batch carries bits, but the mask is {mask:?}")),
            (_, None) => Ok(()),
        }
    }

    fn validate_sequence(&self, index: usize, mask: Mask, layout: &CacheLayout) -> Result<(), ProblemError> {
        let sequence = self.sequence(index);
        let (len, blocks, block_size) = (sequence.len, sequence.table.len(), layout.block_size);
        if len.div_ceil(block_size) > blocks {
            return Err(ProblemError::TableTooShort { sequence: index, len, blocks, block_size });
        }
        // Only what some query sees is followed; the union of intervals is checked as one interval, except
        // that a window without explicit positions frees the blocks behind its first query.
        let visible = match (mask, self.query_positions, sequence.query_len) {
            (_, _, 0) => 0..0,
            (Mask::Window { .. }, None, n) => {
                self.visible(mask, &sequence, 0).start..self.visible(mask, &sequence, n - 1).end
            }
            (Mask::Window { .. }, Some(_), n) => {
                let ranges = (0..n).map(|t| self.visible(mask, &sequence, t)).filter(|r| !r.is_empty());
                ranges.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end)).unwrap_or(0..0)
            }
            _ => 0..len,
        };
        if visible.is_empty() {
            return Ok(());
        }
        for entry in visible.start / block_size..visible.end.div_ceil(block_size) {
            let value = sequence.table.get(entry).copied().unwrap_or(-1);
            if value < 0 || value as usize >= layout.num_blocks {
                let num_blocks = layout.num_blocks;
                return Err(ProblemError::TableEntry { sequence: index, index: entry, value, num_blocks });
            }
        }
        Ok(())
    }
}

fn clamp(position: i64, len: usize) -> usize {
    usize::try_from(position.max(0)).map_or(len, |p| p.min(len))
}
