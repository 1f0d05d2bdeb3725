//! Decode that asks for its first keys while the kernel before it still writes the last ones: behind a `write_kv` that
//! takes its time, the bits of a decode behind nothing. Skipped, loudly, without an NVIDIA GPU of sm_90 or newer.
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
#[path = "gpu/cuda_subject.rs"]
mod cuda_subject;
#[path = "gpu/random.rs"]
mod random;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use cuda_subject::{by_rows, bytes, subject};
use pagewise_attention::conformance::{AttentionData, Case, Subject};
use pagewise_attention::cuda::ptx::decode::Ring;
use pagewise_attention::cuda::{AttentionCall, Context, DecodePlan, Order, PlanOptions, WriteKvCall};
use pagewise_attention::{BlockTables, RowStrides};
use random::{run_cases, run_seed};

const WAIT: &str = "griddepcontrol.wait;";

/// Decodes of several lengths, and as many fresh keys as a dependent launch allows; types, rooms for a head, block sizes
/// below a tile's and the masks that move where a row's keys begin and end.
const CASES: &[&str] = &[
    "attention q=bf16 kv=bf16 heads=16/4 dim=128 block=16 mask=causal sequences=1:3000,16:700,4:90,1:5,1:1",
    "attention q=bf16 kv=bf16 heads=8/8 dim=64 block=4 mask=causal layout=hnd sequences=16:257,1:2048,9:100",
    "attention q=f16 kv=f16 heads=8/1 dim=256 block=32 mask=window:200 sequences=1:1500,16:600,2:31",
    "attention q=f32 kv=f32 heads=4/2 dim=128 block=16 mask=none sequences=16:900,1:333,3:48",
];

/// The kernel that has dependent variants, so that both launches are planned alike and give the same bits.
const OPTIONS: PlanOptions = PlanOptions {
    item_keys: None,
    shrink: None,
    tuning: None,
    ring: Some(Ring::Large),
    block_heads: None,
    grid_items: None,
    order: Order::Stream,
};

/// A case, and the parts of its cache that a step would write: the last keys of each sequence, one a query.
struct Step {
    data: AttentionData,
    /// K and V as they are before the step: NaN where it writes.
    before: [Vec<u8>; 2],
    /// The rows that it writes, K and V.
    rows: [Vec<u8>; 2],
    slots: Vec<i64>,
}

impl Step {
    fn new(case: Case) -> Self {
        let data = AttentionData::generate(&case);
        let size = data.config.kv_dtype.size();
        let whole = [bytes(data.k_view()), bytes(data.v_view())];
        let mut step = Self { before: whole.clone(), rows: [vec![], vec![]], slots: vec![], data };
        let data = &step.data;
        let block_size = data.layout.block_size;
        for (sequence, shape) in data.case.sequences.iter().enumerate() {
            for key in shape.keys - shape.queries.min(shape.keys)..shape.keys {
                let block = data.entries[sequence * data.max_blocks + key / block_size] as usize;
                step.slots.push((block * block_size + key % block_size) as i64);
                let sides =
                    [(data.layout.k, data.config.head_dim_qk), (data.layout.v, data.config.head_dim_v)];
                for (side, (strides, dim)) in sides.into_iter().enumerate() {
                    for head in 0..data.config.kv_heads as u64 {
                        let first = block as u64 * strides.block
                            + (key % block_size) as u64 * strides.token
                            + head * strides.head;
                        let range = first as usize * size..(first as usize + dim) * size;
                        step.rows[side].extend_from_slice(&whole[side][range.clone()]);
                        step.before[side][range].fill(0xff);
                    }
                }
            }
        }
        step
    }

    /// What an ordinary launch gives on the whole cache.
    fn expected(&self, context: &Context) -> Vec<u8> {
        let mut subject = subject(context);
        subject.options = by_rows(OPTIONS);
        let mut out = self.data.poisoned_out();
        subject.attention(&self.data.task().unwrap(), out.as_mut(), None).unwrap();
        bytes(out.as_ref())
    }

