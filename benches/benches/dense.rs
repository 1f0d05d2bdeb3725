//! Dense layers of the CPU backend at the shapes of SmolLM2-135M, beside what the machine can do.
//!
//! `cargo bench -p pagewise-benches --bench dense [-- all] [bf16|f16|f32] [avx2|avx512|portable|neon]`
//!
//! Each measurement walks through the weights of all 30 layers, each its own, so that they come from memory
//! as they do when a model decodes. The time of a walk is the sum of each call's best; the read bandwidth and
//! the peak of multiply-adds are measured in the same process. A result is checked against f64 before it is timed.

#![expect(clippy::expect_used, reason = "a bench stops at the first thing that is wrong")]

use half::{bf16, f16};
use pagewise_attention::HostTensor;
use pagewise_runtime::backend::cpu::dense::{InstructionSet, Projection, linear_many_on};
use std::hint::black_box;
use std::time::Instant;

/// Layers, hidden size, and output features of the projections that read the same input.
const LAYERS: usize = 30;
const SHAPES: [Shape; 4] = [
    Shape { name: "qkv", k: 576, outs: &[576, 192, 192] },
    Shape { name: "o", k: 576, outs: &[576] },
    Shape { name: "gate-up", k: 576, outs: &[1536, 1536] },
    Shape { name: "down", k: 1536, outs: &[576] },
];
const HEAD: Shape = Shape { name: "logits", k: 576, outs: &[49152] };
const ROWS: [usize; 6] = [1, 2, 8, 16, 64, 512];

#[derive(Clone, Copy)]
struct Shape {
    name: &'static str,
    k: usize,
    outs: &'static [usize],
}

impl Shape {
    fn weights(self) -> usize {
        self.k * self.outs.iter().sum::<usize>()
    }
}

/// Weights of one layer's projections.
enum Stored {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Stored {
    fn new(dtype: &str, random: &mut impl FnMut() -> f32, n: usize) -> Self {
        match dtype {
            "f32" => Self::F32((0..n).map(|_| random()).collect()),
            "f16" => Self::F16((0..n).map(|_| f16::from_f32(random())).collect()),
            _ => Self::Bf16((0..n).map(|_| bf16::from_f32(random())).collect()),
        }
    }

    fn range(&self, from: usize, to: usize) -> HostTensor<'_> {
        match self {
            Self::F32(w) => HostTensor::F32(&w[from..to]),
            Self::F16(w) => HostTensor::F16(&w[from..to]),
            Self::Bf16(w) => HostTensor::Bf16(&w[from..to]),
        }
    }

    fn get(&self, i: usize) -> f64 {
        match self {
            Self::F32(w) => f64::from(w[i]),
            Self::F16(w) => w[i].to_f64(),
            Self::Bf16(w) => w[i].to_f64(),
        }
    }
}

/// A shape's weights, one set for each layer, and its outputs.
struct Layers {
    shape: Shape,
    stored: Vec<Stored>,
    outs: Vec<Vec<f32>>,
}

impl Layers {
    fn run(&mut self, set: InstructionSet, layer: usize, x: &[f32], rows: usize) {
        let stored = &self.stored[layer];
        let mut start = 0;
        let mut projections: Vec<_> = self
            .shape
            .outs
            .iter()
            .zip(&mut self.outs)
            .map(|(n, out)| {
                let end = start + n * self.shape.k;
                let weight = stored.range(start, end);
                start = end;
                Projection { weight, bias: None, out: &mut out[..rows * n] }
            })
            .collect();
        linear_many_on(set, &x[..rows * self.shape.k], rows, &mut projections).expect("shapes fit");
    }

