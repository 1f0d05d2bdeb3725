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

use interpreter::Interpreter;
use machine::Machine;
use model::{Device, Run};
use pagewise_attention::cuda::ptx::{Arg, Kernel, Launch, all_kernels};
use random::{run_cases, run_seed};

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
