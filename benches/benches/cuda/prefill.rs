//! Prefill at the shapes that others were measured at, in each form; chunks with few queries; mixtures with decode.

use cudarc::driver::CudaSlice;
use pagewise_attention::cuda::ptx::prefill::Form;
use pagewise_attention::cuda::{AttentionCall, AttentionOptions, AttentionPlan, cudarc};
use pagewise_attention::{AttentionConfig, DType, Mask, MaskBits, PagedBatch, Problem};
use serde_json::{Value, json};

use crate::cache::{BLOCK, Cache, Layout};
use crate::gpu::Gpu;

/// 32 query heads over 8 KV heads of 128 elements, causal.
const HEADS: (usize, usize, usize) = (32, 8, 128);

/// One batch: queries and keys of each sequence.
struct Shape {
    name: &'static str,
    sequences: Vec<(i32, i32)>,
    /// TFLOP/s of FlashAttention 3 over pages of 16, of FlashInfer's fa2 and of its fa3, on another H100.
    peers: Option<[f64; 3]>,
}

fn shapes() -> Vec<Shape> {
    let shape = |name, sequences, peers| Shape { name, sequences, peers };
    vec![
        shape("1x2048", vec![(2048, 2048)], Some([467.0, 219.0, 381.0])),
        shape("1x8192", vec![(8192, 8192)], Some([588.0, 328.0, 565.0])),
        shape("1x16384", vec![(16384, 16384)], Some([614.0, 357.0, 498.0])),
        shape("16x1024", vec![(1024, 1024); 16], Some([400.0, 281.0, 373.0])),
        shape("4x512+8192", vec![(512, 8704); 4], Some([576.0, 345.0, 538.0])),
        shape("1x128+8192", vec![(128, 8320)], None),
        shape("1x16+32768", vec![(16, 32784)], None),
        shape("8x8+4096", vec![(8, 4104); 8], None),
    ]
}

