//! Threads of a block side by side: each runs until it comes to something that threads do together, a barrier, a
//! shuffle or a matrix product; when all who take part are there, it is done for all of them.

use pagewise_attention::cuda::ptx::Arg;

use super::copies::{Copies, Copy};
use super::execute::execute;
use super::memory::Memory;
use super::program::{Instruction, Kind, Program, Source};

/// Lanes of a warp.
const LANES: usize = 32;

/// A thread: its numbers, its registers, and where it is; `None` once it has left.
pub(super) struct Thread {
    special: [[u32; 3]; 4],
    registers: Vec<u64>,
    at: Option<usize>,
    copies: Copies,
    /// See [`Memory::waited`]. Each thread waits for itself: what a barrier passes on is not counted on.
    waited: bool,
}

impl Thread {
    pub(super) fn new(special: [[u32; 3]; 4], program: &Program) -> Self {
        Self {
            special,
            registers: vec![0xdead_beef_dead_beef; program.registers],
            at: Some(0),
            copies: Copies::default(),
            waited: !program.is_dependent,
        }
    }

    pub(super) fn has_waited(&self) -> bool {
        self.waited
    }

    /// Runs up to the next thing that is done together, or to the end.
    fn run(&mut self, program: &Program, args: &[Arg], memory: &mut Memory) -> Result<(), String> {
        memory.waited = self.waited;
        // No kernel here loops for long: more is an endless loop.
        for _ in 0..10_000_000u64 {
            let Some(instruction) = self.at.and_then(|at| program.instructions.get(at)) else {
                self.at = None;
                return Ok(());
            };
            let is_off = instruction
                .guard
                .is_some_and(|(register, wanted)| (self.registers[register] & 1 == 1) != wanted);
            let next = self.at.map(|at| at + 1);
            match instruction.kind {
                _ if is_off => self.at = next,
                Kind::Together => return Ok(()),
                Kind::Return => self.at = None,
                Kind::Branch => self.at = Some(instruction.number as usize),
                kind => {
                    self.at = next;
                    let thread = self.special[2];
                    match kind {
                        Kind::CopyAsync => self.copies.begin(self.copy(instruction), memory),
                        Kind::CommitCopies => {
                            self.copies.commit();
                            Ok(())
                        }
                        Kind::WaitKernels => {
                            self.waited = true;
                            memory.waited = true;
                            Ok(())
                        }
                        Kind::WaitCopies => self.copies.wait(instruction.number as usize, memory),
                        _ => execute(instruction, &mut self.registers, &self.special, args, memory),
                    }
                    .map_err(|error| format!("thread {thread:?}: {}: {error}", instruction.text))?;
                }
            }
        }
        Err("does not end".to_owned())
    }

    fn copy(&self, instruction: &Instruction) -> Copy {
        let value = |index: usize| self.value(&instruction.sources[index]);
        Copy {
            to: value(0).wrapping_add(value(1)),
            from: value(2).wrapping_add(value(3)),
            size: value(4) as usize,
            read: value(5) as u32 as usize,
            waited: self.waited,
        }
    }

    fn value(&self, source: &Source) -> u64 {
        match *source {
            Source::Register(register) => self.registers[register],
            Source::Immediate(value) => value,
            Source::Special(index) => u64::from(self.special[index / 3][index % 3]),
        }
    }
}

/// Runs all threads of a block to their ends.
pub(super) fn run_block(
    program: &Program,
    threads: &mut [Thread],
    args: &[Arg],
    memory: &mut Memory,
) -> Result<(), String> {
    loop {
        // One warp after the other, each as far as barriers let it: one that is missing lets a warp read what another has not
        // written yet, or overwrite what another still reads.
        for warp in threads.chunks_mut(LANES) {
            loop {
                for thread in warp.iter_mut() {
                    thread.run(program, args, memory)?;
                }
                if !run_warp(program, warp, memory)? {
                    break;
                }
            }
        }
        // Nothing is left but barriers of the block.
        let waiting: Vec<&mut Thread> = threads.iter_mut().filter(|thread| thread.at.is_some()).collect();
        if waiting.is_empty() {
            return Ok(());
        }
        for thread in waiting {
            let is_barrier = |at| program.instructions.get(at).is_some_and(is_block_barrier);
            match thread.at {
                Some(at) if is_barrier(at) => thread.at = Some(at + 1),
                _ => return Err("threads wait for each other at different places".to_owned()),
            }
        }
    }
}

