//! Runs a rendered kernel on the CPU, one thread after the other, so that a machine without a GPU sees wrong index
//! arithmetic, wrong masks and accesses outside of an allocation.
//!
//! Owns the subset of PTX that the kernels use which have neither asynchronous copies nor Hopper's instructions; what
//! threads do together is `lockstep.rs`'s. It says nothing about speed or races, and `ex2.approx` and its like are exact
//! to the last bit here.

#[path = "lockstep.rs"]
mod lockstep;

use std::collections::HashMap;

use pagewise_attention::DType;
use pagewise_attention::cuda::ptx::copy_blocks::CopyBlocks;
use pagewise_attention::cuda::ptx::merge_states::MergeStates;
use pagewise_attention::cuda::ptx::write_kv::WriteKv;
use pagewise_attention::cuda::ptx::{Arg, Kernel, Launch};
use pagewise_attention::cuda::{CopyBlocksCall, MergeStatesCall, Rotary, WriteKvCall};

use super::encode::encode;
use super::machine::Machine;

/// Device memory: allocations far apart, so that no wrong address hits another one by chance.
#[derive(Debug, Default)]
pub struct Memory {
    allocations: Vec<Vec<u8>>,
    /// Of the block that runs.
    shared: Vec<u8>,
}

/// Address bits within an allocation.
const SPAN: u32 = 36;

impl Memory {
    /// Copies bytes into a new allocation; its address.
    pub fn upload(&mut self, bytes: &[u8]) -> u64 {
        self.allocations.push(bytes.to_vec());
        (self.allocations.len() as u64) << SPAN
    }

    /// What an allocation holds.
    pub fn download(&self, address: u64) -> &[u8] {
        &self.allocations[(address >> SPAN) as usize - 1]
    }

    fn shared_slice(&mut self, address: u64, size: usize) -> Result<&mut [u8], String> {
        let (at, len) = (address as u32 as usize, self.shared.len());
        if !at.is_multiple_of(size) {
            return Err(format!("{size} shared bytes at {at}: misaligned"));
        }
        self.shared
            .get_mut(at..at + size)
            .ok_or_else(|| format!("{size} shared bytes at {at}: outside of {len}"))
    }

    fn slice(&mut self, address: u64, size: usize) -> Result<&mut [u8], String> {
        if !address.is_multiple_of(size as u64) {
            return Err(format!("{size} bytes at {address:#x}: misaligned"));
        }
        let offset = (address & ((1 << SPAN) - 1)) as usize;
        let number = ((address >> SPAN) as usize).wrapping_sub(1);
        let allocation = self.allocations.get_mut(number);
        let len = allocation.as_ref().map_or(0, |allocation| allocation.len());
        allocation.and_then(|allocation| allocation.get_mut(offset..offset + size)).ok_or_else(|| {
            format!("{size} bytes at {address:#x}: outside of allocation {number} of {len} bytes")
        })
    }
}

/// What an instruction reads.
#[derive(Clone, Debug)]
enum Source {
    Register(usize),
    Immediate(u64),
    /// `%ctaid.x` and its like: 3 · (ctaid, ntid, tid, nctaid) + axis.
    Special(usize),
}

