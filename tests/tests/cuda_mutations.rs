//! Faults planted in the kernels, one at a time: on a GPU each must make a small set of cases fail. Skipped, loudly,
//! without one. `docs/kernel-testing.md` lists the faults.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    unreachable_pub,
    dead_code,
    reason = "a test"
)]

#[path = "gpu/blocks.rs"]
mod blocks;
#[path = "gpu/cuda.rs"]
mod cuda;
#[path = "gpu/cuda_machine.rs"]
mod cuda_machine;
#[path = "gpu/cuda_subject.rs"]
mod cuda_subject;
#[path = "gpu/encode.rs"]
mod encode;
#[path = "gpu/faults/mod.rs"]
mod faults;
#[path = "gpu/machine.rs"]
mod machine;
#[path = "gpu/merge.rs"]
mod merge;
#[path = "gpu/random.rs"]
mod random;
#[path = "gpu/rotary.rs"]
mod rotary;
#[path = "gpu/write_kv.rs"]
mod write_kv;

use std::sync::atomic::Ordering;

use blocks::BlocksCase;
use cuda_machine::Gpu;
use cuda_subject::by_rows;
use faults::Fault;
use machine::{check_blocks, check_merge, check_rotary, check_write};
use merge::MergeCase;
use pagewise_attention::DType;
use pagewise_attention::conformance::{Case as ConformanceCase, Outcome, run_case};
use pagewise_attention::cuda::ptx::decode::Ring;
use pagewise_attention::cuda::ptx::prefill::Form;
use pagewise_attention::cuda::{AttentionOptions, Context, PlanOptions};
use random::{Random, run_cases, run_seed};
use write_kv::Case;

/// A fault that every case takes for the truth, or why a case does not.
type Verdict = Result<(), String>;

/// Plants each fault and runs `cases`, which say what was wrong. The cases must pass without a fault.
fn every_fault_is_found(faults: &[Fault], cases: impl Fn(&Context) -> Verdict) {
    let Some(context) = cuda::context() else { return };
    cases(&context).unwrap_or_else(|error| panic!("without any fault: {error}"));
    // Under a sanitizer, which is slow, a few are enough.
    let count = run_cases(faults.len()).min(faults.len());
    let mut survivors = Vec::new();
    for fault in &faults[..count] {
        let (alter, planted) = fault.planted();
        let context = cuda::context().unwrap().with_altered_kernels(alter);
        let verdict = cases(&context);
        assert!(planted.load(Ordering::Relaxed) > 0, "{}: no kernel has the line {}", fault.name, fault.line);
        match verdict {
            Ok(()) => survivors.push(format!("{}: {}", fault.name, fault.breaks)),
            // A fault must not stop the kernel from loading or running: that would find anything.
            Err(error) => {
                let is_wrong_result = !error.contains("CUDA_ERROR") && !error.contains("could not compile");
                assert!(is_wrong_result, "{}: {error}", fault.name);
                eprintln!("found: {} ({}): {}", fault.name, fault.breaks, error.lines().next().unwrap_or(""));
            }
        }
    }
    assert!(survivors.is_empty(), "no case finds: {survivors:#?}");
    eprintln!("{}: {count} faults found", context.device());
}

/// Random cases of one variant each, so that a fault costs few compilations.
#[test]
fn faults_of_write_kv_are_found() {
    every_fault_is_found(faults::WRITE_KV, |context| {
        let mut machine = Gpu::new(context);
        let mut random = Random::new(run_seed());
        for cache in [DType::Bf16, DType::F32] {
            for _ in 0..4 {
                let case = Case { source: DType::Bf16, cache, unit: 8, seed: random.next() };
                check_write(&mut machine, &case)?;
                check_rotary(&mut machine, &case)?;
            }
        }
        let capability = context.device().compute_capability;
        if (capability.major, capability.minor) >= (8, 9) {
            let case = Case { source: DType::F16, cache: DType::F8E4M3, unit: 8, seed: random.next() };
            check_write(&mut machine, &case)?;
        }
        Ok(())
    });
}

#[test]
fn faults_of_merge_states_are_found() {
    every_fault_is_found(faults::MERGE_STATES, |context| {
        let mut machine = Gpu::new(context);
        let mut random = Random::new(run_seed());
        for _ in 0..30 {
            let case = MergeCase { part: DType::F32, out: DType::F32, unit: 4, seed: random.next() };
            check_merge(&mut machine, &case)?;
        }
        Ok(())
    });
}

#[test]
fn faults_of_copy_blocks_are_found() {
    every_fault_is_found(faults::COPY_BLOCKS, |context| {
        let mut machine = Gpu::new(context);
        let mut random = Random::new(run_seed());
        // A case finds some of the faults with a chance of 1 in 13 only.
        for turn in 0..250 {
            let case = BlocksCase { dtype: DType::Bf16, unit: 8, within: turn % 2 == 0, seed: random.next() };
            check_blocks(&mut machine, &case)?;
        }
        Ok(())
    });
}

