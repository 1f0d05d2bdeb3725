//! A case's inputs: shapes, block tables, tensors, and poison wherever a backend has no business.

use super::masks::mask_words;
use super::oracle;
use super::subject::{AttentionTask, CopyTask, MergePart, MergeTask, Scale, SwapTask, WriteTask};
use super::{Buffer, Case, CaseMask, Layout, Random, Rows, ScaleKind, Tables};
use crate::{
    AttentionConfig, BlockTables, CacheLayout, DType, HostTensor, KvStrides, Mask, MaskBits, PagedBatch,
    Problem, ProblemError, RowStrides, WriteKv,
};

/// Blocks that no sequence owns.
const SPARE_BLOCKS: usize = 3;

impl Case {
    /// What the case's layer computes.
    pub fn config(&self) -> AttentionConfig {
        AttentionConfig {
            q_heads: self.q_heads,
            kv_heads: self.kv_heads,
            head_dim_qk: self.head_dim_qk,
            head_dim_v: self.head_dim_v,
            q_dtype: self.q_dtype,
            kv_dtype: self.kv_dtype,
            // Not quite the usual scale, so that a backend that assumes it is found out.
            scale: 0.9 / (self.head_dim_qk as f32).sqrt(),
            mask: match self.mask {
                CaseMask::None => Mask::None,
                CaseMask::Causal => Mask::Causal,
                CaseMask::Window(size) => Mask::Window { size },
                CaseMask::Bits => Mask::Bits,
            },
            softcap: self.softcap,
            alibi: self.alibi,
            sinks: self.sinks,
        }
    }

    /// Strides of a cache with so many blocks.
    pub fn cache_layout(&self, num_blocks: usize) -> CacheLayout {
        let config = self.config();
        let (heads, size) = (self.kv_heads as u64, self.block_size as u64);
        let (qk, v) = (self.head_dim_qk as u64, self.head_dim_v as u64);
        let nhd = CacheLayout::nhd(num_blocks, self.block_size, &config);
        match self.layout {
            Layout::Nhd => nhd,
            Layout::Hnd => CacheLayout::hnd(num_blocks, self.block_size, &config),
            Layout::Gaps => {
                let strides = |dim: u64| {
                    let head = dim + 16;
                    let token = heads * head + 32;
                    KvStrides { block: size * token + 64, token, head }
                };
                CacheLayout { k: strides(qk), v: strides(v), ..nhd }
            }
            Layout::Interleaved => {
                let block = size * heads * (qk + v);
                CacheLayout { k: KvStrides { block, ..nhd.k }, v: KvStrides { block, ..nhd.v }, ..nhd }
            }
            Layout::Shared => CacheLayout { v: nhd.k, ..nhd },
        }
    }

    /// Strides of queries and of outputs.
    fn row_strides(&self) -> (RowStrides, RowStrides) {
        let (q_heads, kv_heads) = (self.q_heads as u64, self.kv_heads as u64);
        let (qk, v) = (self.head_dim_qk as u64, self.head_dim_v as u64);
        match self.rows {
            Rows::Packed => (
                RowStrides::packed(self.q_heads, self.head_dim_qk),
                RowStrides::packed(self.q_heads, self.head_dim_v),
            ),
            Rows::Fused => (
                RowStrides { token: (q_heads + kv_heads) * qk + kv_heads * v, head: qk },
                RowStrides { token: q_heads * (v + 8) + 24, head: v + 8 },
            ),
        }
    }

    /// Range of the elements of queries and keys, so that the largest scores are about `self.scores`: a dot
    /// product of uniform numbers from −a to a has the standard deviation a²/3 · √dim, and the largest of
    /// many lies three to four deviations out.
    fn amplitude(&self) -> f64 {
        f64::from(self.scores).max(0.0).sqrt()
    }

    /// A scale for each key-value head, such that stored numbers lie within ±`reach`.
    fn scales(&self, reach: f64, random: &mut Random) -> Vec<f32> {
        let stored = 8.0;
        let one = (reach / stored * random.uniform(1.0, 2.0)) as f32;
        (0..self.kv_heads)
            .map(|_| match self.scale {
                ScaleKind::One => 1.0,
                ScaleKind::Tensor => one,
                ScaleKind::Head => (reach / stored * random.uniform(1.0, 2.0)) as f32,
            })
            .collect()
    }
}

