//! The description of a problem and its validation: the one place where shapes, strides, tables and masks
//! are checked. Backends take a [`Problem`] and trust it.

mod batch;
mod config;
mod error;
mod layout;
mod pairs;
mod write;

pub use batch::{BlockTables, MaskBits, PagedBatch, SequenceView};
pub use config::{AttentionConfig, MAX_HEAD_DIM, Mask};
pub use error::ProblemError;
pub use layout::{CacheLayout, KvStrides, MAX_BLOCK_SIZE, RowStrides};
pub use pairs::check_block_pairs;
#[cfg(any(feature = "cpu", feature = "cuda", feature = "wgpu"))]
pub(crate) use pairs::check_block_sizes;
pub use write::WriteKv;

/// A checked problem: what a layer computes, where its cache lies, and what this step asks for.
///
/// Only [`Problem::new`] makes one, so whoever holds it knows that
/// - the configuration is sound and every dtype combination is a known one,
/// - `query_start` rises from 0 and there is one length a sequence,
/// - every block table entry that a query can see names a block of the cache,
/// - strides do not make two elements of a cache share an address unless K aliases V, and no offset
///   overflows 64 bits.
#[derive(Clone, Copy, Debug)]
pub struct Problem<'a> {
    config: &'a AttentionConfig,
    layout: CacheLayout,
    q: RowStrides,
    out: RowStrides,
    batch: PagedBatch<'a>,
}

impl<'a> Problem<'a> {
    /// Checks a problem whose query and output rows are packed:
    /// `q` `[total_queries, q_heads, head_dim_qk]`, `out` `[total_queries, q_heads, head_dim_v]`.
    ///
    /// # Errors
    /// [`ProblemError`] names the field, its value and what it must be.
    pub fn new(
        config: &'a AttentionConfig,
        layout: CacheLayout,
        batch: PagedBatch<'a>,
    ) -> Result<Self, ProblemError> {
        let q = RowStrides::packed(config.q_heads, config.head_dim_qk);
        let out = RowStrides::packed(config.q_heads, config.head_dim_v);
        Self::with_strides(config, layout, q, out, batch)
    }

    /// As [`Problem::new`], for query and output rows with strides of their own (a fused QKV projection).
    ///
    /// # Errors
    /// [`ProblemError`] names the field, its value and what it must be.
    pub fn with_strides(
        config: &'a AttentionConfig,
        layout: CacheLayout,
        q: RowStrides,
        out: RowStrides,
        batch: PagedBatch<'a>,
    ) -> Result<Self, ProblemError> {
        config.validate()?;
        layout.validate(config)?;
        q.validate("q", config.q_heads, config.head_dim_qk)?;
        out.validate("out", config.q_heads, config.head_dim_v)?;
        batch.validate(config, &layout)?;
        Ok(Self { config, layout, q, out, batch })
    }

    /// What the layer computes.
    pub fn config(&self) -> &'a AttentionConfig {
        self.config
    }

    /// Where blocks, tokens and heads lie.
    pub fn layout(&self) -> &CacheLayout {
        &self.layout
    }

    /// Strides of the query rows.
    pub fn q_strides(&self) -> RowStrides {
        self.q
    }

    /// Strides of the output rows.
    pub fn out_strides(&self) -> RowStrides {
        self.out
    }

    /// What the step asks for.
    pub fn batch(&self) -> &PagedBatch<'a> {
        &self.batch
    }

    /// Number of sequences.
    pub fn num_sequences(&self) -> usize {
        self.batch.seq_lens.len()
    }

    /// Number of query rows of all sequences together.
    pub fn total_queries(&self) -> usize {
        self.batch.total_queries()
    }

    /// One sequence: its rows, its length, its block table.
    pub fn sequence(&self, index: usize) -> SequenceView<'a> {
        self.batch.sequence(index)
    }

    /// Elements that the query buffer must hold.
    pub fn q_extent(&self) -> u64 {
        self.q.extent(self.total_queries(), self.config.q_heads, self.config.head_dim_qk)
    }

    /// Elements that the output buffer must hold.
    pub fn out_extent(&self) -> u64 {
        self.out.extent(self.total_queries(), self.config.q_heads, self.config.head_dim_v)
    }

    /// Elements that the LSE buffer must hold: `[total_queries, q_heads]`.
    pub fn lse_extent(&self) -> u64 {
        (self.total_queries() * self.config.q_heads) as u64
    }
}
