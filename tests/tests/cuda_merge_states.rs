//! `merge_states` on an NVIDIA GPU against plain code and the conformance suite. Skipped, loudly, without one.
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

use cuda::Receipts;
use cuda_machine::Gpu;
use machine::check_merge;
use merge::{MergeAddresses, MergeCase};
use pagewise_attention::conformance::{Operation, Outcome, quick, run_case};
use pagewise_attention::cuda::ptx::all_kernels;
use pagewise_attention::cuda::{CudaError, MergeStatesCall};
use pagewise_attention::{DType, ProblemError};
use random::{Random, run_cases, run_seed};

const TYPES: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];

#[test]
fn random_cases_agree_with_the_definition() {
    let Some(context) = cuda::context() else { return };
    let mut machine = Gpu::new(&context);
    let mut receipts = Receipts::default();
    let kernels = all_kernels().unwrap();
    let mut random = Random::new(run_seed());
    for (part, out) in TYPES.into_iter().flat_map(|part| TYPES.into_iter().map(move |out| (part, out))) {
        for unit in [8, 1] {
            for _ in 0..run_cases(20) {
                let case = MergeCase { part, out, unit, seed: random.next() };
                let (variant, error) =
                    check_merge(&mut machine, &case).unwrap_or_else(|error| panic!("{case:?}: {error}"));
                let kernel = kernels.iter().find(|kernel| kernel.entry() == variant).unwrap();
                receipts.passed(&context, kernel, error);
            }
        }
    }
    let checked = receipts.variants().count();
    eprintln!("{}: {checked} variants passed", context.device());
    if run_cases(20) >= 20 {
        assert_eq!(checked, 18, "every variant was chosen for some case");
    }
    receipts.write("merge_states");
}

#[test]
fn the_conformance_cases_agree_with_the_oracle() {
    let Some(context) = cuda::context() else { return };
    let mut subject = cuda_subject::subject(&context);
    let cases: Vec<_> = quick(run_seed() % 1_000_000_000)
        .into_iter()
        .filter(|case| case.operation == Operation::MergeStates)
        .collect();
    assert!(cases.len() >= 4);
    for case in cases {
        let outcome = run_case(&mut subject, &case).outcome;
        assert!(matches!(outcome, Outcome::Passed(_)), "{case}: {outcome:?}");
    }
}

#[test]
fn refusals_are_typed() {
    let addresses = MergeAddresses { part_out: 0, part_lse: 0, out: 0, lse: 0 };
    let tensors = MergeCase { part: DType::Bf16, out: DType::F32, unit: 8, seed: 1 }.build();
    let call = tensors.call(addresses);
    assert!(call.variant().is_ok());
    let refused = |call: MergeStatesCall| call.variant().unwrap_err();
    let error = refused(MergeStatesCall { parts: 0, ..call });
    assert!(matches!(error, CudaError::Problem(ProblemError::Input { input: "parts", .. })), "{error}");
    let error = refused(MergeStatesCall { head_dim: 257, ..call });
    assert!(matches!(error, CudaError::Problem(ProblemError::HeadDim { value: 257, .. })), "{error}");
    let error = refused(MergeStatesCall { out_dtype: DType::F8E4M3, ..call });
    assert!(matches!(error, CudaError::UnsupportedDType { dtype: DType::F8E4M3, .. }), "{error}");
    let error = refused(MergeStatesCall { part_lse: call.part_lse + 2, ..call });
    assert!(matches!(error, CudaError::Misaligned { tensor: "the parts' lse", size: 4, .. }), "{error}");
}
