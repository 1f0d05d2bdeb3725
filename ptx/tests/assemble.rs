//! A pairwise selection of variants and GPU generations assembles, without spills, in the registers and shared memory
//! that `resources.tsv` says. After a deliberate change:
//! `PAGEWISE_UPDATE_RESOURCES=1 cargo test -p pagewise-ptx --test assemble`.
//!
//! The whole grid: `cargo run -p pagewise-ptx --example assemble_all`.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use std::collections::BTreeSet;

use common::{ARCHS, Job, Ptxas, all_jobs, assemble_jobs, faults, table};
use pagewise_ptx::{Kernel, all_kernels};

/// One value of one dimension: which family, which part of the entry point, and what stands there. The GPU is a
/// dimension too.
type Value<'a> = (&'a str, usize, &'a str);

/// The values of an assembly: those of the variant are the parts of its name.
fn values<'a>((kernel, arch): Job<'a>) -> Vec<Value<'a>> {
    let family = kernel.family();
    let parts = kernel.entry().strip_prefix(family).unwrap().split('_').enumerate();
    std::iter::once((family, usize::MAX, arch.name))
        .chain(parts.map(|(place, part)| (family, place, part)))
        .collect()
}

fn pairs<'a>(job: Job<'a>) -> Vec<(Value<'a>, Value<'a>)> {
    let values = values(job);
    let first = values.iter().enumerate();
    first.flat_map(|(i, &a)| values[i + 1..].iter().map(move |&b| (a, b))).collect()
}

/// A set of assemblies in which any two values of two dimensions meet, wherever there is such a variant. Chosen
/// greedily and always the same: the assembly that adds most pairs, the first of equals.
fn pairwise(kernels: &[Kernel]) -> Vec<Job<'_>> {
    let all: Vec<_> = all_jobs(kernels).into_iter().map(|job| (job, pairs(job))).collect();
    let mut missing: BTreeSet<_> = all.iter().flat_map(|(_, pairs)| pairs.iter().copied()).collect();
    let mut chosen = BTreeSet::new();
    while !missing.is_empty() {
        let adds = |pairs: &[_]| pairs.iter().filter(|pair| missing.contains(pair)).count();
        let best = (0..all.len()).max_by_key(|&at| (adds(&all[at].1), usize::MAX - at)).unwrap();
        all[best].1.iter().for_each(|pair| {
            missing.remove(pair);
        });
        chosen.insert(best);
    }
    chosen.into_iter().map(|at| all[at].0).collect()
}

#[test]
fn a_pairwise_selection_assembles_in_the_committed_resources() {
    let Some(ptxas) = Ptxas::find() else { return };
    let kernels = all_kernels().unwrap();
    let jobs = pairwise(&kernels);
    let mut found = Vec::new();
    let mut wrong = Vec::new();
    for (job, result) in jobs.iter().zip(assemble_jobs(&ptxas, &jobs)) {
        match result {
            Err(message) => wrong.push(message),
            Ok(resources) => {
                wrong.extend(faults(*job, resources));
                found.push(resources);
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let table = table(&jobs, &found);

    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/resources.tsv");
    if std::env::var_os("PAGEWISE_UPDATE_RESOURCES").is_some() {
        std::fs::write(path, &table).unwrap();
    }
    let committed = std::fs::read_to_string(path).unwrap_or_default();
    let lines = |text: &str, other: &str, sign: char| -> Vec<String> {
        let known: BTreeSet<&str> = other.lines().collect();
        text.lines().filter(|line| !known.contains(line)).map(|line| format!("{sign} {line}")).collect()
    };
    let changed = [lines(&committed, &table, '-'), lines(&table, &committed, '+')].concat();
    assert!(
        changed.is_empty(),
        "ptx/tests/resources.tsv is out of date; run this test with PAGEWISE_UPDATE_RESOURCES=1 if the change is meant:\n{}",
        changed.join("\n")
    );
    eprintln!("{} of {} assemblies, no spills", jobs.len(), all_jobs(&kernels).len());
}

#[test]
fn the_selection_holds_every_pair_and_stays_small() {
    let kernels = all_kernels().unwrap();
    let jobs = pairwise(&kernels);
    let held: BTreeSet<_> = jobs.iter().flat_map(|job| pairs(*job)).collect();
    for job in all_jobs(&kernels) {
        for pair in pairs(job) {
            assert!(held.contains(&pair), "{pair:?} of {} is missing", job.0.entry());
        }
    }
    for arch in ARCHS {
        assert!(jobs.iter().any(|(_, chosen)| *chosen == arch), "nothing is assembled for {}", arch.name);
    }
    assert!(jobs.len() <= 320, "{} assemblies take too long for every test run", jobs.len());
}

#[test]
fn a_variant_for_every_gpu() {
    let kernels = all_kernels().unwrap();
    for kernel in &kernels {
        // Where there is no room for a dependent variant, the plain small one stands in.
        let small = format!("{}_small", kernel.entry().trim_end_matches("_pdl"));
        let variants: Vec<Kernel> =
            kernels.iter().filter(|k| k.entry() == kernel.entry() || k.entry() == small).cloned().collect();
        let jobs = all_jobs(&variants);
        for arch in ARCHS.iter().filter(|arch| arch.runs(kernel)) {
            let found = jobs.iter().any(|(_, on)| on.name == arch.name);
            assert!(found, "neither {} nor {small} fits {}", kernel.entry(), arch.name);
        }
    }
}