pub fn all_shapes(gpu: &Gpu<'_>) -> Vec<Value> {
    println!("prefill bf16, 32/8 heads, d128, causal: us, TFLOP/s");
    let major = gpu.context.device().compute_capability.major;
    let forms = Form::ALL.into_iter().filter(|form| form.runs_on(major));
    let forms: Vec<Form> = forms.collect();
    let mut results = Vec::new();
    for Shape { name, sequences, peers } in shapes() {
        for (block, form) in
            std::iter::once(BLOCK).chain([128]).flat_map(|block| forms.iter().map(move |form| (block, form)))
        {
            if block != BLOCK && *form != Form::Hopper {
                continue;
            }
            let prepared = Prepared::new(gpu, &sequences, block, DType::Bf16);
            let options = AttentionOptions { form: Some(*form), ..AttentionOptions::default() };
            let (us, error, variants) = prepared.measure(options);
            let rate = prepared.flops() / us / 1e6;
            let over = peers.map_or(String::new(), |[fa3, fa2, _]| {
                format!("  x{:.2} FA3 paged, x{:.2} FI fa2", rate / fa3, rate / fa2)
            });
            println!(
                "{name:12} block {block:3} {form:7?} {us:9.1} us {rate:6.0} TFLOP/s{over}  error {error:.1e}  {}",
                variants.join(" + ")
            );
            results.push(json!({
                "shape": name, "block": block, "form": format!("{form:?}"), "us": us, "tflop_s": rate, "relative_error": error,
                "variants": variants, "fa3_paged_tflop_s": peers.map(|p| p[0]), "fi_fa2_tflop_s": peers.map(|p| p[1]),
                "fi_fa3_tflop_s": peers.map(|p| p[2]),
            }));
        }
    }
    // The same prompt by a mask of bits that says the same, in tiles and row by row.
    for form in forms.iter().filter(|form| **form != Form::Hopper) {
        let causal = vec![(2048, 2048)];
        let options = AttentionOptions { form: Some(*form), ..AttentionOptions::default() };
        let by_rows = AttentionOptions { tiles_from: Some(usize::MAX), ..options };
        let plain = Prepared::new(gpu, &causal, BLOCK, DType::Bf16).measure(options).0;
        let bits = Prepared::new(gpu, &causal, BLOCK, DType::Bf16).by_bits();
        let (us, error, variants) = bits.measure(options);
        let rows = bits.measure(by_rows).0;
        let rate = bits.flops() / us / 1e6;
        println!(
            "1x2048 bits  block {BLOCK:3} {form:7?} {us:9.1} us {rate:6.0} TFLOP/s  x{:.2} of the time of causal, x{:.3} of row by row  error {error:.1e}  {}",
            us / plain,
            us / rows,
            variants.join(" + ")
        );
        results.push(json!({
            "shape": "1x2048 bits", "block": BLOCK, "form": format!("{form:?}"), "us": us, "tflop_s": rate, "relative_error": error,
            "variants": variants, "causal_us": plain, "by_rows_us": rows,
        }));
    }
    // Prompts over an fp8 cache, beside those over one of bf16 in the same form.
    for (name, length) in [("1x2048 e4m3", 2048), ("1x8192 e4m3", 8192)] {
        for form in forms.iter().filter(|form| **form != Form::Hopper) {
            let options = AttentionOptions { form: Some(*form), ..AttentionOptions::default() };
            let prepare = |kv_dtype| Prepared::new(gpu, &[(length, length)], BLOCK, kv_dtype);
            let bf16 = prepare(DType::Bf16).measure(options).0;
            let fp8 = prepare(DType::F8E4M3);
            let (us, error, variants) = fp8.measure(options);
            let rate = fp8.flops() / us / 1e6;
            println!(
                "{name:12} block {BLOCK:3} {form:7?} {us:9.1} us {rate:6.0} TFLOP/s  x{:.2} of the time over bf16  error {error:.1e}  {}",
                us / bf16,
                variants.join(" + ")
            );
            results.push(json!({
                "shape": name, "block": BLOCK, "form": format!("{form:?}"), "us": us, "tflop_s": rate, "relative_error": error,
                "variants": variants, "bf16_us": bf16,
            }));
        }
    }
    // A mixture, and its parts.
    let (decodes, chunk) = (vec![(1, 2048); 64], vec![(2048, 2048)]);
    let mixture = [decodes.clone(), chunk.clone()].concat();
    let [alone, prefill, together] = [decodes, chunk, mixture].map(|sequences| {
        Prepared::new(gpu, &sequences, BLOCK, DType::Bf16).measure(AttentionOptions::default()).0
    });
    let ratio = together / (alone + prefill);
    println!(
        "mixture: 64 decodes of 2048 keys {alone:.1} us, one prompt of 2048 {prefill:.1} us, in one plan {together:.1} us: x{ratio:.3} of the sum"
    );
    results.push(json!({
        "shape": "mixture 64x1+2048, 1x2048", "decode_us": alone, "prefill_us": prefill, "us": together, "of_sum": ratio,
    }));
    results
}

/// A batch's caches, queries and expected outputs.
struct Prepared<'a, 'b> {
    gpu: &'a Gpu<'b>,
    config: AttentionConfig,
    cache: Cache,
    query_start: Vec<i32>,
    lens: Vec<i32>,
    q: CudaSlice<u8>,
    /// Where the mask is one of bits: words of a row, all words, and those on the device.
    bits: Option<(usize, Vec<u32>, CudaSlice<u32>)>,
    /// First element of a row of the output, and what it should be.
    expected: Vec<(usize, Vec<f64>)>,
}

impl<'a, 'b> Prepared<'a, 'b> {
    fn new(gpu: &'a Gpu<'b>, sequences: &[(i32, i32)], block: usize, kv_dtype: DType) -> Self {
        let (q_heads, kv_heads, dim) = HEADS;
        let config =
            AttentionConfig { kv_dtype, ..AttentionConfig::new(q_heads, kv_heads, dim, DType::Bf16) };
        let lens: Vec<i32> = sequences.iter().map(|sequence| sequence.1).collect();
        let mut query_start = vec![0];
        for (queries, _) in sequences {
            query_start.push(query_start.last().unwrap() + queries);
        }
        let rows = *query_start.last().unwrap() as usize;
        let cache = Cache::new(gpu, &config, &lens, Layout { hnd: false, apart: false, block });
        let q = gpu.filled(DType::Bf16, rows * q_heads * dim);
        let mut expected = Vec::new();
        // Of the first and the last sequence: first, last and two rows between, each with another head.
        for sequence in [0, sequences.len() - 1] {
            let (queries, keys) = (sequences[sequence].0 as usize, sequences[sequence].1 as usize);
            for (turn, query) in [0, queries / 3, 2 * queries / 3, queries - 1].into_iter().enumerate() {
                let head = (turn * 11) % q_heads;
                let first = ((query_start[sequence] as usize + query) * q_heads + head) * dim;
                let row: Vec<half::bf16> =
                    (first..first + dim).map(|i| half::bf16::from_f64(gpu.element(DType::Bf16, i))).collect();
                let len = keys - queries + query + 1;
                expected
                    .push((first, cache.attend(gpu, &config, &row, sequence, len, head / config.group())));
            }
        }
        Self { gpu, config, cache, query_start, lens, q, bits: None, expected }
    }