    /// A few elements against f64. The bound is that of the tests: 2 K / 16 + 6 roundings of Σ|x·w|.
    fn check(&mut self, set: InstructionSet, x: &[f32], rows: usize) {
        self.run(set, 0, x, rows);
        let k = self.shape.k;
        let mut first = 0;
        for (n, out) in self.shape.outs.iter().zip(&self.outs) {
            for i in 0..50 {
                let (row, o) = (i * 7 % rows, i * 131 % n);
                let products =
                    (0..k).map(|j| f64::from(x[row * k + j]) * self.stored[0].get(first + o * k + j));
                let (sum, size) = products.fold((0.0, 0.0), |(s, a), p| (s + p, a + p.abs()));
                let tolerance = (2.0 * k as f64 / 16.0 + 6.0) * f64::from(f32::EPSILON) / 2.0 * size;
                let got = f64::from(out[row * n + o]);
                assert!((got - sum).abs() <= tolerance, "{} [{row}, {o}]: {got}, not {sum}", self.shape.name);
            }
            first += n * k;
        }
    }
}

/// Shortest of as many runs as fit a quarter of a second, at least five.
fn best(mut run: impl FnMut()) -> f64 {
    best_of_each(1, |_| run())
}

/// Seconds of a walk over `0..calls` in which each call takes its shortest time of many walks: what the walk
/// takes when nothing else runs, found also where other programs keep interrupting it.
fn best_of_each(calls: usize, mut run: impl FnMut(usize)) -> f64 {
    let (start, mut walks) = (Instant::now(), 0);
    let mut best = vec![f64::INFINITY; calls];
    while walks < 5 || start.elapsed().as_secs_f64() < 0.25 {
        for (call, best) in best.iter_mut().enumerate() {
            let one = Instant::now();
            run(call);
            *best = best.min(one.elapsed().as_secs_f64());
        }
        walks += 1;
    }
    best.iter().sum()
}

/// Bytes per second that all threads together read from memory.
fn read_bandwidth(memory: &[u64]) -> f64 {
    const WINDOW: usize = 2 << 20;
    let threads = rayon::current_num_threads();
    let part = WINDOW / threads / 64 * 64;
    let seconds = best_of_each(memory.len() / WINDOW, |window| {
        rayon::broadcast(|t| {
            let mut sums = [0u64; 64];
            for chunk in memory[window * WINDOW + t.index() * part..][..part].chunks_exact(64) {
                for (sum, x) in sums.iter_mut().zip(chunk) {
                    *sum = sum.wrapping_add(*x);
                }
            }
            black_box(sums);
        });
    });
    (memory.len() / WINDOW * threads * part * 8) as f64 / seconds
}

/// Multiply-adds that all threads together do per second, times two.
fn peak_flops() -> f64 {
    const STEPS: usize = 200_000;
    let seconds = best(|| {
        rayon::broadcast(|_| black_box(chains(STEPS)));
    });
    (2 * rayon::current_num_threads() * STEPS * CHAINS * 16) as f64 / seconds
}

/// Independent chains of multiply-adds over sixteen lanes: two pipes, four cycles each.
const CHAINS: usize = 12;

