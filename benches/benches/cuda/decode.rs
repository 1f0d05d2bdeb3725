//! Decode at the shapes of `peers/h100_decode.tsv`, and `write_kv` against a device copy.

use cudarc::driver::CudaSlice;
use pagewise_attention::cuda::cudarc;
use pagewise_attention::cuda::{AttentionCall, DecodePlan, Order, PlanOptions, WriteKvCall};
use pagewise_attention::{AttentionConfig, CacheLayout, DType, PagedBatch, Problem, RowStrides};
use serde_json::{Value, json};

use crate::cache::{BLOCK, Cache, Layout};
use crate::gpu::{Gpu, Random};
use crate::yardsticks::Yardsticks;

pub use crate::shapes::{Shape, shapes};

/// Side by side in both orders; for a few shapes also what separate buffers cost.
fn layouts(shape: &Shape) -> Vec<Layout> {
    let also_apart =
        shape.q_heads == 32 && ["8x1024", "64x4096"].iter().any(|name| shape.name.ends_with(name));
    let orders = [false, true];
    let list = orders.map(|hnd| Layout { hnd, apart: false, block: BLOCK }).into_iter();
    list.chain(orders.map(|hnd| Layout { hnd, apart: true, block: BLOCK }).into_iter().filter(|_| also_apart))
        .collect()
}

pub fn all_shapes(gpu: &Gpu<'_>, yardsticks: &Yardsticks, wanted: impl Fn(&str) -> bool) -> Vec<Value> {
    let mut results = Vec::new();
    let (mut peers, mut vllm, mut floors) = (Vec::new(), Vec::new(), Vec::new());
    println!(
        "decode bf16, d128 if not said otherwise, block 16: us, GB/s, % of ceiling, x floor, x best peer, x vLLM"
    );
    for shape in shapes().iter().filter(|shape| wanted(&shape.name)) {
        let mut best = f64::INFINITY;
        for layout in layouts(shape) {
            let options = PlanOptions { item_keys: item_keys(), ..PlanOptions::default() };
            let prepared = Prepared::new(gpu, shape, layout);
            let Measured { us, error, items, .. } = prepared.measure(options);
            // Launches that begin while the one before them ends, as in an engine's step.
            let behind = (!layout.apart && gpu.context.device().launches_dependently())
                .then(|| prepared.measure(PlanOptions { order: Order::Dependent, ..options }))
                .filter(|measured| measured.dependent)
                .map(|measured| measured.us);
            let bytes = shape.bytes();
            let rate = bytes / us / 1e3;
            let floor = yardsticks.floor_us(bytes);
            let of_blocks = yardsticks.piece_rate(shape.block_bytes(BLOCK), bytes).map(|most| rate / most);
            let part = of_blocks.map_or(String::new(), |part| format!(" ({:.1}% of blocks')", 100.0 * part));
            let chained = behind.map_or(String::new(), |us| {
                format!("  dependent {us:.1} us {:.1}%", 100.0 * bytes / us / 1e3 / yardsticks.ceiling)
            });
            println!(
                "{:18} {layout:9} {us:8.1} us {rate:5.0} GB/s {:3.0}%{part}  floor x{:.2}  peer x{:.2} ({})  vLLM x{:.2}  error {error:.1e}, {items} items{chained}",
                shape.name,
                100.0 * rate / yardsticks.ceiling,
                us / floor,
                shape.best_us / us,
                shape.best_peer,
                shape.vllm_us / us,
            );
            results.push(json!({
                "shape": shape.name, "layout": layout.to_string(), "us": us, "gb_s": rate, "of_ceiling": rate / yardsticks.ceiling, "of_blocks": of_blocks,
                "over_floor": us / floor, "best_peer": shape.best_peer, "best_peer_us": shape.best_us,
                "speedup_over_best_peer": shape.best_us / us, "speedup_over_vllm": shape.vllm_us / us,
                "relative_error": error, "items": items, "dependent_us": behind,
            }));
            if layout.apart {
                continue;
            }
            best = best.min(us);
            if !layout.hnd && shape.counts() {
                floors.push(us / floor);
            }
        }
        if !shape.counts() {
            continue;
        }
        // Peers are the best of both layouts; so are we.
        peers.push(shape.best_us / best);
        vllm.push(shape.vllm_us / best);
    }
    let mean = |list: &[f64]| (list.iter().map(|x| x.ln()).sum::<f64>() / list.len().max(1) as f64).exp();
    println!(
        "geometric means: x{:.3} over the best peer, x{:.3} over vLLM, x{:.3} of the floor (NHD)",
        mean(&peers),
        mean(&vllm),
        mean(&floors)
    );
    results
}

