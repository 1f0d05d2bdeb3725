//! From PTX text to instructions. What it does not know it refuses by name.

use std::collections::HashMap;

use super::program::{Float, Instruction, Integer, Kind, Program, Source};

#[derive(Default)]
pub(super) struct Reader {
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
    pub(super) fn read(mut self, text: &str) -> Result<Program, String> {
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

    /// The base and the offset of `[%r_x + 4]`.
    fn address(&mut self, operand: &str) -> Result<(Source, u64), String> {
        let inside = operand.trim_matches(['[', ']']);
        let (base, offset) = inside.split_once('+').unwrap_or((inside, "0"));
        Ok((self.source(base.trim())?, offset.trim().parse().map_err(|_| "offset")?))
    }

    /// What [`Kind::CopyAsync`] says; without a size of the source, it is that of the target.
    fn copy_operands(&mut self, operands: &[String]) -> Result<Vec<Source>, String> {
        let [to, from, size, read @ ..] = operands else { return Err("operands".to_owned()) };
        let ((to, to_offset), (from, from_offset)) = (self.address(to)?, self.address(from)?);
        let size = self.source(size)?;
        let read = read.first().map_or_else(|| Ok(size.clone()), |read| self.source(read))?;
        Ok(vec![to, Source::Immediate(to_offset), from, Source::Immediate(from_offset), size, read])
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
            "cp" if instruction.words[1] == "async" => {
                instruction.kind = match instruction.words[2].as_str() {
                    "ca" | "cg" => {
                        instruction.sources = self.copy_operands(&operands)?;
                        Kind::CopyAsync
                    }
                    "commit_group" => Kind::CommitCopies,
                    "wait_group" => {
                        instruction.number = operands[0].parse().map_err(|_| "number of groups")?;
                        Kind::WaitCopies
                    }
                    other => return Err(format!("cp.async.{other}")),
                };
                return Ok(instruction);
            }
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
                let (base, offset) = self.address(&operands[address])?;
                instruction.number = offset;
                instruction.sources.push(base);
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
            "cvt" | "cvta" => Kind::Convert,
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
