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
#[path = "gpu/decode_cases.rs"]
mod decode_cases;
#[path = "gpu/random.rs"]
mod random;

use cuda::Receipts;
use cuda_subject::{by_rows, bytes, subject};
use cudarc::driver::CudaSlice;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use decode_cases::{decode_case, random_options};
use pagewise_attention::conformance::{
    AttentionData, Buffer, Case, Cuda, Outcome, Refusal, SequenceShape, Subject, quick, run_case,
};
use pagewise_attention::cuda::ptx::all_kernels;
use pagewise_attention::cuda::{
    AttentionCall, AttentionSlices, AttentionWorkspace, CudaError, DecodePlan, PlanOptions, StepLimits,
    cudarc,
};
use pagewise_attention::{BlockTables, HostTensorMut};
use random::{Random, run_cases, run_seed};

/// Keys of a random case's longest sequence.
const LONGEST: usize = 4000;

#[test]
fn random_cases_agree_with_the_oracle() {
    let Some(context) = cuda::context() else { return };
    let mut subject = subject(&context);
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
    for turn in 0..run_cases(252) {
        let case = decode_case(&mut random, turn, LONGEST);
        subject.options = by_rows(random_options(&mut random, &case, context.device()));
        match check(&mut subject, &case) {
            true => ran += 1,
            false => skipped += 1,
        }
    }
    subject.options = by_rows(PlanOptions::default());
    // What of the suite's own table this backend takes.
    for case in quick(random.next()) {
        match check(&mut subject, &case) {
            true => ran += 1,
            false => skipped += 1,
        }
    }
    eprintln!("{}: {ran} cases agree, {skipped} not taken", context.device());
    assert!(run_cases(252) < 20 || ran > skipped, "most cases run");
    receipts.write("decode");
}

