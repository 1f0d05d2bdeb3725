//! The bits of a row of logits on the CPU depend on that row's tokens alone: not on the batch, the chunking of its
//! prompt, a prefix hit, the number of threads or the block size. What every prompt gives alone, whole and in one
//! thread is compared bit by bit with what it gives otherwise, for the fixtures and for SmolLM2.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking, its helpers too")]

use pagewise_attention::DType;
use pagewise_runtime::backend::AttentionSpec;
use pagewise_runtime::backend::cpu::CpuBackend;
use pagewise_runtime::executor::{Executor, ModelExecutor};
use pagewise_runtime::model_dir::ModelDir;
use pagewise_runtime::plan::{BlockId, LogitRows, SequenceId};
use pagewise_tests::{FIXTURES, Numbers, Planner, Sequence, executor, fixture, smollm2_f32};
use std::collections::HashMap;
use std::fmt;
use std::path::Path;

/// How prompts are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Way {
    /// Prompts at once; the i-th begins in step `i % 3`, so that all stages meet in a step.
    batch: usize,
    /// Tokens of a prompt in a step. With 1, all of them are computed as decodes are.
    chunk: usize,
    /// Whether all full blocks of a prompt but its last token's come from an earlier computation.
    hit: bool,
    threads: usize,
    block_size: usize,
}

/// What everything is compared with.
const ALONE: Way = Way { batch: 1, chunk: usize::MAX, hit: false, threads: 1, block_size: 16 };

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { batch, chunk, hit, threads, block_size } = self;
        write!(f, "way({batch}, {chunk}, {hit}, {threads}, {block_size})")
    }
}

const fn way(batch: usize, chunk: usize, hit: bool, threads: usize, block_size: usize) -> Way {
    Way { batch, chunk, hit, threads, block_size }
}

const WHOLE: usize = usize::MAX;

/// Every two values of two settings meet, but for those of `hit` and a block larger than the prompts.
const WAYS: [Way; 18] = [
    way(1, WHOLE, false, 2, 1),
    way(1, 1, true, 1, 1),
    way(1, 7, false, 2, 16),
    way(1, 64, true, 2, 256),
    way(2, WHOLE, true, 1, 16),
    way(2, 1, false, 2, 256),
    way(2, 7, true, 2, 1),
    way(2, 64, false, 1, 1),
    way(17, WHOLE, false, 2, 256),
    way(17, 1, true, 2, 16),
    way(17, 7, false, 1, 1),
    way(17, 64, true, 2, 1),
    way(64, WHOLE, true, 1, 1),
    way(64, 1, false, 1, 16),
    way(64, 7, true, 1, 256),
    way(64, 64, false, 2, 16),
    way(1, 64, false, 1, 16),
    way(64, 7, false, 2, 16),
];

/// A model, and what is asked of it.
#[derive(Clone)]
struct Subject<'a> {
    dir: &'a Path,
    dtype: Option<DType>,
    kv_dtype: DType,
    logits: LogitRows,
    prompts: Vec<Vec<u32>>,
}

/// Rows of logits as bits, by prompt and position.
type Rows = HashMap<(usize, usize), Vec<u32>>;

/// A model and its cache.
struct Machine {
    executor: ModelExecutor<CpuBackend>,
    planner: Planner,
}

impl Machine {
    fn new(subject: &Subject<'_>, way: Way) -> Self {
        let ModelDir { config, .. } = ModelDir::open(subject.dir).unwrap();
        let backend = CpuBackend::new(Some(way.threads)).unwrap();
        let block_size = way.block_size;
        let blocks = |prompt: &Vec<u32>| prompt.len().div_ceil(block_size);
        let num_blocks = 2 * config.kv_groups().0.len() * subject.prompts.iter().map(blocks).sum::<usize>();
        let spec = AttentionSpec::new(&config, subject.kv_dtype, block_size, num_blocks);
        let executor = executor(backend, subject.dir, subject.dtype, spec);
        Self { executor, planner: Planner::new(&config, block_size, num_blocks) }
    }

