//! Decode attention on an NVIDIA GPU against the conformance suite's oracle. Skipped, loudly, without one.
//!
//! One case again: `PAGEWISE_CASE="attention q=bf16 …" cargo test -p pagewise-tests --test cuda_decode`.
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

use cuda::Receipts;
use cuda_subject::{Cuda, bytes};
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use pagewise_attention::conformance::{
    AttentionData, Buffer, Case, CaseMask, Layout, Operation, Outcome, Refusal, Rows, SequenceShape, Subject,
    quick, run_case,
};
use pagewise_attention::cuda::ptx::all_kernels;
use pagewise_attention::cuda::{DecodeCall, DecodePlan, PlanOptions, cudarc};
use pagewise_attention::{BlockTables, DType, HostTensorMut};
use random::{Random, run_cases, run_seed};

/// A random case of what the kernel takes.
fn decode_case(random: &mut Random) -> Case {
    let dtype = random.pick(&[DType::Bf16, DType::F16]);
    let dim = random.pick(&[64, 128]);
    let kv_heads = 1 + random.below(8);
    let sequences = (0..1 + random.below(10))
        .map(|_| SequenceShape {
            queries: usize::from(!random.one_in(8)),
            keys: match random.below(8) {
                0 => random.below(3),
                1 => 16 * random.below(20),
                2 => random.below(6000),
                _ => random.below(600),
            },
        })
        .collect();
    Case {
        operation: Operation::Attention,
        q_dtype: dtype,
        kv_dtype: dtype,
        q_heads: kv_heads * random.pick(&[1, 2, 3, 4, 5, 7, 8, 9, 16, 20]),
        kv_heads,
        head_dim_qk: dim,
        head_dim_v: dim,
        block_size: random.pick(&[16, 16, 32, 64, 128, 256]),
        layout: random.pick(&[Layout::Nhd, Layout::Hnd, Layout::Interleaved]),
        rows: random.pick(&[Rows::Packed, Rows::Fused]),
        mask: match random.below(4) {
            0 => CaseMask::None,
            1 => CaseMask::Window(1 + random.below(300)),
            _ => CaseMask::Causal,
        },
        shared_prefix: random.one_in(4),
        scores: random.pick(&[0.5, 8.0, 8.0, 60.0, 1e5]),
        sequences,
        seed: random.next() % 1_000_000_000,
        ..Case::default()
    }
}

fn random_options(random: &mut Random) -> PlanOptions {
    let item_keys = random.one_in(2).then(|| 16 * (1 + random.below(128)) as u32);
    PlanOptions { item_keys }
}

#[test]
fn random_cases_agree_with_the_oracle() {
    let Some(context) = cuda::context() else { return };
    let mut subject = Cuda::new(&context);
    let mut receipts = Receipts::default();
    let kernels = all_kernels().unwrap();
    let mut check = |subject: &mut Cuda<'_>, case: &Case| {
        subject.variants.clear();
        let options = subject.options;
        match run_case(subject, case).outcome {
            Outcome::Passed(agreement) => {
                let ran = kernels
                    .iter()
                    .find(|kernel| subject.variants.first().is_some_and(|v| v == kernel.entry()));
                if let Some(kernel) = ran {
                    receipts.passed(&context, kernel, agreement.worst);
                }
                true
            }
            Outcome::Skipped(_) => false,
            Outcome::Failed(reason) => panic!("PAGEWISE_CASE=\"{case}\" with {options:?}: {reason}"),
        }
    };
    if let Ok(line) = std::env::var("PAGEWISE_CASE") {
        let ran =
            check(&mut subject, &line.parse().expect("PAGEWISE_CASE is a case of the conformance suite"));
        assert!(ran, "the CUDA backend does not take this case");
        return;
    }
    let mut random = Random::new(run_seed());
    let (mut ran, mut skipped) = (0, 0);
    for _ in 0..run_cases(150) {
        subject.options = random_options(&mut random);
        match check(&mut subject, &decode_case(&mut random)) {
            true => ran += 1,
            false => skipped += 1,
        }
    }
    subject.options = PlanOptions::default();
    // What of the suite's own table this backend takes: part of decode, and write_kv.
    for case in quick(random.next()) {
        match check(&mut subject, &case) {
            true => ran += 1,
            false => skipped += 1,
        }
    }
    eprintln!("{}: {ran} cases agree, {skipped} not taken", context.device());
    assert!(run_cases(150) < 20 || ran > skipped, "most cases run");
    receipts.write("decode");
}

