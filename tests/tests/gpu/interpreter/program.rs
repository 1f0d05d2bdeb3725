//! A kernel's text as instructions, and a launch of it over all of its blocks.

use pagewise_attention::cuda::ptx::{Arg, Launch};

use super::lockstep;
use super::memory::Memory;
use super::read::Reader;

/// What an instruction reads.
#[derive(Clone, Debug)]
pub(super) enum Source {
    Register(usize),
    Immediate(u64),
    /// `%ctaid.x` and its like: 3 · (ctaid, ntid, tid, nctaid) + axis.
    Special(usize),
}

#[derive(Clone, Debug)]
pub(super) struct Instruction {
    /// Register and the value it must have.
    pub(super) guard: Option<(usize, bool)>,
    /// The opcode, cut at its dots.
    pub(super) words: Vec<String>,
    pub(super) kind: Kind,
    pub(super) targets: Vec<usize>,
    pub(super) sources: Vec<Source>,
    /// Bytes beyond the address, of loads and stores; the number of the parameter; where a branch goes.
    pub(super) number: u64,
    /// Bytes of one element, of loads and stores.
    pub(super) size: usize,
    pub(super) text: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Move,
    Pack,
    Unpack,
    Integer(Integer),
    Float(Float),
    Compare,
    Select,
    /// Bytes of two words in the order that a third says.
    Permute,
    Not,
    Convert,
    Parameter,
    Load,
    Store,
    Atomic,
    /// `cp.async`: target and what is added to it, source and what is added, bytes of the target, bytes of the source.
    CopyAsync,
    /// The copies since the last one become a group.
    CommitCopies,
    /// All but so many of the latest groups are waited for.
    WaitCopies,
    /// The kernels before this one are waited for.
    WaitKernels,
    /// What the threads of a warp or of a block do together.
    Together,
    Branch,
    Return,
    Nothing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Integer {
    Add,
    Sub,
    Mul,
    Mad,
    Div,
    Rem,
    Shl,
    Shr,
    And,
    Or,
    Xor,
    Min,
    Max,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Float {
    Add,
    Sub,
    Mul,
    Fma,
    Neg,
    Abs,
    Rcp,
    Sqrt,
    CopySign,
    Div,
    Exp2,
    Log2,
    Min,
    Max,
}

/// A kernel's text, read.
#[derive(Debug)]
pub struct Program {
    pub(super) instructions: Vec<Instruction>,
    pub(super) registers: usize,
    /// Bytes of shared memory that the text declares.
    pub(super) shared: usize,
    /// Whether it may begin before the kernels before it have ended (programmatic dependent launch).
    pub(super) is_dependent: bool,
}

impl Program {
    pub fn read(text: &str) -> Result<Self, String> {
        Reader::default().read(text)
    }

    /// Runs a launch. The first bad access or unknown instruction ends it. A dependent one must wait for the kernels before
    /// it, in one thread at least: whoever waits for its end takes theirs for granted.
    pub fn run(&self, launch: Launch, args: &[Arg], memory: &mut Memory) -> Result<(), String> {
        let mut has_waited = !self.is_dependent;
        for_each(launch.grid, |block| {
            let mut threads = Vec::new();
            for_each(launch.block, |thread| {
                threads.push(lockstep::Thread::new([block, launch.block, thread, launch.grid], self));
                Ok(())
            })?;
            let shared = self.shared + launch.dynamic_shared as usize;
            memory.shared = vec![0xff; shared];
            lockstep::run_block(self, &mut threads, args, memory)
                .map_err(|error| format!("block {block:?}: {error}"))?;
            has_waited |= threads.iter().any(lockstep::Thread::has_waited);
            Ok(())
        })?;
        match has_waited {
            true => Ok(()),
            false => Err("no thread waits for the kernels before this one".to_owned()),
        }
    }
}

fn for_each(extent: [u32; 3], mut each: impl FnMut([u32; 3]) -> Result<(), String>) -> Result<(), String> {
    for z in 0..extent[2] {
        for y in 0..extent[1] {
            for x in 0..extent[0] {
                each([x, y, z])?;
            }
        }
    }
    Ok(())
}
