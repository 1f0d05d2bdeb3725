//! The dense layers' kernels, run on the CPU by an interpreter: right on random cases. No GPU is needed; what a GPU's own
//! rounding and scheduling add is for `cuda_model` to see.
//!
//! One case again: `PAGEWISE_MODEL_CASE="argmax_v4 1234" cargo test -p pagewise-tests --test model_interpreted`.
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
#[path = "gpu/encode.rs"]
mod encode;
#[path = "gpu/faults/mod.rs"]
mod faults;
#[path = "gpu/interpreter/mod.rs"]
mod interpreter;
#[path = "gpu/machine.rs"]
mod machine;
#[path = "gpu/merge.rs"]
mod merge;
#[path = "gpu/model/mod.rs"]
mod model;
#[path = "gpu/random.rs"]
mod random;
#[path = "gpu/rotary.rs"]
mod rotary;
#[path = "gpu/write_kv.rs"]
mod write_kv;

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;

use faults::Fault;
use interpreter::Interpreter;
use machine::Machine;
use model::{Device, Run};
use pagewise_attention::cuda::ptx::{Arg, Kernel, Launch, all_kernels};
use random::{run_cases, run_seed};

/// What a thread block may have on sm_90.
const SHARED_MEMORY: u32 = 227 << 10;

impl Device for Interpreter {
    fn upload(&mut self, bytes: &[u8]) -> u64 {
        Machine::upload(self, bytes)
    }

    fn download(&self, address: u64) -> Vec<u8> {
        Machine::download(self, address)
    }

    fn clear(&mut self) {
        Machine::clear(self);
    }

    fn shared_memory(&self) -> u32 {
        SHARED_MEMORY
    }

    fn can_run(&self, _: &Kernel) -> bool {
        true
    }

    fn run(&mut self, kernel: &Kernel, launch: Launch, args: &[Arg]) -> Result<(), String> {
        Interpreter::run(self, kernel, launch, args).map(|_| ())
    }
}

#[test]
fn the_dense_layers_agree_with_the_definition() {
    let mut machine = Interpreter::new(|_, text| text.to_owned());
    let mut ran = BTreeSet::new();
    Run {
        device: &mut machine,
        cases: run_cases(2),
        seed: run_seed(),
        small: true,
        passed: &mut |kernel, _| {
            ran.insert(kernel.entry().to_owned());
        },
    }
    .all();
    if std::env::var_os("PAGEWISE_MODEL_CASE").is_none() {
        let kernels = all_kernels().unwrap();
        let wanted = kernels.iter().filter(|kernel| model::FAMILIES.contains(&kernel.family()));
        let missing: Vec<_> = wanted.map(Kernel::entry).filter(|entry| !ran.contains(*entry)).collect();
        assert!(missing.is_empty(), "{missing:?} did not run");
    }
}

/// The interpreter, for the first variant alone whose name begins as said.
struct OfFamily {
    machine: Interpreter,
    family: &'static str,
    entry: Option<String>,
}

impl Device for OfFamily {
    fn upload(&mut self, bytes: &[u8]) -> u64 {
        Machine::upload(&mut self.machine, bytes)
    }

    fn download(&self, address: u64) -> Vec<u8> {
        Machine::download(&self.machine, address)
    }

    fn clear(&mut self) {
        Machine::clear(&mut self.machine);
    }

    fn shared_memory(&self) -> u32 {
        SHARED_MEMORY
    }

    fn can_run(&self, kernel: &Kernel) -> bool {
        kernel.entry().starts_with(self.family)
            && self.entry.as_deref().is_none_or(|entry| entry == kernel.entry())
    }

    fn run(&mut self, kernel: &Kernel, launch: Launch, args: &[Arg]) -> Result<(), String> {
        self.entry.get_or_insert_with(|| kernel.entry().to_owned());
        Interpreter::run(&mut self.machine, kernel, launch, args).map(|_| ())
    }
}

/// What the cases say of a family with a fault in it.
fn verdict(fault: &Fault) -> Result<(), String> {
    let (alter, planted) = fault.planted();
    let mut device = OfFamily { machine: Interpreter::new(alter), family: fault.family, entry: None };
    let run = Run { device: &mut device, cases: 200, seed: run_seed(), small: true, passed: &mut |_, _| {} };
    let result = catch_unwind(AssertUnwindSafe(|| run.all()));
    assert!(planted.load(Ordering::Relaxed) > 0, "{}: no kernel has the line {}", fault.name, fault.line);
    result.map_err(|error| {
        error.downcast_ref::<String>().cloned().unwrap_or_else(|| "a panic without words".to_owned())
    })
}

#[test]
fn cases_find_what_is_planted() {
    // What the cases panic with is the finding.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let verdicts: Vec<_> = faults::MODEL.iter().map(|fault| catch_unwind(|| verdict(fault))).collect();
    std::panic::set_hook(hook);
    let mut survivors = Vec::new();
    for (fault, verdict) in faults::MODEL.iter().zip(verdicts) {
        match verdict {
            Ok(Ok(())) => survivors.push(format!("{} ({}): {}", fault.name, fault.family, fault.breaks)),
            Ok(Err(error)) => {
                // A wrong result, and not a line that the interpreter cannot read. A share that nothing reaches leaves a
                // weight of 0, by which a GPU would divide, and give what no draw asks for.
                let wrong =
                    ["expected", "has no logit", "are not where", "belongs to no result", "division by zero"];
                assert!(wrong.iter().any(|words| error.contains(words)), "{}: {error}", fault.name);
                eprintln!("found: {} ({}): {error}", fault.name, fault.breaks);
            }
            Err(error) => std::panic::resume_unwind(error),
        }
    }
    assert!(survivors.is_empty(), "no case finds: {survivors:#?}");
}