#[cfg(target_arch = "x86_64")]
fn chains(steps: usize) -> f32 {
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx512f")]
    fn avx512(steps: usize) -> f32 {
        let (a, b) = (_mm512_set1_ps(black_box(0.999)), _mm512_set1_ps(0.001));
        let mut sums = [_mm512_set1_ps(1.0); CHAINS];
        for _ in 0..steps {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, a, b);
            }
        }
        sums.into_iter().map(|x| _mm512_reduce_add_ps(x)).sum()
    }
    #[target_feature(enable = "avx2,fma")]
    fn avx2(steps: usize) -> f32 {
        let (a, b) = (_mm256_set1_ps(black_box(0.999)), _mm256_set1_ps(0.001));
        let mut sums = [_mm256_set1_ps(1.0); CHAINS];
        for _ in 0..2 * steps {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, a, b);
            }
        }
        sums.into_iter().map(|x| _mm256_cvtss_f32(x)).sum()
    }
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: just asked for.
        unsafe { avx512(steps) }
    } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: just asked for.
        unsafe { avx2(steps) }
    } else {
        f32::NAN
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn chains(steps: usize) -> f32 {
    let (a, b) = (black_box(0.999f32), 0.001);
    let mut sums = [[1.0f32; 16]; CHAINS];
    for _ in 0..steps {
        for x in sums.iter_mut().flatten() {
            *x = x.mul_add(a, b);
        }
    }
    sums.iter().flatten().sum()
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let asked = |name: &str| arguments.iter().any(|a| a == name);
    let any = |names: &[&str]| names.iter().any(|n| asked(n));
    let dtypes = ["bf16", "f16", "f32"];
    let sets: Vec<_> = InstructionSet::available()
        .iter()
        .filter(|s| asked("all") || asked(&s.to_string().to_lowercase().replace('-', "")))
        .copied()
        .collect();
    let sets = if sets.is_empty() { vec![InstructionSet::best()] } else { sets };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(0).build().expect("threads start");
    pool.install(|| {
        for set in sets {
            for dtype in dtypes {
                if !any(&dtypes) || asked(dtype) {
                    bench(set, dtype);
                }
            }
        }
    });
}

fn bench(set: InstructionSet, dtype: &str) {
    let mut state = 1u64;
    let mut random = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    let most = ROWS[ROWS.len() - 1];
    let x: Vec<f32> = (0..most * 1536).map(|_| random()).collect();
    let mut layers = |shape: Shape, n: usize| Layers {
        shape,
        stored: (0..n).map(|_| Stored::new(dtype, &mut random, shape.weights())).collect(),
        outs: shape.outs.iter().map(|n| vec![f32::NAN; most * n]).collect(),
    };
    let mut shapes: Vec<Layers> = SHAPES.iter().map(|s| layers(*s, LAYERS)).collect();
    let mut head = layers(HEAD, 1);
    for s in shapes.iter_mut().chain([&mut head]) {
        for rows in [1, 3, 50] {
            s.check(set, &x, rows);
        }
    }
    let memory = vec![1u64; 32 << 20];
    let (mut bandwidth, mut peak) = (read_bandwidth(&memory), peak_flops());
    println!("\n{dtype} weights, {set}, {} threads", rayon::current_num_threads());
    println!(
        "{:>8} {:>5} {:>10} {:>9} {:>7} {:>8} {:>7}",
        "shape", "rows", "µs", "GFLOP/s", "of peak", "GB/s", "of read"
    );
    let element = match dtype {
        "f32" => 4,
        _ => 2,
    };
    let line = |name: &str, rows: usize, weights: usize, head: (usize, usize), s: f64, bw: f64, peak: f64| {
        let flops = 2.0 * (weights * rows + head.0 * head.1) as f64 / s;
        let bytes = ((weights + head.0) * element) as f64 / s;
        println!(
            "{name:>8} {rows:>5} {:>10.1} {:>9.1} {:>6.0}% {:>8.2} {:>6.0}%",
            s * 1e6,
            flops / 1e9,
            100.0 * flops / peak,
            bytes / 1e9,
            100.0 * bytes / bw
        );
    };
    for rows in ROWS {
        for s in &mut shapes {
            let seconds = best_of_each(LAYERS, |l| s.run(set, l, &x, rows)) / LAYERS as f64;
            line(s.shape.name, rows, s.shape.weights(), (0, 0), seconds, bandwidth, peak);
        }
        // As a step of the engine: all layers in turn, and logits of each decoding row or of a prompt's last.
        let logits = if rows > 64 { 1 } else { rows };
        let seconds = best(|| head.run(set, 0, &x, logits));
        line("logits", logits, HEAD.weights(), (0, 0), seconds, bandwidth, peak);
        let calls = LAYERS * SHAPES.len();
        let seconds = best_of_each(calls + 1, |call| match shapes.get_mut(call % SHAPES.len()) {
            Some(s) if call < calls => s.run(set, call / SHAPES.len(), &x, rows),
            _ => head.run(set, 0, &x, logits),
        });
        let weights = LAYERS * SHAPES.iter().map(|s| s.weights()).sum::<usize>();
        line("model", rows, weights, (HEAD.weights(), logits), seconds, bandwidth, peak);
        println!("{:>8} {rows:>5} {:>10.1} tokens/s", "", rows as f64 / seconds);
        (bandwidth, peak) = (bandwidth.max(read_bandwidth(&memory)), peak.max(peak_flops()));
    }
    println!("read bandwidth {:.1} GB/s, multiply-adds {:.1} GFLOP/s", bandwidth / 1e9, peak / 1e9);
}