    /// A step for some sequences, each with a number of tokens.
    fn step(&mut self, work: &mut [(&mut Sequence, usize)], logits: LogitRows, rows: &mut Rows) {
        let plan = self.planner.step(work, logits);
        let wanted = plan.chunks.iter().flat_map(|chunk| {
            let (start, end) = (chunk.start, chunk.start + chunk.tokens.len());
            let first = match logits {
                LogitRows::All => start,
                LogitRows::Last => end - 1,
                LogitRows::None => end,
            };
            (first..end).map(|position| (chunk.sequence.0 as usize, position))
        });
        let wanted: Vec<(usize, usize)> = wanted.collect();
        let output = self.executor.execute(&plan).unwrap();
        let found = output.logits.chunks_exact(output.vocab_size);
        assert_eq!(found.len(), wanted.len());
        for (place, row) in wanted.into_iter().zip(found) {
            rows.insert(place, row.iter().map(|logit| logit.to_bits()).collect());
        }
    }

    /// Computes some prompts together; the i-th from `cached[i]` on, in the blocks that it is given.
    fn compute(
        &mut self,
        prompts: &[(usize, &[u32])],
        cached: Vec<(usize, Vec<Vec<BlockId>>)>,
        way: Way,
        logits: LogitRows,
    ) -> (Rows, Vec<Vec<Vec<BlockId>>>) {
        let mut rows = Rows::new();
        let begin = |(&(index, prompt), (computed, tables)): (&(usize, &[u32]), _)| {
            let id = SequenceId(index as u64);
            Sequence { id, tokens: prompt.to_vec(), computed, tables }
        };
        let mut sequences: Vec<Sequence> = prompts.iter().zip(cached).map(begin).collect();
        for step in 0.. {
            let mut work = Vec::new();
            for (i, sequence) in sequences.iter_mut().enumerate() {
                let count = (sequence.tokens.len() - sequence.computed).min(way.chunk);
                if count > 0 && step >= i % 3 {
                    work.push((sequence, count));
                }
            }
            match work.is_empty() {
                true if step >= 3 => break,
                true => {}
                false => self.step(&mut work, logits, &mut rows),
            }
        }
        (rows, sequences.into_iter().map(|sequence| sequence.tables).collect())
    }

    fn nothing_cached(&self, count: usize) -> Vec<(usize, Vec<Vec<BlockId>>)> {
        vec![(0, self.planner.sequence(0, &[]).tables); count]
    }

    /// All prompts, a batch after the other.
    fn all(&mut self, subject: &Subject<'_>, way: Way) -> Rows {
        let prompts: Vec<_> = subject.prompts.iter().map(Vec::as_slice).enumerate().collect();
        let mut rows = Rows::new();
        for batch in prompts.chunks(way.batch) {
            let mut cached = self.nothing_cached(batch.len());
            if way.hit {
                // Computed before, in an order and in chunks of its own.
                let earlier = Way { chunk: 33, ..way };
                let (_, tables) = self.compute(batch, cached, earlier, LogitRows::None);
                let shared = |(&(_, prompt), tables): (&(usize, &[u32]), Vec<Vec<BlockId>>)| {
                    let blocks = (prompt.len() - 1) / way.block_size;
                    let tables = tables.into_iter().map(|table| table[..blocks].to_vec()).collect();
                    (blocks * way.block_size, tables)
                };
                cached = batch.iter().zip(tables).map(shared).collect();
            }
            rows.extend(self.compute(batch, cached, way, subject.logits).0);
        }
        rows
    }
}

/// Fails with the first row that differs, and with what gives it.
fn check(name: &str, subject: &Subject<'_>, ways: &[Way]) {
    let every_row = Subject { logits: LogitRows::All, ..subject.clone() };
    let most = ways.iter().map(|&way| prompts_of(subject, way)).max().unwrap();
    let every_row = Subject { prompts: subject.prompts[..most].to_vec(), ..every_row };
    let reference = Machine::new(subject, ALONE).all(&every_row, ALONE);
    let mut compared = 0;
    for &way in ways {
        let few =
            Subject { prompts: subject.prompts[..prompts_of(subject, way)].to_vec(), ..subject.clone() };
        let rows = Machine::new(&few, way).all(&few, way);
        let last = |index: usize| (index, few.prompts[index].len() - 1);
        assert!((0..few.prompts.len()).all(|index| rows.contains_key(&last(index))), "{name}, {way}");
        for ((prompt, position), row) in rows {
            let expected = &reference[&(prompt, position)];
            let differs = row.iter().zip(expected).position(|(a, b)| a != b);
            if let Some(token) = differs {
                let [found, alone] = [row[token], expected[token]].map(f32::from_bits);
                panic!(
                    "{name}, {way}: prompt {prompt} of {} tokens, position {position}: the logit of token {token} is \
                     {found:?}, alone {alone:?}",
                    few.prompts[prompt].len()
                );
            }
            assert!(row.iter().all(|&bits| f32::from_bits(bits).is_finite()), "{name}, {way}");
            compared += 1;
        }
    }
    eprintln!("{name}: {compared} rows of logits are the same bits");
}

