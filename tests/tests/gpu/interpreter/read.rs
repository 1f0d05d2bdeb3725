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
            is_dependent: code.contains("griddepcontrol."),
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

    fn registers(&mut self, operand: &str) -> Vec<usize> {
        list(operand).map(|name| self.register(name)).collect()
    }

    fn sources(&mut self, operands: &[String]) -> Result<Vec<Source>, String> {
        operands.iter().flat_map(|operand| list(operand)).map(|name| self.source(name)).collect()
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
        let ty = words.last().map_or("", String::as_str);
        let size = ty.trim_start_matches(|c: char| c.is_alphabetic()).parse::<usize>().unwrap_or(32) / 8;
        let Meaning { kind, targets, sources, number } = self.meaning(&words, &split_operands(operands))?;
        Ok(Instruction { guard, kind, targets, sources, number, size, text: text.to_owned(), words })
    }

    fn meaning(&mut self, words: &[String], operands: &[String]) -> Result<Meaning, String> {
        let plain = |kind| Ok(Meaning { kind, ..Meaning::default() });
        match words[0].as_str() {
            "griddepcontrol" if words[1] == "wait" => plain(Kind::WaitKernels),
            "createpolicy" | "griddepcontrol" | "fence" | "prefetch" => plain(Kind::Nothing),
            "bar" => plain(Kind::Together),
            "ret" => plain(Kind::Return),
            "cp" => self.copy(words, operands),
            "ldmatrix" => {
                let (base, number) = self.address(&operands[1])?;
                let targets = self.registers(&operands[0]);
                Ok(Meaning { kind: Kind::Together, targets, sources: vec![base], number })
            }
            "shfl" | "mma" | "vote" | "redux" | "movmatrix" => Ok(Meaning {
                kind: Kind::Together,
                targets: self.registers(&operands[0]),
                sources: self.sources(&operands[1..])?,
                number: 0,
            }),
            "atom" => Ok(Meaning {
                kind: Kind::Atomic,
                targets: self.registers(&operands[0]),
                sources: vec![self.source(operands[1].trim_matches(['[', ']']))?, self.source(&operands[2])?],
                number: 0,
            }),
            "bra" => {
                self.branches.push((self.instructions.len(), operands[0].clone()));
                plain(Kind::Branch)
            }
            "ld" if words[1] == "param" => Ok(Meaning {
                kind: Kind::Parameter,
                targets: self.registers(&operands[0]),
                sources: Vec::new(),
                number: *self
                    .parameters
                    .get(operands[1].trim_matches(['[', ']']))
                    .ok_or("no such parameter")?,
            }),
            "ld" => {
                let (base, number) = self.address(&operands[1])?;
                let targets = self.registers(&operands[0]);
                Ok(Meaning { kind: Kind::Load, targets, sources: vec![base], number })
            }
            "st" => {
                let (base, number) = self.address(&operands[0])?;
                let mut sources = vec![base];
                sources.extend(self.sources(&operands[1..2])?);
                Ok(Meaning { kind: Kind::Store, targets: Vec::new(), sources, number })
            }
            opcode => {
                let is_float = words.last().is_some_and(|ty| ty.starts_with('f'));
                let kind = match opcode {
                    "mov" if operands[0].starts_with('{') => Kind::Unpack,
                    "mov" if operands[1].starts_with('{') => Kind::Pack,
                    _ => computation(opcode, is_float)?,
                };
                let targets = self.registers(&operands[0]);
                Ok(Meaning { kind, targets, sources: self.sources(&operands[1..])?, number: 0 })
            }
        }
    }

    /// `cp.async` and what belongs to it. Without a size of the source, it is that of the target.
    fn copy(&mut self, words: &[String], operands: &[String]) -> Result<Meaning, String> {
        if words.iter().any(|word| word == "prefetch") {
            return Ok(Meaning::default());
        }
        let mut meaning = Meaning::default();
        meaning.kind = match (words[1].as_str(), words[2].as_str()) {
            ("async", "ca" | "cg") => {
                let [to, from, size, read @ ..] = operands else { return Err("operands".to_owned()) };
                let ((to, to_offset), (from, from_offset)) = (self.address(to)?, self.address(from)?);
                let size = self.source(size)?;
                let read = read.first().map_or_else(|| Ok(size.clone()), |read| self.source(read))?;
                let (to_offset, from_offset) = (Source::Immediate(to_offset), Source::Immediate(from_offset));
                meaning.sources = vec![to, to_offset, from, from_offset, size, read];
                Kind::CopyAsync
            }
            ("async", "commit_group") => Kind::CommitCopies,
            ("async", "wait_group") => {
                meaning.number = operands[0].parse().map_err(|_| "number of groups")?;
                Kind::WaitCopies
            }
            _ => return Err(format!("instruction {}", words.join("."))),
        };
        Ok(meaning)
    }
}

/// What an instruction does with its operands: parts of an [`Instruction`].
struct Meaning {
    kind: Kind,
    targets: Vec<usize>,
    sources: Vec<Source>,
    number: u64,
}

impl Default for Meaning {
    fn default() -> Self {
        Self { kind: Kind::Nothing, targets: Vec::new(), sources: Vec::new(), number: 0 }
    }
}

/// What computes one register from others.
fn computation(opcode: &str, is_float: bool) -> Result<Kind, String> {
    let either = |integer, float| match is_float {
        true => Kind::Float(float),
        false => Kind::Integer(integer),
    };
    let integer = |integer| match is_float {
        true => Err("not a float instruction".to_owned()),
        false => Ok(Kind::Integer(integer)),
    };
    Ok(match opcode {
        "mov" => Kind::Move,
        "add" => either(Integer::Add, Float::Add),
        "sub" => either(Integer::Sub, Float::Sub),
        "mul" => either(Integer::Mul, Float::Mul),
        "div" => either(Integer::Div, Float::Div),
        "min" => either(Integer::Min, Float::Min),
        "max" => either(Integer::Max, Float::Max),
        "mad" => integer(Integer::Mad)?,
        "rem" => integer(Integer::Rem)?,
        "fma" => Kind::Float(Float::Fma),
        "neg" => Kind::Float(Float::Neg),
        "abs" => Kind::Float(Float::Abs),
        "rcp" => Kind::Float(Float::Rcp),
        "sqrt" => Kind::Float(Float::Sqrt),
        "copysign" => Kind::Float(Float::CopySign),
        "ex2" => Kind::Float(Float::Exp2),
        "lg2" => Kind::Float(Float::Log2),
        "shl" => Kind::Integer(Integer::Shl),
        "shr" => Kind::Integer(Integer::Shr),
        "and" => Kind::Integer(Integer::And),
        "or" => Kind::Integer(Integer::Or),
        "xor" => Kind::Integer(Integer::Xor),
        "setp" => Kind::Compare,
        "selp" => Kind::Select,
        "prmt" => Kind::Permute,
        "not" => Kind::Not,
        "cvt" | "cvta" => Kind::Convert,
        other => return Err(format!("instruction {other}")),
    })
}

/// The names of `{%r_a, %r_b}`; one name is a list of one.
fn list(operand: &str) -> impl Iterator<Item = &str> {
    operand.trim_matches(['{', '}']).split(',').map(str::trim)
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
