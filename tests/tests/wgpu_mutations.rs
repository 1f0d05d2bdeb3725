//! Faults planted in attention in WGSL, one at a time, on every adapter: each must make a small set of cases fail.
//! `docs/kernel-testing.md` lists the faults; those of the dense kernels are in `wgpu_dense`.
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

use faults::Fault;
use pagewise_attention::conformance::{Case, Outcome, Wgpu, run_case};
use pagewise_attention::wgpu::{Context, PlanOptions, PrefillChoice};
use random::run_seed;

/// Diagonals, windows within blocks, short tiles, maxima that rise late, splits of so many keys, bits over keys that no row
/// of a tile sees, for which it takes few rows. All are computed by two variants.
const PREFILL_CASES: &[(&str, Option<u32>)] = &[
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
    (
        "attention q=f16 kv=f16 heads=8/2 dim=64 block=16 mask=bits poison_unseen sequences=50:217,6*3:180",
        None,
    ),
];

/// Few keys and many, an empty row, maxima that rise late, splits of so many keys. All are computed by one variant.
const DECODE_CASES: &[(&str, Option<u32>)] = &[
    ("attention q=f16 kv=f16 heads=8/2 dim=64 block=16 mask=causal sequences=1:1,1:17,1:130,1:511,1:0", None),
    (
        "attention q=f16 kv=f16 heads=8/2 dim=64 block=32 mask=window:37 layout=hnd poison_unseen sequences=1:300,1:40",
        None,
    ),
    ("attention q=f16 kv=f16 heads=8/2 dim=64 block=16 mask=causal scores=60 sequences=1:900,1:33", Some(64)),
    ("attention q=f16 kv=f16 heads=8/2 dim=64 block=16 mask=causal scores=60 sequences=1:1500", Some(4096)),
];

/// Whether all cases agree with the oracle under a choice of prefill, or which does not and how.
fn check(context: &Context, prefill: Option<PrefillChoice>) -> Result<(), String> {
    let mut subject = Wgpu::new("wgpu", context);
    // Random data hide a fault sometimes: two draws of each case.
    for turn in 0..2 {
        for &(line, keys) in if prefill.is_some() { PREFILL_CASES } else { DECODE_CASES } {
            subject.options = match prefill {
                Some(prefill) => {
                    PlanOptions { tiles_from: Some(1), prefill_keys: keys, prefill, ..PlanOptions::default() }
                }
                None => PlanOptions { item_keys: keys, ..PlanOptions::default() },
            };
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

/// Plants each fault, on adapters that take the kernels, and wants a case to fail by what it compares.
fn every_fault_is_found(faults: &[Fault], prefill: Option<PrefillChoice>, takes: fn(&Context) -> bool) {
    let contexts = || wgpu_contexts::contexts().into_iter().filter(|(_, context)| takes(context));
    let adapters: Vec<_> = contexts().collect();
    if adapters.is_empty() {
        let _ = writeln!(std::io::stderr(), "SKIPPED: no adapter takes {}", faults[0].family);
    }
    for (at, (adapter, context)) in adapters.iter().enumerate() {
        check(context, prefill).unwrap_or_else(|error| panic!("{adapter}, without any fault: {error}"));
        let mut survivors = Vec::new();
        for fault in faults {
            let (alter, planted) = fault.planted();
            let (_, context) = contexts().nth(at).unwrap();
            let verdict = check(&context.with_altered_kernels(alter), prefill);
            let name = fault.name;
            assert!(planted.load(Ordering::Relaxed) > 0, "{name}: no kernel has the line {}", fault.line);
            match verdict {
                Ok(()) => survivors.push(format!("{name}: {}", fault.breaks)),
                // A comparison names a row; a kernel that does not compile says something else.
                Err(error) => {
                    assert!(error.contains("query row"), "{name}: {error}");
                    eprintln!("found: {name} ({}): {}", fault.breaks, error.lines().next().unwrap_or(""));
                }
            }
        }
        assert!(survivors.is_empty(), "{adapter}: no case finds: {survivors:#?}");
        eprintln!("{adapter}: {} faults found", faults.len());
    }
}

#[test]
fn faults_of_decode_are_found() {
    every_fault_is_found(faults::DECODE_WGSL, None, |_| true);
}

#[test]
fn faults_of_prefill_in_tiles_are_found() {
    every_fault_is_found(faults::PREFILL_TILED, Some(PrefillChoice::Tiled(None)), |_| true);
}

#[test]
fn faults_of_prefill_on_matrix_units_are_found() {
    let takes = |context: &Context| context.matrices().is_some();
    every_fault_is_found(faults::PREFILL_MATRIX, Some(PrefillChoice::Matrix(None)), takes);
}
