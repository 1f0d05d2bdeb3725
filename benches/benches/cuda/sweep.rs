//! `PAGEWISE_SWEEP=1`: tries tunings of the decode kernel and cuts of its work on a dozen shapes, each checked first.
//!
//! One thing at a time: first how the kernel is made, then how the work is cut for the three best kernels, then
//! the groups of the merge. Stops after `PAGEWISE_SWEEP_SECONDS` (150).

use std::time::Instant;

use pagewise_attention::cuda::ptx::decode::{DecodeTuning, Prefetch};
use pagewise_attention::cuda::{PlanOptions, Shrink};
use serde_json::{Value, json};

use crate::decode::{Prepared, shapes};
use crate::gpu::Gpu;

/// In the order of what there is to learn.
const SHAPES: [(&str, bool); 14] = [
    ("8/1 1x8192", false),
    ("64/8 1x32768", true),
    ("32/8 8x8192", true),
    ("32/32 8x1024", true),
    ("32/8 64x4096", true),
    ("32/8 64x4096", false),
    ("32/8 1x8192", true),
    ("32/8 ragged64", true),
    ("8/1 64x1024", true),
    ("8/1 1x131072", true),
    ("32/8 256x512", true),
    ("32/32 64x1024", true),
    ("32/8 1x1024", true),
    ("32/32 64x4096", true),
];

/// Warps, stages and thread blocks a multiprocessor: what a Hopper GPU has shared memory for.
const RINGS: [(u32, u32, u32); 11] = [
    (4, 3, 2),
    (4, 2, 3),
    (4, 6, 1),
    (8, 3, 1),
    (8, 2, 1),
    (2, 6, 2),
    (2, 3, 4),
    (2, 4, 3),
    (4, 4, 1),
    (1, 6, 4),
    (1, 4, 6),
];

pub fn run(gpu: &Gpu<'_>) -> Vec<Value> {
    let started = Instant::now();
    let seconds = std::env::var("PAGEWISE_SWEEP_SECONDS").ok().and_then(|text| text.parse().ok());
    let budget: f64 = seconds.unwrap_or(150.0);
    let all = shapes();
    let default = DecodeTuning::for_row_bytes(256);
    let mut results = Vec::new();
    for (name, hnd) in SHAPES {
        if started.elapsed().as_secs_f64() > budget {
            println!("sweep: out of time before {name}");
            break;
        }
        let shape = all.iter().find(|shape| shape.name == name).expect("a shape of the table");
        let prepared = Prepared::new(gpu, shape, hnd);
        let mut tried: Vec<(f64, PlanOptions)> = Vec::new();
        let mut attempt = |tried: &mut Vec<(f64, PlanOptions)>, options: PlanOptions| {
            if tried.iter().any(|(_, before)| *before == options) {
                return;
            }
            let (us, error, items) = prepared.measure(options);
            let tuning = options.tuning.unwrap_or(default);
            results.push(json!({
                "shape": name, "hnd": hnd, "us": us, "gb_s": shape.bytes() / us / 1e3, "peer": shape.best_us / us,
                "warps": tuning.warps, "stages": tuning.stages, "blocks": tuning.blocks_per_multiprocessor,
                "merge": tuning.merge_group, "prefetch": format!("{:?}", tuning.prefetch), "item_keys": options.item_keys,
                "shrink": options.shrink.map(|s| [s.shares, s.smallest]), "items": items, "error": error,
            }));
            tried.push((us, options));
            tried.sort_by(|a, b| a.0.total_cmp(&b.0));
        };
        for (warps, stages, blocks_per_multiprocessor) in RINGS {
            for prefetch in Prefetch::ALL {
                let tuning = DecodeTuning { warps, stages, blocks_per_multiprocessor, prefetch, ..default };
                attempt(&mut tried, PlanOptions { tuning: Some(tuning), ..PlanOptions::default() });
            }
        }
        let best: Vec<PlanOptions> = tried.iter().take(3).map(|(_, options)| *options).collect();
        for options in best {
            for keys in [64, 128, 192, 256, 384, 512, 704, 1024, 2048, 4096] {
                attempt(&mut tried, PlanOptions { item_keys: Some(keys), ..options });
            }
            for shares in [1, 2, 4] {
                for smallest in [128, 256, 512] {
                    attempt(&mut tried, PlanOptions { shrink: Some(Shrink { shares, smallest }), ..options });
                }
            }
        }
        let options = tried[0].1;
        for merge_group in [4, 8, 16, 32, 1 << 20] {
            let tuning = DecodeTuning { merge_group, ..options.tuning.unwrap_or(default) };
            attempt(&mut tried, PlanOptions { tuning: Some(tuning), ..options });
        }
        println!("{name} {}: best of {} configurations", if hnd { "HND" } else { "NHD" }, tried.len());
        for (us, options) in tried.iter().take(4).chain(tried.last()) {
            let rate = shape.bytes() / us / 1e3;
            println!("  {us:8.1} us {rate:5.0} GB/s peer x{:.2} {options:?}", shape.best_us / us);
        }
    }
    results
}
