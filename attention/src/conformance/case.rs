//! A case: everything that decides a problem's shape and data, and its form as one line of text.

use crate::{DType, MAX_BLOCK_SIZE, MAX_HEAD_DIM};
use std::fmt;
use std::str::FromStr;

/// What is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Attention over a paged cache.
    Attention,
    /// New keys and values into their slots.
    WriteKv,
    /// Blocks within a cache.
    CopyBlocks,
    /// Blocks between two caches.
    SwapBlocks,
    /// Partial results by their LSE.
    MergeStates,
}

/// How keys and values lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Layout {
    /// `[blocks, block_size, kv_heads, head_dim]`
    Nhd,
    /// `[blocks, kv_heads, block_size, head_dim]`
    Hnd,
    /// As `Nhd` with room after each head, token and block.
    Gaps,
    /// `[blocks, 2, block_size, kv_heads, head_dim]`, keys and values in one buffer. For operations that
    /// write, two buffers with those strides.
    Interleaved,
    /// Values are the first `head_dim_v` elements of keys (MLA). Attention only.
    Shared,
}

/// How block tables are given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Tables {
    /// `[sequences, max_blocks]`, wild entries behind each sequence's own.
    Padded,
    /// `indptr` and `indices`, with wild entries at each end.
    Csr,
}

/// How queries, outputs and new keys and values lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rows {
    /// Without gaps.
    Packed,
    /// As parts of a fused query-key-value projection; outputs with gaps.
    Fused,
}

/// Which keys a query sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CaseMask {
    /// All.
    None,
    /// Those at its position or before.
    Causal,
    /// The last so many of those.
    Window(usize),
    /// Random ones.
    Bits,
}

/// What stored keys and values are multiplied with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScaleKind {
    /// Nothing.
    One,
    /// One scale for each tensor.
    Tensor,
    /// One for each key-value head.
    Head,
}

/// A sequence's number of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SequenceShape {
    /// New tokens.
    pub queries: usize,
    /// Keys, those of the new tokens included.
    pub keys: usize,
}

/// One case of the conformance suite.
#[derive(Clone, Debug, PartialEq)]
pub struct Case {
    /// What is computed.
    pub operation: Operation,
    /// Type of queries, outputs, new keys and values.
    pub q_dtype: DType,
    /// Type of the cache.
    pub kv_dtype: DType,
    /// Query heads.
    pub q_heads: usize,
    /// Key-value heads.
    pub kv_heads: usize,
    /// Elements of a query or key head.
    pub head_dim_qk: usize,
    /// Elements of a value or output head.
    pub head_dim_v: usize,
    /// Tokens a block.
    pub block_size: usize,
    /// Strides of the cache.
    pub layout: Layout,
    /// Strides of rows.
    pub rows: Rows,
    /// Form of the block tables.
    pub tables: Tables,
    /// Which keys are seen.
    pub mask: CaseMask,
    /// Explicit, random positions of the queries.
    pub positions: bool,
    /// Sequences share the blocks of a common prefix.
    pub shared_prefix: bool,
    /// Keys that no query of their sequence sees are poisoned too, not only those past the length.
    pub poison_unseen: bool,
    /// Soft cap of the scores.
    pub softcap: Option<f32>,
    /// Linear biases.
    pub alibi: bool,
    /// Attention sinks.
    pub sinks: bool,
    /// Scales of the cache.
    pub scale: ScaleKind,
    /// About how large the largest scores are.
    pub scores: f32,
    /// The batch. `write_kv` writes as many tokens as there are queries; `merge_states` has a row for each.
    pub sequences: Vec<SequenceShape>,
    /// Pairs of a copy or swap, parts of a merge.
    pub count: usize,
    /// Seed of the data.
    pub seed: u64,
}

impl Default for Case {
    fn default() -> Self {
        Self {
            operation: Operation::Attention,
            q_dtype: DType::F32,
            kv_dtype: DType::F32,
            q_heads: 4,
            kv_heads: 2,
            head_dim_qk: 64,
            head_dim_v: 64,
            block_size: 16,
            layout: Layout::Nhd,
            rows: Rows::Packed,
            tables: Tables::Padded,
            mask: CaseMask::Causal,
            positions: false,
            shared_prefix: false,
            poison_unseen: false,
            softcap: None,
            alibi: false,
            sinks: false,
            scale: ScaleKind::One,
            scores: 8.0,
            sequences: Vec::new(),
            count: 0,
            seed: 0,
        }
    }
}

