//! CPU attention alone: checked against the oracle, then timed beside the machine's read bandwidth.
//!
//! `cargo bench -p pagewise-benches --bench cpu_attention [-- WORDS]` prints one line a case; with words, only
//! cases whose name contains one of them. Decode is bound by reading the cache once, so it is given as a
//! fraction of the bandwidth that plain summing of a large buffer reaches; prefill is bound by arithmetic and
//! given in multiply-adds. Runs and summing take turns, so that what else the machine does slows both, and the
//! fraction is the median over the turns.

use pagewise_attention::conformance::{Agreement, AttentionData, Case, ProbabilityRounding, Reference};
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
    println!("{} threads, {}", rayon::current_num_threads(), Level::detect().name());
    let yardstick = Yardstick::new();
    let mut failed = false;
    for (name, line) in CASES {
        if !words.is_empty() && !words.iter().any(|word| name.contains(word.as_str())) {
            continue;
        }
        match bench(line, &yardstick) {
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
fn bench(line: &str, yardstick: &Yardstick) -> Result<String, String> {
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
    let turns = take_turns(|| run(None), yardstick)?;
    let reference = Reference::attention(&data);
    Agreement::of_attention(&data, &reference, ProbabilityRounding::default(), &before, &out, Some(&lse))?;

    let config = &data.config;
    let keys: usize = case.sequences.iter().map(|shape| shape.keys).sum();
    let dims = config.head_dim_qk + config.head_dim_v;
    let bytes = (keys * config.kv_heads * dims * config.kv_dtype.size()) as f64;
    let pairs: usize = reference.rows.iter().map(|row| row.keys).sum();
    let time = median(turns.iter().map(|turn| turn.time));
    let best = turns.iter().map(|turn| turn.time).fold(f64::INFINITY, f64::min);
    let bandwidth = median(turns.iter().map(|turn| turn.bandwidth));
    let share = median(turns.iter().map(|turn| bytes / turn.time / turn.bandwidth));
    let (rate, flops) = (bytes / time / 1e9, 2.0 * (pairs * dims) as f64 / time / 1e9);
    Ok(format!(
        "{:9.3} ms  (best {:.3})  {rate:6.1} GB/s = {:3.0}% of {:.1} GB/s read  {flops:6.1} GFLOP/s",
        time * 1e3,
        best * 1e3,
        100.0 * share,
        bandwidth / 1e9,
    ))
}

/// What was measured together.
struct Turn {
    /// Seconds of a run, the median of some.
    time: f64,
    /// Bytes a second that summing read.
    bandwidth: f64,
}

/// Three seconds' worth of turns, at least five.
fn take_turns(
    mut run: impl FnMut() -> Result<(), String>,
    yardstick: &Yardstick,
) -> Result<Vec<Turn>, String> {
    let (begin, mut turns) = (Instant::now(), Vec::new());
    while turns.len() < 5 || begin.elapsed() < Duration::from_secs(3) {
        let (start, mut times) = (Instant::now(), Vec::new());
        while times.is_empty() || start.elapsed() < Duration::from_millis(30) {
            let start = Instant::now();
            run()?;
            times.push(start.elapsed().as_secs_f64());
        }
        turns.push(Turn { time: median(times.into_iter()), bandwidth: yardstick.bandwidth() });
    }
    Ok(turns)
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// A buffer far larger than the caches.
struct Yardstick(Vec<u64>);

impl Yardstick {
    fn new() -> Self {
        Self(vec![1; 1 << 24])
    }

    /// Bytes a second when all threads sum the buffer.
    fn bandwidth(&self) -> f64 {
        use rayon::prelude::*;
        let start = Instant::now();
        let chunks = self.0.par_chunks(1 << 17);
        let sum: u64 = chunks.map(|chunk| chunk.iter().fold(0u64, |sum, &x| sum.wrapping_add(x))).sum();
        black_box(sum);
        size_of_val(&self.0[..]) as f64 / start.elapsed().as_secs_f64()
    }
}
