//! Inputs of an attention case: the step, its queries, and what a subject is given.

use super::super::masks::mask_words;
use super::super::subject::AttentionTask;
use super::super::{Buffer, Case, CaseMask, Random, Tables};
use super::SPARE_BLOCKS;
use super::shapes::scale_of;
use crate::{
    AttentionConfig, BlockTables, CacheLayout, HostTensor, MaskBits, PagedBatch, Problem, ProblemError,
    RowStrides,
};

/// Inputs of an attention case.
#[derive(Clone, Debug)]
pub struct AttentionData {
    /// The case.
    pub case: Case,
    /// What the layer computes.
    pub config: AttentionConfig,
    /// Where keys and values lie.
    pub layout: CacheLayout,
    /// Strides of queries.
    pub q_strides: RowStrides,
    /// Strides of outputs.
    pub out_strides: RowStrides,
    /// Queries.
    pub q: Buffer,
    /// The cache of keys; of both where they share memory.
    pub k: Buffer,
    /// The cache of values, if it is separate.
    pub v: Option<Buffer>,
    /// Where values begin in `k`, if they are not separate.
    pub v_offset: usize,
    /// Scale of each key head.
    pub k_scales: Vec<f32>,
    /// Scale of each value head.
    pub v_scales: Vec<f32>,
    /// Slope of each query head.
    pub alibi_slopes: Option<Vec<f32>>,
    /// Sink of each query head.
    pub sinks: Option<Vec<f32>>,
    /// See [`PagedBatch`].
    pub query_start: Vec<i32>,
    /// See [`PagedBatch`].
    pub seq_lens: Vec<i32>,
    /// Block table entries: padded rows or `indices`.
    pub entries: Vec<i32>,
    /// Length of a padded row.
    pub max_blocks: usize,
    /// `indptr` of CSR tables.
    pub indptr: Vec<i32>,
    /// See [`PagedBatch`].
    pub query_positions: Option<Vec<i32>>,
    /// See [`MaskBits`].
    pub mask_words: Vec<u32>,
    /// See [`MaskBits`].
    pub mask_row_words: usize,
}

impl AttentionData {
    /// Makes the data of a case; the same line gives the same data.
    pub fn generate(case: &Case) -> Self {
        let mut random = Random::new(case.seed);
        let config = case.config();
        let (q_strides, out_strides) = case.row_strides();
        let block_size = case.block_size;
        let mut query_start = vec![0i32];
        for shape in &case.sequences {
            query_start.push(query_start.last().copied().unwrap_or(0) + shape.queries as i32);
        }
        let total = case.sequences.iter().map(|shape| shape.queries).sum::<usize>();
        let seq_lens: Vec<i32> = case.sequences.iter().map(|shape| shape.keys as i32).collect();
        let query_positions = case.positions.then(|| {
            let shapes = case.sequences.iter();
            let rows = shapes.flat_map(|shape| std::iter::repeat_n(shape.keys, shape.queries));
            rows.map(|keys| random.below(keys + 6) as i32 - 2).collect::<Vec<i32>>()
        });
        let longest = case.sequences.iter().map(|shape| shape.keys).max().unwrap_or(0);
        let mask_row_words = longest.div_ceil(32) + 1;
        let mask_words = match case.mask {
            CaseMask::Bits => mask_words(&case.sequences, mask_row_words, &mut random),
            _ => Vec::new(),
        };
        let blocks_of = |keys: usize| keys.div_ceil(block_size);
        let num_blocks =
            case.sequences.iter().map(|shape| blocks_of(shape.keys)).sum::<usize>() + SPARE_BLOCKS;
        let layout = case.cache_layout(num_blocks);

        let mut data = Self {
            case: case.clone(),
            config,
            layout,
            q_strides,
            out_strides,
            q: Buffer::zeros(case.q_dtype, 0),
            k: Buffer::zeros(case.kv_dtype, 0),
            v: None,
            v_offset: 0,
            k_scales: case.scales(case.amplitude(), &mut random),
            v_scales: case.scales(2.0, &mut random),
            alibi_slopes: None,
            sinks: None,
            query_start,
            seq_lens,
            entries: Vec::new(),
            max_blocks: 0,
            indptr: Vec::new(),
            query_positions,
            mask_words,
            mask_row_words,
        };
        if case.alibi {
            data.alibi_slopes = Some((0..case.q_heads).map(|_| random.uniform(0.01, 0.6) as f32).collect());
        }
        if case.sinks {
            let reach = f64::from(case.scores);
            data.sinks =
                Some((0..case.q_heads).map(|_| random.uniform(-reach / 2.0, reach) as f32).collect());
        }
        data.make_queries(total, &mut random);
        data.make_cache(&mut random);
        data
    }

