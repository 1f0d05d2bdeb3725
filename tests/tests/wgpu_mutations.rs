//! Faults planted in attention in WGSL, one at a time: each must make a small set of cases fail. Skipped, loudly, where no
//! adapter has matrix units. `docs/kernel-testing.md` lists the faults; those of the dense kernels are in `wgpu_dense`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub, reason = "a test")]

#[allow(dead_code, reason = "its other tables are those of other kernels")]
#[path = "gpu/faults/mod.rs"]
mod faults;
#[allow(dead_code, reason = "the cases are a list")]
#[path = "gpu/random.rs"]
mod random;
#[path = "gpu/wgpu_contexts.rs"]
mod wgpu_contexts;

use std::io::Write as _;
use std::sync::atomic::Ordering;

use pagewise_attention::conformance::{Case, Outcome, Wgpu, run_case};
use pagewise_attention::wgpu::{Context, PlanOptions, PrefillChoice};
use random::run_seed;

/// What the faults must fail: diagonals, windows within blocks, short tiles, maxima that rise late, splits, bits over keys
/// that nobody may read. All are computed by two variants.
const CASES: &[(&str, Option<u32>)] = &[
    ("attention q=f16 kv=f16 heads=4/2 dim=64 block=16 mask=causal sequences=50:50,17:150,1:0", None),
    (
        "attention q=f16 kv=f16 heads=6/2 dim=64 block=32 mask=window:37 layout=hnd poison_unseen sequences=25:151,20:9",
        None,
    ),
    (
        "attention q=f16 kv=f16 heads=8/2 dim=64 block=16 mask=causal scores=60 sequences=33:400,9:300",
        Some(128),
    ),
    ("attention q=f16 kv=f16 heads=4/4 dim=64 block=64 mask=causal scores=60 sequences=2*20:350", None),
    ("attention q=f16 kv=f16 heads=8/2 dim=64 block=16 mask=bits poison_unseen sequences=50:217,40:90", None),
];

fn check(context: &Context) -> Result<(), String> {
    let mut subject = Wgpu::new("wgpu", context);
    // Random data hide a fault sometimes: two draws of each case.
    for turn in 0..2 {
        for &(line, prefill_keys) in CASES {
            let prefill = PrefillChoice::Matrix(None);
            subject.options =
                PlanOptions { tiles_from: Some(1), prefill_keys, prefill, ..PlanOptions::default() };
            let seed = run_seed().wrapping_add(turn) % 1_000_000_000;
            let case = Case { seed, ..line.parse().unwrap() };
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
fn faults_of_prefill_on_matrix_units_are_found() {
    let contexts = || {
        let all = wgpu_contexts::contexts().into_iter();
        all.filter(|(_, context)| context.matrices().is_some()).collect::<Vec<_>>()
    };
    let adapters = contexts();
    if adapters.is_empty() {
        let _ = writeln!(std::io::stderr(), "SKIPPED: no adapter has cooperative matrices of f16");
    }
    for (at, (adapter, context)) in adapters.iter().enumerate() {
        check(context).unwrap_or_else(|error| panic!("{adapter}, without any fault: {error}"));
        let mut survivors = Vec::new();
        for fault in faults::PREFILL_MATRIX {
            let (alter, planted) = fault.planted();
            let (_, context) = contexts().swap_remove(at);
            let verdict = check(&context.with_altered_kernels(alter));
            let name = fault.name;
            assert!(planted.load(Ordering::Relaxed) > 0, "{name}: no kernel has the line {}", fault.line);
            match verdict {
                Ok(()) => survivors.push(format!("{name}: {}", fault.breaks)),
                // What is compared names a row; a kernel that does not compile says something else.
                Err(error) => {
                    assert!(error.contains("query row"), "{name}: {error}");
                    eprintln!("found: {name} ({}): {}", fault.breaks, error.lines().next().unwrap_or(""));
                }
            }
        }
        assert!(survivors.is_empty(), "{adapter}: no case finds: {survivors:#?}");
        eprintln!("{adapter}: {} faults found", faults::PREFILL_MATRIX.len());
    }
}
