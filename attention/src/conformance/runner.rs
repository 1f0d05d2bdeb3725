//! Runs cases on a subject and says what passed, what failed and what was skipped, each with its line.

use super::check::{Agreement, unchanged};
use super::{
    AttentionData, Buffer, Case, CopyData, MergeData, Operation, Random, Reference, Refusal, Subject,
    SwapData, WriteData,
};
use crate::{CacheLayout, DType, HostTensor, KvStrides};
use std::fmt;

/// What became of a case.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// It agrees with the oracle.
    Passed(Agreement),
    /// It does not; what and where.
    Failed(String),
    /// The subject does not do this; why.
    Skipped(String),
}

/// A case and what became of it.
#[derive(Clone, Debug, PartialEq)]
pub struct CaseResult {
    /// The case's line: paste it to run it again.
    pub line: String,
    /// What became of it.
    pub outcome: Outcome,
}

/// What became of many cases.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// Name of the subject.
    pub subject: String,
    /// One after the other.
    pub results: Vec<CaseResult>,
}

impl Report {
    fn count(&self, of: impl Fn(&Outcome) -> bool) -> usize {
        self.results.iter().filter(|result| of(&result.outcome)).count()
    }

    /// Number of cases that agree with the oracle.
    pub fn passed(&self) -> usize {
        self.count(|outcome| matches!(outcome, Outcome::Passed(_)))
    }

    /// Number of cases that do not.
    pub fn failed(&self) -> usize {
        self.count(|outcome| matches!(outcome, Outcome::Failed(_)))
    }

    /// Number of cases that the subject does not do.
    pub fn skipped(&self) -> usize {
        self.count(|outcome| matches!(outcome, Outcome::Skipped(_)))
    }

    /// The report as JSON: `subject`, `passed`, `failed`, `skipped`, `worst` (largest error as a fraction of
    /// its tolerance), and `cases` with those that failed or were skipped and the reason.
    pub fn to_json(&self) -> String {
        let mut worst = 0.0f64;
        let mut cases = Vec::new();
        for CaseResult { line, outcome } in &self.results {
            let (name, reason) = match outcome {
                Outcome::Passed(agreement) => {
                    worst = worst.max(agreement.worst);
                    continue;
                }
                Outcome::Failed(reason) => ("failed", reason),
                Outcome::Skipped(reason) => ("skipped", reason),
            };
            let (line, reason) = (json_string(line), json_string(reason));
            cases.push(format!("{{\"case\":{line},\"outcome\":\"{name}\",\"reason\":{reason}}}"));
        }
        format!(
            "{{\"subject\":{},\"passed\":{},\"failed\":{},\"skipped\":{},\"worst\":{worst:.4},\"cases\":[{}]}}",
            json_string(&self.subject),
            self.passed(),
            self.failed(),
            self.skipped(),
            cases.join(",")
        )
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for CaseResult { line, outcome } in &self.results {
            match outcome {
                Outcome::Passed(_) => {}
                Outcome::Failed(reason) => writeln!(f, "FAILED  {line}\n        {reason}")?,
                Outcome::Skipped(reason) => writeln!(f, "skipped {line}\n        {reason}")?,
            }
        }
        let (passed, failed, skipped) = (self.passed(), self.failed(), self.skipped());
        write!(f, "{}: {passed} passed, {failed} failed, {skipped} skipped", self.subject)
    }
}

fn json_string(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            c if c.is_control() => quoted.push_str(&format!("\\u{:04x}", c as u32)),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

/// Runs cases one after the other.
pub fn run(subject: &mut dyn Subject, cases: &[Case]) -> Report {
    let results = cases.iter().map(|case| run_case(subject, case)).collect();
    Report { subject: subject.name(), results }
}

/// Runs one case.
pub fn run_case(subject: &mut dyn Subject, case: &Case) -> CaseResult {
    run_case_observed(subject, case, &mut |_| {})
}

/// Runs one case and shows the tensors that the subject's first call has written: K and V, or output and log-sum-exp.
pub fn run_case_observed(subject: &mut dyn Subject, case: &Case, observe: &mut Observe<'_>) -> CaseResult {
    let unanswered = || Outcome::Failed("the subject only says that it is not done yet".to_owned());
    let result = answer(subject, case, observe);
    result.unwrap_or_else(|| CaseResult { line: case.to_string(), outcome: unanswered() })
}

/// Sees what a subject has written.
pub type Observe<'a> = dyn FnMut(&[HostTensor<'_>]) + 'a;

