//! Random cases on every backend of this machine: each agrees with the oracle, and all with each other. Attention and
//! merging may then differ by what both backends' tolerances allow together, which follows from their agreeing with the
//! oracle; what only moves elements (write, copy, swap) must give the same bits everywhere.
//!
//! One case again: `PAGEWISE_CASE="attention q=bf16 …" cargo test -p pagewise-tests --test backends_agree`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub, reason = "a test")]

#[path = "gpu/cuda.rs"]
#[allow(dead_code, reason = "no receipts here")]
mod cuda;
#[path = "gpu/cuda_subject.rs"]
mod cuda_subject;
#[path = "gpu/random.rs"]
#[allow(dead_code, reason = "the cases come from the suite")]
mod random;
#[path = "gpu/wgpu_contexts.rs"]
mod wgpu_contexts;

use cuda_subject::subject;
use pagewise_attention::HostTensor;
use pagewise_attention::conformance::{
    Case, Cpu, Operation, Outcome, Random, ScaleKind, Subject, Wgpu, random_case, run_case_observed,
};
use random::{run_cases, run_seed};
use wgpu_contexts::contexts;

const CASES: usize = 120;

/// Runs a case everywhere. How many backends answered, or what is wrong.
fn agree(subjects: &mut [Box<dyn Subject + '_>], case: &Case) -> Result<usize, String> {
    let mut answers: Vec<(String, Vec<Vec<u8>>)> = Vec::new();
    for subject in subjects {
        let mut outputs = Vec::new();
        let mut observe =
            |tensors: &[HostTensor<'_>]| outputs = tensors.iter().map(HostTensor::to_bytes).collect();
        match run_case_observed(subject.as_mut(), case, &mut observe).outcome {
            Outcome::Passed(_) => answers.push((subject.name(), outputs)),
            Outcome::Failed(reason) => return Err(format!("{}: {reason}", subject.name())),
            Outcome::Skipped(_) => {}
        }
    }
    let moves = matches!(case.operation, Operation::CopyBlocks | Operation::SwapBlocks)
        // With a scale the nearest element may be one of two.
        || (case.operation == Operation::WriteKv && case.scale == ScaleKind::One);
    if moves && let [(first, expected), others @ ..] = answers.as_slice() {
        for (other, outputs) in others {
            if outputs != expected {
                return Err(format!("{first} and {other} wrote different bits"));
            }
        }
    }
    Ok(answers.len())
}

#[test]
fn random_cases_agree_on_all_backends() {
    let wgpu = contexts();
    let cuda = cuda::context();
    let mut subjects: Vec<Box<dyn Subject + '_>> = vec![Box::new(Cpu::default())];
    for (name, context) in &wgpu {
        subjects.push(Box::new(Wgpu::new(name.clone(), context)));
    }
    if let Some(context) = &cuda {
        subjects.push(Box::new(subject(context)));
    }
    if let Ok(line) = std::env::var("PAGEWISE_CASE") {
        let case: Case = line.parse().unwrap();
        agree(&mut subjects, &case).unwrap_or_else(|error| panic!("{case}\n{error}"));
        return;
    }
    let mut random = Random::new(run_seed());
    let cases = run_cases(CASES);
    let mut together = 0;
    for _ in 0..cases {
        let case = random_case(&mut random);
        match agree(&mut subjects, &case) {
            Ok(answers) => together += usize::from(answers > 1),
            Err(error) => {
                panic!("{error}\nPAGEWISE_CASE=\"{case}\" cargo test -p pagewise-tests --test backends_agree")
            }
        }
    }
    eprintln!("{} backends, {together} of {cases} random cases by more than one", subjects.len());
    assert!(subjects.len() == 1 || together * 5 > cases, "the backends have too few cases in common");
}
