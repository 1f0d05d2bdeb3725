//! What one thread's instruction does to its registers and to memory.

use pagewise_attention::DType;
use pagewise_attention::cuda::ptx::Arg;

use super::super::encode::encode;
use super::memory::{Memory, SHARED_WINDOW};
use super::program::{Float, Instruction, Integer, Kind, Source};

pub(super) fn execute(
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
                    Integer::Mul if words[1] == "hi" => ((u128::from(a) * u128::from(small)) >> bits) as u64,
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
                    Integer::Min if ty == "s32" => (a as i32).min(small as i32) as u64,
                    Integer::Max if ty == "s32" => (a as i32).max(small as i32) as u64,
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
        Kind::Permute => {
            let bytes = (value(1) << 32 | cut(value(0), 32)).to_le_bytes();
            let order = value(2);
            (0..4).fold(0, |all, i| {
                let selected = order >> (4 * i);
                let byte = bytes[(selected & 7) as usize];
                // The fourth bit asks for the byte's sign, eight times.
                let byte = if selected & 8 == 0 { byte } else { 0xff * (byte >> 7) };
                all | u64::from(byte) << (8 * i)
            })
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
            // Without a space in its name a load takes either's addresses.
            let is_generic = !words.iter().any(|word| word == "shared" || word == "global");
            let bytes: &[u8] = match is_shared(words) || (is_generic && address & SHARED_WINDOW != 0) {
                true => memory.shared_slice(address, size * targets.len())?,
                false => memory.load(address, size * targets.len())?,
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
                false => memory.store(address, size * words.len())?,
            };
            for (word, bytes) in words.iter().zip(bytes.chunks_exact_mut(*size)) {
                bytes.copy_from_slice(&word[..*size]);
            }
            return Ok(());
        }
        Kind::Atomic => {
            let bytes = match is_shared(words) {
                true => memory.shared_slice(value(0), *size)?,
                false => memory.store(value(0), *size)?,
            };
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
        Kind::Nothing
        | Kind::Branch
        | Kind::Return
        | Kind::Together
        | Kind::CopyAsync
        | Kind::CommitCopies
        | Kind::WaitCopies
        | Kind::WaitKernels => return Ok(()),
    };
    if let Some(&target) = targets.first() {
        registers[target] = result;
    }
    Ok(())
}

pub(super) fn is_shared(words: &[String]) -> bool {
    words.iter().any(|word| word == "shared")
}

fn convert(words: &[String], value: u64, second: impl FnOnce() -> u64) -> Result<u64, String> {
    if words[0] == "cvta" {
        return Ok(value | SHARED_WINDOW);
    }
    let [.., to, from] = words else { return Err("cvt".to_owned()) };
    let two = |dtype: DType, second: u64| {
        let code = |value: u64| encode(dtype, f32::from_bits(value as u32));
        let bytes: Vec<u8> = code(second).into_iter().chain(code(value)).collect();
        bytes.iter().rev().fold(0u64, |all, byte| all << 8 | u64::from(*byte))
    };
    Ok(match (to.as_str(), from.as_str()) {
        ("u64" | "u32", "u16") => value & 0xffff,
        ("u32", "f32") => u64::from(f32::from_bits(value as u32) as u32),
        ("u64", "f32") if words[1] == "rni" => f32::from_bits(value as u32).round_ties_even() as u64,
        ("f64", "f32") => f64::from(f32::from_bits(value as u32)).to_bits(),
        ("f32", "f64") => u64::from((f64::from_bits(value) as f32).to_bits()),
        ("f32", "u64") => u64::from((value as f32).to_bits()),
        ("f64", "u64") => (value as f64).to_bits(),
        ("u64", "u32") | ("u32", "u64") => value & 0xffff_ffff,
        ("f32", "f16") => u64::from(half::f16::from_bits(value as u16).to_f32().to_bits()),
        ("f32", "u32") => u64::from((value as u32 as f32).to_bits()),
        ("f32", "s32") => u64::from((value as u32 as i32 as f32).to_bits()),
        ("f16x2", "e4m3x2") => halves(value, |code| fp8(code, 3, 7)),
        ("f16x2", "e5m2x2") => halves(value, |code| fp8(code, 2, 15)),
        ("f16x2", "f32") => two(DType::F16, second()),
        ("bf16x2", "f32") => two(DType::Bf16, second()),
        ("e4m3x2", "f32") => two(DType::F8E4M3, second()),
        ("e5m2x2", "f32") => two(DType::F8E5M2, second()),
        other => return Err(format!("conversion {other:?}")),
    })
}

/// Two numbers of eight bits as two of f16.
fn halves(value: u64, number: impl Fn(u8) -> f64) -> u64 {
    let half = |shift: u32| u64::from(half::f16::from_f64(number((value >> shift) as u8)).to_bits());
    half(0) | half(8) << 16
}

/// The value of a number of eight bits. E4M3 has one NaN and no infinity, E5M2 has both as IEEE has.
fn fp8(code: u8, mantissa_bits: u32, bias: i32) -> f64 {
    let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
    let mantissa = u32::from(code) & ((1 << mantissa_bits) - 1);
    let exponent = i32::from((code & 0x7f) >> mantissa_bits);
    let part = f64::from(mantissa) / f64::from(1 << mantissa_bits);
    let all_ones = (0x7f >> mantissa_bits) == exponent;
    sign * match (all_ones, mantissa_bits) {
        (true, 2) if mantissa == 0 => f64::INFINITY,
        (true, 2) => f64::NAN,
        (true, 3) if mantissa == 7 => f64::NAN,
        _ if exponent == 0 => part * 2f64.powi(1 - bias),
        _ => (1.0 + part) * 2f64.powi(exponent - bias),
    }
}