fn scale_of(kind: ScaleKind, scales: &[f32]) -> Scale<'_> {
    match (kind, scales.first()) {
        (ScaleKind::Tensor, Some(&scale)) => Scale::PerTensor(scale),
        (ScaleKind::Head, _) => Scale::PerHead(scales),
        _ => Scale::One,
    }
}

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

    /// Block tables and what lies in the blocks.
    fn make_cache(&mut self, random: &mut Random) {
        let case = self.case.clone();
        let (block_size, num_blocks) = (case.block_size, self.layout.num_blocks);
        let mut free: Vec<i32> = (0..num_blocks as i32).collect();
        random.shuffle(&mut free);
        let wild = [i32::MIN, i32::MAX, num_blocks as i32, num_blocks as i32 + 7, -77];

        // The tables, as they would be without tricks.
        let mut tables: Vec<Vec<i32>> = Vec::new();
        let shortest = case.sequences.iter().map(|shape| shape.keys).filter(|&keys| keys > 0).min();
        let common = shortest.unwrap_or(0).div_ceil(block_size).div_ceil(2);
        let mut prefix: Vec<i32> = Vec::new();
        for shape in &case.sequences {
            let blocks = shape.keys.div_ceil(block_size);
            let mut table: Vec<i32> = Vec::new();
            if case.shared_prefix && blocks > 0 {
                table.extend(prefix.iter().take(blocks));
            }
            while table.len() < blocks {
                table.extend(free.pop());
            }
            if case.shared_prefix && prefix.is_empty() && blocks > 0 {
                prefix = table.iter().copied().take(common).collect();
            }
            tables.push(table);
        }

        // Poison everywhere, numbers where a key may be read.
        let sides = self.allocate(random);
        for (sequence, table) in tables.iter_mut().enumerate() {
            let seen: Vec<bool> = oracle::seen_keys(self, sequence);
            let first = seen.iter().position(|&seen| seen).unwrap_or(seen.len());
            let last = seen.iter().rposition(|&seen| seen).map_or(0, |last| last + 1);
            // Without queries, or behind a window, nobody may follow an entry.
            let no_queries = case.sequences[sequence].queries == 0;
            let windowed = matches!(case.mask, CaseMask::Window(_));
            for key in 0..seen.len() {
                let unused = no_queries || (windowed && !(first..last).contains(&key));
                let within =
                    windowed && (first / block_size..last.div_ceil(block_size)).contains(&(key / block_size));
                if (unused && !within) || (case.poison_unseen && !seen[key]) {
                    continue;
                }
                self.fill(table[key / block_size] as usize, key % block_size, sides, random);
            }
            for (index, entry) in table.iter_mut().enumerate() {
                let within = first / block_size <= index && index < last.div_ceil(block_size);
                if no_queries || (windowed && !within) {
                    *entry = random.pick(-1, &wild);
                }
            }
        }

        // The form of the tables.
        match case.tables {
            Tables::Padded => {
                self.max_blocks = tables.iter().map(Vec::len).max().unwrap_or(0) + random.below(3);
                for table in &tables {
                    self.entries.extend(table);
                    (table.len()..self.max_blocks).for_each(|_| self.entries.push(random.pick(-1, &wild)));
                }
            }
            Tables::Csr => {
                (0..2).for_each(|_| self.entries.push(random.pick(-1, &wild)));
                self.indptr.push(self.entries.len() as i32);
                for table in &tables {
                    self.entries.extend(table);
                    (0..random.below(3)).for_each(|_| self.entries.push(random.pick(-1, &wild)));
                    self.indptr.push(self.entries.len() as i32);
                }
                self.entries.push(random.pick(-1, &wild));
            }
        }
    }

    /// Makes the poisoned buffers; says whether values have to be filled apart from keys.
    fn allocate(&mut self, random: &mut Random) -> bool {
        let (k_len, v_len) =
            (self.layout.k_extent(&self.config) as usize, self.layout.v_extent(&self.config) as usize);
        let dtype = self.config.kv_dtype;
        match self.case.layout {
            Layout::Shared => {
                self.k = Buffer::poisoned(dtype, k_len.max(v_len), random);
                false
            }
            Layout::Interleaved => {
                self.v_offset = self.case.block_size * self.config.kv_heads * self.config.head_dim_qk;
                self.k = Buffer::poisoned(dtype, k_len.max(self.v_offset + v_len), random);
                true
            }
            _ => {
                self.k = Buffer::poisoned(dtype, k_len, random);
                self.v = Some(Buffer::poisoned(dtype, v_len, random));
                true
            }
        }
    }

    /// Puts numbers where one token's keys and values belong.
    fn fill(&mut self, block: usize, place: usize, values: bool, random: &mut Random) {
        let reach = self.case.amplitude();
        let at = |strides: KvStrides, head: usize| {
            block * strides.block as usize + place * strides.token as usize + head * strides.head as usize
        };
        for head in 0..self.config.kv_heads {
            let scale = f64::from(self.k_scales[head]);
            let start = at(self.layout.k, head);
            for d in 0..self.config.head_dim_qk {
                self.k.set(start + d, random.uniform(-reach, reach) / scale);
            }
            if !values {
                continue;
            }
            let scale = f64::from(self.v_scales[head]);
            let start = at(self.layout.v, head);
            for d in 0..self.config.head_dim_v {
                // Not around 0, so that a wrong normalisation shows.
                let value = random.uniform(-1.0, 2.0) / scale;
                match &mut self.v {
                    Some(v) => v.set(start + d, value),
                    None => self.k.set(self.v_offset + start + d, value),
                }
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

/// Inputs of a `write_kv` case.
#[derive(Clone, Debug)]
pub struct WriteData {
    /// The case.
    pub case: Case,
    /// What the layer computes.
    pub config: AttentionConfig,
    /// Where keys and values lie.
    pub layout: CacheLayout,
    /// `[tokens]`
    pub slots: Vec<i64>,
    /// Strides of new keys and new values.
    pub strides: (RowStrides, RowStrides),
    /// New keys and new values.
    pub source: (Buffer, Buffer),
    /// Scales of keys and values.
    pub scales: (Vec<f32>, Vec<f32>),
}

impl WriteData {
    /// Makes the data of a case.
    pub fn generate(case: &Case) -> Self {
        let mut random = Random::new(case.seed);
        let config = case.config();
        let tokens: usize = case.sequences.iter().map(|shape| shape.queries).sum();
        let layout = case.cache_layout(tokens.div_ceil(case.block_size) + SPARE_BLOCKS);
        let mut slots: Vec<i64> = (0..layout.slots() as i64).collect();
        random.shuffle(&mut slots);
        slots.truncate(tokens);
        for slot in &mut slots {
            if random.one_in(7) {
                *slot = random.pick(-1, &[-5, i64::MIN]);
            }
        }
        let (heads, qk, v) = (config.kv_heads as u64, config.head_dim_qk as u64, config.head_dim_v as u64);
        let token = config.q_heads as u64 * qk + heads * (qk + v);
        let strides = match case.rows {
            Rows::Packed => {
                let packed = WriteKv::packed(&slots, &config);
                (packed.k, packed.v)
            }
            Rows::Fused => (RowStrides { token, head: qk }, RowStrides { token, head: v }),
        };
        let mut source = |strides: RowStrides, dim: usize, reach: f64| {
            let len = strides.extent(tokens, config.kv_heads, dim) as usize;
            let mut buffer = Buffer::poisoned(case.q_dtype, len, &mut random);
            for token in 0..tokens {
                for head in 0..config.kv_heads {
                    let at = token * strides.token as usize + head * strides.head as usize;
                    for d in 0..dim {
                        // A few outliers, so that 8-bit caches saturate.
                        let outlier = if random.one_in(50) { 300.0 } else { 1.0 };
                        buffer.set(at + d, random.uniform(-reach, reach) * outlier);
                    }
                }
            }
            buffer
        };
        let reach = case.amplitude();
        let source =
            (source(strides.0, config.head_dim_qk, reach), source(strides.1, config.head_dim_v, 2.0));
        let scales = (case.scales(reach, &mut random), case.scales(2.0, &mut random));
        Self { case: case.clone(), config, layout, slots, strides, source, scales }
    }

    /// What a subject is given.
    pub fn task(&self) -> WriteTask<'_> {
        WriteTask {
            config: &self.config,
            layout: self.layout,
            write: WriteKv { slots: &self.slots, k: self.strides.0, v: self.strides.1 },
            k: self.source.0.as_ref(),
            v: self.source.1.as_ref(),
            k_scale: scale_of(self.case.scale, &self.scales.0),
            v_scale: scale_of(self.case.scale, &self.scales.1),
        }
    }
}

/// A cache with random bits that are numbers.
fn random_cache(config: &AttentionConfig, layout: &CacheLayout, random: &mut Random) -> (Buffer, Buffer) {
    let mut buffer = |len: u64, dtype: DType| {
        let mut buffer = Buffer::zeros(dtype, len as usize);
        (0..buffer.len()).for_each(|i| buffer.set(i, random.uniform(-100.0, 100.0)));
        buffer
    };
    (buffer(layout.k_extent(config), config.kv_dtype), buffer(layout.v_extent(config), config.kv_dtype))
}

/// Inputs of a `copy_blocks` case.
#[derive(Clone, Debug)]
pub struct CopyData {
    /// What the layer computes.
    pub config: AttentionConfig,
    /// Where keys and values lie.
    pub layout: CacheLayout,
    /// Block to read, block to write.
    pub pairs: Vec<(u32, u32)>,
    /// Keys and values before the copy.
    pub cache: (Buffer, Buffer),
}

impl CopyData {
    /// Makes the data of a case.
    pub fn generate(case: &Case) -> Self {
        let mut random = Random::new(case.seed);
        let config = case.config();
        // Some blocks are copied more than once, none to two places' harm: sources and targets are disjoint.
        let sources = case.count.div_ceil(2).max(1);
        let layout = case.cache_layout(sources + case.count + SPARE_BLOCKS);
        let mut blocks: Vec<u32> = (0..layout.num_blocks as u32).collect();
        random.shuffle(&mut blocks);
        let (from, to) = blocks.split_at(sources);
        let pairs = to.iter().take(case.count).map(|&to| (from[random.below(sources)], to)).collect();
        let cache = random_cache(&config, &layout, &mut random);
        Self { config, layout, pairs, cache }
    }

    /// What a subject is given.
    pub fn task(&self) -> CopyTask<'_> {
        CopyTask { config: &self.config, layout: self.layout, pairs: &self.pairs }
    }
}

/// Inputs of a `swap_blocks` case.
#[derive(Clone, Debug)]
pub struct SwapData {
    /// What the layer computes.
    pub config: AttentionConfig,
    /// The cache that is read.
    pub source_layout: CacheLayout,
    /// The cache that is written.
    pub target_layout: CacheLayout,
    /// Block to read, block to write.
    pub pairs: Vec<(u32, u32)>,
    /// Keys and values that are read.
    pub source: (Buffer, Buffer),
    /// Keys and values before they are written.
    pub target: (Buffer, Buffer),
}

impl SwapData {
    /// Makes the data of a case.
    pub fn generate(case: &Case) -> Self {
        let mut random = Random::new(case.seed);
        let config = case.config();
        let source_layout = case.cache_layout(case.count + SPARE_BLOCKS);
        let target_layout = case.cache_layout(2 * case.count + SPARE_BLOCKS);
        let mut order = |blocks: usize| {
            let mut order: Vec<u32> = (0..blocks as u32).collect();
            random.shuffle(&mut order);
            order
        };
        let (from, to) = (order(source_layout.num_blocks), order(target_layout.num_blocks));
        let pairs = from.into_iter().zip(to).take(case.count).collect();
        let source = random_cache(&config, &source_layout, &mut random);
        let target = random_cache(&config, &target_layout, &mut random);
        Self { config, source_layout, target_layout, pairs, source, target }
    }

    /// What a subject is given.
    pub fn task(&self) -> SwapTask<'_> {
        SwapTask {
            config: &self.config,
            source_layout: self.source_layout,
            target_layout: self.target_layout,
            pairs: &self.pairs,
            k: self.source.0.as_ref(),
            v: self.source.1.as_ref(),
        }
    }
}

