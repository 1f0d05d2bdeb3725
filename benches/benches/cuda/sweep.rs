//! `PAGEWISE_SWEEP=1`: tries tunings of the decode kernel and cuts of its work on two dozen shapes, each checked first.
//!
//! `PAGEWISE_SWEEP_SHAPES` names others than these, between semicolons ("32/32 256x512;64/8 64x4096"), and
//! `PAGEWISE_SWEEP_DEPENDENT=1` launches them as dependents. First rings, heads of a thread block and cuts together, then what the L2 fetches and the groups of the merge for
//! the best of them. Stops after `PAGEWISE_SWEEP_SECONDS` (150).

use std::time::Instant;

use pagewise_attention::cuda::ptx::decode::{DecodeTuning, Prefetch, Ring};
use pagewise_attention::cuda::{Order, PlanOptions, Shrink};
use serde_json::{Value, json};

use crate::cache::{BLOCK, Layout};
use crate::decode::{Measured, Prepared, shapes};
use crate::gpu::Gpu;

/// In the order of what there is to learn.
const SHAPES: [(&str, bool); 20] = [
    ("32/8 64x4096", false),
    ("32/8 8x1024", false),
    ("8/1 8x8192", false),
    ("64/8 1x8192", true),
    ("32/32 8x1024", false),
    ("32/8 32x2048", true),
    ("32/8 1x32768", true),
    ("32/8 1x8192", true),
    ("32/8 1x1024", true),
    ("8/1 1x8192", false),
    ("32/8 ragged64", false),
    ("8/1 128x1024", true),
    ("8/1 256x512", true),
    ("32/8 256x512", true),
    ("32/32 64x4096", true),
    ("32/32 ragged64", false),
    ("8/1 ragged64", false),
    ("32/8 64x4096 d128 e4m3", true),
    ("12/12 64x1024 d64 bf16", false),
    ("16/8 32x2048 d256 bf16", false),
];

/// Warps, stages and thread blocks a multiprocessor, for rows of 256 bytes: what a Hopper GPU has shared memory for.
/// Other rows have as many more or fewer stages.
const RINGS: [(u32, u32, u32); 6] = [(8, 2, 1), (8, 3, 1), (4, 3, 2), (4, 2, 3), (4, 4, 1), (4, 6, 1)];

/// Bytes for rings that a thread block can have there.
const MOST_SHARED: u32 = 224 << 10;

pub fn run(gpu: &Gpu<'_>) -> Vec<Value> {
    let started = Instant::now();
    let seconds = std::env::var("PAGEWISE_SWEEP_SECONDS").ok().and_then(|text| text.parse().ok());
    let budget: f64 = seconds.unwrap_or(150.0);
    let all = shapes();
    let order = match std::env::var_os("PAGEWISE_SWEEP_DEPENDENT") {
        Some(_) => Order::Dependent,
        None => Order::Stream,
    };
    let asked = std::env::var("PAGEWISE_SWEEP_SHAPES");
    let asked = asked.as_ref().map(|names| names.split(';').map(|name| (name, false)).collect::<Vec<_>>());
    let mut results = Vec::new();
    for &(name, hnd) in asked.as_deref().unwrap_or(&SHAPES) {
        if started.elapsed().as_secs_f64() > budget {
            println!("sweep: out of time before {name}");
            break;
        }
        let shape = all.iter().find(|shape| shape.name == name).expect("a shape of the table");
        let prepared = Prepared::new(gpu, shape, Layout { hnd, apart: false, block: BLOCK });
        let usual = DecodeTuning::for_row_bytes(shape.row_bytes(), Ring::Large);
        let mut tried: Vec<(f64, PlanOptions)> = Vec::new();
        let mut attempt = |tried: &mut Vec<(f64, PlanOptions)>, options: PlanOptions| {
            if tried.iter().any(|(_, before)| *before == options) {
                return;
            }
            let Measured { us, error, items, .. } = prepared.measure(PlanOptions { order, ..options });
            let tuning = options.tuning.unwrap_or(usual);
            results.push(json!({
                "chosen": options == PlanOptions::default(),
                "shape": name, "hnd": hnd, "us": us, "gb_s": shape.bytes() / us / 1e3, "peer": shape.best_us / us,
                "warps": tuning.warps, "stages": tuning.stages, "blocks": tuning.blocks_per_multiprocessor,
                "merge": tuning.merge_group, "prefetch": format!("{:?}", tuning.prefetch),
                "block_heads": options.block_heads, "item_keys": options.item_keys,
                "shrink": options.shrink.map(|s| [s.shares, s.smallest]), "items": items, "error": error,
            }));
            tried.push((us, options));
            tried.sort_by(|a, b| a.0.total_cmp(&b.0));
        };
        attempt(&mut tried, PlanOptions::default());
        let chosen = tried[0].0;
        for (warps, stages, blocks_per_multiprocessor) in RINGS {
            let stages = (stages * 256 / shape.row_bytes()).clamp(2, 16);
            if warps * stages * shape.row_bytes() * 32 > MOST_SHARED {
                continue;
            }
            let tuning = DecodeTuning { warps, stages, blocks_per_multiprocessor, ..usual };
            for block_heads in [1, 2, 4, 8].into_iter().filter(|heads| shape.divides(*heads, warps)) {
                let options = PlanOptions {
                    tuning: Some(tuning),
                    block_heads: Some(block_heads),
                    ..PlanOptions::default()
                };
                attempt(&mut tried, options);
                attempt(
                    &mut tried,
                    PlanOptions { shrink: Some(Shrink { shares: 1, smallest: 64 }), ..options },
                );
                // Whole rows, and rows in so many pieces.
                for pieces in [1, 2, 3, 4, 8, 16, 32, 64, 128] {
                    let keys = shape.longest().div_ceil(pieces).next_multiple_of(16);
                    let launched = shape.sequences() * pieces * shape.kv_heads as u32 / block_heads;
                    if keys >= 16 && (32..=132 * 5).contains(&launched) {
                        attempt(&mut tried, PlanOptions { item_keys: Some(keys), ..options });
                    }
                }
            }
        }
        let (_, options) = tried[0];
        let tuning = options.tuning.unwrap_or(usual);
        for prefetch in Prefetch::ALL {
            attempt(&mut tried, PlanOptions { tuning: Some(DecodeTuning { prefetch, ..tuning }), ..options });
        }
        for merge_group in [4, 8, 32, 1 << 20] {
            attempt(
                &mut tried,
                PlanOptions { tuning: Some(DecodeTuning { merge_group, ..tuning }), ..options },
            );
        }
        println!(
            "{name} {}: {chosen:.1} us as chosen, x{:.3} of the best of {} configurations",
            if hnd { "HND" } else { "NHD" },
            chosen / tried[0].0,
            tried.len()
        );
        for (us, options) in tried.iter().take(4).chain(tried.last()) {
            let rate = shape.bytes() / us / 1e3;
            println!("  {us:8.1} us {rate:5.0} GB/s peer x{:.2} {options:?}", shape.best_us / us);
        }
    }
    results
}
