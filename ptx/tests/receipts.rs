//! Every kernel variant has a receipt, and none has changed since a GPU last ran it.
//!
//! What no GPU has run yet is printed as PENDING, and stays in `receipts/` as `"run": null`.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::Path;

use pagewise_ptx::all_kernels;
use pagewise_ptx::receipt::{Receipt, Run, Standing, fingerprint};

#[test]
fn no_kernel_changed_since_its_last_run_on_a_gpu() {
    let mut receipts = BTreeMap::new();
    for file in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("receipts")).unwrap() {
        let path = file.unwrap().path();
        let list: Vec<Receipt> = serde_json::from_slice(&std::fs::read(&path).unwrap())
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        for receipt in list {
            let variant = receipt.variant.clone();
            assert!(receipts.insert(variant.clone(), receipt).is_none(), "two receipts for {variant}");
        }
    }

    let mut faults = Vec::new();
    let mut checked = 0;
    let mut pending = Vec::new();
    for kernel in all_kernels().unwrap() {
        let entry = kernel.entry();
        let Some(receipt) = receipts.remove(entry) else {
            faults.push(format!("{entry} has no receipt, not even an empty one"));
            continue;
        };
        match receipt.standing(&kernel) {
            Standing::Checked => checked += 1,
            Standing::NeverRun => pending.push(entry.to_owned()),
            Standing::Changed => faults.push(format!("{entry} changed since its last run on a GPU")),
        }
    }
    faults.extend(receipts.into_keys().map(|variant| format!("{variant} has a receipt but does not exist")));
    // Past the test harness, which keeps eprintln! of a passing test to itself.
    let mut stderr = std::io::stderr();
    let _ = writeln!(stderr, "receipts: {checked} variants checked on a GPU, {} pending", pending.len());
    if !pending.is_empty() {
        let _ = writeln!(stderr, "PENDING: never run on a GPU: {}", pending.join(" "));
    }
    assert!(
        faults.is_empty(),
        "{}\nRun scripts/bundle-gpu's tests on a GPU, then file their receipts: \
         cargo run -p pagewise-ptx --example import_receipts -- RECEIPTS.json",
        faults.join("\n")
    );
}

#[test]
fn a_changed_kernel_is_found_out() {
    let kernel = all_kernels().unwrap().swap_remove(0);
    let run = Run {
        code: fingerprint(&kernel.code()),
        descriptor: fingerprint(&kernel.description()),
        gpu: "a GPU".into(),
        compute_capability: "9.0".into(),
        driver: "CUDA 13.0".into(),
        cases: 1,
        worst_error: 0.0,
    };
    let receipt = |run| Receipt { variant: kernel.entry().into(), run };
    assert_eq!(receipt(Some(run.clone())).standing(&kernel), Standing::Checked);
    assert_eq!(receipt(None).standing(&kernel), Standing::NeverRun);
    let other_code = Run { code: fingerprint("other"), ..run.clone() };
    assert_eq!(receipt(Some(other_code)).standing(&kernel), Standing::Changed);
    let other_launch = Run { descriptor: fingerprint("other"), ..run };
    assert_eq!(receipt(Some(other_launch)).standing(&kernel), Standing::Changed);
}
