//! Decode and copies of blocks over a cache of more than 2^31 elements and 2^32 bytes, with 40,000 keys: K and V are made on the device by
//! the counter kernel, and sampled rows are checked by plain f64 code that makes the same numbers again. Skipped,
//! loudly, without an NVIDIA GPU or with too little memory on it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    unreachable_pub,
    dead_code,
    reason = "a test"
)]

#[path = "gpu/cuda.rs"]
mod cuda;
#[path = "gpu/random.rs"]
mod random;

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::Ptx;
use half::bf16;
use pagewise_attention::cuda::ptx::counter::{Counter, number};
use pagewise_attention::cuda::ptx::prefill::Form;
use pagewise_attention::cuda::{
    AttentionCall, AttentionOptions, AttentionPlan, BlockNumberType, BlockPairs, CacheBlocks, Context,
    CopyBlocksCall, LayerAddresses, cudarc, ptx,
};
use pagewise_attention::{AttentionConfig, CacheLayout, DType, KvStrides, PagedBatch, Problem};
use random::{Random, run_seed};

const KV_HEADS: usize = 8;
const GROUP: usize = 4;
const DIM: usize = 128;
const BLOCK: usize = 16;
const NUM_BLOCKS: usize = 150_000;
const LENGTHS: [usize; 4] = [40_000, 17, 0, 999];
const SEEDS: [u32; 2] = [11, 12];

fn address<T>(slice: &CudaSlice<T>, stream: &CudaStream) -> u64 {
    slice.device_ptr(stream).0
}

/// A buffer of the counter's numbers.
fn counted(context: &Context, stream: &Arc<CudaStream>, elements: usize, seed: u32) -> CudaSlice<u16> {
    let counter = Counter::new(ptx::DType::Bf16).unwrap();
    let launch = counter.launch(elements as u64).unwrap();
    let module = context.cudarc().unwrap().load_module(Ptx::from_src(counter.kernel().text())).unwrap();
    let function = module.load_function(counter.kernel().entry()).unwrap();
    // SAFETY: every element is written below before anything reads it.
    let buffer = unsafe { stream.alloc::<u16>(elements) }.unwrap();
    let (data, count) = (address(&buffer, stream), elements as u64);
    let ([grid, ..], [block, ..]) = (launch.grid, launch.block);
    let config = LaunchConfig { grid_dim: (grid, 1, 1), block_dim: (block, 1, 1), shared_mem_bytes: 0 };
    let mut builder = stream.launch_builder(&function);
    builder.arg(&data).arg(&count).arg(&seed);
    // SAFETY: the arguments are in the descriptor's order, and the buffer holds so many elements.
    unsafe { builder.launch(config) }.unwrap();
    buffer
}

/// Blocks of the sequences: from the far end and from the beginning of the cache in turn.
fn block_tables() -> (Vec<i32>, usize) {
    let max_blocks = LENGTHS.iter().map(|len| len.div_ceil(BLOCK)).max().unwrap();
    let (mut low, mut high) = (0, NUM_BLOCKS as i32);
    let mut tables = vec![-1; max_blocks * LENGTHS.len()];
    for (sequence, len) in LENGTHS.iter().enumerate() {
        for block in 0..len.div_ceil(BLOCK) {
            tables[sequence * max_blocks + block] = if block % 3 == 2 {
                low += 1;
                low - 1
            } else {
                high -= 1;
                high
            };
        }
    }
    (tables, max_blocks)
}

struct Row {
    out: Vec<f64>,
    lse: f64,
    /// What the output may differ by: by element, and the log-sum-exp.
    error: Vec<f64>,
    lse_error: f64,
}

/// Attention of one query over the counter's numbers, by the definition.
fn reference(q: &[f64], keys: &[usize], strides: KvStrides, head: usize, scale: f64) -> Row {
    let row = |seed: u32, slot: usize| -> Vec<f64> {
        let (block, place) = ((slot / BLOCK) as u64, (slot % BLOCK) as u64);
        let first = block * strides.block + place * strides.token + head as u64 * strides.head;
        (first..first + DIM as u64).map(|index| f64::from(number(seed, index))).collect()
    };
    let (mut scores, mut largest_magnitude) = (Vec::with_capacity(keys.len()), 0.0f64);
    for &slot in keys {
        let k = row(SEEDS[0], slot);
        scores.push(scale * q.iter().zip(&k).map(|(q, k)| q * k).sum::<f64>());
        let magnitude = scale * q.iter().zip(&k).map(|(q, k)| (q * k).abs()).sum::<f64>();
        largest_magnitude = largest_magnitude.max(magnitude);
    }
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = scores.iter().map(|score| (score - largest).exp()).sum();
    let (mut out, mut weight) = (vec![0.0; DIM], vec![0.0; DIM]);
    for (&slot, score) in keys.iter().zip(&scores) {
        let p = (score - largest).exp() / total;
        for (d, v) in row(SEEDS[1], slot).into_iter().enumerate() {
            out[d] += p * v;
            weight[d] += p * v.abs();
        }
    }
    // A dot product of 128 terms in f32 errs by about sqrt(128) roundings of its magnitude; we allow four times that,
    // and the same of the sums over the keys. Probabilities and outputs are rounded to bf16 (2^-9 each).
    let single = 2f64.powi(-24);
    let score = (4.0 * (DIM as f64).sqrt() + 8.0) * single * largest_magnitude;
    let sum = (4.0 * (keys.len() as f64).sqrt() + 16.0) * single;
    let half = 2f64.powi(-8);
    let relative = (2.0 * score).exp_m1() + sum + 2.0 * half;
    let error = out.iter().zip(&weight).map(|(out, weight)| relative * weight + half * out.abs()).collect();
    let lse = largest + total.ln();
    Row { out, lse, error, lse_error: score + sum + 2.0 * half * half + 4.0 * single * lse.abs() }
}