/// Runs one case on a subject that may have to be asked again; `None` is "not yet". A case's data are made from its
/// line, so that it asks the same each time.
pub fn try_case(subject: &mut dyn Subject, case: &Case) -> Option<CaseResult> {
    answer(subject, case, &mut |_| {})
}

fn answer(subject: &mut dyn Subject, case: &Case, observe: &mut Observe<'_>) -> Option<CaseResult> {
    let run = match case.operation {
        Operation::Attention => attention,
        Operation::WriteKv => write_kv,
        Operation::CopyBlocks => copy_blocks,
        Operation::SwapBlocks => swap_blocks,
        Operation::MergeStates => merge_states,
    };
    let result = run(subject, case, observe);
    let outcome = match result {
        Ok(agreement) => Outcome::Passed(agreement),
        Err(Refusal::Failed(reason)) => Outcome::Failed(reason),
        Err(Refusal::Unsupported(reason)) => Outcome::Skipped(reason),
        Err(Refusal::Pending) => return None,
    };
    Some(CaseResult { line: case.to_string(), outcome })
}

fn failed(reason: impl fmt::Display) -> Refusal {
    Refusal::Failed(reason.to_string())
}

fn attention(
    subject: &mut dyn Subject,
    case: &Case,
    observe: &mut Observe<'_>,
) -> Result<Agreement, Refusal> {
    let data = AttentionData::generate(case);
    let task = data.task().map_err(failed)?;
    let before = data.poisoned_out();
    let (mut out, mut lse) = (before.clone(), data.poisoned_lse());
    subject.attention(&task, out.as_mut(), Some(&mut lse))?;
    observe(&[out.as_ref(), HostTensor::F32(&lse)]);
    let reference = Reference::attention(&data);
    let rounding = subject.probability_rounding(&data.config);
    let agreement = Agreement::of_attention(&data, &reference, rounding, &before, &out, Some(&lse));
    let agreement = agreement.map_err(failed)?;
    // Asked for no `lse`, it gives the same output.
    let mut again = before.clone();
    subject.attention(&task, again.as_mut(), None)?;
    match (0..out.len()).find(|&i| out.bits(i) != again.bits(i)) {
        Some(i) => Err(failed(format!("element {i} of out differs when no lse is asked for"))),
        None => Ok(agreement),
    }
}

/// Offsets of a block's elements, `[tokens, heads, dim]`, in plain loops.
fn block_elements(
    layout: &CacheLayout,
    strides: KvStrides,
    heads: usize,
    dim: usize,
    block: u32,
) -> Vec<usize> {
    let mut elements = Vec::new();
    for token in 0..layout.block_size {
        for head in 0..heads {
            for d in 0..dim {
                elements.push(
                    block as usize * strides.block as usize
                        + token * strides.token as usize
                        + head * strides.head as usize
                        + d,
                );
            }
        }
    }
    elements
}

fn write_kv(subject: &mut dyn Subject, case: &Case, observe: &mut Observe<'_>) -> Result<Agreement, Refusal> {
    let data = WriteData::generate(case);
    let mut random = Random::new(!case.seed);
    let mut cache = |len: u64| Buffer::poisoned(case.kv_dtype, len as usize, &mut random);
    let before = (cache(data.layout.k_extent(&data.config)), cache(data.layout.v_extent(&data.config)));
    let mut after = before.clone();
    subject.write_kv(&data.task(), after.0.as_mut(), after.1.as_mut())?;
    observe(&[after.0.as_ref(), after.1.as_ref()]);
    let mut agreement = Agreement::default();
    let sides = [
        ("K", &data.source.0, data.strides.0, data.layout.k, data.config.head_dim_qk, &data.scales.0),
        ("V", &data.source.1, data.strides.1, data.layout.v, data.config.head_dim_v, &data.scales.1),
    ];
    for ((what, source, rows, strides, dim, scales), (before, after)) in
        sides.into_iter().zip([(&before.0, &after.0), (&before.1, &after.1)])
    {
        let mut written = vec![false; before.len()];
        for (token, &slot) in data.slots.iter().enumerate().filter(|&(_, &slot)| slot >= 0) {
            let (block, place) = (slot as usize / case.block_size, slot as usize % case.block_size);
            for (head, &scale) in scales.iter().enumerate() {
                for d in 0..dim {
                    let from = token * rows.token as usize + head * rows.head as usize + d;
                    let to = block * strides.block as usize
                        + place * strides.token as usize
                        + head * strides.head as usize
                        + d;
                    written[to] = true;
                    let worst =
                        stored(source.get(from), f64::from(scale), before, after, to).map_err(|text| {
                            failed(format!("{what}, token {token}, head {head}, element {d}: {text}"))
                        })?;
                    agreement.worst = agreement.worst.max(worst);
                }
            }
        }
        unchanged(what, before, after, |i| !written[i]).map_err(failed)?;
    }
    Ok(agreement)
}