#[derive(Clone, Debug)]
struct Instruction {
    /// Register and the value it must have.
    guard: Option<(usize, bool)>,
    /// The opcode, cut at its dots.
    words: Vec<String>,
    kind: Kind,
    targets: Vec<usize>,
    sources: Vec<Source>,
    /// Bytes beyond the address, of loads and stores; the number of the parameter; where a branch goes.
    number: u64,
    /// Bytes of one element, of loads and stores.
    size: usize,
    text: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Move,
    Pack,
    Unpack,
    Integer(Integer),
    Float(Float),
    Compare,
    Select,
    Not,
    Convert,
    Parameter,
    Load,
    Store,
    Atomic,
    /// What the threads of a warp or of a block do together.
    Together,
    Branch,
    Return,
    Nothing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Integer {
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
enum Float {
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
    instructions: Vec<Instruction>,
    registers: usize,
    /// Bytes of shared memory that the text declares.
    shared: usize,
}

impl Program {
    pub fn read(text: &str) -> Result<Self, String> {
        Reader::default().read(text)
    }

    /// Runs a launch. The first bad access or unknown instruction ends it.
    pub fn run(&self, launch: Launch, args: &[Arg], memory: &mut Memory) -> Result<(), String> {
        for_each(launch.grid, |block| {
            let mut threads = Vec::new();
            for_each(launch.block, |thread| {
                threads
                    .push(lockstep::Thread::new([block, launch.block, thread, launch.grid], self.registers));
                Ok(())
            })?;
            let shared = self.shared + launch.dynamic_shared as usize;
            memory.shared = vec![0xff; shared];
            lockstep::run_block(self, &mut threads, args, memory)
                .map_err(|error| format!("block {block:?}: {error}"))
        })
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

fn execute(
    instruction: &Instruction,
    registers: &mut [u64],
    special: &[[u32; 3]; 4],
    args: &[Arg],
    memory: &mut Memory,
) -> Result<(), String> {
    let Instruction { words, targets, sources, number, size, .. } = instruction;
    let value = |index: usize| match sources[index] {
        Source::Register(register) => registers[register],
        Source::Immediate(value) => value,
        Source::Special(index) => u64::from(special[index / 3][index % 3]),
    };
    let ty = words.last().map_or("", String::as_str);
    let bits: u32 = ty.trim_start_matches(|c: char| c.is_alphabetic()).parse().unwrap_or(32);
    let cut = |value: u64, bits: u32| if bits >= 64 { value } else { value & ((1 << bits) - 1) };
    let float = |index: usize| f32::from_bits(value(index) as u32);
    let result = match instruction.kind {
        Kind::Move => value(0),
        Kind::Pack => {
            (0..sources.len()).fold(0, |all, i| all | cut(value(i), bits / 2) << (bits / 2 * i as u32))
        }
        Kind::Unpack => {
            let all = value(0);
            for (i, &target) in targets.iter().enumerate() {
                registers[target] = cut(all >> (bits / 2 * i as u32), bits / 2);
            }
            return Ok(());
        }
        Kind::Integer(operation) => {
            let wide = words.iter().any(|word| word == "wide");
            let out = if wide { 2 * bits } else { bits };
            let (a, b) = (cut(value(0), bits), value(1));
            let small = cut(b, bits);
            let shift = b as u32;
            cut(
                match operation {
                    Integer::Add => a.wrapping_add(b),
                    Integer::Sub => a.wrapping_sub(b),
                    Integer::Mul => a.wrapping_mul(small),
                    Integer::Mad => a.wrapping_mul(small).wrapping_add(value(2)),
                    Integer::Div => a.checked_div(small).ok_or("division by zero")?,
                    Integer::Rem => a.checked_rem(small).ok_or("division by zero")?,
                    Integer::Shl => {
                        if shift >= bits {
                            0
                        } else {
                            a << shift
                        }
                    }
                    Integer::Shr => {
                        if shift >= bits {
                            0
                        } else {
                            a >> shift
                        }
                    }
                    Integer::And => a & b,
                    Integer::Or => a | b,
                    Integer::Xor => a ^ b,
                    Integer::Min => a.min(small),
                    Integer::Max => a.max(small),
                },
                out,
            )
        }
        Kind::Float(operation) => {
            let x = float(0);
            let result = match operation {
                Float::Add => x + float(1),
                Float::Sub => x - float(1),
                Float::Mul => x * float(1),
                Float::Fma => x.mul_add(float(1), float(2)),
                Float::Neg => -x,
                Float::Abs => x.abs(),
                Float::Rcp => 1.0 / x,
                Float::Sqrt => x.sqrt(),
                // PTX names the sign first.
                Float::CopySign => float(1).copysign(x),
                Float::Div => x / float(1),
                Float::Exp2 => x.exp2(),
                Float::Log2 => x.log2(),
                Float::Min => x.min(float(1)),
                Float::Max if words[1] == "NaN" && (x.is_nan() || float(1).is_nan()) => f32::NAN,
                Float::Max => x.max(float(1)),
            };
            u64::from(result.to_bits())
        }
        Kind::Compare => {
            let (a, b) = (value(0), value(1));
            let order = if ty.starts_with('f') {
                float(0).partial_cmp(&float(1))
            } else if ty == "s32" {
                Some((a as i32).cmp(&(b as i32)))
            } else {
                Some(cut(a, bits).cmp(&cut(b, bits)))
            };
            let holds = match words[1].as_str() {
                "lt" => order.is_some_and(|order| order.is_lt()),
                "le" => order.is_some_and(|order| order.is_le()),
                "gt" => order.is_some_and(|order| order.is_gt()),
                "ge" => order.is_some_and(|order| order.is_ge()),
                "eq" => order.is_some_and(|order| order.is_eq()),
                "ne" => order.is_some_and(|order| order.is_ne()),
                "neu" => order.is_none_or(|order| order.is_ne()),
                other => return Err(format!("comparison {other}")),
            };
            u64::from(match words[2].as_str() {
                "and" => holds && value(2) & 1 == 1,
                "or" => holds || value(2) & 1 == 1,
                _ => holds,
            })
        }
        Kind::Select => {
            if value(2) & 1 == 1 {
                value(0)
            } else {
                value(1)
            }
        }
        Kind::Not => !value(0),
        Kind::Convert => convert(words, value(0), || value(1))?,
        Kind::Parameter => {
            let arg = args.get(*number as usize).ok_or("no such argument")?;
            // SAFETY: the cell lives as long as the argument.
            let cell = unsafe { *arg.as_ptr() };
            cut(cell, 8 * arg.ty().size() as u32)
        }
        Kind::Load => {
            let address = value(0).wrapping_add(*number);
            let bytes = match is_shared(words) {
                true => memory.shared_slice(address, size * targets.len())?,
                false => memory.slice(address, size * targets.len())?,
            };
            for (&target, bytes) in targets.iter().zip(bytes.chunks_exact(*size)) {
                let mut word = [0; 8];
                word[..*size].copy_from_slice(bytes);
                registers[target] = u64::from_le_bytes(word);
            }
            return Ok(());
        }
        Kind::Store => {
            let address = value(0).wrapping_add(*number);
            let words: Vec<[u8; 8]> = (1..sources.len()).map(|i| value(i).to_le_bytes()).collect();
            let bytes = match is_shared(&instruction.words) {
                true => memory.shared_slice(address, size * words.len())?,
                false => memory.slice(address, size * words.len())?,
            };
            for (word, bytes) in words.iter().zip(bytes.chunks_exact_mut(*size)) {
                bytes.copy_from_slice(&word[..*size]);
            }
            return Ok(());
        }
        Kind::Atomic => {
            let bytes = memory.slice(value(0), *size)?;
            let mut word = [0; 8];
            word[..*size].copy_from_slice(bytes);
            let (old, operand) = (u64::from_le_bytes(word), cut(value(1), bits));
            let operation = words.iter().rev().nth(1).map_or("", String::as_str);
            let new = match operation {
                "inc" => {
                    if old >= operand {
                        0
                    } else {
                        old + 1
                    }
                }
                "max" => old.max(operand),
                "exch" => operand,
                "add" => cut(old.wrapping_add(operand), bits),
                other => return Err(format!("atomic {other}")),
            };
            bytes.copy_from_slice(&new.to_le_bytes()[..*size]);
            old
        }
        Kind::Nothing | Kind::Branch | Kind::Return | Kind::Together => return Ok(()),
    };
    if let Some(&target) = targets.first() {
        registers[target] = result;
    }
    Ok(())
}

fn is_shared(words: &[String]) -> bool {
    words.iter().any(|word| word == "shared")
}

fn convert(words: &[String], value: u64, second: impl FnOnce() -> u64) -> Result<u64, String> {
    let [.., to, from] = words else { return Err("cvt".to_owned()) };
    let two = |dtype: DType, second: u64| {
        let code = |value: u64| encode(dtype, f32::from_bits(value as u32));
        let bytes: Vec<u8> = code(second).into_iter().chain(code(value)).collect();
        bytes.iter().rev().fold(0u64, |all, byte| all << 8 | u64::from(*byte))
    };
    Ok(match (to.as_str(), from.as_str()) {
        ("u64" | "u32", "u16") => value & 0xffff,
        ("u32", "f32") => u64::from(f32::from_bits(value as u32) as u32),
        ("f64", "f32") => f64::from(f32::from_bits(value as u32)).to_bits(),
        ("f32", "f64") => u64::from((f64::from_bits(value) as f32).to_bits()),
        ("f64", "u64") => (value as f64).to_bits(),
        ("u64", "u32") | ("u32", "u64") => value & 0xffff_ffff,
        ("f32", "f16") => u64::from(half::f16::from_bits(value as u16).to_f32().to_bits()),
        ("f32", "u32") => u64::from((value as u32 as f32).to_bits()),
        ("f16x2", "f32") => two(DType::F16, second()),
        ("bf16x2", "f32") => two(DType::Bf16, second()),
        ("e4m3x2", "f32") => two(DType::F8E4M3, second()),
        ("e5m2x2", "f32") => two(DType::F8E5M2, second()),
        other => return Err(format!("conversion {other:?}")),
    })
}

#[derive(Default)]
struct Reader {
    registers: HashMap<String, usize>,
    parameters: HashMap<String, u64>,
    labels: HashMap<String, u64>,
    /// Where shared arrays begin; the dynamic one lies behind all others.
    shared: HashMap<String, u64>,
    shared_bytes: usize,
    branches: Vec<(usize, String)>,
    instructions: Vec<Instruction>,
}

impl Reader {
    fn read(mut self, text: &str) -> Result<Program, String> {
        let code: String = text
            .lines()
            .map(|line| line.split_once("//").map_or(line, |(code, _)| code).trim())
            .filter(|line| !line.is_empty() && *line != ".address_size 64")
            .collect::<Vec<_>>()
            .join("\n");
        let (head, body) = code.split_once("\n{\n").ok_or("no body")?;
        for line in head.lines().filter_map(|line| line.strip_prefix(".param ")) {
            let name = line.split_whitespace().nth(1).unwrap_or("").trim_end_matches(',');
            let number = self.parameters.len() as u64;
            self.parameters.insert(name.to_owned(), number);
        }
        for line in body.lines().filter(|line| line.starts_with(".shared")) {
            let (name, rest) =
                line.split_whitespace().next_back().and_then(|word| word.split_once('[')).ok_or("shared")?;
            let bytes: usize = rest.trim_end_matches("];").parse().map_err(|_| "bytes of shared memory")?;
            self.shared.insert(name.to_owned(), self.shared_bytes as u64);
            self.shared_bytes += bytes.next_multiple_of(16);
        }
        for line in head.lines().filter(|line| line.starts_with(".extern .shared")) {
            let name = line.split_whitespace().next_back().unwrap_or("").trim_end_matches("[];");
            self.shared.insert(name.to_owned(), self.shared_bytes as u64);
        }
        // A statement ends in a semicolon and may span lines; a label ends in a colon.
        let mut statement = String::new();
        for line in body.trim_end_matches('}').lines() {
            if statement.is_empty()
                && let Some(label) = line.strip_suffix(':')
            {
                self.labels.insert(label.to_owned(), self.instructions.len() as u64);
                continue;
            }
            statement.push_str(line);
            statement.push(' ');
            if let Some(whole) = statement.trim_end().strip_suffix(';') {
                if !whole.starts_with(".reg") && !whole.starts_with(".shared") {
                    let instruction = self.instruction(whole).map_err(|error| format!("{whole}: {error}"))?;
                    self.instructions.push(instruction);
                }
                statement.clear();
            }
        }
        for (at, label) in std::mem::take(&mut self.branches) {
            self.instructions[at].number = *self.labels.get(&label).ok_or(format!("no label {label}"))?;
        }
        Ok(Program {
            instructions: self.instructions,
            registers: self.registers.len(),
            shared: self.shared_bytes,
        })
    }

    fn register(&mut self, name: &str) -> usize {
        let next = self.registers.len();
        *self.registers.entry(name.to_owned()).or_insert(next)
    }

    fn source(&mut self, text: &str) -> Result<Source, String> {
        if let Some(place) =
            ["%ctaid.", "%ntid.", "%tid.", "%nctaid."].iter().position(|name| text.starts_with(name))
        {
            let axis = "xyz".find(&text[text.len() - 1..]).ok_or("axis")?;
            return Ok(Source::Special(3 * place + axis));
        }
        if text.starts_with('%') {
            return Ok(Source::Register(self.register(text)));
        }
        if let Some(&place) = self.shared.get(text) {
            return Ok(Source::Immediate(place));
        }
        let parsed = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0f")) {
            Some(digits) => u64::from_str_radix(digits, 16).ok(),
            None => text.parse::<i64>().ok().map(|value| value as u64),
        };
        // `createpolicy` has a decimal fraction, which nothing here computes with.
        parsed
            .or_else(|| text.parse::<f32>().ok().map(|value| u64::from(value.to_bits())))
            .map(Source::Immediate)
            .ok_or_else(|| format!("operand {text}"))
    }

    fn instruction(&mut self, text: &str) -> Result<Instruction, String> {
        let mut rest = text;
        let mut guard = None;
        if let Some(after) = rest.strip_prefix('@') {
            let (name, after) = after.split_once(' ').ok_or("guard")?;
            let wanted = !name.starts_with('!');
            guard = Some((self.register(name.trim_start_matches('!')), wanted));
            rest = after.trim_start();
        }
        let (opcode, operands) = rest.split_once(' ').unwrap_or((rest, ""));
        // `L1::no_allocate` is one word.
        let words: Vec<String> = opcode.split('.').map(str::to_owned).collect();
        let ty = words.last().map_or("", String::as_str).to_owned();
        let is_float = ty.starts_with('f');
        let operands = split_operands(operands);
        let mut instruction = Instruction {
            guard,
            kind: Kind::Nothing,
            targets: Vec::new(),
            sources: Vec::new(),
            number: 0,
            size: ty.trim_start_matches(|c: char| c.is_alphabetic()).parse::<usize>().unwrap_or(32) / 8,
            text: text.to_owned(),
            words,
        };
        let list = |operand: &str| -> Vec<String> {
            operand.trim_matches(['{', '}']).split(',').map(|name| name.trim().to_owned()).collect()
        };
        let arithmetic = |integer: Integer, float: Option<Float>| match (is_float, float) {
            (true, Some(float)) => Ok(Kind::Float(float)),
            (true, None) => Err("not a float instruction".to_owned()),
            (false, _) => Ok(Kind::Integer(integer)),
        };
        let first = instruction.words[0].clone();
        instruction.kind = match first.as_str() {
            "createpolicy" | "griddepcontrol" | "fence" | "prefetch" => return Ok(instruction),
            "cp" if instruction.words.iter().any(|word| word == "prefetch") => return Ok(instruction),
            "bar" => {
                instruction.kind = Kind::Together;
                return Ok(instruction);
            }
            "shfl" | "mma" => {
                for name in list(&operands[0]) {
                    let register = self.register(&name);
                    instruction.targets.push(register);
                }
                for operand in &operands[1..] {
                    for name in list(operand) {
                        let source = self.source(&name)?;
                        instruction.sources.push(source);
                    }
                }
                Kind::Together
            }
            "atom" => {
                instruction.targets = vec![self.register(&operands[0])];
                instruction.sources =
                    vec![self.source(operands[1].trim_matches(['[', ']']))?, self.source(&operands[2])?];
                Kind::Atomic
            }
            "ret" => Kind::Return,
            "bra" => {
                self.branches.push((self.instructions.len(), operands[0].clone()));
                Kind::Branch
            }
            "ld" if instruction.words[1] == "param" => {
                let name = operands[1].trim_matches(['[', ']']).to_owned();
                instruction.number = *self.parameters.get(&name).ok_or("no such parameter")?;
                instruction.targets = vec![self.register(&operands[0])];
                Kind::Parameter
            }
            "ld" | "st" => {
                let is_load = first == "ld";
                let (address, values) = if is_load { (1, 0) } else { (0, 1) };
                let inside = operands[address].trim_matches(['[', ']']).to_owned();
                let (base, offset) = inside.split_once('+').unwrap_or((&inside, "0"));
                instruction.number = offset.trim().parse().map_err(|_| "offset")?;
                instruction.sources.push(self.source(base.trim())?);
                for name in list(&operands[values]) {
                    match is_load {
                        true => {
                            let register = self.register(&name);
                            instruction.targets.push(register);
                        }
                        false => {
                            let source = self.source(&name)?;
                            instruction.sources.push(source);
                        }
                    }
                }
                if is_load { Kind::Load } else { Kind::Store }
            }
            "mov" if operands[0].starts_with('{') => {
                instruction.targets = list(&operands[0]).iter().map(|name| self.register(name)).collect();
                instruction.sources = vec![self.source(&operands[1])?];
                Kind::Unpack
            }
            "mov" if operands[1].starts_with('{') => {
                instruction.targets = vec![self.register(&operands[0])];
                instruction.sources =
                    list(&operands[1]).iter().map(|name| self.source(name)).collect::<Result<_, _>>()?;
                Kind::Pack
            }
            "mov" => Kind::Move,
            "add" => arithmetic(Integer::Add, Some(Float::Add))?,
            "sub" => arithmetic(Integer::Sub, Some(Float::Sub))?,
            "mul" => arithmetic(Integer::Mul, Some(Float::Mul))?,
            "mad" => arithmetic(Integer::Mad, None)?,
            "fma" => Kind::Float(Float::Fma),
            "neg" => Kind::Float(Float::Neg),
            "abs" => Kind::Float(Float::Abs),
            "rcp" => Kind::Float(Float::Rcp),
            "sqrt" => Kind::Float(Float::Sqrt),
            "copysign" => Kind::Float(Float::CopySign),
            "ex2" => Kind::Float(Float::Exp2),
            "lg2" => Kind::Float(Float::Log2),
            "div" => arithmetic(Integer::Div, Some(Float::Div))?,
            "rem" => arithmetic(Integer::Rem, None)?,
            "min" => arithmetic(Integer::Min, Some(Float::Min))?,
            "max" => arithmetic(Integer::Max, Some(Float::Max))?,
            "shl" => Kind::Integer(Integer::Shl),
            "shr" => Kind::Integer(Integer::Shr),
            "and" => Kind::Integer(Integer::And),
            "or" => Kind::Integer(Integer::Or),
            "xor" => Kind::Integer(Integer::Xor),
            "setp" => Kind::Compare,
            "selp" => Kind::Select,
            "not" => Kind::Not,
            "cvt" => Kind::Convert,
            other => return Err(format!("instruction {other}")),
        };
        let ordinary = matches!(
            instruction.kind,
            Kind::Move
                | Kind::Integer(_)
                | Kind::Float(_)
                | Kind::Compare
                | Kind::Select
                | Kind::Not
                | Kind::Convert
        );
        if ordinary {
            instruction.targets = vec![self.register(&operands[0])];
            instruction.sources =
                operands[1..].iter().map(|text| self.source(text)).collect::<Result<_, _>>()?;
        }
        Ok(instruction)
    }
}

/// Cuts at the commas outside of braces.
fn split_operands(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut depth = 0;
    for c in text.chars() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(String::new());
                continue;
            }
            _ => {}
        }
        if let Some(part) = parts.last_mut() {
            part.push(c);
        }
    }
    parts.iter().map(|part| part.trim().to_owned()).collect()
}

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