/// One shape's caches, queries and expected outputs, for any number of plans.
pub struct Prepared<'a, 'b> {
    gpu: &'a Gpu<'b>,
    config: AttentionConfig,
    cache: Cache,
    lens: Vec<i32>,
    q: CudaSlice<half::bf16>,
    /// First element of a row of the output, and what it should be.
    expected: Vec<(usize, Vec<f64>)>,
}

impl<'a, 'b> Prepared<'a, 'b> {
    pub fn new(gpu: &'a Gpu<'b>, shape: &Shape, layout: Layout) -> Self {
        let sequences = shape.lens.len();
        let dim = shape.dim;
        let config = AttentionConfig {
            kv_dtype: shape.kv_dtype,
            ..AttentionConfig::new(shape.q_heads, shape.kv_heads, dim, DType::Bf16)
        };
        let cache = Cache::new(gpu, &config, &shape.lens, layout);
        let q_rows: Vec<half::bf16> = {
            let mut random = Random(5);
            (0..sequences * shape.q_heads * dim).map(|_| half::bf16::from_f64(random.unit() * 2.0)).collect()
        };
        let mut expected = Vec::new();
        for sequence in [0, sequences - 1] {
            for head in [0, shape.q_heads - 1] {
                let first = (sequence * shape.q_heads + head) * dim;
                let (len, kv_head) = (shape.lens[sequence] as usize, head / config.group());
                let q = &q_rows[first..first + dim];
                expected.push((first, cache.attend(gpu, &config, q, sequence, len, kv_head)));
            }
        }
        let q = gpu.stream.clone_htod(&q_rows).unwrap();
        let lens = shape.lens.clone();
        Self { gpu, config, cache, lens, q, expected }
    }

    /// Plans, checks and times.
    pub fn measure(&self, options: PlanOptions) -> Measured {
        let (gpu, cache) = (self.gpu, &self.cache);
        let sequences = self.lens.len();
        let query_start: Vec<i32> = (0..=sequences as i32).collect();
        let batch = PagedBatch::padded(&query_start, &self.lens, &cache.tables[0], cache.max_blocks);
        let problem = Problem::new(&self.config, cache.layout, batch).unwrap();
        let plan = DecodePlan::new(&problem, gpu.context.device(), options).unwrap();
        let sizes = plan.workspace();
        let stream = &gpu.stream;
        let out = stream.clone_htod(&vec![half::bf16::NAN; self.q.len()]).unwrap();
        let work = stream.clone_htod(&plan.work()).unwrap();
        let partial_out = stream.alloc_zeros::<u8>(sizes.partial_out.max(16) as usize).unwrap();
        let partial_max = stream.alloc_zeros::<u8>(sizes.partial_max.max(16) as usize).unwrap();
        let tickets = stream.alloc_zeros::<u8>(sizes.tickets.max(16) as usize).unwrap();
        let call = |set: usize| AttentionCall {
            q: gpu.address(&self.q),
            k_cache: cache.k_address(gpu),
            v_cache: cache.v_address(gpu, &self.config),
            tables: cache.tables_address(gpu, set),
            out: gpu.address(&out),
            work: gpu.address(&work),
            partial_out: gpu.address(&partial_out),
            partial_max: gpu.address(&partial_max),
            tickets: gpu.address(&tickets),
            ..AttentionCall::default()
        };
        let launch = |set: usize| {
            // SAFETY: all addresses are those of live slices that hold what the plan reaches, on one stream.
            unsafe { gpu.context.decode_raw(&plan, &call(set), gpu.raw_stream()) }.unwrap();
        };
        gpu.context.prepare_decode(&plan).unwrap();
        launch(0);
        let found = stream.clone_dtoh(&out).unwrap();
        let mut error = 0.0f64;
        for (first, expected) in &self.expected {
            let largest = expected.iter().fold(0.0f64, |largest, x| largest.max(x.abs()));
            for (found, expected) in found[*first..first + self.config.head_dim_v].iter().zip(expected) {
                let difference = (found.to_f64() - expected).abs() / largest;
                error = if difference.is_nan() { f64::INFINITY } else { error.max(difference) };
            }
        }
        // Two roundings to bf16, of the probabilities and of the output.
        assert!(error < 2e-2, "{options:?}: relative error {error:.1e}");

        let sets = cache.tables.len();
        let launches = sets.clamp(4, 128).next_multiple_of(sets.min(128));
        Measured {
            us: gpu.time(launches, |i| launch(i % sets)),
            error,
            items: plan.items().len(),
            dependent: plan.variant().ends_with("_pdl"),
        }
    }
}