#[test]
fn long_sequences_and_many_splits_agree_with_the_oracle() {
    let Some(context) = cuda::context() else { return };
    if std::env::var_os("PAGEWISE_SMALL").is_some() {
        return;
    }
    let mut subject = Cuda::new(&context);
    for (line, item_keys) in [
        ("attention q=bf16 kv=bf16 heads=8/1 dim=128 block=16 mask=causal sequences=1:40000", None),
        (
            "attention q=bf16 kv=bf16 heads=4/1 dim=128 block=16 mask=causal layout=hnd sequences=1:20000",
            Some(16),
        ),
        ("attention q=f16 kv=f16 heads=32/8 dim=128 block=16 mask=causal sequences=20*1:300,3*1:2000", None),
        ("attention q=bf16 kv=bf16 heads=8/8 dim=64 block=256 mask=causal sequences=1:9000,1:1", Some(2048)),
    ] {
        subject.options = PlanOptions { item_keys };
        let case = Case { seed: run_seed() % 1_000_000_000, ..line.parse().unwrap() };
        let outcome = run_case(&mut subject, &case).outcome;
        assert!(
            matches!(outcome, Outcome::Passed(_)),
            "PAGEWISE_CASE=\"{case}\", {item_keys:?}: {outcome:?}"
        );
    }
}

fn run(subject: &mut Cuda<'_>, data: &AttentionData) -> Result<Buffer, Refusal> {
    let mut out = data.poisoned_out();
    subject.attention(&data.task().unwrap(), out.as_mut(), None)?;
    Ok(out)
}

#[test]
fn with_a_fixed_split_a_row_does_not_depend_on_its_batch() {
    let Some(context) = cuda::context() else { return };
    let mut subject = Cuda::new(&context);
    subject.options = PlanOptions { item_keys: Some(128) };
    let batch: Case =
        "attention q=bf16 kv=bf16 heads=8/2 dim=128 block=16 mask=causal sequences=1:700,1:90,1:1500"
            .parse()
            .unwrap();
    let data = AttentionData::generate(&Case { seed: 5, ..batch });
    let together = run(&mut subject, &data).unwrap();
    // The first sequence alone, on the same data.
    let mut alone = data.clone();
    alone.query_start.truncate(2);
    alone.seq_lens.truncate(1);
    alone.entries.truncate(alone.max_blocks);
    let first = run(&mut subject, &alone).unwrap();
    assert!((0..first.len()).all(|i| first.bits(i) == together.bits(i)));
}

/// A graph, captured once, replayed many times on one stream while another works: same bits every time, and
/// the tickets come out reset.
#[test]
fn replays_give_the_same_bits_every_time() {
    let Some(context) = cuda::context() else { return };
    let engine = context.cudarc().unwrap();
    // SAFETY: buffers of one stream are never used on the other.
    unsafe { engine.disable_event_tracking() };
    let case: Case =
        "attention q=bf16 kv=bf16 heads=16/4 dim=128 block=16 mask=causal sequences=1:3000,1:64,5*1:511"
            .parse()
            .unwrap();
    let threads: Vec<_> = (0..2)
        .map(|seed| {
            let data = AttentionData::generate(&Case { seed, ..case.clone() });
            let expected = bytes(run(&mut Cuda::new(&context), &data).unwrap().as_ref());
            (data, expected)
        })
        .collect();
    let replays = run_cases(100).min(300);
    std::thread::scope(|scope| {
        for (data, expected) in &threads {
            scope.spawn(|| replay(&context, data, expected, replays));
        }
    });
}