/// What decode's faults must fail: few keys and many, windows, groups that fill no tile, empty rows, and splits.
const DECODE_CASES: &[(&str, Option<u32>)] = &[
    (
        "attention q=bf16 kv=bf16 heads=8/2 dim=128 block=16 mask=causal sequences=1:1,1:17,1:130,1:511,1:0",
        None,
    ),
    (
        "attention q=bf16 kv=bf16 heads=20/2 dim=128 block=32 mask=window:37 layout=hnd sequences=1:300,0:9,1:40",
        None,
    ),
    ("attention q=bf16 kv=bf16 heads=8/2 dim=128 block=16 mask=causal sequences=1:900,1:33", Some(64)),
    ("attention q=bf16 kv=bf16 heads=4/4 dim=128 block=16 mask=causal scores=60 sequences=1:3000", Some(64)),
    // Many tiles to a warp, and maxima that rise late.
    (
        "attention q=bf16 kv=bf16 heads=8/2 dim=128 block=16 mask=causal scores=60 sequences=1:2000,1:700",
        Some(4096),
    ),
];

#[test]
fn faults_of_decode_are_found() {
    every_fault_is_found(faults::DECODE, |context| {
        let mut subject = cuda_subject::subject(context);
        for &(line, item_keys) in DECODE_CASES {
            subject.options =
                by_rows(PlanOptions { item_keys, ring: Some(Ring::Large), ..PlanOptions::default() });
            let case: ConformanceCase = line.parse().unwrap();
            let case = ConformanceCase { seed: run_seed() % 1_000_000_000, ..case };
            match run_case(&mut subject, &case).outcome {
                Outcome::Passed(_) => {}
                Outcome::Failed(reason) => return Err(format!("PAGEWISE_CASE=\"{case}\": {reason}")),
                Outcome::Skipped(reason) => panic!("{case} is not taken: {reason}"),
            }
        }
        Ok(())
    });
}

/// What prefill's faults must fail: diagonals, windows within blocks, short tiles, splits, more items than
/// multiprocessors, block sizes above 16, bits of all kinds over keys that nobody may read.
const PREFILL_CASES: &[(&str, Option<u32>)] = &[
    ("attention q=bf16 kv=bf16 heads=8/2 dim=128 block=16 mask=causal sequences=70:70,33:300,1:0", None),
    (
        "attention q=bf16 kv=bf16 heads=6/2 dim=128 block=32 mask=window:37 layout=hnd poison_unseen sequences=45:301,20:9",
        None,
    ),
    (
        "attention q=bf16 kv=bf16 heads=8/2 dim=128 block=16 mask=causal scores=60 sequences=64:900,17:1200",
        Some(256),
    ),
    ("attention q=bf16 kv=bf16 heads=8/2 dim=128 block=256 mask=causal sequences=40:500", None),
    ("attention q=bf16 kv=bf16 heads=8/8 dim=128 block=64 mask=causal scores=60 sequences=30*20:150", None),
    (
        "attention q=bf16 kv=bf16 heads=8/2 dim=128 block=16 mask=bits poison_unseen sequences=4*70:517,6*40:90",
        None,
    ),
    (
        "attention q=bf16 kv=bf16 heads=2/2 dim=128 block=16 mask=bits poison_unseen sequences=3*130:900",
        Some(192),
    ),
    // Garbage behind the last key, in its block: NaN is there.
    ("attention q=bf16 kv=bf16 heads=4/1 dim=128 block=64 mask=bits poison_unseen sequences=9*50:50", None),
];

fn check_prefill(context: &Context, form: Form, cases: &[(&str, Option<u32>)]) -> Verdict {
    let mut subject = cuda_subject::subject(context);
    // Random data hide a fault sometimes: two draws of each case.
    for turn in 0..2 {
        for (line, prefill_keys) in cases {
            subject.options = AttentionOptions {
                form: Some(form),
                prefill_keys: *prefill_keys,
                tiles_from: Some(1),
                ..AttentionOptions::default()
            };
            let seed = run_seed().wrapping_add(turn) % 1_000_000_000;
            let case = ConformanceCase { seed, ..line.parse().unwrap() };
            match run_case(&mut subject, &case).outcome {
                Outcome::Passed(_) => {}
                Outcome::Failed(reason) => return Err(format!("PAGEWISE_CASE=\"{case}\": {reason}")),
                Outcome::Skipped(reason) => panic!("{case} is not taken: {reason}"),
            }
        }
    }
    Ok(())
}

#[test]
fn faults_of_prefill_are_found() {
    every_fault_is_found(faults::PREFILL, |context| check_prefill(context, Form::Large, PREFILL_CASES));
}

/// The same over fp8 caches, with scales of both kinds.
const PREFILL_FP8_CASES: &[(&str, Option<u32>)] = &[
    (
        "attention q=bf16 kv=fp8_e4m3 heads=8/2 dim=128 block=16 mask=causal scale=head poison_unseen sequences=70:70,33:300,1:0",
        None,
    ),
    (
        "attention q=bf16 kv=fp8_e4m3 heads=8/2 dim=128 block=16 mask=causal scale=tensor scores=60 sequences=64:900,17:1200",
        Some(256),
    ),
];

#[test]
fn faults_of_prefill_over_fp8_are_found() {
    let Some(context) = cuda::context() else { return };
    let capability = context.device().compute_capability;
    if Form::Large.runs_on(capability.major) {
        every_fault_is_found(faults::PREFILL_FP8, |context| {
            check_prefill(context, Form::Large, PREFILL_FP8_CASES)
        });
    }
}

#[test]
fn faults_of_prefill_on_hopper_are_found() {
    let Some(context) = cuda::context() else { return };
    if Form::Hopper.runs_on(context.device().compute_capability.major) {
        every_fault_is_found(faults::PREFILL_HOPPER, |context| {
            check_prefill(context, Form::Hopper, PREFILL_CASES)
        });
    }
}