    /// The rows written by one dependent launch and attended to by the next.
    fn chain(&self, context: &Context) -> Vec<u8> {
        let data = &self.data;
        let problem = data.problem().unwrap();
        let options = PlanOptions { order: Order::Dependent, ..OPTIONS };
        let plan = DecodePlan::new(&problem, context.device(), options).unwrap();
        assert!(plan.variant().ends_with("_pdl"), "{} is no dependent variant", plan.variant());
        let subject = subject(context);
        // Dependent launches are not for the default stream.
        let stream = context.cudarc().unwrap().new_stream().unwrap();
        let upload = |bytes: &[u8]| stream.clone_htod(bytes).unwrap();
        let sizes = plan.workspace();
        let BlockTables::Padded { entries, .. } = problem.batch().block_tables else { unreachable!() };
        let q = upload(&bytes(data.q.as_ref()));
        let [k, v] = self.before.each_ref().map(|side| upload(side));
        let [k_rows, v_rows] = self.rows.each_ref().map(|side| upload(side));
        let slots = stream.clone_htod(&self.slots).unwrap();
        let tables = stream.clone_htod(entries).unwrap();
        let work = stream.clone_htod(&plan.work()).unwrap();
        let out = upload(&bytes(data.poisoned_out().as_ref()));
        let partial_out = upload(&vec![0xff; sizes.partial_out.max(16) as usize]);
        let partial_max = upload(&vec![0xff; sizes.partial_max.max(16) as usize]);
        let tickets = upload(&vec![0; sizes.tickets as usize]);
        let write = WriteKvCall {
            config: &data.config,
            layout: &data.layout,
            source: data.config.kv_dtype,
            tokens: self.slots.len(),
            slots: subject.address(&slots),
            k: subject.address(&k_rows),
            k_strides: RowStrides::packed(data.config.kv_heads, data.config.head_dim_qk),
            v: subject.address(&v_rows),
            v_strides: RowStrides::packed(data.config.kv_heads, data.config.head_dim_v),
            k_cache: subject.address(&k),
            v_cache: subject.address(&v),
            scales: None,
            order: Order::Dependent,
        };
        let call = AttentionCall {
            q: subject.address(&q),
            k_cache: subject.address(&k),
            v_cache: subject.address(&v),
            tables: subject.address(&tables),
            out: subject.address(&out),
            work: subject.address(&work),
            partial_out: subject.address(&partial_out),
            partial_max: subject.address(&partial_max),
            tickets: subject.address(&tickets),
            ..AttentionCall::default()
        };
        let writes = context.prepare_write_kv(&write).unwrap();
        assert!(writes.spec().dependent, "{} is no dependent variant", writes.name());
        context.prepare_decode(&plan).unwrap();
        let raw = stream.cu_stream().into();
        // SAFETY: the slices live until the stream has been waited for, and are as large as shapes and strides reach.
        unsafe {
            context.write_kv_raw(&write, raw).unwrap();
            context.decode_raw(&plan, &call, raw).unwrap();
        }
        let found = stream.clone_dtoh(&out).unwrap();
        assert!(stream.clone_dtoh(&tickets).unwrap().iter().all(|&byte| byte == 0), "tickets are reset");
        found
    }
}

/// A context whose `write_kv` sleeps for up to 8 ms before it writes, and how many kernels got that; whose decodes wait
/// for it only before they write themselves, if so asked.
fn slow(waits: bool) -> Option<(Context, Arc<AtomicUsize>)> {
    let altered = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&altered);
    let context = cuda::context()?.with_altered_kernels(move |entry, text| {
        if entry.starts_with("write_kv") && text.contains(WAIT) {
            counted.fetch_add(1, Ordering::Relaxed);
            return text.replacen(WAIT, &(WAIT.to_owned() + &"\nnanosleep.u32 1000000;".repeat(4)), 1);
        }
        match text.rfind(WAIT) {
            Some(last) if entry.starts_with("decode") && !waits => {
                text[..last].replace(WAIT, "") + &text[last..]
            }
            _ => text.to_owned(),
        }
    });
    if !context.device().launches_dependently() {
        eprintln!("SKIPPED: {} launches no kernel before the one before it has ended", context.device());
        return None;
    }
    Some((context, altered))
}

#[test]
fn fresh_keys_are_waited_for() {
    let Some((context, altered)) = slow(true) else { return };
    let plain = cuda::context().unwrap();
    if let Ok(line) = std::env::var("PAGEWISE_CASE") {
        let case: Case = line.parse().expect("PAGEWISE_CASE is a case of the conformance suite");
        let step = Step::new(case);
        assert!(step.chain(&context) == step.expected(&plain), "other bits behind write_kv");
        return;
    }
    for line in CASES {
        let turns = run_cases(10).min(100);
        for turn in 0..turns {
            let seed = run_seed() % 1_000_000_000 + turn as u64;
            let step = Step::new(Case { seed, ..line.parse().unwrap() });
            let (expected, found) = (step.expected(&plain), step.chain(&context));
            assert!(found == expected, "PAGEWISE_CASE=\"{}\": other bits behind write_kv", step.data.case);
        }
    }
    assert!(altered.load(Ordering::Relaxed) > 0, "no write_kv was slow");
    eprintln!("{}: {} cases agree behind a slow write_kv", context.device(), CASES.len());
}

/// What the test above would say of a kernel that reads fresh keys too early.
#[test]
fn a_decode_that_does_not_wait_is_found_out() {
    let Some((context, _)) = slow(false) else { return };
    let plain = cuda::context().unwrap();
    for line in CASES {
        let step = Step::new(line.parse().unwrap());
        assert!(step.chain(&context) != step.expected(&plain), "{line}: nobody noticed");
    }
}