/// Names of the values of an enum in a case's line.
macro_rules! names {
    ($type:ident, $($value:ident = $name:literal),*) => {
        impl $type {
            const NAMES: &'static [(Self, &'static str)] = &[$((Self::$value, $name)),*];
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$value => $name),* })
            }
        }

        impl FromStr for $type {
            type Err = ParseCaseError;

            fn from_str(text: &str) -> Result<Self, ParseCaseError> {
                let found = Self::NAMES.iter().find(|(_, name)| *name == text);
                let expected = || Self::NAMES.iter().map(|(_, name)| *name).collect::<Vec<_>>().join(", ");
                found.map(|(value, _)| *value).ok_or_else(|| ParseCaseError::value(text, &expected()))
            }
        }
    };
}

names!(
    Operation,
    Attention = "attention",
    WriteKv = "write_kv",
    CopyBlocks = "copy_blocks",
    SwapBlocks = "swap_blocks",
    MergeStates = "merge_states"
);
names!(Layout, Nhd = "nhd", Hnd = "hnd", Gaps = "gaps", Interleaved = "interleaved", Shared = "shared");
names!(Tables, Padded = "padded", Csr = "csr");
names!(Rows, Packed = "packed", Fused = "fused");
names!(ScaleKind, One = "one", Tensor = "tensor", Head = "head");

/// A line that is no case.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ParseCaseError(String);

impl ParseCaseError {
    fn value(text: &str, expected: &str) -> Self {
        Self(format!("'{text}' is not one of: {expected}"))
    }
}

impl fmt::Display for CaseMask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Causal => f.write_str("causal"),
            Self::Window(size) => write!(f, "window:{size}"),
            Self::Bits => f.write_str("bits"),
        }
    }
}

impl FromStr for CaseMask {
    type Err = ParseCaseError;

    fn from_str(text: &str) -> Result<Self, ParseCaseError> {
        match (text, text.strip_prefix("window:").map(str::parse)) {
            ("none", _) => Ok(Self::None),
            ("causal", _) => Ok(Self::Causal),
            ("bits", _) => Ok(Self::Bits),
            (_, Some(Ok(size))) => Ok(Self::Window(size)),
            _ => Err(ParseCaseError::value(text, "none, causal, bits, window:SIZE")),
        }
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let default = Self::default();
        write!(
            f,
            "{} q={} kv={} heads={}/{} dim={}",
            self.operation, self.q_dtype, self.kv_dtype, self.q_heads, self.kv_heads, self.head_dim_qk
        )?;
        if self.head_dim_v != self.head_dim_qk {
            write!(f, " dim_v={}", self.head_dim_v)?;
        }
        write!(f, " block={} mask={}", self.block_size, self.mask)?;
        let mut option = |name: &str, value: &dyn fmt::Display, shown: bool| match shown {
            true => write!(f, " {name}={value}"),
            false => Ok(()),
        };
        option("layout", &self.layout, self.layout != default.layout)?;
        option("rows", &self.rows, self.rows != default.rows)?;
        option("tables", &self.tables, self.tables != default.tables)?;
        option("scale", &self.scale, self.scale != default.scale)?;
        option("softcap", &self.softcap.unwrap_or(0.0), self.softcap.is_some())?;
        option("scores", &self.scores, self.scores != default.scores)?;
        option("count", &self.count, self.count != default.count)?;
        let flags = [
            ("positions", self.positions),
            ("shared_prefix", self.shared_prefix),
            ("poison_unseen", self.poison_unseen),
            ("alibi", self.alibi),
            ("sinks", self.sinks),
        ];
        for (name, _) in flags.iter().filter(|(_, set)| *set) {
            write!(f, " {name}")?;
        }
        if !self.sequences.is_empty() {
            f.write_str(" sequences=")?;
        }
        // Runs of equal sequences as `times*queries:keys`.
        for (i, run) in self.sequences.chunk_by(PartialEq::eq).enumerate() {
            f.write_str(if i == 0 { "" } else { "," })?;
            if run.len() > 1 {
                write!(f, "{}*", run.len())?;
            }
            if let Some(shape) = run.first() {
                write!(f, "{}:{}", shape.queries, shape.keys)?;
            }
        }
        write!(f, " seed={}", self.seed)
    }
}

impl FromStr for Case {
    type Err = ParseCaseError;

