//! Why a problem is refused: each message names the field, its value and what it must be.

use crate::DType;

/// What is wrong with a problem. Nothing has been computed or written when one is returned.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ProblemError {
    /// Heads do not divide.
    #[error(
        "q_heads is {q_heads} and kv_heads is {kv_heads}; q_heads must be a multiple of kv_heads and neither may be 0"
    )]
    Heads {
        /// Query heads.
        q_heads: usize,
        /// Key-value heads.
        kv_heads: usize,
    },
    /// A head dimension out of range.
    #[error("{field} is {value}; it must be between 1 and {max}")]
    HeadDim {
        /// Which.
        field: &'static str,
        /// Its value.
        value: usize,
        /// Largest allowed.
        max: usize,
    },
    /// Queries cannot be 8-bit.
    #[error("queries and outputs cannot be {dtype}; use f32, f16 or bf16 (fp8 is for the cache)")]
    QueryDType {
        /// Type asked for.
        dtype: DType,
    },
    /// A number that must be finite.
    #[error("{field} is {value}; it must be finite")]
    NotFinite {
        /// Which.
        field: &'static str,
        /// Its value.
        value: f32,
    },
    /// A soft cap that caps nothing.
    #[error("softcap is {value}; it must be finite and above 0 (leave it out for no cap)")]
    Softcap {
        /// Its value.
        value: f32,
    },
    /// A window that sees nothing.
    #[error(
        "the window's size is 0; a query sees at least the key at its own position, so it must be at least 1"
    )]
    EmptyWindow,
    /// Block sizes are powers of two.
    #[error("block_size is {value}; it must be a power of two from 1 to 256")]
    BlockSize {
        /// Its value.
        value: usize,
    },
    /// Strides under which rows overlap.
    #[error(
        "{tensor}: {field} stride is {value} elements but the {what} inside it take {needed}; they would overlap"
    )]
    Overlap {
        /// Which tensor.
        tensor: &'static str,
        /// Which stride.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What lies inside.
        what: &'static str,
        /// Elements needed.
        needed: u64,
    },
    /// The last element's offset does not fit 63 bits.
    #[error("{tensor}: offsets overflow 63 bits with these strides and sizes")]
    TooLarge {
        /// Which tensor.
        tensor: &'static str,
    },
    /// `query_start` must rise from 0.
    #[error("query_start[{index}] is {value}; it must start at 0 and never fall")]
    QueryStart {
        /// Where.
        index: usize,
        /// Its value.
        value: i32,
    },
    /// One more start than lengths.
    #[error(
        "query_start has {starts} entries and seq_lens {sequences}; query_start needs one more than seq_lens"
    )]
    SequenceCount {
        /// Entries of `query_start`.
        starts: usize,
        /// Entries of `seq_lens`.
        sequences: usize,
    },
    /// A negative length.
    #[error("seq_lens[{sequence}] is {value}; a length cannot be negative")]
    SeqLen {
        /// Which sequence.
        sequence: usize,
        /// Its value.
        value: i32,
    },
    /// The table's shape does not fit the batch.
    #[error("block tables: {0}")]
    TableShape(String),
    /// A sequence has more keys than its table has room for.
    #[error("sequence {sequence} has {len} keys but its block table only {blocks} blocks of {block_size}")]
    TableTooShort {
        /// Which sequence.
        sequence: usize,
        /// Its keys.
        len: usize,
        /// Blocks in its table.
        blocks: usize,
        /// Tokens a block.
        block_size: usize,
    },
    /// A visible entry names no block.
    #[error(
        "sequence {sequence}: block table entry {index} is {value}, but the cache has {num_blocks} blocks"
    )]
    TableEntry {
        /// Which sequence.
        sequence: usize,
        /// Which entry.
        index: usize,
        /// Its value.
        value: i32,
        /// Blocks of the cache.
        num_blocks: usize,
    },
    /// `query_positions` has another number of rows.
    #[error("query_positions has {rows} entries; it needs one for each of the {total_queries} query rows")]
    QueryPositions {
        /// Entries.
        rows: usize,
        /// Rows.
        total_queries: usize,
    },
    /// Mask bits are missing, unasked for or too few.
    #[error("mask_bits: {0}")]
    MaskBits(String),
    /// A slot outside of the cache.
    #[error("slots[{token}] is {value}, but the cache has {slots} slots (a negative slot skips the token)")]
    Slot {
        /// Which token.
        token: usize,
        /// Its value.
        value: i64,
        /// Slots of the cache.
        slots: u64,
    },
    /// A buffer is shorter than its shape.
    #[error("{tensor} holds {len} elements; its shape and strides need {needed}")]
    BufferTooShort {
        /// Which.
        tensor: &'static str,
        /// Elements there.
        len: u64,
        /// Elements needed.
        needed: u64,
    },
    /// A buffer has another dtype than the configuration.
    #[error("{tensor} is {found}; the configuration says {expected}")]
    BufferDType {
        /// Which.
        tensor: &'static str,
        /// Type there.
        found: DType,
        /// Type asked for.
        expected: DType,
    },
    /// An input that the configuration asks for is missing, or one is there that it does not ask for.
    #[error("{input}: {problem}")]
    Input {
        /// Which.
        input: &'static str,
        /// What is wrong and what to do.
        problem: String,
    },
}