/// A stored element against the nearest that its type has. Without a scale the bits must be those; with one,
/// dividing or multiplying by the reciprocal may decide a near tie differently: then it may be the neighbour
/// as long as that is as near within 4 roundings of binary32.
fn stored(value: f64, scale: f64, cache: &Buffer, after: &Buffer, at: usize) -> Result<f64, String> {
    let mut nearest = Buffer::zeros(cache.dtype(), 1);
    nearest.set(0, value / scale);
    let (expected, found) = (nearest.get(0), after.get(at));
    if nearest.bits(0) == after.bits(at) {
        return Ok(0.0);
    }
    let slack = 4.0 * DType::F32.unit_roundoff() * (value / scale).abs();
    let (best, error) = ((expected - value / scale).abs(), (found - value / scale).abs());
    match scale != 1.0 && error <= best + slack {
        true => Ok((error - best) / slack),
        false => Err(format!("{found} was stored for {value} with scale {scale}, expected {expected}")),
    }
}

fn copy_blocks(
    subject: &mut dyn Subject,
    case: &Case,
    observe: &mut Observe<'_>,
) -> Result<Agreement, Refusal> {
    let data = CopyData::generate(case);
    let mut after = data.cache.clone();
    subject.copy_blocks(&data.task(), after.0.as_mut(), after.1.as_mut())?;
    observe(&[after.0.as_ref(), after.1.as_ref()]);
    let heads = data.config.kv_heads;
    for (what, strides, dim, before, after) in [
        ("K", data.layout.k, data.config.head_dim_qk, &data.cache.0, &after.0),
        ("V", data.layout.v, data.config.head_dim_v, &data.cache.1, &after.1),
    ] {
        let elements = |block: u32| block_elements(&data.layout, strides, heads, dim, block);
        let moves = data.pairs.iter().flat_map(|&(from, to)| elements(from).into_iter().zip(elements(to)));
        check_moves(what, moves, before, before, after)?;
    }
    Ok(Agreement::default())
}

fn swap_blocks(
    subject: &mut dyn Subject,
    case: &Case,
    observe: &mut Observe<'_>,
) -> Result<Agreement, Refusal> {
    let data = SwapData::generate(case);
    let mut after = data.target.clone();
    subject.swap_blocks(&data.task(), after.0.as_mut(), after.1.as_mut())?;
    observe(&[after.0.as_ref(), after.1.as_ref()]);
    let (heads, from, to) = (data.config.kv_heads, &data.source_layout, &data.target_layout);
    for (what, strides, dim, source, before, after) in [
        ("K", (from.k, to.k), data.config.head_dim_qk, &data.source.0, &data.target.0, &after.0),
        ("V", (from.v, to.v), data.config.head_dim_v, &data.source.1, &data.target.1, &after.1),
    ] {
        let moves = data.pairs.iter().flat_map(|&pair| {
            let read = block_elements(from, strides.0, heads, dim, pair.0);
            read.into_iter().zip(block_elements(to, strides.1, heads, dim, pair.1))
        });
        check_moves(what, moves, source, before, after)?;
    }
    Ok(Agreement::default())
}

/// Elements moved must have arrived with their bits, all others must be as before.
fn check_moves(
    what: &str,
    moves: impl Iterator<Item = (usize, usize)>,
    source: &Buffer,
    before: &Buffer,
    after: &Buffer,
) -> Result<(), Refusal> {
    let mut written = vec![false; before.len()];
    for (from, to) in moves {
        written[to] = true;
        if source.bits(from) != after.bits(to) {
            let (found, expected) = (after.get(to), source.get(from));
            return Err(failed(format!("{what}: element {to} is {found}, expected {expected}")));
        }
    }
    unchanged(what, before, after, |i| !written[i]).map_err(failed)
}

fn merge_states(
    subject: &mut dyn Subject,
    case: &Case,
    observe: &mut Observe<'_>,
) -> Result<Agreement, Refusal> {
    let data = MergeData::generate(case);
    let parts = data.merge_parts();
    let rows = data.rows * data.heads;
    let mut out = Buffer::poisoned(case.q_dtype, rows * data.head_dim, &mut Random::new(!case.seed));
    let mut lse = vec![f32::NAN; rows];
    subject.merge_states(&data.task(&parts), out.as_mut(), &mut lse)?;
    observe(&[out.as_ref(), HostTensor::F32(&lse)]);
    Agreement::of_merge(&data, &Reference::merge(&data), &out, &lse).map_err(failed)
}
