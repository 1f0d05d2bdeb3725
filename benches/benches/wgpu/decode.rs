//! Decode at the shapes of `peers/h100_decode.tsv`, in f16.

use std::time::Instant;

use half::f16;
use pagewise_attention::cpu;
use pagewise_attention::wgpu::shaders;
use pagewise_attention::wgpu::shaders::decode::{DecodeNeeds, DecodeSpec, DecodeTuning, Unit};
use pagewise_attention::wgpu::wgpu::Buffer;
use pagewise_attention::wgpu::{AttentionCall, BufferRange, HeadTerms, PlanOptions, PreparedAttention};
use pagewise_attention::{
    AttentionConfig, CacheLayout, DType, HostTensor, HostTensorMut, KvStrides, PagedBatch, Problem,
    RowStrides,
};
use serde_json::{Value, json};

use crate::gpu::{Gpu, Random, element};
use crate::shapes::{Shape, shapes};

pub const BLOCK: usize = 16;

/// Of software drivers only what takes no minutes.
const SOFTWARE_BYTES: f64 = 5e6;

fn in_f16(gpu: &Gpu<'_>) -> impl Iterator<Item = Shape> {
    // The peers' bf16 is measured in f16: the same bytes.
    let most = if gpu.software { SOFTWARE_BYTES } else { f64::INFINITY };
    shapes().into_iter().filter(move |shape| shape.kv_dtype == DType::Bf16 && shape.bytes() <= most)
}

/// The shapes that are measured on a GPU.
pub fn names() -> Vec<String> {
    shapes().into_iter().filter(|shape| shape.kv_dtype == DType::Bf16).map(|shape| shape.name).collect()
}

pub fn headline() {
    println!(
        "decode f16, d128 if not said otherwise, block 16: us, GB/s, % of ceiling, x vLLM, x SDPA dense"
    );
}

pub fn all_shapes(gpu: &Gpu<'_>, ceiling: f64, wanted: impl Fn(&str) -> bool) -> Vec<Value> {
    let mut results = Vec::new();
    headline();
    for shape in in_f16(gpu).filter(|shape| wanted(&shape.name)) {
        for hnd in [false, true] {
            let layout = if hnd { "HND" } else { "NHD" };
            let prepared = match Prepared::new(gpu, &shape, hnd) {
                Ok(prepared) => prepared,
                Err(reason) => {
                    println!("{:18} {layout}  SKIPPED: {reason}", shape.name);
                    results.push(json!({ "shape": shape.name, "layout": layout, "skipped": reason }));
                    continue;
                }
            };
            let Measured { us, error, items, merged, variant } =
                prepared.measure(PlanOptions::default(), tuning(&prepared.config)).unwrap();
            let rate = shape.bytes() / us / 1e3;
            // A software driver computes on the CPU: what the CPU backend takes there says how well.
            let cpu_us = gpu.software.then(|| prepared.cpu_us());
            if let Some(cpu_us) = cpu_us {
                println!(
                    "{:18} {layout} {us:8.1} us, the CPU backend {cpu_us:8.1} us: x{:.1}",
                    shape.name,
                    us / cpu_us
                );
            }
            let dense = shape.sdpa_us.map(|sdpa| sdpa / us);
            println!(
                "{:18} {layout} {us:8.1} us {rate:5.0} GB/s {:3.0}%  vLLM x{:.2}  SDPA {}  peer x{:.2}  error {error:.1e}, {items} items, {merged} merged",
                shape.name,
                100.0 * rate / ceiling,
                shape.vllm_us / us,
                dense.map_or("-".to_owned(), |ratio| format!("x{ratio:.2}")),
                shape.best_us / us,
            );
            results.push(json!({
                "shape": shape.name, "layout": layout, "us": us, "bytes": shape.bytes(), "gb_s": rate,
                "of_ceiling": rate / ceiling, "speedup_over_vllm": shape.vllm_us / us, "speedup_over_sdpa_dense": dense,
                "speedup_over_best_peer": shape.best_us / us, "relative_error": error, "items": items,
                "merged_rows": merged, "variant": variant, "cpu_us": cpu_us,
            }));
        }
    }
    summary(&results);
    results
}

/// `PAGEWISE_HALF=1`: the default, but that caches are read as f16 and not by words.
fn tuning(config: &AttentionConfig) -> Option<DecodeTuning> {
    std::env::var_os("PAGEWISE_HALF")?;
    let needs = DecodeNeeds {
        q: shaders::DType::F16,
        kv: shaders::DType::F16,
        unit: Unit::Vec4,
        head_dim: config.head_dim_qk as u32,
        group: config.group() as u32,
        subgroup: Some(32),
        bits: false,
    };
    DecodeSpec::for_needs(needs).map(|spec| DecodeTuning { half: true, ..spec.tuning })
}

