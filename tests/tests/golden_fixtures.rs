//! The fixtures' golden values: logits and greedy tokens of small random models, as transformers computed
//! them (`tests/fixtures/make_fixtures.py`), reproduced through blocks and block tables.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use pagewise_attention::DType;
use pagewise_runtime::backend::AttentionSpec;
use pagewise_runtime::backend::cpu::CpuBackend;
use pagewise_runtime::executor::{Executor, ModelExecutor};
use pagewise_runtime::model_dir::ModelDir;
use pagewise_runtime::plan::LogitRows;
use pagewise_tests::{FIXTURES, Numbers, Planner, Sequence, argmax, executor, fixture, rows_by_sequence};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::Path;

const BLOCK_SIZES: [usize; 3] = [1, 16, 64];

/// f32 throughout; the reference itself is 1.6e-5 away from its f64 twin at most, on logits of about 10.
const TOLERANCE: f64 = 1e-4;

#[derive(Deserialize)]
struct Golden {
    prompts: Vec<GoldenPrompt>,
}

#[derive(Deserialize)]
struct GoldenPrompt {
    prompt: Vec<u32>,
    logits: BTreeMap<String, Vec<f64>>,
    argmax_all_positions: Vec<u32>,
    greedy: Vec<u32>,
}

fn golden(name: &str) -> Golden {
    let path = fixture(name).join("golden.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// A model with a cache whose blocks are never given back.
struct Bench {
    executor: ModelExecutor<CpuBackend>,
    planner: Planner,
}

impl Bench {
    fn new(dir: &Path, block_size: usize) -> Self {
        let ModelDir { config, .. } = ModelDir::open(dir).unwrap();
        let num_blocks = 1024usize.div_ceil(block_size) + 8;
        let spec = AttentionSpec::new(&config, DType::F32, block_size, num_blocks);
        let executor = executor(CpuBackend::new(Some(2)).unwrap(), dir, None, spec);
        Self { executor, planner: Planner::new(&config, block_size, num_blocks) }
    }

    /// Computes the next tokens of each sequence in one step; returns the logits of all their positions.
    fn step(&mut self, work: &mut [(&mut Sequence, usize)]) -> Vec<Vec<Vec<f32>>> {
        let plan = self.planner.step(work, LogitRows::All);
        rows_by_sequence(&plan, &self.executor.execute(&plan).unwrap())
    }
}

fn check_row(label: &str, row: &[f32], golden: &[f64]) {
    let largest = golden.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    for (i, (&got, &want)) in row.iter().zip(golden).enumerate() {
        let error = (f64::from(got) - want).abs();
        assert!(
            error <= TOLERANCE * largest,
            "{label}: logit {i} is {got}, golden {want} (largest {largest})"
        );
    }
    assert_eq!(row.len(), golden.len(), "{label}");
}

fn check_prompt(label: &str, golden: &GoldenPrompt, rows: &[Vec<f32>]) {
    let tokens: Vec<u32> = rows.iter().map(|row| argmax(row)).collect();
    assert_eq!(tokens, golden.argmax_all_positions, "{label}: likeliest token at every prompt position");
    for (position, want) in &golden.logits {
        let position: usize = position.parse().unwrap();
        check_row(&format!("{label}, position {position}"), &rows[position], want);
    }
}

#[test]
fn each_prompt_alone() {
    for name in FIXTURES {
        for block_size in BLOCK_SIZES {
            let mut bench = Bench::new(&fixture(name), block_size);
            for (index, golden) in golden(name).prompts.iter().enumerate() {
                let label = format!("{name}, block size {block_size}, prompt {index} alone");
                let mut sequence = bench.planner.sequence(index as u64, &golden.prompt);
                let count = golden.prompt.len();
                let rows = bench.step(&mut [(&mut sequence, count)]).remove(0);
                check_prompt(&label, golden, &rows);
                let mut next = argmax(rows.last().unwrap());
                let mut greedy = vec![next];
                while greedy.len() < golden.greedy.len() {
                    sequence.tokens.push(next);
                    let rows = bench.step(&mut [(&mut sequence, 1)]).remove(0);
                    next = argmax(&rows[0]);
                    greedy.push(next);
                }
                assert_eq!(greedy, golden.greedy, "{label}");
            }
        }
    }
}

/// All prompts twice over, in chunks of random lengths, prefills and decodes mixed in every step.
#[test]
fn all_prompts_in_one_random_batch() {
    for name in FIXTURES {
        for block_size in BLOCK_SIZES {
            let golden = golden(name).prompts;
            let mut bench = Bench::new(&fixture(name), block_size);
            let mut numbers = Numbers(11 + block_size as u64);
            let mut sequences: Vec<Sequence> = (0..2 * golden.len())
                .map(|i| bench.planner.sequence(i as u64, &golden[i % golden.len()].prompt))
                .collect();
            let mut rows: Vec<Vec<Vec<f32>>> = vec![Vec::new(); sequences.len()];
            let goal =
                |i: usize| golden[i % golden.len()].prompt.len() + golden[i % golden.len()].greedy.len() - 1;
            while (0..sequences.len()).any(|i| rows[i].len() < goal(i)) {
                let mut chosen = Vec::new();
                for (i, sequence) in sequences.iter_mut().enumerate() {
                    let waiting =
                        (sequence.tokens.len() - sequence.computed).min(goal(i) - sequence.computed);
                    if waiting > 0 && numbers.below(4) > 0 {
                        chosen.push((i, 1 + numbers.below(waiting), sequence));
                    }
                }
                if chosen.is_empty() {
                    continue;
                }
                let indices: Vec<usize> = chosen.iter().map(|(i, ..)| *i).collect();
                let mut work: Vec<_> =
                    chosen.into_iter().map(|(_, count, sequence)| (sequence, count)).collect();
                let output = bench.step(&mut work);
                for ((i, new), (sequence, _)) in indices.into_iter().zip(output).zip(work) {
                    rows[i].extend(new);
                    if sequence.computed == sequence.tokens.len() {
                        sequence.tokens.push(argmax(rows[i].last().unwrap()));
                    }
                }
            }
            for (i, sequence) in sequences.iter().enumerate() {
                let golden = &golden[i % golden.len()];
                let label = format!("{name}, block size {block_size}, prompt {} in a batch", i % 4);
                check_prompt(&label, golden, &rows[i][..golden.prompt.len()]);
                assert_eq!(sequence.tokens[golden.prompt.len()..], golden.greedy, "{label}");
            }
        }
    }
}

/// Both spellings of `config.json` mean the same model; those without a rotary embedding have but one.
#[test]
fn older_spelling_of_the_configuration_is_the_same_model() {
    for name in FIXTURES.into_iter().filter(|name| fixture(name).join("config.v4.json").exists()) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::copy(fixture(name).join("config.v4.json"), dir.path().join("config.json")).unwrap();
        let older = ModelDir::open(dir.path()).unwrap().config;
        assert_eq!(older, ModelDir::open(&fixture(name)).unwrap().config, "{name}");
    }
}