fn replay(
    context: &pagewise_attention::cuda::Context,
    data: &AttentionData,
    expected: &[u8],
    replays: usize,
) {
    let engine = context.cudarc().unwrap();
    engine.bind_to_thread().unwrap();
    let stream = engine.new_stream().unwrap();
    let problem = data.problem().unwrap();
    let plan = DecodePlan::new(&problem, context.device(), PlanOptions::default()).unwrap();
    let sizes = plan.workspace().unwrap();
    let BlockTables::Padded { entries, .. } = problem.batch().block_tables else { unreachable!() };
    let upload = |bytes: &[u8]| stream.clone_htod(bytes).unwrap();
    let q = upload(&bytes(data.q.as_ref()));
    let k = upload(&bytes(data.k_view()));
    let v = upload(&bytes(data.v_view()));
    let tables = stream.clone_htod(entries).unwrap();
    let work = stream.clone_htod(&plan.work()).unwrap();
    let mut out = upload(&vec![0xff; expected.len()]);
    let partial_out = upload(&vec![0xff; sizes.partial_out as usize]);
    let partial_max = upload(&vec![0xff; sizes.partial_max as usize]);
    let tickets = upload(&vec![0; sizes.tickets as usize]);
    let subject =
        Cuda { context, stream: stream.clone(), options: PlanOptions::default(), variants: Vec::new() };
    let call = DecodeCall {
        q: subject.address(&q),
        k_cache: subject.address(&k),
        v_cache: subject.address(&v),
        tables: subject.address(&tables),
        out: subject.address(&out),
        lse: 0,
        work: subject.address(&work),
        partial_out: subject.address(&partial_out),
        partial_max: subject.address(&partial_max),
        tickets: subject.address(&tickets),
    };
    context.prepare_decode(&plan).unwrap();
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    // SAFETY: the slices live until the last replay has completed.
    unsafe { context.decode_raw(&plan, &call, stream.cu_stream().into()) }.unwrap();
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags).unwrap().unwrap();
    for turn in 0..replays {
        stream.memcpy_htod(&vec![0xff; expected.len()], &mut out).unwrap();
        graph.launch().unwrap();
        assert!(stream.clone_dtoh(&out).unwrap() == expected, "replay {turn} gave other bits");
    }
    assert!(stream.clone_dtoh(&tickets).unwrap().iter().all(|&byte| byte == 0));
}

#[test]
fn what_the_kernel_does_not_do_is_a_typed_refusal() {
    let Some(context) = cuda::context() else { return };
    let mut subject = Cuda::new(&context);
    for line in [
        "attention q=bf16 kv=bf16 heads=8/2 dim=128 block=16 mask=causal softcap=30 sequences=1:90",
        "attention q=bf16 kv=bf16 heads=8/2 dim=128 block=16 mask=causal sequences=2:90",
        "attention q=bf16 kv=bf16 heads=8/2 dim=96 block=16 mask=causal sequences=1:90",
        "attention q=f32 kv=f32 heads=8/2 dim=128 block=16 mask=causal sequences=1:90",
        "attention q=bf16 kv=bf16 heads=8/2 dim=128 block=8 mask=causal sequences=1:90",
        "attention q=bf16 kv=bf16 heads=8/2 dim=128 block=16 mask=bits sequences=1:90",
        "attention q=bf16 kv=bf16 heads=8/2 dim=128 block=16 mask=causal tables=csr sequences=1:90",
    ] {
        let data = AttentionData::generate(&line.parse().unwrap());
        let mut out = data.poisoned_out();
        let refused =
            subject.attention(&data.task().unwrap(), HostTensorMut::reborrow(&mut out.as_mut()), None);
        assert!(matches!(refused, Err(Refusal::Unsupported(_))), "{line}: {refused:?}");
    }
}