/// Geometric means over the better layout of each shape.
pub fn summary(results: &[Value]) {
    let (mut vllm, mut sdpa, mut peers, mut large) = (vec![], vec![], vec![], vec![]);
    for shape in shapes() {
        let of_shape = results.iter().filter(|result| result["shape"] == shape.name.as_str());
        let best = |key: &str| of_shape.clone().filter_map(|result| result[key].as_f64()).reduce(f64::max);
        if shape.counts() {
            vllm.extend(best("speedup_over_vllm"));
            sdpa.extend(best("speedup_over_sdpa_dense"));
            peers.extend(best("speedup_over_best_peer"));
        }
        if shape.bytes() >= 256e6 {
            large.extend(best("of_ceiling").map(|share| (share, shape.name)));
        }
    }
    let mean = |list: &[f64]| (list.iter().map(|x| x.ln()).sum::<f64>() / list.len().max(1) as f64).exp();
    println!(
        "geometric means, the better layout of each shape: x{:.3} over vLLM, x{:.3} over SDPA dense, x{:.3} over the best peer",
        mean(&vllm),
        mean(&sdpa),
        mean(&peers)
    );
    if let Some((least, name)) = large.iter().min_by(|a, b| a.0.total_cmp(&b.0)) {
        println!("from 256 MB on, at least {:.1}% of the read ceiling ({name})", 100.0 * least);
    }
}

/// Plans and tunings, on a few shapes.
pub fn sweep(gpu: &Gpu<'_>, ceiling: f64, wanted: impl Fn(&str) -> bool) -> Vec<Value> {
    let chosen = [
        "32/8 1x8192",
        "32/8 64x1024",
        "32/8 ragged64",
        "32/32 64x1024",
        "64/8 1x131072",
        "64/8 8x8192",
        "64/8 64x1024",
        "64/8 128x1024",
        "64/8 64x4096",
        "64/8 32x2048",
        "8/1 256x2048",
    ];
    let mut results = Vec::new();
    for shape in in_f16(gpu).filter(|shape| wanted(&shape.name)) {
        if !gpu.software && !chosen.contains(&shape.name.as_str()) {
            continue;
        }
        let Ok(prepared) = Prepared::new(gpu, &shape, false) else { continue };
        let mut best: Option<(f64, String)> = None;
        let mut try_one = |options: PlanOptions, tuning: Option<DecodeTuning>| {
            let what = format!(
                "workgroups {}, items of {} to {}, {tuning:?}",
                options.workgroups, options.smallest, options.largest
            );
            let Ok(Measured { us, items, .. }) = prepared.measure(options, tuning) else { return };
            println!(
                "{:16} {us:8.1} us {:3.0}%  {what}, {items} items",
                shape.name,
                shape.bytes() / us / 10.0 / ceiling
            );
            results.push(json!({ "shape": shape.name, "us": us, "choice": what, "items": items }));
            if best.as_ref().is_none_or(|(so_far, _)| us < *so_far) {
                best = Some((us, what));
            }
        };
        for workgroups in [128, 192, 256, 384, 512, 1024] {
            for (smallest, largest) in [(128, 512), (128, 2048)] {
                try_one(PlanOptions { workgroups, smallest, largest, ..PlanOptions::default() }, None);
            }
        }
        for (rows, workgroup_size) in [2, 4, 8].into_iter().flat_map(|rows| [(rows, 64), (rows, 128)]) {
            for (kept, ahead) in [(false, false), (false, true), (true, false), (true, true)] {
                for half in [false, true] {
                    let tuning = DecodeTuning { rows, workgroup_size, kept, ahead, half };
                    try_one(PlanOptions::default(), Some(tuning));
                }
            }
        }
        if let Some((us, what)) = best {
            println!("{:16} best {us:.1} us: {what}", shape.name);
        }
    }
    results
}

/// Elements of the pattern before V's first: 256-byte aligned, as bindings want it.
pub const V_SHIFT: usize = 128 * 125;

/// One shape's caches, queries and expected outputs, for any number of plans.
struct Prepared<'a, 'b> {
    gpu: &'a Gpu<'b>,
    config: AttentionConfig,
    layout: CacheLayout,
    lens: Vec<i32>,
    max_blocks: usize,
    tables: Vec<Vec<i32>>,
    k_cache: Buffer,
    v_cache: Buffer,
    q: Buffer,
    q_rows: Vec<f16>,
    rows: usize,
    /// First element of a row of the output, and what it should be.
    expected: Vec<(usize, Vec<f64>)>,
}