#[test]
fn caches_beyond_32_bits_give_what_the_definition_says() {
    let Some(context) = cuda::context() else { return };
    let config = AttentionConfig::new(KV_HEADS * GROUP, KV_HEADS, DIM, DType::Bf16);
    let elements = NUM_BLOCKS * BLOCK * KV_HEADS * DIM;
    assert!(elements > 1 << 31 && 2 * elements > 1 << 32);
    if context.device().memory < 5 * elements as u64 || std::env::var_os("PAGEWISE_SMALL").is_some() {
        eprintln!("SKIPPED: caches of {} GiB are too large here", (4 * elements) >> 30);
        return;
    }
    let stream = context.cudarc().unwrap().default_stream();
    let k = counted(&context, &stream, elements, SEEDS[0]);
    let v = counted(&context, &stream, elements, SEEDS[1]);

    let seed = run_seed();
    let mut random = Random::new(seed);
    let (tables, max_blocks) = block_tables();
    let query_start: Vec<i32> = (0..=LENGTHS.len() as i32).collect();
    let seq_lens = LENGTHS.map(|len| len as i32);
    // Scores of a few tens, so that a few keys decide and one taken from elsewhere shows.
    let rows = LENGTHS.len() * KV_HEADS * GROUP;
    let q: Vec<bf16> = (0..rows * DIM).map(|_| bf16::from_f64(16.0 * random.unit())).collect();
    let device_q = stream.clone_htod(&q).unwrap();
    let device_tables = stream.clone_htod(&tables).unwrap();

    // By rows, and in the tiles of each form of prefill.
    let major = context.device().compute_capability.major;
    let by_tiles =
        |form| AttentionOptions { form: Some(form), tiles_from: Some(1), ..AttentionOptions::default() };
    let by_rows = AttentionOptions { tiles_from: Some(usize::MAX), ..AttentionOptions::default() };
    let forms = Form::ALL.into_iter().filter(|form| form.runs_on(major)).map(by_tiles);
    let ways: Vec<AttentionOptions> = std::iter::once(by_rows).chain(forms).collect();
    let layouts =
        [CacheLayout::nhd(NUM_BLOCKS, BLOCK, &config), CacheLayout::hnd(NUM_BLOCKS, BLOCK, &config)];
    for (layout, options) in layouts.into_iter().flat_map(|layout| ways.iter().map(move |way| (layout, *way)))
    {
        let batch = PagedBatch::padded(&query_start, &seq_lens, &tables, max_blocks);
        let problem = Problem::new(&config, layout, batch).unwrap();
        let plan = AttentionPlan::new(&problem, context.device(), options).unwrap();
        let sizes = plan.workspace();
        let work = stream.clone_htod(&plan.work()).unwrap();
        let out = stream.clone_htod(&vec![bf16::NAN; rows * DIM]).unwrap();
        let lse = stream.clone_htod(&vec![f32::NAN; rows]).unwrap();
        let bytes = |count: u64, byte: u8| stream.clone_htod(&vec![byte; count.max(16) as usize]).unwrap();
        let partial_out = bytes(sizes.partial_out, 0xff);
        let partial_max = bytes(sizes.partial_max, 0xff);
        let tickets = bytes(sizes.tickets, 0);
        let call = AttentionCall {
            q: address(&device_q, &stream),
            k_cache: address(&k, &stream),
            v_cache: address(&v, &stream),
            tables: address(&device_tables, &stream),
            out: address(&out, &stream),
            work: address(&work, &stream),
            partial_out: address(&partial_out, &stream),
            partial_max: address(&partial_max, &stream),
            tickets: address(&tickets, &stream),
            ..AttentionCall::default()
        };
        let call = AttentionCall { lse: address(&lse, &stream), ..call };
        // SAFETY: all addresses are those of live slices that hold what the plan reaches.
        unsafe { context.attention_raw(&plan, &call, stream.cu_stream().into()) }.unwrap();
        let (out, lse) = (stream.clone_dtoh(&out).unwrap(), stream.clone_dtoh(&lse).unwrap());

        for (sequence, &len) in LENGTHS.iter().enumerate() {
            let table = &tables[sequence * max_blocks..];
            let slots: Vec<usize> =
                (0..len).map(|key| table[key / BLOCK] as usize * BLOCK + key % BLOCK).collect();
            // The first and the last head of the long sequence and one between, half of the others.
            let step = if len > 1000 { KV_HEADS * GROUP / 2 - 1 } else { 3 };
            for head in (0..KV_HEADS * GROUP).step_by(step) {
                let row = sequence * KV_HEADS * GROUP + head;
                let found = &out[row * DIM..(row + 1) * DIM];
                let what = format!("PAGEWISE_SEED={seed}, {:?}, {len} keys, head {head}", plan.variants());
                if len == 0 {
                    assert!(
                        found.iter().all(|x| x.to_f32() == 0.0) && lse[row] == f32::NEG_INFINITY,
                        "{what}"
                    );
                    continue;
                }
                let q: Vec<f64> = q[row * DIM..(row + 1) * DIM].iter().map(|x| x.to_f64()).collect();
                let expected = reference(&q, &slots, layout.k, head / GROUP, f64::from(config.scale));
                for (d, found) in found.iter().enumerate() {
                    let (found, value, error) = (found.to_f64(), expected.out[d], expected.error[d]);
                    // Written so that NaN fails.
                    let fine = (found - value).abs() <= error;
                    assert!(fine, "{what}, element {d}: {found}, expected {value} within {error:e}");
                }
                let difference = (f64::from(lse[row]) - expected.lse).abs();
                assert!(
                    difference <= expected.lse_error,
                    "{what}: lse {}, expected {}",
                    lse[row],
                    expected.lse
                );
            }
        }
    }
    eprintln!("{}: {} keys agree over caches of {} GiB", context.device(), LENGTHS[0], (4 * elements) >> 30);
}

