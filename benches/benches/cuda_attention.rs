//! Decode attention, `write_kv`, `copy_blocks` and `swap_blocks` on an NVIDIA GPU, beside what the same card can do at best in the same run.
//!
//! `cargo bench -p pagewise-benches --bench cuda_attention [-- WORDS]`; with words, only shapes whose name
//! contains one of them. First the read ceiling (our plainest kernel over memory in order) and the floor (pages
//! in random order through a table, merge included), each at its best choice of grid; then `write_kv` and
//! `copy_blocks` against a device copy, `swap_blocks` against the link; then the shapes of `peers/h100_decode.tsv`, each checked against plain code before it is timed.
//! Times are of CUDA graph replays over as many caches as keep the L2 from serving them.
//! `PAGEWISE_BENCH_JSON` names a file for the figures. `PAGEWISE_SWEEP=1` tunes instead: see `sweep.rs`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub, reason = "a bench")]

#[path = "cuda/blocks.rs"]
mod blocks;
#[path = "cuda/cache.rs"]
mod cache;
#[path = "cuda/decode.rs"]
mod decode;
#[path = "cuda/gpu.rs"]
mod gpu;
#[path = "cuda/host.rs"]
mod host;
#[path = "cuda/prefill.rs"]
mod prefill;
#[path = "shared/shapes.rs"]
mod shapes;
#[path = "cuda/short_rows.rs"]
mod short_rows;
#[path = "cuda/sweep.rs"]
mod sweep;
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

    if std::env::var_os("PAGEWISE_SWEEP").is_some() {
        let (blocks, decode) = (blocks::sweep(&gpu), sweep::run(&gpu));
        let lines: Vec<String> = blocks.iter().chain(&decode).map(|line| format!("{line}\n")).collect();
        if let Some(path) = std::env::var_os("PAGEWISE_BENCH_JSON") {
            std::fs::write(path, lines.concat()).unwrap();
        }
        return;
    }
    let yardsticks = yardsticks::measure(&gpu);
    let write = if wanted("write_kv") { Some(decode::write_kv(&gpu, &yardsticks)) } else { None };
    let host = if wanted("host") { Some(host::measure(&gpu)) } else { None };
    let copies = if wanted("copy_blocks") { Some(blocks::copy_blocks(&gpu)) } else { None };
    let swaps = if wanted("swap_blocks") { Some(blocks::swap_blocks(&gpu)) } else { None };
    let shapes = decode::all_shapes(&gpu, &yardsticks, wanted);
    let short = if wanted("short rows") { short_rows::measure(&gpu, &yardsticks) } else { Vec::new() };
    let prefill = if wanted("prefill") { prefill::all_shapes(&gpu) } else { Vec::new() };

    if let Some(path) = std::env::var_os("PAGEWISE_BENCH_JSON") {
        let json = serde_json::json!({
            "gpu": context.device().name,
            "driver": context.device().driver.to_string(),
            "driver_release": driver_release(),
            "read_ceiling_gb_s": yardsticks.ceiling,
            "floor": yardsticks.floor.iter().map(|(bytes, us)| serde_json::json!({ "bytes": bytes, "us": us })).collect::<Vec<_>>(),
            "blocks": yardsticks.pieces.iter().map(|pieces| serde_json::json!({ "block": pieces.piece, "bytes": pieces.bytes, "gb_s": pieces.rate })).collect::<Vec<_>>(),
            "write_kv": write,
            "host": host,
            "copy_blocks": copies,
            "swap_blocks": swaps,
            "decode": shapes,
            "short_rows": short,
            "prefill": prefill,
        });
        std::fs::write(path, serde_json::to_string_pretty(&json).unwrap() + "\n").unwrap();
    }
}
