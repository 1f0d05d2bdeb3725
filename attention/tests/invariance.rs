//! The bits of an output row depend on that row alone: not on its batch, the chunking of its prompt, the block
//! size, the layout, the form of the tables or the threads.
#![expect(clippy::unwrap_used, reason = "a test may stop where it stands")]

use pagewise_attention::conformance::{
    self, AttentionData, Buffer, Case, CaseMask, Layout, Random, SequenceShape, Tables, fresh_seed,
};
use pagewise_attention::cpu::{Inputs, Level, Outputs, Plan};
use pagewise_attention::{
    AttentionConfig, CacheLayout, DType, HostTensor, HostTensorMut, MaskBits, PagedBatch, Problem,
};

/// A sequence's length, queries of all its positions, keys and values, as `[len, heads, dim]`.
type Dense = (usize, Vec<f32>, Vec<f32>, Vec<f32>);

/// Dense queries, keys and values of some sequences, from which the same problem can be cut in many ways.
struct Sequences {
    config: AttentionConfig,
    dense: Vec<Dense>,
    slopes: Vec<f32>,
    sinks: Vec<f32>,
    /// Mask bits of each query position, if the mask is `Bits`.
    words: Vec<Vec<Vec<u32>>>,
}

const ROW_WORDS: usize = 64;

impl Sequences {
    fn new(config: AttentionConfig, lens: &[usize], random: &mut Random) -> Self {
        let (q_row, k_row, v_row) = (
            config.q_heads * config.head_dim_qk,
            config.kv_heads * config.head_dim_qk,
            config.kv_heads * config.head_dim_v,
        );
        let mut numbers = |n: usize, reach: f64| -> Vec<f32> {
            (0..n).map(|_| random.uniform(-reach, reach) as f32).collect()
        };
        let dense = lens
            .iter()
            .map(|&len| {
                (len, numbers(len * q_row, 3.0), numbers(len * k_row, 3.0), numbers(len * v_row, 1.0))
            })
            .collect();
        let (slopes, sinks) = (numbers(config.q_heads, 0.3), numbers(config.q_heads, 3.0));
        let words = lens
            .iter()
            .map(|&len| (0..len).map(|_| (0..ROW_WORDS).map(|_| random.bits() as u32).collect()).collect())
            .collect();
        Self { config, dense, slopes, sinks, words }
    }

    /// Output bits and lse bits of the queries `queries` (sequence, first, end), computed in one batch.
    fn run(
        &self,
        queries: &[(usize, usize, usize)],
        block_size: usize,
        hnd: bool,
        random: &mut Random,
    ) -> Vec<Vec<u32>> {
        let config = &self.config;
        let blocks = |len: usize| len.div_ceil(block_size);
        let num_blocks = queries.iter().map(|&(_, _, end)| blocks(end)).sum::<usize>() + 2;
        let layout = match hnd {
            true => CacheLayout::hnd(num_blocks, block_size, config),
            false => CacheLayout::nhd(num_blocks, block_size, config),
        };
        let mut k = Buffer::poisoned(config.kv_dtype, layout.k_extent(config) as usize, random);
        let mut v = Buffer::poisoned(config.kv_dtype, layout.v_extent(config) as usize, random);
        let mut free: Vec<i32> = (0..num_blocks as i32).collect();
        random.shuffle(&mut free);
        let (mut query_start, mut seq_lens) = (vec![0], Vec::new());
        let (mut indptr, mut indices) = (vec![0], Vec::new());
        let (mut q, mut words) = (Vec::new(), Vec::new());
        for &(sequence, first, end) in queries {
            let (_, queries, keys, values) = &self.dense[sequence];
            let row = config.q_heads * config.head_dim_qk;
            q.extend_from_slice(&queries[first * row..end * row]);
            words.extend(self.words[sequence][first..end].iter().flatten().copied());
            query_start.push(query_start.last().unwrap() + (end - first) as i32);
            // A chunk sees the keys up to its own end: those behind are not written yet.
            seq_lens.push(end as i32);
            let table: Vec<i32> = (0..blocks(end)).map(|_| free.pop().unwrap()).collect();
            for key in 0..end {
                let (block, place) = (table[key / block_size] as usize, key % block_size);
                for head in 0..config.kv_heads {
                    let at = |strides: pagewise_attention::KvStrides| {
                        block * strides.block as usize
                            + place * strides.token as usize
                            + head * strides.head as usize
                    };
                    for d in 0..config.head_dim_qk {
                        let from = (key * config.kv_heads + head) * config.head_dim_qk + d;
                        k.set(at(layout.k) + d, f64::from(keys[from]));
                    }
                    for d in 0..config.head_dim_v {
                        let from = (key * config.kv_heads + head) * config.head_dim_v + d;
                        v.set(at(layout.v) + d, f64::from(values[from]));
                    }
                }
            }
            indices.extend(table);
            indptr.push(indices.len() as i32);
        }
        let mut batch = PagedBatch::csr(&query_start, &seq_lens, &indptr, &indices);
        if config.mask == pagewise_attention::Mask::Bits {
            batch.mask_bits = Some(MaskBits { words: &words, row_words: ROW_WORDS });
        }
        let rows = *query_start.last().unwrap() as usize;
        let (width, heads) = (config.q_heads * config.head_dim_v, config.q_heads);
        let (mut out, mut lse) = (vec![f32::NAN; rows * width], vec![f32::NAN; rows * heads]);
        let inputs = Inputs {
            alibi_slopes: config.alibi.then_some(&self.slopes[..]),
            sinks: config.sinks.then_some(&self.sinks[..]),
            ..Inputs::new(HostTensor::F32(&q), k.as_ref(), v.as_ref())
        };
        let mut outputs = Outputs { out: HostTensorMut::F32(&mut out), lse: Some(&mut lse) };
        Plan::new(Problem::new(config, layout, batch).unwrap()).run(&inputs, &mut outputs).unwrap();
        (0..rows)
            .map(|row| {
                let values = out[row * width..(row + 1) * width].iter();
                let values = values.chain(&lse[row * heads..(row + 1) * heads]);
                values.map(|value| value.to_bits()).collect()
            })
            .collect()
    }
}

