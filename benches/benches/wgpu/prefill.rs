//! Prefill at the shapes that others were measured at, chunks with few queries, and a mixture with decode; in f16.

use half::f16;
use pagewise_attention::wgpu::shaders::prefill::{MatrixTuning, PrefillTuning};
use pagewise_attention::wgpu::{PlanOptions, PrefillChoice};
use pagewise_attention::{AttentionConfig, CacheLayout, DType, PagedBatch, Problem};
use serde_json::{Value, json};

use crate::batch::{BLOCK, Row, Tensors, attend, blocks_of, tables, upload_plan};
use crate::gpu::{Gpu, element};

/// 32 query heads over 8 KV heads of 128 elements, causal.
const HEADS: (usize, usize, usize) = (32, 8, 128);

/// One batch: queries and keys of each sequence.
struct Shape {
    name: &'static str,
    sequences: Vec<(i32, i32)>,
    /// TFLOP/s of FlashAttention 3 over pages of 16 and of FlashInfer's fa2, through CUDA on another H100.
    peers: Option<[f64; 2]>,
}

fn shapes(software: bool) -> Vec<Shape> {
    let shape = |name, sequences, peers| Shape { name, sequences, peers };
    if software {
        return vec![shape("1x128", vec![(128, 128)], None), shape("1x32+512", vec![(32, 544)], None)];
    }
    vec![
        shape("1x2048", vec![(2048, 2048)], Some([467.0, 219.0])),
        shape("1x8192", vec![(8192, 8192)], Some([588.0, 328.0])),
        shape("16x1024", vec![(1024, 1024); 16], Some([400.0, 281.0])),
        shape("4x512+8192", vec![(512, 8704); 4], Some([576.0, 345.0])),
        shape("1x128+8192", vec![(128, 8320)], None),
        shape("1x16+32768", vec![(16, 32784)], None),
        shape("8x8+4096", vec![(8, 4104); 8], None),
    ]
}

pub fn all_shapes(gpu: &Gpu<'_>, wanted: impl Fn(&str) -> bool) -> Vec<Value> {
    println!("prefill f16, 32/8 heads, d128, causal, block 16: us, TFLOP/s");
    let mut results = Vec::new();
    for Shape { name, sequences, peers } in shapes(gpu.software) {
        if !wanted(name) {
            continue;
        }
        let prepared = Prepared::new(gpu, &sequences);
        let tiled = PlanOptions { prefill: PrefillChoice::Tiled(None), ..PlanOptions::default() };
        let tiled = prepared.measure(tiled).unwrap();
        let measured = prepared.measure(PlanOptions::default()).unwrap();
        let Measured { us, rate, error, variant } = measured;
        let over = peers.map_or(String::new(), |[fa3, fa2]| {
            format!("  x{:.2} FA3 paged, x{:.2} FI fa2", rate / fa3, rate / fa2)
        });
        println!(
            "prefill {name:12} {us:9.1} us {rate:6.1} TFLOP/s{over}  error {error:.1e}  {variant}, tiled {:.1} TFLOP/s",
            tiled.rate
        );
        results.push(json!({
            "shape": name, "us": us, "tflop_s": rate, "relative_error": error, "variant": variant, "tiled_tflop_s": tiled.rate,
            "fa3_paged_tflop_s": peers.map(|p| p[0]), "fi_fa2_tflop_s": peers.map(|p| p[1]),
        }));
    }
    if !gpu.software && wanted("mixture") {
        let (decodes, chunk) = (vec![(1, 2048); 64], vec![(2048, 2048)]);
        let mixture = [decodes.clone(), chunk.clone()].concat();
        let [alone, prefill, together] = [decodes, chunk, mixture]
            .map(|sequences| Prepared::new(gpu, &sequences).measure(PlanOptions::default()).unwrap().us);
        let ratio = together / (alone + prefill);
        println!(
            "mixture: 64 decodes of 2048 keys {alone:.1} us, one prompt of 2048 {prefill:.1} us, in one plan {together:.1} us: x{ratio:.3} of the sum"
        );
        results.push(json!({
            "shape": "mixture 64x1+2048, 1x2048", "decode_us": alone, "prefill_us": prefill, "us": together,
            "of_sum": ratio,
        }));
    }
    results
}

/// Tilings and splits on a few shapes.
pub fn sweep(gpu: &Gpu<'_>, wanted: impl Fn(&str) -> bool) -> Vec<Value> {
    let mut results = Vec::new();
    for Shape { name, sequences, .. } in shapes(gpu.software) {
        if !wanted(name) || !(gpu.software || ["1x2048", "4x512+8192", "1x128+8192"].contains(&name)) {
            continue;
        }
        let prepared = Prepared::new(gpu, &sequences);
        let mut best: Option<(f64, String)> = None;
        let mut try_one = |what: String, options: PlanOptions| {
            // What does not fit this device is no choice.
            let Ok(Measured { us, rate, variant, .. }) = prepared.measure(options) else { return };
            println!("prefill {name:12} {us:9.1} us {rate:6.1} TFLOP/s  {variant}, {what}");
            results.push(
                json!({ "shape": name, "us": us, "tflop_s": rate, "variant": variant, "choice": what }),
            );
            if best.as_ref().is_none_or(|(so_far, _)| us < *so_far) {
                best = Some((us, format!("{variant}, {what}")));
            }
        };
        for workgroup_size in [64, 128, 256] {
            for row_quads in [1, 2] {
                for (chunk, gap) in [(4, true), (8, true), (8, false), (16, true)] {
                    let tuning = PrefillTuning { row_quads, workgroup_size, chunk, gap };
                    try_one(
                        "split as by default".to_owned(),
                        PlanOptions { prefill: PrefillChoice::Tiled(Some(tuning)), ..PlanOptions::default() },
                    );
                }
            }
        }
        for strips in [2, 4, 8] {
            let prefill = PrefillChoice::Matrix(Some(MatrixTuning { strips }));
            let options = PlanOptions { prefill, ..PlanOptions::default() };
            try_one("split as by default".to_owned(), options);
        }
        for workgroups in [512, 2048, 4096] {
            let options = PlanOptions { workgroups, ..PlanOptions::default() };
            try_one(format!("{workgroups} workgroups"), options);
        }
        if let Some((us, what)) = best {
            println!("prefill {name:12} best {us:.1} us: {what}");
        }
    }
    results
}

