//! Runs a rendered kernel on the CPU, one thread after the other, so that a machine without a GPU sees wrong index
//! arithmetic, wrong masks and accesses outside of an allocation.
//!
//! Owns the subset of PTX that the kernels here use, but for what is Hopper's alone. What threads do together is
//! `lockstep`'s, copies that a thread does not wait for `copies`'; `memory` has what a dependent launch finds before it has
//! waited for the kernels before it, and refuses what it writes by then. It says nothing about speed or other races, and
//! `ex2.approx` and its like are exact to the last bit here.

mod copies;
mod execute;
mod lockstep;
mod memory;
mod program;
mod read;

use memory::Memory;
use pagewise_attention::cuda::ptx::copy_blocks::CopyBlocks;
use pagewise_attention::cuda::ptx::merge_states::MergeStates;
use pagewise_attention::cuda::ptx::write_kv::WriteKv;
use pagewise_attention::cuda::ptx::{Arg, Kernel, Launch};
use pagewise_attention::cuda::{CopyBlocksCall, MergeStatesCall, Rotary, WriteKvCall};
use program::Program;

use super::machine::Machine;

/// From an entry point and its text to the text that runs.
type AlterText = dyn Fn(&str, &str) -> String;

/// The interpreter as a machine. Kernels run with the text that `alter` makes of theirs.
pub struct Interpreter {
    memory: Memory,
    alter: Box<AlterText>,
}

impl Interpreter {
    pub fn new(alter: impl Fn(&str, &str) -> String + 'static) -> Self {
        Self { memory: Memory::default(), alter: Box::new(alter) }
    }

    /// What the next kernels find in an allocation before they have waited for those before them: for dependent variants,
    /// what those before write is not there yet.
    pub fn set_early(&mut self, address: u64, bytes: Vec<u8>) {
        self.memory.set_early(address, bytes);
    }

    pub fn run(&mut self, kernel: &Kernel, launch: Launch, args: &[Arg]) -> Result<String, String> {
        let text = (self.alter)(kernel.entry(), kernel.text());
        Program::read(&text)
            .and_then(|program| program.run(launch, args, &mut self.memory))
            .map_err(|error| format!("{}: {error}", kernel.entry()))?;
        Ok(kernel.entry().to_owned())
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

impl Machine for Interpreter {
    fn launches_dependently(&self) -> bool {
        true
    }

    fn upload(&mut self, bytes: &[u8]) -> u64 {
        self.memory.upload(bytes)
    }

    fn download(&self, address: u64) -> Vec<u8> {
        self.memory.download(address).to_vec()
    }

    fn clear(&mut self) {
        self.memory = Memory::default();
    }

    fn write_kv(&mut self, call: &WriteKvCall<'_>, rotary: Option<&Rotary>) -> Result<String, String> {
        let variant = rotary.map_or_else(|| call.variant(), |rotary| rotary.variant(call)).map_err(text)?;
        let args = rotary.map_or_else(|| call.args(), |rotary| rotary.args(call)).map_err(text)?;
        let descriptor = WriteKv::new(variant.spec()).map_err(text)?;
        let launch = descriptor.launch(args.shape).map_err(text)?;
        // The rows come from kernels that may still run.
        let queries = rotary.and_then(|rotary| rotary.queries).map(|queries| queries.q);
        for address in [call.k, call.v].into_iter().chain(queries) {
            let poison = vec![0xff; self.memory.download(address).len()];
            self.memory.set_early(address, poison);
        }
        self.run(descriptor.kernel(), launch, &args.values())
    }

    fn merge_states(&mut self, call: &MergeStatesCall) -> Result<String, String> {
        let variant = call.variant().map_err(text)?;
        let args = call.args().map_err(text)?;
        let descriptor = MergeStates::new(variant.spec()).map_err(text)?;
        let launch = descriptor.launch(args.shape).map_err(text)?;
        self.run(descriptor.kernel(), launch, &args.values())
    }

    fn copy_blocks(&mut self, call: &CopyBlocksCall<'_>) -> Result<String, String> {
        let variant = call.variant().map_err(text)?;
        let args = call.args().map_err(text)?;
        let descriptor = CopyBlocks::new(variant.spec()).map_err(text)?;
        if call.pairs.count > 0 {
            let launch = descriptor.launch(args.shape, call.thread_blocks).map_err(text)?;
            self.run(descriptor.kernel(), launch, &args.values())?;
        }
        Ok(variant.name())
    }
}