    fn from_str(line: &str) -> Result<Self, ParseCaseError> {
        let mut words = line.split_whitespace();
        let operation = words.next().ok_or_else(|| ParseCaseError("the line is empty".into()))?;
        let mut case = Self { operation: operation.parse()?, ..Self::default() };
        let mut dim_v = None;
        for word in words {
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            let number = || {
                value.parse::<usize>().map_err(|_| ParseCaseError(format!("'{word}' needs a whole number")))
            };
            let real = || {
                let real = value.parse::<f32>().ok().filter(|x| x.is_finite());
                real.ok_or_else(|| ParseCaseError(format!("'{word}' needs a number")))
            };
            let dtype =
                || value.parse::<DType>().map_err(|error| ParseCaseError(format!("'{word}': {error}")));
            match name {
                "q" => case.q_dtype = dtype()?,
                "kv" => case.kv_dtype = dtype()?,
                "heads" => {
                    let (q, kv) = pair(value, '/').ok_or_else(|| {
                        ParseCaseError(format!("'{word}' must look like heads=Q_HEADS/KV_HEADS"))
                    })?;
                    (case.q_heads, case.kv_heads) = (q, kv);
                }
                "dim" => case.head_dim_qk = number()?,
                "dim_v" => dim_v = Some(number()?),
                "block" => case.block_size = number()?,
                "mask" => case.mask = value.parse()?,
                "layout" => case.layout = value.parse()?,
                "rows" => case.rows = value.parse()?,
                "tables" => case.tables = value.parse()?,
                "scale" => case.scale = value.parse()?,
                "softcap" => case.softcap = Some(real()?),
                "scores" => case.scores = real()?,
                "count" => case.count = number()?,
                "seed" => case.seed = number()? as u64,
                "positions" => case.positions = true,
                "shared_prefix" => case.shared_prefix = true,
                "poison_unseen" => case.poison_unseen = true,
                "alibi" => case.alibi = true,
                "sinks" => case.sinks = true,
                "sequences" => case.sequences = sequences(value)?,
                _ => return Err(ParseCaseError(format!("'{word}' is no part of a case"))),
            }
        }
        case.head_dim_v = dim_v.unwrap_or(case.head_dim_qk);
        case.check()?;
        Ok(case)
    }
}

impl Case {
    /// Refuses shapes for which no data can be made. Everything else is up to the problem's own validation.
    fn check(&self) -> Result<(), ParseCaseError> {
        let wrong = |text: &str| Err(ParseCaseError(text.into()));
        // A line may come from anyone: what it asks for must fit a test machine.
        const MOST: usize = 1 << 20;
        let dims = 1..=MAX_HEAD_DIM;
        let total = |f: fn(&SequenceShape) -> usize| {
            self.sequences.iter().try_fold(0usize, |sum, shape| sum.checked_add(f(shape)))
        };
        if !dims.contains(&self.head_dim_qk) || !dims.contains(&self.head_dim_v) {
            return wrong("dim and dim_v must be from 1 to 256");
        }
        if !self.block_size.is_power_of_two() || self.block_size > MAX_BLOCK_SIZE {
            return wrong("block must be a power of two from 1 to 256");
        }
        if self.kv_heads == 0 || !self.q_heads.is_multiple_of(self.kv_heads) || self.q_heads > 4096 {
            return wrong("heads must be Q_HEADS/KV_HEADS with Q_HEADS a multiple of KV_HEADS, at most 4096");
        }
        if self.q_heads == 0 || self.q_dtype.is_fp8() {
            return wrong("there must be query heads, of f32, f16 or bf16");
        }
        if self.layout == Layout::Shared && self.head_dim_v > self.head_dim_qk {
            return wrong("layout=shared needs dim_v of at most dim");
        }
        if total(|shape| shape.queries).is_none_or(|n| n > MOST)
            || total(|shape| shape.keys).is_none_or(|n| n > MOST)
            || self.count > MOST
        {
            return wrong("the sequences or the count are too large for a test");
        }
        Ok(())
    }
}

fn pair(text: &str, separator: char) -> Option<(usize, usize)> {
    let (a, b) = text.split_once(separator)?;
    Some((a.parse().ok()?, b.parse().ok()?))
}

fn sequences(text: &str) -> Result<Vec<SequenceShape>, ParseCaseError> {
    let mut shapes = Vec::new();
    for part in text.split(',') {
        let wrong = || ParseCaseError(format!("'{part}' must look like QUERIES:KEYS or TIMES*QUERIES:KEYS"));
        let (times, shape) = match part.split_once('*') {
            Some((times, shape)) => (times.parse::<usize>().map_err(|_| wrong())?, shape),
            None => (1, part),
        };
        let (queries, keys) = pair(shape, ':').ok_or_else(wrong)?;
        if times > 1 << 16 {
            return Err(wrong());
        }
        shapes.extend(std::iter::repeat_n(SequenceShape { queries, keys }, times));
    }
    Ok(shapes)
}
