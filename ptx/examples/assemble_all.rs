//! Assembles every variant for every GPU generation that it runs on: the whole grid of which the tests take a
//! selection. Prints registers and shared memory as a table; fails on spills.
//!
//! ```text
//! cargo run -p pagewise-ptx --example assemble_all              # everything
//! cargo run -p pagewise-ptx --example assemble_all -- decode    # entry points that begin so
//! ```
#![allow(clippy::unwrap_used, clippy::panic, reason = "shared with the tests, which fail by panicking")]

#[path = "../tests/common/mod.rs"]
mod common;

use std::process::ExitCode;

use common::{Ptxas, all_jobs, assemble_jobs, faults, table};
use pagewise_ptx::all_kernels;

fn main() -> ExitCode {
    let Some(ptxas) = Ptxas::find() else { return ExitCode::FAILURE };
    let mut kernels = match all_kernels() {
        Ok(kernels) => kernels,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    let wanted = std::env::args().nth(1).unwrap_or_default();
    kernels.retain(|kernel| kernel.entry().starts_with(&wanted));
    let jobs = all_jobs(&kernels);
    let mut done = Vec::new();
    let mut found = Vec::new();
    let mut wrong = Vec::new();
    for (job, result) in jobs.iter().zip(assemble_jobs(&ptxas, &jobs)) {
        match result {
            Err(message) => wrong.push(message),
            Ok(resources) => {
                wrong.extend(faults(*job, resources));
                done.push(*job);
                found.push(resources);
            }
        }
    }
    print!("{}", table(&done, &found));
    eprintln!("{} assemblies, {} faults", jobs.len(), wrong.len());
    wrong.iter().for_each(|fault| eprintln!("{fault}"));
    if wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