    fn make_queries(&mut self, total: usize, random: &mut Random) {
        let (heads, dim) = (self.config.q_heads, self.config.head_dim_qk);
        let len = self.q_strides.extent(total, heads, dim) as usize;
        let reach = self.case.amplitude();
        self.q = Buffer::poisoned(self.config.q_dtype, len, random);
        for row in 0..total {
            for head in 0..heads {
                let at = row * self.q_strides.token as usize + head * self.q_strides.head as usize;
                (0..dim).for_each(|d| self.q.set(at + d, random.uniform(-reach, reach)));
            }
        }
    }

    /// Keys.
    pub fn k_view(&self) -> HostTensor<'_> {
        self.k.as_ref()
    }

    /// Values.
    pub fn v_view(&self) -> HostTensor<'_> {
        match &self.v {
            Some(v) => v.as_ref(),
            None => self.k.from(self.v_offset),
        }
    }

    /// The step.
    pub fn batch(&self) -> PagedBatch<'_> {
        let block_tables = match self.case.tables {
            Tables::Padded => BlockTables::Padded { entries: &self.entries, max_blocks: self.max_blocks },
            Tables::Csr => BlockTables::Csr { indptr: &self.indptr, indices: &self.entries },
        };
        let bits = MaskBits { words: &self.mask_words, row_words: self.mask_row_words };
        PagedBatch {
            query_start: &self.query_start,
            seq_lens: &self.seq_lens,
            block_tables,
            query_positions: self.query_positions.as_deref(),
            mask_bits: (self.case.mask == CaseMask::Bits).then_some(bits),
        }
    }

    /// The checked problem.
    ///
    /// # Errors
    /// [`ProblemError`] if the case makes no sound problem.
    pub fn problem(&self) -> Result<Problem<'_>, ProblemError> {
        Problem::with_strides(&self.config, self.layout, self.q_strides, self.out_strides, self.batch())
    }

    /// What a subject is given.
    ///
    /// # Errors
    /// [`ProblemError`] if the case makes no sound problem.
    pub fn task(&self) -> Result<AttentionTask<'_>, ProblemError> {
        Ok(AttentionTask {
            problem: self.problem()?,
            q: self.q.as_ref(),
            k: self.k_view(),
            v: self.v_view(),
            k_scale: scale_of(self.case.scale, &self.k_scales),
            v_scale: scale_of(self.case.scale, &self.v_scales),
            alibi_slopes: self.alibi_slopes.as_deref(),
            sinks: self.sinks.as_deref(),
        })
    }

    /// Number of query rows.
    pub fn total_queries(&self) -> usize {
        self.query_start.last().map_or(0, |&end| end as usize)
    }

    /// A poisoned output of the right size.
    pub fn poisoned_out(&self) -> Buffer {
        let heads = self.config.q_heads;
        let len = self.out_strides.extent(self.total_queries(), heads, self.config.head_dim_v);
        Buffer::poisoned(self.config.q_dtype, len as usize, &mut Random::new(!self.case.seed))
    }

    /// A poisoned `lse` of the right size.
    pub fn poisoned_lse(&self) -> Vec<f32> {
        vec![f32::NAN; self.total_queries() * self.config.q_heads]
    }
}
