//! Every variant assembles for every GPU generation, without spills, in the registers and shared
//! memory that `resources.tsv` says. After a deliberate change:
//! `PAGEWISE_UPDATE_RESOURCES=1 cargo test -p pagewise-ptx --test assemble`.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use std::fmt::Write as _;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{Ptxas, Resources};
use pagewise_ptx::decode::{Decode, DecodeSpec, DecodeTuning, LoadHint};
use pagewise_ptx::{DType, Kernel, all_kernels};

/// Ampere (A100, consumer), Ada, Hopper with its own instructions, consumer Blackwell.
const ARCHS: [(&str, u32); 5] =
    [("sm_80", 80), ("sm_86", 86), ("sm_89", 89), ("sm_90a", 90), ("sm_120", 120)];

const HEADER: &str = "kernel\tGPU\tregisters\tshared bytes\n";

/// Assembles everything on all cores; the results come back in order.
fn assemble_all(ptxas: &Ptxas, jobs: &[(&Kernel, &str)]) -> Vec<Result<Resources, String>> {
    let results = Mutex::new(vec![None; jobs.len()]);
    let next = AtomicUsize::new(0);
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some((kernel, arch)) = jobs.get(index) else { break };
                    let result = ptxas.assemble(kernel, arch);
                    results.lock().unwrap()[index] = Some(result);
                }
            });
        }
    });
    results.into_inner().unwrap().into_iter().map(Option::unwrap).collect()
}

#[test]
fn every_variant_assembles_in_the_committed_resources() {
    let Some(ptxas) = Ptxas::find() else { return };
    let kernels = all_kernels().unwrap();
    let jobs: Vec<(&Kernel, &str)> = kernels
        .iter()
        .flat_map(|kernel| {
            ARCHS.iter().filter(|(_, sm)| *sm >= kernel.target().sm).map(move |(arch, _)| (kernel, *arch))
        })
        .collect();
    let mut table = HEADER.to_string();
    let mut faults = Vec::new();
    for ((kernel, arch), result) in jobs.iter().zip(assemble_all(&ptxas, &jobs)) {
        match result {
            Err(message) => faults.push(message),
            Ok(Resources { registers, shared, spills }) => {
                if spills > 0 {
                    faults.push(format!("{} spills {spills} bytes on {arch}", kernel.entry()));
                }
                if shared != kernel.static_shared() {
                    let declared = kernel.static_shared();
                    faults.push(format!(
                        "{} uses {shared} bytes of shared memory on {arch}, its descriptor says {declared}",
                        kernel.entry()
                    ));
                }
                writeln!(table, "{}\t{arch}\t{registers}\t{shared}", kernel.entry()).unwrap();
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));

    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/resources.tsv");
    if std::env::var_os("PAGEWISE_UPDATE_RESOURCES").is_some() {
        std::fs::write(path, &table).unwrap();
    }
    let committed = std::fs::read_to_string(path).unwrap_or_default();
    let changed: Vec<String> = committed
        .lines()
        .filter(|line| !table.lines().any(|new| new == *line))
        .map(|line| format!("- {line}"))
        .chain(
            table
                .lines()
                .filter(|line| !committed.lines().any(|old| old == *line))
                .map(|line| format!("+ {line}")),
        )
        .collect();
    assert!(
        changed.is_empty(),
        "ptx/tests/resources.tsv is out of date; run this test with PAGEWISE_UPDATE_RESOURCES=1 if the change is meant:\n{}",
        changed.join("\n")
    );
    eprintln!("{} assemblies, no spills", jobs.len());
}

/// What the bench's sweep may try.
#[test]
fn other_tunings_of_decode_assemble_without_spills() {
    let Some(ptxas) = Ptxas::find() else { return };
    let tuned =
        |tuning| Decode::new(DecodeSpec { dtype: DType::Bf16, head_dim: 128, tuning }).unwrap().into_kernel();
    let warps = [(4, 3), (2, 6), (6, 2), (8, 1), (1, 12)];
    let shapes = warps.map(|(warps, blocks_per_multiprocessor)| DecodeTuning {
        warps,
        blocks_per_multiprocessor,
        ..DecodeTuning::default()
    });
    let loads = LoadHint::ALL.map(|load| DecodeTuning { load, ..DecodeTuning::default() });
    let merges = [2, 1 << 20].map(|merge_group| DecodeTuning { merge_group, ..DecodeTuning::default() });
    let kernels: Vec<Kernel> = shapes.into_iter().chain(loads).chain(merges).map(tuned).collect();
    let jobs: Vec<(&Kernel, &str)> = kernels.iter().map(|kernel| (kernel, "sm_90a")).collect();
    for (kernel, result) in kernels.iter().zip(assemble_all(&ptxas, &jobs)) {
        let Resources { shared, spills, .. } = result.unwrap();
        assert_eq!((spills, shared), (0, kernel.static_shared()), "{}", kernel.entry());
    }
}
