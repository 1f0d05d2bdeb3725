//! The dense layers' kernels on an NVIDIA GPU, beside the rate at which the same card reads memory in the same run.
//!
//! `cargo bench -p pagewise-benches --bench cuda_model [-- WORDS]`; with words, only what has one of them in its name.
//! Times are of CUDA graph replays over as many copies of the weights as keep the L2 from serving them.
//! `step` measures a whole decode step of one sequence, and it without each kind of kernel: where each microsecond goes.
//! `PAGEWISE_BENCH_JSON` names a file for the figures. `PAGEWISE_SWEEP=1` tries every geometry of a product.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    unreachable_pub,
    dead_code,
    reason = "a bench"
)]

#[path = "cuda/gpu.rs"]
mod gpu;
#[path = "cuda/model/mod.rs"]
mod model;
#[path = "cuda/step/mod.rs"]
mod step;
#[path = "cuda/yardsticks.rs"]
mod yardsticks;

use gpu::Gpu;
use pagewise_attention::cuda::{Context, devices, driver_release};

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    if let Err(error) = devices() {
        eprintln!("SKIPPED: no NVIDIA GPU to measure: {error}");
        return;
    }
    let context = Context::primary(0).unwrap();
    println!("{}", context.device());
    let gpu = Gpu::new(&context);
    let wanted = |name: &str| words.is_empty() || words.iter().any(|word| name.contains(word.as_str()));
    let ceiling = yardsticks::ceiling(&gpu);
    let mut bench = model::Bench::new(&gpu, ceiling);
    let sweeps = std::env::var_os("PAGEWISE_SWEEP").is_some();
    if sweeps {
        bench.sweep(wanted);
    } else {
        bench.all(wanted);
    }
    for model in step::MODELS.iter().filter(|model| wanted(&format!("step {}", model.name))) {
        let mut step = step::Step::new(&mut bench, model);
        if sweeps { step.sweep() } else { step.table() }
    }
    if let Some(path) = std::env::var_os("PAGEWISE_BENCH_JSON") {
        let json = serde_json::json!({
            "gpu": context.device().name,
            "driver": context.device().driver.to_string(),
            "driver_release": driver_release(),
            "read_ceiling_gb_s": ceiling,
            "model": bench.figures,
        });
        std::fs::write(path, serde_json::to_string_pretty(&json).unwrap() + "\n").unwrap();
    }
}