#[test]
fn long_sequences_and_many_splits_agree_with_the_oracle() {
    let Some(context) = cuda::context() else { return };
    if std::env::var_os("PAGEWISE_SMALL").is_some() {
        return;
    }
    let mut subject = subject(&context);
    for (line, item_keys) in [
        ("attention q=bf16 kv=bf16 heads=8/1 dim=128 block=16 mask=causal sequences=1:40000", None),
        (
            "attention q=bf16 kv=bf16 heads=4/1 dim=128 block=16 mask=causal layout=hnd sequences=1:20000",
            Some(16),
        ),
        ("attention q=f16 kv=f16 heads=32/8 dim=128 block=16 mask=causal sequences=20*1:300,3*1:2000", None),
        ("attention q=bf16 kv=bf16 heads=8/8 dim=64 block=256 mask=causal sequences=1:9000,1:1", Some(2048)),
    ] {
        subject.options = by_rows(PlanOptions { item_keys, ..PlanOptions::default() });
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
    let mut subject = subject(&context);
    subject.options = by_rows(PlanOptions { item_keys: Some(128), ..PlanOptions::default() });
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
            let expected = bytes(run(&mut subject(&context), &data).unwrap().as_ref());
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
    let sizes = plan.workspace();
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
        Cuda { stream: stream.clone(), options: by_rows(PlanOptions::default()), ..subject(context) };
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

/// A graph captured for the largest step, replayed for steps of other lengths and of fewer sequences: plan, lengths
/// and tables change at fixed addresses.
#[test]
fn one_graph_serves_steps_of_changing_lengths() {
    let Some(context) = cuda::context() else { return };
    let engine = context.cudarc().unwrap();
    engine.bind_to_thread().unwrap();
    let stream = engine.new_stream().unwrap();
    let subject =
        Cuda { stream: stream.clone(), options: by_rows(PlanOptions::default()), ..subject(&context) };
    let line = "attention q=bf16 kv=bf16 heads=16/4 dim=128 block=16 mask=causal";
    let (rows, longest) = (6, 3000);
    let case = |lens: &[usize], seed| -> Case {
        let sequences = lens.iter().map(|&keys| SequenceShape { queries: 1, keys }).collect();
        Case { sequences, seed, ..line.parse().unwrap() }
    };
    let largest = AttentionData::generate(&case(&[longest; 6], 1));
    let limits = StepLimits { rows, keys: rows * longest };
    let bound = DecodePlan::bound(&largest.config, context.device(), limits, PlanOptions::default()).unwrap();
    let options = PlanOptions { grid_items: Some(bound.items), ..PlanOptions::default() };
    let room = |bytes: usize| stream.clone_htod(&vec![0xffu8; bytes.max(16)]).unwrap();
    let cache_bytes = bytes(largest.k_view()).len();
    // Tables of a step may be padded with wild entries.
    let table_bytes = 16 * rows * longest.div_ceil(16);
    let row_bytes = bytes(largest.q.as_ref()).len();
    let mut q = room(row_bytes);
    let (mut k, mut v) = (room(cache_bytes), room(cache_bytes));
    let mut tables = room(table_bytes);
    let mut work = room(bound.work as usize);
    let mut out = room(row_bytes);
    let partial_out = room(bound.workspace.partial_out as usize);
    let partial_max = room(bound.workspace.partial_max as usize);
    let tickets = stream.clone_htod(&vec![0u8; bound.workspace.tickets as usize]).unwrap();
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
    let plan = DecodePlan::new(&largest.problem().unwrap(), context.device(), options).unwrap();
    context.prepare_decode(&plan).unwrap();
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    // SAFETY: the slices live until the last replay has completed, and are as large as the largest step asks.
    unsafe { context.decode_raw(&plan, &call, stream.cu_stream().into()) }.unwrap();
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags).unwrap().unwrap();

    let mut random = Random::new(run_seed());
    for turn in 0..run_cases(20).min(60) {
        let lens: Vec<usize> = (0..1 + random.below(rows)).map(|_| random.below(longest + 1)).collect();
        // The layout of every step is that of the largest: strides are the graph's.
        let data = AttentionData::generate(&case(&lens, turn as u64));
        let problem = data.problem().unwrap();
        let plan = DecodePlan::new(&problem, context.device(), options).unwrap();
        let BlockTables::Padded { entries, .. } = problem.batch().block_tables else { unreachable!() };
        let entries: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        let words: Vec<u8> = plan.work().iter().flat_map(|word| word.to_le_bytes()).collect();
        let put = |target: &mut CudaSlice<u8>, bytes: &[u8]| {
            stream.memcpy_htod(bytes, &mut target.slice_mut(..bytes.len())).unwrap();
        };
        put(&mut q, &bytes(data.q.as_ref()));
        put(&mut k, &bytes(data.k_view()));
        put(&mut v, &bytes(data.v_view()));
        put(&mut tables, &entries);
        put(&mut work, &words);
        put(&mut out, &vec![0xff; row_bytes]);
        graph.launch().unwrap();
        let found = stream.clone_dtoh(&out).unwrap();
        let mut expecting = cuda_subject::subject(&context);
        expecting.options = by_rows(options);
        let expected = bytes(run(&mut expecting, &data).unwrap().as_ref());
        assert!(found.starts_with(&expected), "step {turn} with {lens:?} gave other bits");
        assert!(found[expected.len()..].iter().all(|&byte| byte == 0xff), "step {turn} wrote past its rows");
    }
}

/// The cudarc API gives the raw one's bits, and refuses buffers that are too short or of another type.
#[test]
fn slices_are_checked_and_give_the_same_bits() {
    let Some(context) = cuda::context() else { return };
    let stream = context.cudarc().unwrap().default_stream();
    let line = "attention q=bf16 kv=bf16 heads=16/4 dim=128 block=16 mask=causal alibi sequences=1:3000,2:64";
    let case = Case { seed: run_seed() % 1_000_000_000, ..line.parse().unwrap() };
    let data = AttentionData::generate(&case);
    let problem = data.problem().unwrap();
    let plan = DecodePlan::new(&problem, context.device(), PlanOptions::default()).unwrap();
    let limits = StepLimits { rows: 8, keys: 8 * 3000 };
    let bound = DecodePlan::bound(&data.config, context.device(), limits, PlanOptions::default()).unwrap();
    let mut workspace = AttentionWorkspace::new(&stream, &bound).unwrap();
    workspace.upload(&stream, &plan).unwrap();
    let BlockTables::Padded { entries, .. } = problem.batch().block_tables else { unreachable!() };
    let numbers = |bytes: Vec<u8>| -> Vec<half::bf16> {
        bytes.as_chunks().0.iter().map(|pair| half::bf16::from_le_bytes(*pair)).collect()
    };
    let q = stream.clone_htod(&numbers(bytes(data.q.as_ref()))).unwrap();
    let k = stream.clone_htod(&numbers(bytes(data.k_view()))).unwrap();
    let v = stream.clone_htod(&numbers(bytes(data.v_view()))).unwrap();
    let tables = stream.clone_htod(entries).unwrap();
    let slopes = stream.clone_htod(data.alibi_slopes.as_deref().unwrap()).unwrap();
    let mut out = stream.clone_htod(&vec![half::bf16::NAN; q.len()]).unwrap();
    let mut decode = |q, alibi_slopes| {
        let args = AttentionSlices {
            q,
            k_cache: k.as_view(),
            v_cache: v.as_view(),
            tables: tables.as_view(),
            out: &mut out.as_view_mut(),
            lse: None,
            scales: None,
            alibi_slopes,
            sinks: None,
            mask_bits: None,
        };
        // SAFETY: tables and workspace are those of the plan, on one stream.
        unsafe { context.decode(&stream, &plan, &mut workspace, args) }
    };
    let short = decode(q.slice(1..), Some(slopes.as_view())).unwrap_err().to_string();
    assert!(short.contains('q'), "{short}");
    assert!(matches!(decode(q.as_view(), None), Err(CudaError::Missing { .. })));
    decode(q.as_view(), Some(slopes.as_view())).unwrap();
    let found: Vec<u8> =
        stream.clone_dtoh(&out).unwrap().iter().flat_map(|value| value.to_le_bytes()).collect();
    assert!(found == bytes(run(&mut subject(&context), &data).unwrap().as_ref()));
}

#[test]
fn what_the_kernel_does_not_do_is_a_typed_refusal() {
    let Some(context) = cuda::context() else { return };
    let mut subject = subject(&context);
    for line in [
        "attention q=bf16 kv=f16 heads=8/2 dim=128 block=16 mask=causal sequences=1:90",
        "attention q=f32 kv=bf16 heads=8/2 dim=128 block=16 mask=causal sequences=1:90",
        "attention q=bf16 kv=bf16 heads=8/2 dim=100 block=16 mask=causal sequences=1:90",
        "attention q=f32 kv=f32 heads=8/2 dim=66 block=16 mask=causal sequences=1:90",
        "attention q=bf16 kv=fp8_e4m3 heads=8/1 dim=72 block=16 mask=causal sequences=1:90",
    ] {
        let data = AttentionData::generate(&line.parse().unwrap());
        let mut out = data.poisoned_out();
        let refused =
            subject.attention(&data.task().unwrap(), HostTensorMut::reborrow(&mut out.as_mut()), None);
        assert!(matches!(refused, Err(Refusal::Unsupported(_))), "{line}: {refused:?}");
    }
}