/// The reference itself, on a cache small enough to write down: it finds its elements where the layouts put them.
#[test]
fn the_reference_reads_the_layouts_as_they_are_defined() {
    let config = AttentionConfig::new(KV_HEADS, KV_HEADS, DIM, DType::Bf16);
    let hnd = CacheLayout::hnd(4, BLOCK, &config);
    let one_key = reference(&[0.0; DIM], &[3 * BLOCK + 5], hnd.k, 2, 1.0);
    let first = ((3 * KV_HEADS + 2) * BLOCK + 5) * DIM;
    for (d, out) in one_key.out.iter().enumerate() {
        assert_eq!(*out, f64::from(number(SEEDS[1], (first + d) as u64)));
    }
    assert_eq!(one_key.lse, 0.0);
}

#[test]
fn blocks_beyond_32_bits_are_copied_from_and_to_where_they_should() {
    let Some(context) = cuda::context() else { return };
    let config = AttentionConfig::new(KV_HEADS * GROUP, KV_HEADS, DIM, DType::Bf16);
    let layout = CacheLayout::nhd(NUM_BLOCKS, BLOCK, &config);
    let block = layout.k.block as usize;
    let elements = NUM_BLOCKS * block;
    if context.device().memory < 5 * elements as u64 || std::env::var_os("PAGEWISE_SMALL").is_some() {
        eprintln!("SKIPPED: caches of {} GiB are too large here", (4 * elements) >> 30);
        return;
    }
    let stream = context.cudarc().unwrap().default_stream();
    let tensors = SEEDS.map(|seed| counted(&context, &stream, elements, seed));
    let layers = LayerAddresses::new([(address(&tensors[0], &stream), address(&tensors[1], &stream))]);
    let table = stream.clone_htod(layers.words()).unwrap();
    let last = NUM_BLOCKS as i64 - 1;
    // Across 2^31 elements, which are block 131,072, and 2^32 bytes, which are the same; from either side.
    let pairs = [(last, 0), (1, last - 1), (131_071, 131_072), (131_073, 5), (last - 2, last - 3)];
    let flat: Vec<i64> = pairs.iter().flat_map(|&(from, to)| [from, to]).collect();
    let device_pairs = stream.clone_htod(&flat).unwrap();
    let cache = CacheBlocks { layout: &layout, layers: &layers, table: address(&table, &stream) };
    let call = CopyBlocksCall {
        config: &config,
        from: cache,
        to: cache,
        pairs: BlockPairs {
            address: address(&device_pairs, &stream),
            number_type: BlockNumberType::I64,
            count: pairs.len(),
            count_at: 0,
        },
        thread_blocks: None,
        tuning: None,
    };
    // SAFETY: all addresses are those of live slices that hold what the layout reaches; the pairs are independent.
    unsafe { context.copy_blocks_raw(&call, stream.cu_stream().into()) }.unwrap();
    for (tensor, seed) in tensors.iter().zip(SEEDS) {
        let check = |at: i64, holds: i64| {
            let first = at as usize * block;
            let found = stream.clone_dtoh(&tensor.slice(first..first + block)).unwrap();
            for (index, bits) in found.into_iter().enumerate() {
                let expected = number(seed, holds as u64 * block as u64 + index as u64);
                assert_eq!(bf16::from_bits(bits).to_f32(), expected, "block {at}, element {index}");
            }
        };
        for (from, to) in pairs {
            check(to, from);
            check(from, from);
            // What lies beside it is as it was.
            let beside = if to == last { to - 1 } else { to + 1 };
            if pairs.iter().all(|&(_, to)| to != beside) {
                check(beside, beside);
            }
        }
    }
}