fn in_pool<T: Send>(threads: usize, f: impl FnOnce() -> T + Send) -> T {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(f)
}

/// Every way of cutting the same sequences gives the same bits.
fn check(config: AttentionConfig, lens: &[usize]) {
    let seed = fresh_seed();
    let random = &mut Random::new(seed);
    let sequences = Sequences::new(config, lens, random);
    // Reference: each sequence alone, whole, one thread.
    let whole: Vec<Vec<Vec<u32>>> = (0..lens.len())
        .map(|i| in_pool(1, || sequences.run(&[(i, 0, lens[i])], 16, false, random)))
        .collect();
    let all: Vec<_> = (0..lens.len()).map(|i| (i, 0, lens[i])).collect();
    let expected = whole.concat();
    for threads in [1, 2, 5] {
        for block_size in [1, 16, 256] {
            for hnd in [false, true] {
                let found = in_pool(threads, || sequences.run(&all, block_size, hnd, random));
                assert!(
                    found == expected,
                    "seed {seed}: batch, block {block_size}, hnd {hnd}, {threads} threads"
                );
            }
        }
    }
    for chunk in [1, 7, 64] {
        for (i, &len) in lens.iter().enumerate() {
            // Chunks of one query for every position of a long sequence would take long: take some.
            let starts = (0..len).step_by(chunk).filter(|start| chunk > 1 || len < 200 || start % 13 == 0);
            for first in starts {
                let end = (first + chunk).min(len);
                // With a companion of another length, so that the plan is another one.
                let other = (i + 1) % lens.len();
                let companion = (other, lens[other].saturating_sub(3), lens[other]);
                let found = in_pool(2, || sequences.run(&[companion, (i, first, end)], 16, false, random));
                assert!(
                    found[companion.2 - companion.1..] == whole[i][first..end],
                    "seed {seed}: sequence {i}, queries {first}..{end}"
                );
            }
        }
    }
}

#[test]
fn causal_grouped_heads() {
    check(AttentionConfig::new(9, 3, 64, DType::F32), &[1, 37, 300, 700]);
}

#[test]
fn sixteen_bit_caches() {
    for kv_dtype in [DType::F16, DType::Bf16] {
        let config = AttentionConfig { kv_dtype, ..AttentionConfig::new(8, 2, 48, DType::F32) };
        check(config, &[1, 37, 300]);
    }
}

#[test]
fn odd_dimensions_and_every_term() {
    let config = AttentionConfig {
        head_dim_v: 24,
        softcap: Some(20.0),
        alibi: true,
        sinks: true,
        kv_dtype: DType::F16,
        ..AttentionConfig::new(5, 1, 40, DType::F32)
    };
    check(config, &[1, 130, 300]);
}

