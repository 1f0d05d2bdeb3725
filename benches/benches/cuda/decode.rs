//! Decode at the shapes of `peers/h100_decode.tsv`, and `write_kv` against a device copy.

use pagewise_attention::cuda::{DecodeCall, DecodePlan, PlanOptions, WriteKvCall};
use pagewise_attention::{AttentionConfig, CacheLayout, DType, PagedBatch, Problem, RowStrides};
use serde_json::{Value, json};

use crate::gpu::{Gpu, ROTATION, Random};
use crate::yardsticks::Yardsticks;

const DIM: usize = 128;
const BLOCK: usize = 16;

/// One line of the table of peers.
struct Shape {
    q_heads: usize,
    kv_heads: usize,
    name: String,
    lens: Vec<i32>,
    best_peer: String,
    best_us: f64,
    vllm_us: f64,
}

fn shapes() -> Vec<Shape> {
    let text = include_str!("../../peers/h100_decode.tsv");
    let ragged =
        text.lines().find_map(|line| line.split_once("log-normal lengths, ")).expect("the ragged lengths").1;
    let ragged: Vec<i32> = ragged.split(',').map(|len| len.parse().unwrap()).collect();
    let rows = text.lines().filter(|line| line.starts_with(|c: char| c.is_ascii_digit()));
    rows.map(|line| {
        let fields: Vec<&str> = line.split('\t').collect();
        let [q_heads, kv_heads, name, best_peer, best_us, vllm_us] = fields[..] else { panic!("{line}") };
        let lens = match name.split_once('x') {
            Some((sequences, keys)) => vec![keys.parse().unwrap(); sequences.parse().unwrap()],
            None => ragged.clone(),
        };
        Shape {
            q_heads: q_heads.parse().unwrap(),
            kv_heads: kv_heads.parse().unwrap(),
            name: format!("{q_heads}/{kv_heads} {name}"),
            lens,
            best_peer: best_peer.to_owned(),
            best_us: best_us.parse().unwrap(),
            vllm_us: vllm_us.parse().unwrap(),
        }
    })
    .collect()
}