/// What one plan of one shape took.
struct Measured {
    us: f64,
    error: f64,
    items: usize,
    merged: u32,
    variant: String,
}

impl<'a, 'b> Prepared<'a, 'b> {
    fn new(gpu: &'a Gpu<'b>, shape: &Shape, hnd: bool) -> Result<Self, String> {
        let sequences = shape.lens.len();
        let config = AttentionConfig::new(shape.q_heads, shape.kv_heads, shape.dim, DType::F16);
        let blocks_of = |len: i32| (len as usize).div_ceil(BLOCK);
        let blocks_per_set: usize = shape.lens.iter().map(|len| blocks_of(*len)).sum();
        let side = (blocks_per_set * BLOCK * shape.kv_heads * shape.dim * 2) as u64;
        if side + 2 * V_SHIFT as u64 > gpu.most_bytes() {
            return Err(format!(
                "K takes {side} bytes, but max_storage_buffer_binding_size is {}",
                gpu.most_bytes()
            ));
        }
        let sets = (gpu.rotation() / (2 * side)).clamp(1, 64) as usize;
        let blocks = sets * blocks_per_set;
        let layout = match hnd {
            false => CacheLayout::nhd(blocks, BLOCK, &config),
            true => CacheLayout::hnd(blocks, BLOCK, &config),
        };
        // V begins elsewhere in the pattern, so that it is not K.
        let k_cache = gpu.filled(2 * layout.k_extent(&config));
        let v_cache = gpu.filled(2 * (layout.v_extent(&config) + V_SHIFT as u64));
        let order = Random(11).permutation(blocks);
        let max_blocks = shape.lens.iter().map(|len| blocks_of(*len)).max().unwrap();
        let mut next = order.iter();
        let tables: Vec<Vec<i32>> = (0..sets)
            .map(|_| {
                let rows = shape.lens.iter().flat_map(|len| {
                    let mut row: Vec<i32> = next.by_ref().take(blocks_of(*len)).copied().collect();
                    row.resize(max_blocks, 0);
                    row
                });
                rows.collect()
            })
            .collect();
        let mut random = Random(5);
        let q: Vec<f16> = (0..sequences * shape.q_heads * shape.dim)
            .map(|_| f16::from_f64((random.next() >> 40) as f64 / f64::from(1 << 22) - 2.0))
            .collect();
        let mut expected = Vec::new();
        for sequence in [0, sequences - 1] {
            for head in [0, shape.q_heads - 1] {
                let first = (sequence * shape.q_heads + head) * shape.dim;
                let table = &tables[0][sequence * max_blocks..][..max_blocks];
                let row = Row {
                    q: &q[first..first + shape.dim],
                    table,
                    len: shape.lens[sequence] as usize,
                    head: head / config.group(),
                };
                expected.push((first, attend(&config, &layout, &row)));
            }
        }
        let q_bytes: Vec<u8> = q.iter().flat_map(|x| x.to_le_bytes()).collect();
        Ok(Self {
            gpu,
            rows: sequences,
            lens: shape.lens.clone(),
            q: gpu.upload(&q_bytes),
            q_rows: q,
            config,
            layout,
            max_blocks,
            tables,
            k_cache,
            v_cache,
            expected,
        })
    }

    /// µs that the CPU backend takes for the same, the median of nine.
    fn cpu_us(&self) -> f64 {
        let side = |extent: u64, first: usize| -> Vec<f16> {
            (first..first + extent as usize).map(|i| f16::from_f64(element(i))).collect()
        };
        let k = side(self.layout.k_extent(&self.config), 0);
        let v = side(self.layout.v_extent(&self.config), V_SHIFT);
        let query_start: Vec<i32> = (0..=self.rows as i32).collect();
        let batch = PagedBatch::padded(&query_start, &self.lens, &self.tables[0], self.max_blocks);
        let plan = cpu::Plan::new(Problem::new(&self.config, self.layout, batch).unwrap());
        let tensors = [&self.q_rows, &k, &v].map(|x| HostTensor::F16(x));
        let inputs = cpu::Inputs::new(tensors[0], tensors[1], tensors[2]);
        let mut out = vec![f16::ZERO; self.q_rows.len()];
        let mut times: Vec<f64> = (0..9)
            .map(|_| {
                let started = Instant::now();
                plan.run(&inputs, &mut cpu::Outputs::new(HostTensorMut::F16(&mut out))).unwrap();
                started.elapsed().as_secs_f64() * 1e6
            })
            .collect();
        times.sort_by(f64::total_cmp);
        times[4]
    }

