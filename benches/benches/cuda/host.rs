//! Host time: of a plan, and of a run beside a bare launch of a kernel that does nothing.

use std::time::Instant;

use pagewise_attention::cuda::{AttentionCall, DecodePlan, PlanOptions};
use pagewise_attention::{AttentionConfig, CacheLayout, DType, PagedBatch, Problem};
use serde_json::{Value, json};

use crate::gpu::Gpu;

const BLOCK: usize = 16;

/// Median time of `count` calls in µs, `before` not counted.
fn median(count: usize, mut before: impl FnMut(), mut call: impl FnMut()) -> f64 {
    let mut times: Vec<f64> = (0..count)
        .map(|_| {
            before();
            let started = Instant::now();
            call();
            started.elapsed().as_secs_f64() * 1e6
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[count / 2]
}

/// A plan for 64 decodes of different lengths, and one run.
pub fn measure(gpu: &Gpu<'_>) -> Value {
    let config = AttentionConfig::new(32, 8, 128, DType::Bf16);
    let lens: Vec<i32> = (0..64).map(|i| 500 + 37 * (i * 31 % 64)).collect();
    let blocks_of = |len: &i32| (*len as usize).div_ceil(BLOCK);
    let layout = CacheLayout::nhd(lens.iter().map(blocks_of).sum(), BLOCK, &config).interleaved();
    let max_blocks = lens.iter().map(blocks_of).max().unwrap();
    let tables = vec![0; lens.len() * max_blocks];
    let query_start: Vec<i32> = (0..=lens.len() as i32).collect();
    let batch = PagedBatch::padded(&query_start, &lens, &tables, max_blocks);
    let problem = Problem::new(&config, layout, batch).unwrap();
    let device = gpu.context.device();
    let plan = || DecodePlan::new(&problem, device, PlanOptions::default()).unwrap();
    let plan_us = median(2001, || {}, || drop(std::hint::black_box(plan())));

    // A step of one key, over before the next is launched, so that no queue fills.
    let (one, start, table) = ([1], [0, 1], [0]);
    let problem = Problem::new(&config, layout, PagedBatch::padded(&start, &one, &table, 1)).unwrap();
    let plan = DecodePlan::new(&problem, device, PlanOptions::default()).unwrap();
    let stream = &gpu.stream;
    let memory = gpu.filled(DType::Bf16, 1 << 20);
    let table = stream.clone_htod(&table).unwrap();
    let work = stream.clone_htod(&plan.work()).unwrap();
    let tickets = stream.alloc_zeros::<u32>(64).unwrap();
    let call = AttentionCall {
        q: gpu.address(&memory),
        k_cache: gpu.address(&memory),
        v_cache: gpu.address(&memory),
        tables: gpu.address(&table),
        out: gpu.address(&memory),
        work: gpu.address(&work),
        partial_out: gpu.address(&memory),
        partial_max: gpu.address(&memory),
        tickets: gpu.address(&tickets),
        ..AttentionCall::default()
    };
    gpu.context.prepare_decode(&plan).unwrap();
    let bare = gpu.bare_kernel(35);
    let idle = || stream.synchronize().unwrap();
    let run_us = median(501, idle, || {
        // SAFETY: the work is one key, of memory that is there.
        unsafe { gpu.context.decode_raw(&plan, &call, gpu.raw_stream()) }.unwrap();
    });
    let bare_us = median(501, idle, || bare.launch());
    println!(
        "host: a plan of 64 decodes {plan_us:.2} us; a run {run_us:.2} us, a bare launch {bare_us:.2} us"
    );
    json!({ "plan_64_us": plan_us, "run_us": run_us, "bare_launch_us": bare_us })
}
