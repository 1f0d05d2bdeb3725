//! `pagewise conformance`: the attention backends of this machine against the oracle, case by case.
//!
//! What a person sends us from a GPU that we do not have. The cases, the oracle and the runner are
//! `pagewise_attention::conformance`'s; here is only which backends are asked and how the answer is printed.

use std::io;

use clap::{Args, ValueEnum};
use pagewise_attention::conformance::{
    Case, CaseResult, Cpu, Outcome, Report, Subject, fresh_seed, full, quick, run_case,
};

use crate::{Failure, generate};

/// Check the attention kernels of this machine against plain code
#[derive(Args, Debug)]
#[command(args_override_self = true)]
pub(crate) struct ConformanceArgs {
    /// Which backend; auto takes the CPU, every wgpu adapter and every NVIDIA GPU
    #[arg(long, value_enum, default_value_t = Backend::Auto)]
    backend: Backend,
    /// A small part of the cases
    #[arg(long)]
    quick: bool,
    /// One JSON line for each backend, then one with the sums
    #[arg(long)]
    json: bool,
    /// Run this one case, as a report names it
    #[arg(long, value_name = "LINE")]
    case: Option<String>,
    /// Seed of the cases' data; another one each time by default
    #[arg(long)]
    seed: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Backend {
    Auto,
    Cpu,
    Wgpu,
    Cuda,
}

impl ConformanceArgs {
    fn wants(&self, backend: Backend) -> bool {
        [Backend::Auto, backend].contains(&self.backend)
    }

    fn cases(&self) -> Result<Vec<Case>, Failure> {
        if let Some(line) = &self.case {
            let case = line.parse().map_err(|error| Failure::Usage(format!("--case: {error}")))?;
            return Ok(vec![case]);
        }
        let seed = self.seed.unwrap_or_else(fresh_seed);
        Ok(if self.quick { quick(seed) } else { full(seed) })
    }
}

/// Sums over all backends.
#[derive(Default)]
struct Sums {
    passed: usize,
    failed: usize,
    skipped: usize,
}

/// Runs the command.
pub(crate) fn run(args: &ConformanceArgs) -> Result<(), Failure> {
    let cases = args.cases()?;
    let mut sums = Sums::default();
    if args.wants(Backend::Cpu) {
        check(args, &cases, &mut Cpu::default(), &mut sums)?;
    }
    if args.wants(Backend::Wgpu) {
        wgpu(args, &cases, &mut sums)?;
    }
    if args.wants(Backend::Cuda) {
        cuda(args, &cases, &mut sums)?;
    }
    let Sums { passed, failed, skipped } = sums;
    if args.json {
        let line = format!("{{\"passed\": {passed}, \"failed\": {failed}, \"skipped\": {skipped}}}\n");
        generate::write(&mut io::stdout().lock(), &line)?;
    }
    if failed > 0 { Err(Failure::Reported) } else { Ok(()) }
}

/// Runs the cases on one backend and prints its report.
fn check(
    args: &ConformanceArgs,
    cases: &[Case],
    subject: &mut dyn Subject,
    sums: &mut Sums,
) -> Result<(), Failure> {
    let results = cases.iter().map(|case| said(run_case(subject, case))).collect();
    let report = Report { subject: subject.name(), results };
    sums.passed += report.passed();
    sums.failed += report.failed();
    sums.skipped += report.skipped();
    let text = if args.json { report.to_json() } else { report.to_string() };
    generate::write(&mut io::stdout().lock(), &format!("{text}\n"))
}

/// Failures show at once: on some drivers a long report never comes.
fn said(result: CaseResult) -> CaseResult {
    if let Outcome::Failed(reason) = &result.outcome {
        tracing::warn!(case = result.line, "failed: {reason}");
    }
    result
}

#[cfg(feature = "wgpu")]
fn wgpu(args: &ConformanceArgs, cases: &[Case], sums: &mut Sums) -> Result<(), Failure> {
    use pagewise_attention::conformance::Wgpu;
    use pagewise_attention::wgpu::{self, Context, WgpuError};

    let reports = pollster::block_on(wgpu::adapters());
    if reports.is_empty() && args.backend == Backend::Wgpu {
        return Err(Failure::Usage(format!("--backend wgpu: {}", WgpuError::NoAdapter)));
    }
    for report in reports {
        if let Err(error) = report.check() {
            tracing::warn!("{report} is left out: {error}");
            continue;
        }
        let (device, queue) = pollster::block_on(wgpu::open(report.index)).map_err(Failure::error)?;
        let context = Context::new(device, queue).map_err(Failure::error)?.with_matrices(&report.matrices);
        check(args, cases, &mut Wgpu::new(report.to_string(), &context), sums)?;
    }
    Ok(())
}

#[cfg(not(feature = "wgpu"))]
fn wgpu(args: &ConformanceArgs, _: &[Case], _: &mut Sums) -> Result<(), Failure> {
    match args.backend {
        Backend::Wgpu => {
            Err(Failure::Usage("--backend wgpu: not in this binary (the feature wgpu is off)".to_owned()))
        }
        _ => Ok(()),
    }
}

#[cfg(feature = "cuda")]
fn cuda(args: &ConformanceArgs, cases: &[Case], sums: &mut Sums) -> Result<(), Failure> {
    use pagewise_attention::conformance::Cuda;
    use pagewise_attention::cuda::{Context, CudaError, devices};

    let asked = args.backend == Backend::Cuda;
    let absent = |error: CudaError| Failure::Usage(format!("--backend cuda: {error}"));
    let devices = match devices() {
        Ok(devices) if devices.is_empty() && asked => {
            return Err(absent(CudaError::NoSuchDevice { ordinal: 0, count: 0 }));
        }
        Ok(devices) => devices,
        Err(error) if asked => return Err(absent(error)),
        Err(error) => {
            tracing::debug!("no CUDA: {error}");
            return Ok(());
        }
    };
    for device in devices {
        match device.check() {
            Err(error) if asked => return Err(absent(error)),
            Err(error) => {
                tracing::warn!("{device} is left out: {error}");
                continue;
            }
            Ok(()) => {}
        }
        let context = Context::primary(device.ordinal).map_err(Failure::error)?;
        // A primary context always has cudarc's side.
        if let Some(mut subject) = Cuda::new(&context) {
            check(args, cases, &mut subject, sums)?;
        }
    }
    Ok(())
}

#[cfg(not(feature = "cuda"))]
fn cuda(args: &ConformanceArgs, _: &[Case], _: &mut Sums) -> Result<(), Failure> {
    match args.backend {
        Backend::Cuda => {
            Err(Failure::Usage("--backend cuda: not in this binary (the feature cuda is off)".to_owned()))
        }
        _ => Ok(()),
    }
}