/// Batches of one and two say enough with four prompts.
fn prompts_of(subject: &Subject<'_>, way: Way) -> usize {
    way.batch.max(4).min(subject.prompts.len())
}

/// 64 prompts of these lengths, cyclic, of tokens below `vocab_size`.
fn prompts(lengths: impl Fn(usize) -> usize, vocab_size: usize) -> Vec<Vec<u32>> {
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    let mut token = || numbers.below(vocab_size) as u32;
    (0..64).map(|i| (0..lengths(i)).map(|_| token()).collect()).collect()
}

/// One prompt is longer than a segment of attention, one longer than the largest block, some longer than a chunk
/// of attention; most are shorter than the model's 128 positions. Learned positions end there.
fn check_fixture(name: &str) {
    let dir = fixture(name);
    let learned = ModelDir::open(&dir).unwrap().config.rope.is_none();
    let lengths = |i: usize| match i {
        0 if learned => 128,
        1 | 3 if learned => 101 + i,
        0 => 530,
        1 => 270,
        2 => 1,
        3 => 141,
        _ => 2 + i * 29 % 67,
    };
    let prompts = prompts(lengths, 256);
    // Caches of fp8 are tried with one model, in fewer ways.
    let fp8 = [(None, DType::F8E4M3), (Some(DType::Bf16), DType::F8E5M2)];
    let fp8 = fp8.into_iter().filter(|_| name == "llama_gqa");
    for (dtype, kv_dtype) in [(None, DType::F32), (Some(DType::Bf16), DType::F16)].into_iter().chain(fp8) {
        let subject =
            Subject { dir: &dir, dtype, kv_dtype, logits: LogitRows::All, prompts: prompts.clone() };
        let ways = if kv_dtype.is_fp8() { &WAYS[..7] } else { &WAYS };
        check(&format!("{name}, cache in {kv_dtype}"), &subject, ways);
    }
}

/// A test for each fixture, so that they run side by side.
macro_rules! fixtures {
    ($($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                check_fixture(stringify!($name));
            }
        )*

        #[test]
        fn no_fixture_is_left_out() {
            let mut here = [$(stringify!($name)),*];
            let mut all = FIXTURES;
            here.sort_unstable();
            all.sort_unstable();
            assert_eq!(here, all);
        }
    };
}

fixtures! {
    llama_gqa llama_rope3 qwen2 mistral_swa qwen3 phi3 gemma2
    opt_preln opt_postln_proj opt_heads80 opt_heads128 gpt2
}

/// Fewer, as a step of this model takes its time; every value of every setting occurs.
const SMOLLM2_WAYS: [Way; 9] = [
    way(1, WHOLE, false, 2, 1),
    way(1, 64, true, 2, 256),
    way(2, 1, true, 2, 16),
    way(2, 7, true, 1, 1),
    way(17, 7, false, 2, 256),
    way(17, 64, true, 2, 16),
    way(64, WHOLE, true, 2, 1),
    way(64, 1, false, 2, 16),
    way(64, 64, false, 1, 256),
];

/// In bf16, as it is published, and once in f32.
#[test]
fn smollm2() {
    let Some(dir) = smollm2_f32() else { return };
    // One is longer than the longest chunk; most are short, for the test's time.
    let lengths = |i: usize| match i {
        0 => 70,
        1 => 23,
        2 => 1,
        3 => 17,
        _ => 2 + i % 3,
    };
    let prompts = prompts(lengths, 49_152);
    let (dtype, logits) = (Some(DType::Bf16), LogitRows::Last);
    let subject = Subject { dir: &dir, dtype, kv_dtype: DType::Bf16, logits, prompts: prompts.clone() };
    check("SmolLM2 in bf16", &subject, &SMOLLM2_WAYS);
    let subject = Subject { dir: &dir, dtype: None, kv_dtype: DType::F32, logits, prompts };
    check("SmolLM2 in f32", &subject, &[way(2, 7, true, 2, 1)]);
}
