//! Random cases on every backend of this machine: each agrees with the oracle, and all with each other. Attention and
//! merging may then differ by what both backends' tolerances allow together, which follows from their agreeing with the
//! oracle; what only moves elements (write, copy, swap) must give the same bits everywhere.
//!
//! One case again: `PAGEWISE_CASE="attention q=bf16 …" cargo test -p pagewise-tests --test backends_agree`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub, reason = "a test")]

#[path = "gpu/cuda.rs"]
#[allow(dead_code, reason = "no receipts here")]
mod cuda;
#[path = "gpu/cuda_subject.rs"]
mod cuda_subject;
#[path = "gpu/random.rs"]
#[allow(dead_code, reason = "the cases come from the suite")]
mod random;
#[path = "gpu/wgpu_contexts.rs"]
mod wgpu_contexts;

use cuda_subject::subject;
use pagewise_attention::conformance::{
    AttentionTask, Case, CopyTask, Cpu, MergeTask, Operation, Outcome, ProbabilityRounding, Random, Refusal,
    ScaleKind, Subject, SwapTask, Wgpu, WriteTask, random_case, run_case,
};
use pagewise_attention::{AttentionConfig, HostTensor, HostTensorMut};
use random::{run_cases, run_seed};
use wgpu_contexts::contexts;

const CASES: usize = 120;

/// A subject, and the outputs of the first call of a case.
struct Recorded<'a> {
    subject: &'a mut dyn Subject,
    outputs: Vec<Vec<u8>>,
}

impl Recorded<'_> {
    fn record(&mut self, outputs: &[HostTensor<'_>]) {
        if self.outputs.is_empty() {
            self.outputs = outputs.iter().map(HostTensor::to_bytes).collect();
        }
    }
}

impl Subject for Recorded<'_> {
    fn name(&self) -> String {
        self.subject.name()
    }

    fn probability_rounding(&self, config: &AttentionConfig) -> ProbabilityRounding {
        self.subject.probability_rounding(config)
    }

    fn attention(
        &mut self,
        task: &AttentionTask<'_>,
        mut out: HostTensorMut<'_>,
        mut lse: Option<&mut [f32]>,
    ) -> Result<(), Refusal> {
        self.subject.attention(task, out.reborrow(), lse.as_deref_mut())?;
        self.record(&[out.as_ref(), HostTensor::F32(lse.as_deref().unwrap_or_default())]);
        Ok(())
    }

    fn write_kv(
        &mut self,
        task: &WriteTask<'_>,
        mut k: HostTensorMut<'_>,
        mut v: HostTensorMut<'_>,
    ) -> Result<(), Refusal> {
        self.subject.write_kv(task, k.reborrow(), v.reborrow())?;
        self.record(&[k.as_ref(), v.as_ref()]);
        Ok(())
    }

    fn copy_blocks(
        &mut self,
        task: &CopyTask<'_>,
        mut k: HostTensorMut<'_>,
        mut v: HostTensorMut<'_>,
    ) -> Result<(), Refusal> {
        self.subject.copy_blocks(task, k.reborrow(), v.reborrow())?;
        self.record(&[k.as_ref(), v.as_ref()]);
        Ok(())
    }

    fn swap_blocks(
        &mut self,
        task: &SwapTask<'_>,
        mut k: HostTensorMut<'_>,
        mut v: HostTensorMut<'_>,
    ) -> Result<(), Refusal> {
        self.subject.swap_blocks(task, k.reborrow(), v.reborrow())?;
        self.record(&[k.as_ref(), v.as_ref()]);
        Ok(())
    }

    fn merge_states(
        &mut self,
        task: &MergeTask<'_>,
        mut out: HostTensorMut<'_>,
        lse: &mut [f32],
    ) -> Result<(), Refusal> {
        self.subject.merge_states(task, out.reborrow(), lse)?;
        self.record(&[out.as_ref(), HostTensor::F32(lse)]);
        Ok(())
    }
}

/// Runs a case everywhere. How many backends answered, or what is wrong.
fn agree(subjects: &mut [Box<dyn Subject + '_>], case: &Case) -> Result<usize, String> {
    let mut answers: Vec<(String, Vec<Vec<u8>>)> = Vec::new();
    for subject in subjects {
        let mut recorded = Recorded { subject: subject.as_mut(), outputs: Vec::new() };
        match run_case(&mut recorded, case).outcome {
            Outcome::Passed(_) => answers.push((recorded.name(), recorded.outputs)),
            Outcome::Failed(reason) => return Err(format!("{}: {reason}", recorded.name())),
            Outcome::Skipped(_) => {}
        }
    }
    let moves = matches!(case.operation, Operation::CopyBlocks | Operation::SwapBlocks)
        // With a scale the nearest element may be one of two.
        || (case.operation == Operation::WriteKv && case.scale == ScaleKind::One);
    if moves && let [(first, expected), others @ ..] = answers.as_slice() {
        for (other, outputs) in others {
            if outputs != expected {
                return Err(format!("{first} and {other} wrote different bits"));
            }
        }
    }
    Ok(answers.len())
}

#[test]
fn random_cases_agree_on_all_backends() {
    let wgpu = contexts();
    let cuda = cuda::context();
    let mut subjects: Vec<Box<dyn Subject + '_>> = vec![Box::new(Cpu::default())];
    for (name, context) in &wgpu {
        subjects.push(Box::new(Wgpu::new(name.clone(), context)));
    }
    if let Some(context) = &cuda {
        subjects.push(Box::new(subject(context)));
    }
    if let Ok(line) = std::env::var("PAGEWISE_CASE") {
        let case: Case = line.parse().unwrap();
        agree(&mut subjects, &case).unwrap_or_else(|error| panic!("{case}\n{error}"));
        return;
    }
    let mut random = Random::new(run_seed());
    let cases = run_cases(CASES);
    let mut together = 0;
    for _ in 0..cases {
        let case = random_case(&mut random);
        match agree(&mut subjects, &case) {
            Ok(answers) => together += usize::from(answers > 1),
            Err(error) => {
                panic!("{error}\nPAGEWISE_CASE=\"{case}\" cargo test -p pagewise-tests --test backends_agree")
            }
        }
    }
    eprintln!("{} backends, {together} of {cases} random cases by more than one", subjects.len());
    assert!(subjects.len() == 1 || together * 5 > cases, "the backends have too few cases in common");
}
