//! `pagewise doctor`: what this machine can compute on, what would be chosen, and why.

use std::fmt::Write as _;
use std::io;

use clap::Args;
use pagewise_attention::cpu::Level;
use pagewise_runtime::load::{BackendChoice, choose_backend};

use crate::{Failure, generate};

/// Show what this machine can compute on, and what would be chosen
#[derive(Args, Debug)]
#[command(args_override_self = true)]
pub(crate) struct DoctorArgs {}

/// Runs the command.
pub(crate) fn run(_: &DoctorArgs) -> Result<(), Failure> {
    let auto = match choose_backend(BackendChoice::Auto) {
        Ok(choice) => choice.line,
        Err(error) => error.to_string(),
    };
    let mut report = Report::default();
    report.line("pagewise", env!("CARGO_PKG_VERSION"));
    report.line("system", &format!("{} on {}", std::env::consts::OS, std::env::consts::ARCH));
    report.line("--backend auto", &auto);
    cpu(&mut report);
    cuda(&mut report);
    wgpu(&mut report);
    generate::write(&mut io::stdout().lock(), &report.text)
}

/// Lines of a name and what there is to say of it; sub-lines have no name.
#[derive(Default)]
struct Report {
    text: String,
}

impl Report {
    fn line(&mut self, name: &str, value: &str) {
        // Writing to a string does not fail.
        let _ = writeln!(self.text, "{name:<16}{value}");
    }

    fn more(&mut self, value: &str) {
        self.line("", value);
    }
}

fn cpu(report: &mut Report) {
    report.line("cpu", &cpu_name().unwrap_or_else(|| "unnamed".to_owned()));
    let threads =
        std::thread::available_parallelism().map_or_else(|_| "unknown".to_owned(), |n| n.to_string());
    report.more(&format!("threads: {threads}"));
    report.more(&format!("instructions: {}", cpu_features().join(", ")));
    report.more(&format!("attention kernels: {:?}", Level::detect()).to_lowercase());
}

/// The processor's name, where the operating system says so in the way of Linux.
fn cpu_name() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let value = text.lines().find(|line| line.starts_with("model name"))?.split_once(':')?.1.trim();
    Some(value.to_owned())
}

#[cfg(target_arch = "x86_64")]
fn cpu_features() -> Vec<&'static str> {
    let features = [
        ("avx2", std::arch::is_x86_feature_detected!("avx2")),
        ("fma", std::arch::is_x86_feature_detected!("fma")),
        ("f16c", std::arch::is_x86_feature_detected!("f16c")),
        ("avx512f", std::arch::is_x86_feature_detected!("avx512f")),
        ("avx512bf16", std::arch::is_x86_feature_detected!("avx512bf16")),
    ];
    there(&features)
}

#[cfg(target_arch = "aarch64")]
fn cpu_features() -> Vec<&'static str> {
    let features = [
        ("neon", std::arch::is_aarch64_feature_detected!("neon")),
        ("fp16", std::arch::is_aarch64_feature_detected!("fp16")),
        ("bf16", std::arch::is_aarch64_feature_detected!("bf16")),
    ];
    there(&features)
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn cpu_features() -> Vec<&'static str> {
    vec!["none that the kernels use"]
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
fn there(features: &[(&'static str, bool)]) -> Vec<&'static str> {
    let there: Vec<_> = features.iter().filter(|feature| feature.1).map(|feature| feature.0).collect();
    if there.is_empty() { vec!["none that the kernels use"] } else { there }
}

#[cfg(feature = "cuda")]
fn cuda(report: &mut Report) {
    use pagewise_attention::cuda;

    match cuda::devices() {
        Err(error) => report.line("cuda", &format!("not usable: {error}")),
        Ok(devices) => {
            for (at, device) in devices.iter().enumerate() {
                report.line(if at == 0 { "cuda" } else { "" }, &device.to_string());
                report.more(&match device.check() {
                    Ok(()) => format!(
                        "usable: {} multiprocessors, {} KiB of shared memory a block, prefill by {}",
                        device.multiprocessors,
                        device.shared_memory_per_block >> 10,
                        device.prefill_form()
                    ),
                    Err(error) => format!("not usable: {error}"),
                });
            }
            report.more(&match pagewise_runtime::backend::cuda::blaslt_version() {
                Ok(version) => format!("cuBLASLt: {version}"),
                Err(problem) => problem,
            });
            if let Some(release) = cuda::driver_release() {
                report.more(&format!("driver: {release}"));
            }
        }
    }
    let kernels = cuda::ptx::all_kernels();
    report.more(&match kernels {
        Ok(kernels) => kernel_summary(kernels.iter().map(|kernel| kernel.family())),
        Err(error) => format!("kernels: {error}"),
    });
}

#[cfg(not(feature = "cuda"))]
fn cuda(report: &mut Report) {
    report.line("cuda", "not in this binary (the feature cuda is off)");
}

#[cfg(feature = "wgpu")]
fn wgpu(report: &mut Report) {
    use pagewise_attention::wgpu;

    let adapters = pollster::block_on(wgpu::adapters());
    if adapters.is_empty() {
        report.line("wgpu", "not usable: no Vulkan, Metal or DX12 driver shows an adapter");
    }
    for (at, adapter) in adapters.iter().enumerate() {
        report.line(if at == 0 { "wgpu" } else { "" }, &adapter.to_string());
        let features: Vec<String> =
            adapter.features.iter_names().map(|(name, _)| name.to_lowercase().replace('_', "-")).collect();
        report.more(&match adapter.check() {
            Ok(()) => format!(
                "usable: {}; bindings of up to {} MiB",
                if features.is_empty() { "no optional features".to_owned() } else { features.join(", ") },
                adapter.limits.max_storage_buffer_binding_size >> 20
            ),
            Err(error) => format!("not usable: {error}"),
        });
    }
    report.more(&match wgpu::shaders::all_shaders() {
        Ok(shaders) => kernel_summary(shaders.iter().map(|shader| shader.family())),
        Err(error) => format!("kernels: {error}"),
    });
}

#[cfg(not(feature = "wgpu"))]
fn wgpu(report: &mut Report) {
    report.line("wgpu", "not in this binary (the feature wgpu is off)");
}

/// `kernels and their variants: decode 4, write_kv 30`.
#[cfg(any(feature = "cuda", feature = "wgpu"))]
fn kernel_summary<'a>(families: impl Iterator<Item = &'a str>) -> String {
    let mut variants: std::collections::BTreeMap<&str, usize> = std::collections::BTreeMap::new();
    families.for_each(|family| *variants.entry(family).or_default() += 1);
    let variants: Vec<String> = variants.iter().map(|(family, count)| format!("{family} {count}")).collect();
    format!("kernels and their variants: {}", variants.join(", "))
}
