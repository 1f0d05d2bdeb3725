//! Attention through wgpu in f16: decode at the shapes of `peers/h100_decode.tsv`, beside what the same device can read
//! at best in the same run; prefill, and a mixture of both.
//!
//! `cargo bench -p pagewise-benches --bench wgpu_attention [-- WORDS]`; with words, only shapes whose name contains
//! one of them. Each shape's output is checked against plain code before it is timed. Times are of many dispatches in
//! one pass, by timestamps where the device has them, over as many caches as keep the last-level cache from serving
//! them. `PAGEWISE_BENCH_JSON` names a file for the figures. `PAGEWISE_SWEEP=1` tries plans and tunings on a few shapes
//! instead. A software driver is skipped unless `PAGEWISE_SOFTWARE=1`, which then measures the smallest shapes only.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub, reason = "a bench")]

#[path = "wgpu/batch.rs"]
mod batch;
#[path = "wgpu/decode.rs"]
mod decode;
#[path = "wgpu/gpu.rs"]
mod gpu;
#[path = "wgpu/prefill.rs"]
mod prefill;
#[path = "shared/shapes.rs"]
mod shapes;

use gpu::Gpu;
use pagewise_attention::wgpu::wgpu::DeviceType;
use pagewise_attention::wgpu::{self as backend, Context};

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let wanted = |name: &str| words.is_empty() || words.iter().any(|word| name.contains(word.as_str()));
    let software = std::env::var_os("PAGEWISE_SOFTWARE").is_some();
    let reports = pollster::block_on(backend::adapters());
    let Some(report) = reports.iter().find(|report| software || report.device_type != DeviceType::Cpu) else {
        eprintln!("SKIPPED: no GPU adapter to measure ({} software)", reports.len());
        return;
    };
    if words.is_empty() && !software && std::env::var_os("PAGEWISE_SWEEP").is_none() {
        return each_in_its_own_process(&report.to_string());
    }
    println!("{report}");
    let (device, queue) = pollster::block_on(backend::open(report.index)).unwrap();
    let context = Context::new(device, queue).unwrap().with_matrices(&report.matrices);
    let gpu = Gpu::new(&context, report.device_type == DeviceType::Cpu);
    let ceiling = gpu.read_ceiling();
    println!("read ceiling {ceiling:.0} GB/s");
    let wanted_decode = |name: &str| !words.iter().any(|word| word == PREFILL) && wanted(name);
    let wanted_prefill = |name: &str| words.iter().any(|word| word == PREFILL) || wanted(name);
    let (decode, prefill) = match std::env::var_os("PAGEWISE_SWEEP") {
        Some(_) => (decode::sweep(&gpu, ceiling, wanted_decode), prefill::sweep(&gpu, wanted_prefill)),
        None => (decode::all_shapes(&gpu, ceiling, wanted_decode), prefill::all_shapes(&gpu, wanted_prefill)),
    };
    if let Some(path) = std::env::var_os("PAGEWISE_BENCH_JSON") {
        let json = serde_json::json!({
            "adapter": report.to_string(), "read_ceiling_gb_s": ceiling, "decode": decode, "prefill": prefill,
        });
        std::fs::write(path, serde_json::to_string_pretty(&json).unwrap() + "\n").unwrap();
    }
}

/// All prefill, as a word on the command line.
const PREFILL: &str = "prefill";

/// Every decode shape, then prefill, each by a process that measures nothing else: after a few buffers of a GiB the memory
/// that this driver gives is up to half as fast, whatever was freed before.
fn each_in_its_own_process(adapter: &str) {
    println!("{adapter}");
    decode::headline();
    let folder = std::env::temp_dir().join(format!("pagewise-bench-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let json = folder.join("one.json");
    let (mut decode, mut prefill, mut ceilings) = (Vec::new(), Vec::new(), Vec::new());
    for name in decode::names().into_iter().chain([PREFILL.to_owned()]) {
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        let output = command.args(["--bench", &name]).env("PAGEWISE_BENCH_JSON", &json).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        for line in text.lines().filter(|line| line.starts_with(&name) || name == PREFILL) {
            println!("{line}");
        }
        let Ok(found) = std::fs::read_to_string(&json) else { continue };
        let found: serde_json::Value = serde_json::from_str(&found).unwrap();
        ceilings.extend(found["read_ceiling_gb_s"].as_f64());
        decode.extend(found["decode"].as_array().into_iter().flatten().cloned());
        prefill.extend(found["prefill"].as_array().into_iter().flatten().cloned());
        std::fs::remove_file(&json).unwrap();
    }
    std::fs::remove_dir_all(&folder).unwrap();
    let ceiling = ceilings.iter().copied().fold(0.0, f64::max);
    println!("read ceiling: {ceiling:.0} GB/s, the best of all processes");
    decode::summary(&decode);
    if let Some(path) = std::env::var_os("PAGEWISE_BENCH_JSON") {
        let json = serde_json::json!({
            "adapter": adapter, "read_ceiling_gb_s": ceiling, "decode": decode, "prefill": prefill,
        });
        std::fs::write(path, serde_json::to_string_pretty(&json).unwrap() + "\n").unwrap();
    }
}