/// What one plan of one shape took.
pub struct Measured {
    /// µs of a launch.
    pub us: f64,
    /// Largest error, relative to the largest element of its row.
    pub error: f64,
    /// Work items.
    pub items: usize,
    /// Whether the launches began while those before them ended.
    pub dependent: bool,
}

/// Work items of another size than planned, for tuning.
fn item_keys() -> Option<u32> {
    std::env::var("PAGEWISE_ITEM_KEYS").ok().map(|keys| keys.parse().expect("PAGEWISE_ITEM_KEYS is a number"))
}

/// `write_kv` of 8192 tokens into random slots, against a device copy of as many bytes.
pub fn write_kv(gpu: &Gpu<'_>, yardsticks: &Yardsticks) -> Value {
    let stream = &gpu.stream;
    let (tokens, heads, dim) = (8192usize, 8usize, 128usize);
    let config = AttentionConfig::new(heads, heads, dim, DType::Bf16);
    let sets = 16;
    let layout = CacheLayout::nhd(sets * tokens / BLOCK, BLOCK, &config);
    let row = heads * dim;
    let source = gpu.filled(DType::Bf16, 2 * sets * tokens * row);
    let k_cache = gpu.filled(DType::Bf16, layout.k_extent(&config) as usize);
    let v_cache = gpu.filled(DType::Bf16, layout.v_extent(&config) as usize);
    let slots: Vec<i64> = Random(9).permutation(sets * tokens).into_iter().map(i64::from).collect();
    let slots = stream.clone_htod(&slots).unwrap();
    let strides = RowStrides::packed(heads, dim);
    let call = |set: usize| WriteKvCall {
        config: &config,
        layout: &layout,
        source: DType::Bf16,
        tokens,
        slots: gpu.address(&slots) + (8 * set * tokens) as u64,
        k: gpu.address(&source) + (2 * 2 * set * tokens * row) as u64,
        k_strides: strides,
        v: gpu.address(&source) + (2 * (2 * set + 1) * tokens * row) as u64,
        v_strides: strides,
        k_cache: gpu.address(&k_cache),
        v_cache: gpu.address(&v_cache),
        scales: None,
        order: Order::Stream,
    };
    gpu.context.prepare_write_kv(&call(0)).unwrap();
    let us = gpu.time(sets, |set| {
        // SAFETY: all addresses are those of live slices that hold what shapes and strides reach.
        unsafe { gpu.context.write_kv_raw(&call(set), gpu.raw_stream()) }.unwrap();
    });
    let bytes = (2 * 2 * tokens * row * 2) as f64;
    // Bytes of K and V of one set.
    let half = 2 * tokens * row * 2;
    let mut copy = gpu.filled(DType::Bf16, sets * half / 2);
    let copy_us = gpu.time(sets, |set| {
        let mut target = copy.slice_mut(set * half..(set + 1) * half);
        stream.memcpy_dtod(&source.slice(set * half..(set + 1) * half), &mut target).unwrap();
    });
    let (rate, copy_rate) = (bytes / us / 1e3, bytes / copy_us / 1e3);
    println!(
        "write_kv {tokens} tokens x {heads} heads: {us:.1} us, {rate:.0} GB/s read + written; device copy {copy_us:.1} us, {copy_rate:.0} GB/s: {:.0}% (read ceiling {:.0})",
        100.0 * rate / copy_rate,
        yardsticks.ceiling
    );
    json!({ "us": us, "gb_s": rate, "copy_us": copy_us, "copy_gb_s": copy_rate, "of_copy": rate / copy_rate })
}