fn is_block_barrier(instruction: &Instruction) -> bool {
    instruction.words.first().is_some_and(|word| word == "bar")
        && instruction.words.get(1).is_some_and(|word| word != "warp")
}

/// Does what a warp's threads all wait for, if they do; whether that was so.
fn run_warp(program: &Program, warp: &mut [Thread], memory: &mut Memory) -> Result<bool, String> {
    let mut places = warp.iter().filter_map(|thread| thread.at);
    let Some(at) = places.next() else { return Ok(false) };
    if places.any(|other| other != at) {
        return Ok(false);
    }
    let Some(instruction) = program.instructions.get(at) else { return Ok(false) };
    if is_block_barrier(instruction) {
        return Ok(false);
    }
    if instruction.words[0] != "bar" {
        if warp.len() != LANES || warp.iter().any(|thread| thread.at.is_none()) {
            return Err(format!("{}: not all lanes of the warp are there", instruction.text));
        }
        match instruction.words[0].as_str() {
            "shfl" => shuffle(instruction, warp)?,
            "vote" => vote(instruction, warp)?,
            "redux" => reduce(instruction, warp)?,
            "ldmatrix" => {
                load_matrices(instruction, warp, memory)
                    .map_err(|error| format!("{}: {error}", instruction.text))?;
            }
            "movmatrix" => transpose(instruction, warp),
            _ => multiply(instruction, warp),
        }
    }
    for thread in warp.iter_mut().filter(|thread| thread.at.is_some()) {
        thread.at = Some(at + 1);
    }
    Ok(true)
}

/// `shfl.sync` by an exclusive or of the lane, from below, or of one lane to all.
fn shuffle(instruction: &Instruction, warp: &mut [Thread]) -> Result<(), String> {
    let mode = instruction.words[2].as_str();
    let values: Vec<u64> = warp.iter().map(|thread| thread.value(&instruction.sources[0])).collect();
    for (lane, thread) in warp.iter_mut().enumerate() {
        let operand = thread.value(&instruction.sources[1]) as usize;
        let from = match mode {
            "bfly" => lane ^ operand,
            "up" => lane.checked_sub(operand).unwrap_or(lane),
            "down" => {
                if lane + operand < LANES {
                    lane + operand
                } else {
                    lane
                }
            }
            "idx" => operand,
            other => return Err(format!("shuffle {other}")),
        };
        let target = instruction.targets[0];
        thread.registers[target] = values[from];
    }
    Ok(())
}

/// `vote.sync.any`.
fn vote(instruction: &Instruction, warp: &mut [Thread]) -> Result<(), String> {
    if instruction.words[2] != "any" {
        return Err(format!("vote {}", instruction.words[2]));
    }
    let any = warp.iter().any(|thread| thread.value(&instruction.sources[0]) & 1 == 1);
    for thread in warp.iter_mut() {
        thread.registers[instruction.targets[0]] = u64::from(any);
    }
    Ok(())
}

/// `redux.sync` of bits.
fn reduce(instruction: &Instruction, warp: &mut [Thread]) -> Result<(), String> {
    let words = warp.iter().map(|thread| thread.value(&instruction.sources[0]) & 0xffff_ffff);
    let result = match instruction.words[2].as_str() {
        "and" => words.fold(0xffff_ffff, |all, word| all & word),
        "or" => words.fold(0, |all, word| all | word),
        other => return Err(format!("redux {other}")),
    };
    for thread in warp.iter_mut() {
        thread.registers[instruction.targets[0]] = result;
    }
    Ok(())
}