/// A batch's caches, queries and expected outputs.
struct Prepared<'a, 'b> {
    gpu: &'a Gpu<'b>,
    tensors: Tensors,
    query_start: Vec<i32>,
    lens: Vec<i32>,
    table: Vec<i32>,
    max_blocks: usize,
}

struct Measured {
    us: f64,
    /// TFLOP/s.
    rate: f64,
    error: f64,
    variant: String,
}

impl<'a, 'b> Prepared<'a, 'b> {
    fn new(gpu: &'a Gpu<'b>, sequences: &[(i32, i32)]) -> Self {
        let (q_heads, kv_heads, dim) = HEADS;
        let config = AttentionConfig::new(q_heads, kv_heads, dim, DType::F16);
        let lens: Vec<i32> = sequences.iter().map(|sequence| sequence.1).collect();
        let mut query_start = vec![0];
        for (queries, _) in sequences {
            query_start.push(query_start.last().unwrap() + queries);
        }
        let rows = *query_start.last().unwrap() as usize;
        let blocks = lens.iter().map(|len| blocks_of(*len)).sum();
        let layout = CacheLayout::nhd(blocks, BLOCK, &config);
        let (tables, max_blocks) = tables(&lens, 1);
        let table = tables.into_iter().next().unwrap();
        let mut expected = Vec::new();
        // Of the first and the last sequence: first, last and two rows between, each with another head.
        for sequence in [0, sequences.len() - 1] {
            let (queries, keys) = (sequences[sequence].0 as usize, sequences[sequence].1 as usize);
            for (turn, query) in [0, queries / 3, 2 * queries / 3, queries - 1].into_iter().enumerate() {
                let head = (turn * 11) % q_heads;
                let first = ((query_start[sequence] as usize + query) * q_heads + head) * dim;
                let q: Vec<f16> = (first..first + dim).map(|i| f16::from_f64(element(i))).collect();
                let table = &table[sequence * max_blocks..][..max_blocks];
                let row = Row { q: &q, table, len: keys - queries + query + 1, head: head / config.group() };
                expected.push((first, attend(&config, &layout, &row)));
            }
        }
        let [k_cache, v_cache] = Tensors::caches(gpu, &config, &layout);
        let q = gpu.filled((2 * rows * q_heads * dim) as u64);
        let tensors = Tensors { config, layout, rows, k_cache, v_cache, q, expected };
        Self { gpu, tensors, query_start, lens, table, max_blocks }
    }

    /// Operations: two products for each pair of a query head and a key that it sees.
    fn flops(&self) -> f64 {
        let pairs = self.lens.iter().zip(self.query_start.windows(2)).map(|(len, rows)| {
            let (queries, keys) = (f64::from(rows[1] - rows[0]), f64::from(*len));
            queries * (keys - queries) + queries * (queries + 1.0) / 2.0
        });
        4.0 * (self.tensors.config.head_dim_qk * self.tensors.config.q_heads) as f64 * pairs.sum::<f64>()
    }

    /// Plans, checks and times.
    fn measure(&self, options: PlanOptions) -> Result<Measured, String> {
        let Self { gpu, tensors, .. } = self;
        let batch = PagedBatch::padded(&self.query_start, &self.lens, &self.table, self.max_blocks);
        let problem = Problem::new(&tensors.config, tensors.layout, batch).unwrap();
        let plan = gpu.context.plan_attention(&problem, options).map_err(|error| error.to_string())?;
        let out = tensors.out(gpu);
        let workspace = gpu.buffer(plan.workspace_bytes());
        let words = upload_plan(gpu, &plan);
        let call = tensors.call(&out, &words, &workspace, None);
        let prepared = gpu.context.prepare_attention(&call).map_err(|error| error.to_string())?;
        gpu.submit(|pass| prepared.encode(pass, &plan).unwrap());
        let error = tensors.checked_error(gpu, &out, &format!("{options:?}"));
        let flops = self.flops();
        let count = if gpu.software { 1 } else { (1e12 / flops).clamp(2.0, 64.0) as usize };
        let us = gpu.time(count, |pass, _| prepared.encode(pass, &plan).unwrap());
        let variant = plan.prefill_variant().unwrap_or_else(|| prepared.variant());
        Ok(Measured { us, rate: flops / us / 1e6, error, variant })
    }
}