/// Inputs of a `merge_states` case.
#[derive(Clone, Debug)]
pub struct MergeData {
    /// Query rows.
    pub rows: usize,
    /// Heads of a row.
    pub heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Outputs and LSE of each part.
    pub parts: Vec<(Buffer, Vec<f32>)>,
}

impl MergeData {
    /// Makes the data of a case.
    pub fn generate(case: &Case) -> Self {
        let mut random = Random::new(case.seed);
        let rows: usize = case.sequences.iter().map(|shape| shape.queries).sum();
        let (heads, head_dim) = (case.q_heads, case.head_dim_v);
        let reach = f64::from(case.scores);
        // Some rows are empty in every part.
        let dead: Vec<bool> = (0..rows * heads).map(|_| random.one_in(9)).collect();
        let part = |random: &mut Random| {
            let mut out = Buffer::poisoned(case.q_dtype, rows * heads * head_dim, random);
            let mut lse = vec![f32::NEG_INFINITY; rows * heads];
            for row in 0..rows * heads {
                if dead[row] || random.one_in(4) {
                    // The outputs of an empty part are zeros.
                    (0..head_dim).for_each(|d| out.set(row * head_dim + d, 0.0));
                    continue;
                }
                lse[row] = random.uniform(-reach, reach) as f32;
                (0..head_dim).for_each(|d| out.set(row * head_dim + d, random.uniform(-1.0, 2.0)));
            }
            (out, lse)
        };
        let parts = (0..case.count.max(1)).map(|_| part(&mut random)).collect();
        Self { rows, heads, head_dim, parts }
    }

    /// The parts as a subject is given them.
    pub fn merge_parts(&self) -> Vec<MergePart<'_>> {
        self.parts.iter().map(|(out, lse)| MergePart { out: out.as_ref(), lse }).collect()
    }

    /// What a subject is given.
    pub fn task<'a>(&self, parts: &'a [MergePart<'a>]) -> MergeTask<'a> {
        MergeTask { rows: self.rows, heads: self.heads, head_dim: self.head_dim, parts }
    }
}