pub fn all_shapes(gpu: &Gpu<'_>, yardsticks: &Yardsticks, wanted: impl Fn(&str) -> bool) -> Vec<Value> {
    let mut results = Vec::new();
    let (mut peers, mut vllm, mut floors) = (Vec::new(), Vec::new(), Vec::new());
    println!("decode bf16 d128, block 16: us, GB/s, % of ceiling, x floor, x best peer, x vLLM");
    for shape in shapes().iter().filter(|shape| wanted(&shape.name)) {
        let mut best = f64::INFINITY;
        for hnd in [false, true] {
            let layout = if hnd { "HND" } else { "NHD" };
            let (us, error, items) = run(gpu, shape, hnd);
            let keys: f64 = shape.lens.iter().map(|len| f64::from(*len)).sum();
            let bytes = 2.0 * 2.0 * (shape.kv_heads * DIM) as f64 * keys;
            let rate = bytes / us / 1e3;
            let floor = yardsticks.floor_us(bytes);
            println!(
                "{:18} {layout} {us:8.1} us {rate:5.0} GB/s {:3.0}%  floor x{:.2}  peer x{:.2} ({})  vLLM x{:.2}  error {error:.1e}, {items} items",
                shape.name,
                100.0 * rate / yardsticks.ceiling,
                us / floor,
                shape.best_us / us,
                shape.best_peer,
                shape.vllm_us / us,
            );
            best = best.min(us);
            results.push(json!({
                "shape": shape.name, "layout": layout, "us": us, "gb_s": rate, "of_ceiling": rate / yardsticks.ceiling,
                "over_floor": us / floor, "best_peer": shape.best_peer, "best_peer_us": shape.best_us,
                "speedup_over_best_peer": shape.best_us / us, "speedup_over_vllm": shape.vllm_us / us,
                "relative_error": error, "items": items,
            }));
            if !hnd {
                floors.push(us / floor);
            }
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

/// Checks and times one shape; gives µs, the relative error and the number of work items.
fn run(gpu: &Gpu<'_>, shape: &Shape, hnd: bool) -> (f64, f64, usize) {
    let sequences = shape.lens.len();
    let config = AttentionConfig::new(shape.q_heads, shape.kv_heads, DIM, DType::Bf16);
    let blocks_of = |len: i32| (len as usize).div_ceil(BLOCK);
    let blocks_per_set: usize = shape.lens.iter().map(|len| blocks_of(*len)).sum();
    let set_bytes = blocks_per_set * BLOCK * shape.kv_heads * DIM * 4;
    let sets = (ROTATION / set_bytes).clamp(1, 128);
    let blocks = sets * blocks_per_set;
    let layout = match hnd {
        false => CacheLayout::nhd(blocks, BLOCK, &config),
        true => CacheLayout::hnd(blocks, BLOCK, &config),
    };
    let k_cache = gpu.filled(layout.k_extent(&config) as usize);
    // V begins elsewhere in the pattern, so that it is not K.
    let v_shift = 8 * 1001;
    let v_cache = gpu.filled(layout.v_extent(&config) as usize + v_shift);

    // Blocks in random order, dealt to the sets and their sequences.
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
    let query_start: Vec<i32> = (0..=sequences as i32).collect();
    let batch = PagedBatch::padded(&query_start, &shape.lens, &tables[0], max_blocks);
    let problem = Problem::new(&config, layout, batch).unwrap();
    let plan =
        DecodePlan::new(&problem, gpu.context.device(), PlanOptions { item_keys: item_keys() }).unwrap();
    let sizes = plan.workspace().unwrap();

    let q_rows: Vec<half::bf16> = {
        let mut random = Random(5);
        (0..sequences * shape.q_heads * DIM).map(|_| half::bf16::from_f64(random.unit() * 2.0)).collect()
    };
    let stream = &gpu.stream;
    let q = stream.clone_htod(&q_rows).unwrap();
    let out = stream.clone_htod(&vec![half::bf16::NAN; q_rows.len()]).unwrap();
    let device_tables = stream.clone_htod(&tables.concat()).unwrap();
    let work = stream.clone_htod(&plan.work()).unwrap();
    let partial_out = stream.alloc_zeros::<u8>(sizes.partial_out.max(16) as usize).unwrap();
    let partial_max = stream.alloc_zeros::<u8>(sizes.partial_max.max(16) as usize).unwrap();
    let tickets = stream.alloc_zeros::<u8>(sizes.tickets.max(16) as usize).unwrap();
    let call = |set: usize| DecodeCall {
        q: gpu.address(&q),
        k_cache: gpu.address(&k_cache),
        v_cache: gpu.address(&v_cache) + 2 * v_shift as u64,
        tables: gpu.address(&device_tables) + (4 * set * sequences * max_blocks) as u64,
        out: gpu.address(&out),
        lse: 0,
        work: gpu.address(&work),
        partial_out: gpu.address(&partial_out),
        partial_max: gpu.address(&partial_max),
        tickets: gpu.address(&tickets),
    };
    let launch = |set: usize| {
        // SAFETY: all addresses are those of live slices that hold what the plan reaches, on one stream.
        unsafe { gpu.context.decode_raw(&plan, &call(set), gpu.raw_stream()) }.unwrap();
    };
    gpu.context.prepare_decode(&plan).unwrap();
    launch(0);
    let found = stream.clone_dtoh(&out).unwrap();
    let mut error = 0.0f64;
    for sequence in [0, sequences - 1] {
        for head in [0, shape.q_heads - 1] {
            let first = (sequence * shape.q_heads + head) * DIM;
            let table = &tables[0][sequence * max_blocks..][..max_blocks];
            let len = shape.lens[sequence] as usize;
            let expected = attend(
                gpu,
                &layout,
                v_shift,
                &q_rows[first..first + DIM],
                table,
                len,
                head / config.group(),
                config.scale,
            );
            let largest = expected.iter().fold(0.0f64, |largest, x| largest.max(x.abs()));
            for (found, expected) in found[first..first + DIM].iter().zip(expected) {
                let difference = (found.to_f64() - expected).abs() / largest;
                error = if difference.is_nan() { f64::INFINITY } else { error.max(difference) };
            }
        }
    }
    // Two roundings to bf16, of the probabilities and of the output.
    assert!(error < 2e-2, "{}: relative error {error:.1e}", shape.name);

    let launches = sets.clamp(4, 128).next_multiple_of(sets.min(128));
    let us = gpu.time(launches, |i| launch(i % sets));
    (us, error, plan.items().len())
}

/// Work items of another size than planned, for tuning.
fn item_keys() -> Option<u32> {
    std::env::var("PAGEWISE_ITEM_KEYS").ok().map(|keys| keys.parse().expect("PAGEWISE_ITEM_KEYS is a number"))
}

/// One row of attention in f64, by the definition.
#[expect(clippy::too_many_arguments, reason = "a check of one row, used once")]
fn attend(
    gpu: &Gpu<'_>,
    layout: &CacheLayout,
    v_shift: usize,
    q: &[half::bf16],
    table: &[i32],
    len: usize,
    head: usize,
    scale: f32,
) -> Vec<f64> {
    let place = |strides: pagewise_attention::KvStrides, key: usize| {
        table[key / BLOCK] as usize * strides.block as usize
            + key % BLOCK * strides.token as usize
            + head * strides.head as usize
    };
    let scores: Vec<f64> = (0..len)
        .map(|key| {
            let first = place(layout.k, key);
            let dot: f64 = q.iter().enumerate().map(|(d, q)| q.to_f64() * gpu.element(first + d)).sum();
            dot * f64::from(scale)
        })
        .collect();
    let largest = scores.iter().fold(f64::NEG_INFINITY, |largest, score| largest.max(*score));
    let mut out = vec![0.0; DIM];
    let mut sum = 0.0;
    for (key, score) in scores.iter().enumerate() {
        let weight = (score - largest).exp();
        sum += weight;
        let first = place(layout.v, key) + v_shift;
        out.iter_mut().enumerate().for_each(|(d, out)| *out += weight * gpu.element(first + d));
    }
    out.iter().map(|out| out / sum).collect()
}

/// `write_kv` of 8192 tokens into random slots, against a device copy of as many bytes.
pub fn write_kv(gpu: &Gpu<'_>, yardsticks: &Yardsticks) -> Value {
    let stream = &gpu.stream;
    let (tokens, heads) = (8192usize, 8usize);
    let config = AttentionConfig::new(heads, heads, DIM, DType::Bf16);
    let sets = 16;
    let layout = CacheLayout::nhd(sets * tokens / BLOCK, BLOCK, &config);
    let row = heads * DIM;
    let source = gpu.filled(2 * sets * tokens * row);
    let k_cache = gpu.filled(layout.k_extent(&config) as usize);
    let v_cache = gpu.filled(layout.v_extent(&config) as usize);
    let slots: Vec<i64> = Random(9).permutation(sets * tokens).into_iter().map(i64::from).collect();
    let slots = stream.clone_htod(&slots).unwrap();
    let strides = RowStrides::packed(heads, DIM);
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
    };
    gpu.context.prepare_write_kv(&call(0)).unwrap();
    let us = gpu.time(sets, |set| {
        // SAFETY: all addresses are those of live slices that hold what shapes and strides reach.
        unsafe { gpu.context.write_kv_raw(&call(set), gpu.raw_stream()) }.unwrap();
    });
    let bytes = (2 * 2 * tokens * row * 2) as f64;
    let half = tokens * row * 2;
    let mut copy = gpu.filled(sets * half);
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