    /// Plans, checks and times.
    fn measure(&self, options: PlanOptions, tuning: Option<DecodeTuning>) -> Result<Measured, String> {
        let Self { gpu, rows, .. } = *self;
        let query_start: Vec<i32> = (0..=rows as i32).collect();
        let plans: Vec<_> = self
            .tables
            .iter()
            .map(|table| {
                let batch = PagedBatch::padded(&query_start, &self.lens, table, self.max_blocks);
                let problem = Problem::new(&self.config, self.layout, batch).unwrap();
                gpu.context.plan_attention(&problem, options).map_err(|error| error.to_string())
            })
            .collect::<Result<_, String>>()?;
        let first = &plans[0];
        let nan: Vec<u8> = f16::NAN.to_le_bytes().repeat(rows * self.config.q_heads * self.config.head_dim_v);
        let out = gpu.upload(&nan);
        let workspace = gpu.buffer(first.workspace_bytes());
        let uploaded: Vec<Buffer> = plans
            .iter()
            .map(|plan| {
                gpu.upload(&plan.words().iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>())
            })
            .collect();
        let strides = RowStrides::packed(self.config.q_heads, self.config.head_dim_qk);
        let prepared: Vec<PreparedAttention> = uploaded
            .iter()
            .map(|plan| {
                let call = AttentionCall {
                    config: &self.config,
                    layout: &self.layout,
                    rows,
                    q: BufferRange::whole(&self.q),
                    q_strides: strides,
                    k_cache: BufferRange::whole(&self.k_cache),
                    v_cache: BufferRange {
                        buffer: &self.v_cache,
                        offset: 2 * V_SHIFT as u64,
                        size: self.v_cache.size() - 2 * V_SHIFT as u64,
                    },
                    terms: HeadTerms::default(),
                    out: BufferRange::whole(&out),
                    out_strides: strides,
                    lse: None,
                    plan: BufferRange::whole(plan),
                    workspace: BufferRange::whole(&workspace),
                    tuning,
                };
                gpu.context.prepare_attention(&call).map_err(|error| error.to_string())
            })
            .collect::<Result<_, String>>()?;
        gpu.submit(|pass| prepared[0].encode(pass, first).unwrap());
        let bytes = gpu.read(&out);
        let found: Vec<f64> = bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f64()).collect();
        let mut error = 0.0f64;
        for (start, expected) in &self.expected {
            let largest = expected.iter().fold(0.0f64, |largest, x| largest.max(x.abs()));
            for (found, expected) in found[*start..].iter().zip(expected) {
                let difference = (found - expected).abs() / largest;
                error = if difference.is_nan() { f64::INFINITY } else { error.max(difference) };
            }
        }
        // One rounding to f16, and f32 sums over up to 131072 keys.
        assert!(error < 2e-3, "{options:?}, {tuning:?}: relative error {error:.1e}");

        let sets = prepared.len();
        let bytes = 4
            * self.config.kv_heads
            * self.config.head_dim_qk
            * self.lens.iter().map(|len| *len as usize).sum::<usize>();
        // Some milliseconds a pass, and every set as often as the others.
        let count = (8_000_000_000 / bytes.max(1)).clamp(4, 256).next_multiple_of(sets);
        let count = if gpu.software { sets } else { count };
        let us = gpu.time(count, |pass, i| prepared[i % sets].encode(pass, &plans[i % sets]).unwrap());
        Ok(Measured {
            us,
            error,
            items: first.items(),
            merged: first.merged_rows(),
            variant: prepared[0].variant(),
        })
    }
}

/// One query row of one head.
pub struct Row<'a> {
    pub q: &'a [f16],
    pub table: &'a [i32],
    pub len: usize,
    pub head: usize,
}

/// One row of attention in f64, by the definition.
pub fn attend(config: &AttentionConfig, layout: &CacheLayout, row: &Row<'_>) -> Vec<f64> {
    let place = |strides: KvStrides, key: usize| {
        row.table[key / BLOCK] as usize * strides.block as usize
            + key % BLOCK * strides.token as usize
            + row.head * strides.head as usize
    };
    let scores: Vec<f64> = (0..row.len)
        .map(|key| {
            let first = place(layout.k, key);
            let dot: f64 = row.q.iter().enumerate().map(|(d, q)| q.to_f64() * element(first + d)).sum();
            dot * f64::from(config.scale)
        })
        .collect();
    let largest = scores.iter().fold(f64::NEG_INFINITY, |largest, score| largest.max(*score));
    let mut out = vec![0.0; config.head_dim_v];
    let mut sum = 0.0;
    for (key, score) in scores.iter().enumerate() {
        let weight = (score - largest).exp();
        sum += weight;
        let first = place(layout.v, key) + V_SHIFT;
        out.iter_mut().enumerate().for_each(|(d, out)| *out += weight * element(first + d));
    }
    out.iter().map(|out| out / sum).collect()
}
