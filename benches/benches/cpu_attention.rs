//! CPU attention alone: checked against the oracle, then timed beside the machine's read bandwidth.
//!
//! `cargo bench -p pagewise-benches --bench cpu_attention [-- WORDS]` prints one line a case; with words, only
//! cases whose name contains one of them. Decode is bound by reading the cache once, so it is given as a
//! fraction of the bandwidth that plain summing of a large buffer reaches in the same run; prefill is bound by
//! arithmetic and given in multiply-adds.

use pagewise_attention::conformance::{Agreement, AttentionData, Case, Reference};
use pagewise_attention::cpu::{Inputs, Level, Outputs, Plan};
use std::hint::black_box;
use std::time::{Duration, Instant};

/// Name and case. The first is the goal of the CPU backend: at least 70% of the read bandwidth.
const CASES: &[(&str, &str)] = &[
    (
        "decode-8x4096-bf16",
        "attention q=f32 kv=bf16 heads=32/8 dim=128 block=16 mask=causal sequences=8*1:4096 seed=1",
    ),
    (
        "decode-8x4096-f16",
        "attention q=f32 kv=f16 heads=32/8 dim=128 block=16 mask=causal sequences=8*1:4096 seed=1",
    ),
    (
        "decode-8x4096-hnd",
        "attention q=f32 kv=bf16 heads=32/8 dim=128 block=16 mask=causal layout=hnd sequences=8*1:4096 seed=1",
    ),
    (
        "decode-8x4096-fp8",
        "attention q=f32 kv=fp8_e4m3 heads=32/8 dim=128 block=16 mask=causal scale=head sequences=8*1:4096 seed=1",
    ),
    (
        "decode-8x2048-f32",
        "attention q=f32 kv=f32 heads=32/8 dim=128 block=16 mask=causal sequences=8*1:2048 seed=1",
    ),
    (
        "decode-1x16384-bf16",
        "attention q=f32 kv=bf16 heads=32/8 dim=128 block=16 mask=causal sequences=1:16384 seed=1",
    ),
    (
        "smollm2-decode-1x512",
        "attention q=f32 kv=bf16 heads=9/3 dim=64 block=16 mask=causal sequences=1:512 seed=1",
    ),
    (
        "smollm2-decode-16x512",
        "attention q=f32 kv=bf16 heads=9/3 dim=64 block=16 mask=causal sequences=16*1:512 seed=1",
    ),
    (
        "smollm2-prefill-512",
        "attention q=f32 kv=bf16 heads=9/3 dim=64 block=16 mask=causal sequences=512:512 seed=1",
    ),
    (
        "smollm2-prefill-512-f32",
        "attention q=f32 kv=f32 heads=9/3 dim=64 block=16 mask=causal sequences=512:512 seed=1",
    ),
    (
        "llama-prefill-1024",
        "attention q=f32 kv=bf16 heads=32/8 dim=128 block=16 mask=causal sequences=1024:1024 seed=1",
    ),
];

fn main() {
    // `cargo bench` passes `--bench`; what is no option chooses cases.
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let bandwidth = read_bandwidth();
    println!(
        "{} threads, {}, read bandwidth {bandwidth:.1} GB/s",
        rayon::current_num_threads(),
        Level::detect().name()
    );
    let mut failed = false;
    for (name, line) in CASES {
        if !words.is_empty() && !words.iter().any(|word| name.contains(word.as_str())) {
            continue;
        }
        match bench(line, bandwidth) {
            Ok(text) => println!("{name:24} {text}"),
            Err(error) => {
                failed = true;
                println!("{name:24} FAILED: {error}");
            }
        }
    }
    if failed {
        std::process::exit(1);
    }
}

/// Checks a case, times it, and says what it reached.
fn bench(line: &str, bandwidth: f64) -> Result<String, String> {
    let case: Case = line.parse().map_err(|error| format!("{error}"))?;
    let data = AttentionData::generate(&case);
    let task = data.task().map_err(|error| error.to_string())?;
    let inputs = Inputs {
        k_scale: task.k_scale.into(),
        v_scale: task.v_scale.into(),
        ..Inputs::new(task.q, task.k, task.v)
    };
    let before = data.poisoned_out();
    let (mut out, mut lse) = (before.clone(), data.poisoned_lse());
    let plan = Plan::new(task.problem);
    let mut run = |lse: Option<&mut [f32]>| {
        plan.run(&inputs, &mut Outputs { out: out.as_mut(), lse }).map_err(|error| error.to_string())
    };
    run(Some(&mut lse))?;
    let times = time(|| run(None))?;
    let reference = Reference::attention(&data);
    Agreement::of_attention(&data, &reference, 0.0, &before, &out, Some(&lse))?;

    let config = &data.config;
    let median = times[times.len() / 2].as_secs_f64();
    let keys: usize = case.sequences.iter().map(|shape| shape.keys).sum();
    let dims = config.head_dim_qk + config.head_dim_v;
    let bytes = (keys * config.kv_heads * dims * config.kv_dtype.size()) as f64;
    let pairs: usize = reference.rows.iter().map(|row| row.keys).sum();
    let (rate, flops) = (bytes / median / 1e9, 2.0 * (pairs * dims) as f64 / median / 1e9);
    Ok(format!(
        "{:9.3} ms  (best {:.3})  {rate:6.1} GB/s = {:3.0}% of read bandwidth  {flops:6.1} GFLOP/s",
        median * 1e3,
        times[0].as_secs_f64() * 1e3,
        100.0 * rate / bandwidth,
    ))
}

/// Sorted times of a second's worth of runs, at least five.
fn time(mut run: impl FnMut() -> Result<(), String>) -> Result<Vec<Duration>, String> {
    let (begin, mut times) = (Instant::now(), Vec::new());
    while times.len() < 5 || (begin.elapsed() < Duration::from_secs(1) && times.len() < 10_000) {
        let start = Instant::now();
        run()?;
        times.push(start.elapsed());
    }
    times.sort();
    Ok(times)
}

/// The best of several runs in which all threads sum a buffer far larger than the caches, in GB/s.
fn read_bandwidth() -> f64 {
    use rayon::prelude::*;
    let buffer = vec![1u64; 1 << 26];
    let bytes = size_of_val(&buffer[..]) as f64;
    let best = (0..7).map(|_| {
        let start = Instant::now();
        let sum: u64 = buffer
            .par_chunks(1 << 17)
            .map(|chunk| chunk.iter().fold(0u64, |sum, &x| sum.wrapping_add(x)))
            .reduce(|| 0, u64::wrapping_add);
        black_box(sum);
        start.elapsed()
    });
    bytes / best.min().map_or(1.0, |time| time.as_secs_f64()) / 1e9
}