/// A matrix of 8 x 8 elements of 16 bits over the lanes of a warp: lane 4 g + t has elements 2t and 2t + 1 of row g.
type Matrix = [[u16; 8]; 8];

fn fragment(matrix: &Matrix, lane: usize, is_transposed: bool) -> u64 {
    let (group, quad) = (lane / 4, lane % 4);
    let element = |column: usize| match is_transposed {
        true => matrix[column][group],
        false => matrix[group][column],
    };
    u64::from(element(2 * quad)) | u64::from(element(2 * quad + 1)) << 16
}

/// `ldmatrix`: lane 8 i + r says where row r of matrix i begins.
fn load_matrices(instruction: &Instruction, warp: &mut [Thread], memory: &mut Memory) -> Result<(), String> {
    let is_transposed = instruction.words.iter().any(|word| word == "trans");
    for (number, &target) in instruction.targets.iter().enumerate() {
        let mut matrix = Matrix::default();
        for (row, thread) in matrix.iter_mut().zip(&warp[8 * number..]) {
            let address = thread.value(&instruction.sources[0]).wrapping_add(instruction.number);
            let bytes = memory.shared_slice(address, 16)?;
            for (element, pair) in row.iter_mut().zip(bytes.as_chunks().0) {
                *element = u16::from_le_bytes(*pair);
            }
        }
        for (lane, thread) in warp.iter_mut().enumerate() {
            thread.registers[target] = fragment(&matrix, lane, is_transposed);
        }
    }
    Ok(())
}

/// `movmatrix.trans`.
fn transpose(instruction: &Instruction, warp: &mut [Thread]) {
    let mut matrix = Matrix::default();
    for (lane, thread) in warp.iter().enumerate() {
        let word = thread.value(&instruction.sources[0]);
        let row = &mut matrix[lane / 4];
        (row[2 * (lane % 4)], row[2 * (lane % 4) + 1]) = (word as u16, (word >> 16) as u16);
    }
    for (lane, thread) in warp.iter_mut().enumerate() {
        thread.registers[instruction.targets[0]] = fragment(&matrix, lane, true);
    }
}

/// `mma.sync` m16n8k16 of f16 or bf16 with f32 sums: fragments as PTX lays them out over the lanes.
fn multiply(instruction: &Instruction, warp: &mut [Thread]) {
    let is_half = instruction.words.iter().any(|word| word == "f16");
    let number = |bits: u64| match is_half {
        true => half::f16::from_bits(bits as u16).to_f64(),
        false => half::bf16::from_bits(bits as u16).to_f64(),
    };
    let (mut a, mut b) = ([[0.0; 16]; 16], [[0.0; 8]; 16]);
    for (lane, thread) in warp.iter().enumerate() {
        let (group, quad) = (lane / 4, lane % 4);
        let word = |index: usize| thread.value(&instruction.sources[index]);
        for part in 0..2 {
            for (register, (row, k)) in [(0, 0), (8, 0), (0, 8), (8, 8)].into_iter().enumerate() {
                a[group + row][2 * quad + k + part] = number(word(register) >> (16 * part));
            }
            for register in 0..2 {
                b[2 * quad + 8 * register + part][group] = number(word(4 + register) >> (16 * part));
            }
        }
    }
    for (lane, thread) in warp.iter_mut().enumerate() {
        let (group, quad) = (lane / 4, lane % 4);
        for (register, (row, column)) in [(0, 0), (0, 1), (8, 0), (8, 1)].into_iter().enumerate() {
            let (row, column) = (group + row, 2 * quad + column);
            let start = f64::from(f32::from_bits(thread.value(&instruction.sources[6 + register]) as u32));
            let sum: f64 = (0..16).map(|k| a[row][k] * b[k][column]).sum();
            thread.registers[instruction.targets[register]] = u64::from(((start + sum) as f32).to_bits());
        }
    }
}