#[test]
fn windows() {
    let config = AttentionConfig {
        mask: pagewise_attention::Mask::Window { size: 100 },
        ..AttentionConfig::new(4, 2, 32, DType::F32)
    };
    check(config, &[1, 90, 650]);
}

#[test]
fn long_contexts_split_over_threads() {
    // Long enough to be split into segments; few rows, so that splitting is worth it.
    let config = AttentionConfig { kv_dtype: DType::Bf16, ..AttentionConfig::new(4, 1, 64, DType::F32) };
    let random = &mut Random::new(fresh_seed());
    let lens = [3000, 1700];
    let sequences = Sequences::new(config, &lens, random);
    let last: Vec<_> = lens.iter().enumerate().map(|(i, &len)| (i, len - 2, len)).collect();
    let expected = in_pool(1, || sequences.run(&last, 16, false, random));
    for threads in [2, 3, 8] {
        assert!(in_pool(threads, || sequences.run(&last, 32, true, random)) == expected, "{threads} threads");
        for (i, query) in last.iter().enumerate() {
            let alone = in_pool(threads, || sequences.run(&[*query], 16, false, random));
            assert!(alone == expected[2 * i..2 * i + 2], "sequence {i} alone, {threads} threads");
        }
    }
}

#[test]
fn instruction_sets_with_fused_multiply_add() {
    if !(Level::Avx512.is_available() && Level::Avx2.is_available()) {
        eprintln!("SKIPPED: this processor has no two instruction sets with fused multiply-add to compare");
        return;
    }
    let mut random = Random::new(fresh_seed());
    for _ in 0..40 {
        let operation = conformance::Operation::Attention;
        let case = Case { operation, ..conformance::random_case(&mut random) };
        let data = AttentionData::generate(&case);
        let task = data.task().unwrap();
        let inputs = Inputs {
            k_scale: task.k_scale.into(),
            v_scale: task.v_scale.into(),
            alibi_slopes: task.alibi_slopes,
            sinks: task.sinks,
            ..Inputs::new(task.q, task.k, task.v)
        };
        let run = |level: Level| {
            let mut out = data.poisoned_out();
            Plan::new(task.problem).with_level(level)?.run(&inputs, &mut Outputs::new(out.as_mut())).unwrap();
            Some((0..out.len()).map(|i| out.bits(i)).collect::<Vec<_>>())
        };
        let (wide, narrow) = (run(Level::Avx512), run(Level::Avx2));
        assert!(wide.is_some() && wide == narrow, "{case}");
    }
}

#[test]
fn mask_bits() {
    let config = AttentionConfig {
        mask: pagewise_attention::Mask::Bits,
        ..AttentionConfig::new(4, 2, 32, DType::F32)
    };
    let random = &mut Random::new(fresh_seed());
    let lens = [40, 600];
    let sequences = Sequences::new(config, &lens, random);
    let all: Vec<_> = lens.iter().enumerate().map(|(i, &len)| (i, 0, len)).collect();
    let expected = in_pool(1, || sequences.run(&all, 16, false, random));
    // Only the last rows see all keys in every cut; earlier chunks would have other lengths.
    for (i, first, end) in [(0, 33, 40), (1, 599, 600), (1, 500, 600)] {
        let found = in_pool(2, || sequences.run(&[(i, first, end)], 1, true, random));
        let offset = if i == 0 { 0 } else { lens[0] };
        assert!(found == expected[offset + first..offset + end], "sequence {i}, queries {first}..{end}");
    }
}

#[test]
fn tables_rows_and_layouts_of_one_case() {
    // The same seed gives the same numbers in every layout that draws them in the same order.
    let seed = fresh_seed();
    let case = |layout, tables| Case {
        layout,
        tables,
        kv_dtype: DType::F32,
        mask: CaseMask::Causal,
        sequences: vec![SequenceShape { queries: 5, keys: 300 }, SequenceShape { queries: 1, keys: 70 }],
        seed,
        ..Case::default()
    };
    let run = |case: &Case| {
        let data = AttentionData::generate(case);
        let task = data.task().unwrap();
        let mut out = data.poisoned_out();
        let inputs = Inputs::new(task.q, task.k, task.v);
        Plan::new(task.problem).run(&inputs, &mut Outputs::new(out.as_mut())).unwrap();
        (0..out.len()).map(|i| out.bits(i)).collect::<Vec<_>>()
    };
    let expected = run(&case(Layout::Nhd, Tables::Padded));
    assert!(run(&case(Layout::Hnd, Tables::Padded)) == expected);
}