    /// The same, causality being said by a mask of bits.
    fn by_bits(mut self) -> Self {
        let row_words = self.lens.iter().max().map_or(0, |&len| (len as usize).div_ceil(32));
        let mut words = Vec::new();
        for (rows, &len) in self.query_start.windows(2).zip(&self.lens) {
            let queries = (rows[1] - rows[0]) as usize;
            for query in 0..queries {
                let seen = len as usize - queries + query + 1;
                words.extend((0..row_words).map(|word| match seen.saturating_sub(32 * word) {
                    left @ 0..32 => (1u32 << left) - 1,
                    _ => u32::MAX,
                }));
            }
        }
        self.config.mask = Mask::Bits;
        let device = self.gpu.stream.clone_htod(&words).unwrap();
        self.bits = Some((row_words, words, device));
        self
    }

    /// Operations: two products for each pair of a query head and a key that it sees.
    fn flops(&self) -> f64 {
        let pairs: f64 = self
            .lens
            .iter()
            .zip(self.query_start.windows(2))
            .map(|(len, rows)| {
                let (queries, keys) = (f64::from(rows[1] - rows[0]), f64::from(*len));
                queries * (keys - queries) + queries * (queries + 1.0) / 2.0
            })
            .sum();
        4.0 * (self.config.head_dim_qk * self.config.q_heads) as f64 * pairs
    }

    /// Plans, checks and times: µs, relative error, kernels.
    fn measure(&self, options: AttentionOptions) -> (f64, f64, Vec<String>) {
        let (gpu, cache) = (self.gpu, &self.cache);
        let mut batch = PagedBatch::padded(&self.query_start, &self.lens, &cache.tables[0], cache.max_blocks);
        batch.mask_bits =
            self.bits.as_ref().map(|(row_words, words, _)| MaskBits { words, row_words: *row_words });
        let problem = Problem::new(&self.config, cache.layout, batch).unwrap();
        let plan = AttentionPlan::new(&problem, gpu.context.device(), options).unwrap();
        let sizes = plan.workspace();
        let stream = &gpu.stream;
        let out = stream.clone_htod(&vec![half::bf16::NAN; self.q.len() / 2]).unwrap();
        let work = stream.clone_htod(&plan.work()).unwrap();
        let partial_out = stream.alloc_zeros::<u8>(sizes.partial_out.max(16) as usize).unwrap();
        let partial_max = stream.alloc_zeros::<u8>(sizes.partial_max.max(16) as usize).unwrap();
        let tickets = stream.alloc_zeros::<u8>(sizes.tickets.max(16) as usize).unwrap();
        let call = |set: usize| AttentionCall {
            q: gpu.address(&self.q),
            k_cache: cache.k_address(gpu),
            v_cache: cache.v_address(gpu, &self.config),
            tables: cache.tables_address(gpu, set),
            mask_bits: self.bits.as_ref().map_or(0, |(_, _, device)| gpu.address(device)),
            out: gpu.address(&out),
            work: gpu.address(&work),
            partial_out: gpu.address(&partial_out),
            partial_max: gpu.address(&partial_max),
            tickets: gpu.address(&tickets),
            ..AttentionCall::default()
        };
        let launch = |set: usize| {
            // SAFETY: all addresses are those of live slices that hold what the plan reaches, on one stream.
            unsafe { gpu.context.attention_raw(&plan, &call(set), gpu.raw_stream()) }.unwrap();
        };
        gpu.context.prepare(&plan).unwrap();
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
        (gpu.time(sets.clamp(4, 16), |i| launch(i % sets)), error, plan.variants())
    }
}
