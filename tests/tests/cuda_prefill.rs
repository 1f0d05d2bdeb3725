//! Prefill, chunked prefill and mixtures on an NVIDIA GPU against the conformance suite's oracle. Skipped, loudly,
//! without one.
//!
//! One case again: `PAGEWISE_CASE="attention q=bf16 …" cargo test -p pagewise-tests --test cuda_prefill`.
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
use cuda_subject::bytes;
use cudarc::driver::DevicePtr;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use pagewise_attention::conformance::{
    AttentionData, Buffer, Case, CaseMask, Cuda, Layout, Operation, Outcome, Rows, ScaleKind, SequenceShape,
    Subject, Tables, quick, run_case,
};
use pagewise_attention::cuda::ptx::all_kernels;
use pagewise_attention::cuda::ptx::prefill::Form;
use pagewise_attention::cuda::{
    AttentionCall, AttentionOptions, AttentionPlan, AttentionWorkspace, Context, cudarc,
};
use pagewise_attention::{BlockTables, DType};
use random::{Random, run_cases, run_seed};

/// The forms that this GPU can run.
fn forms(context: &Context) -> Vec<Form> {
    let major = context.device().compute_capability.major;
    Form::ALL.into_iter().filter(|form| form.runs_on(major)).collect()
}

/// A random case of what the prefill kernels take: `turn` walks through types, rooms for heads and forms.
fn prefill_case(random: &mut Random, turn: usize, form: Form) -> Case {
    let dtype = [DType::Bf16, DType::F16][turn % 2];
    let hopper = form == Form::Hopper;
    let room = [64, 128, 256][turn / 2 % if hopper { 2 } else { 3 }];
    // Only the forms by mma.sync read fp8.
    let kv_dtype = if hopper { dtype } else { [dtype, DType::F8E4M3, DType::F8E5M2][turn / 6 % 3] };
    // 16 bytes, to which rows of the cache are aligned.
    let multiple = 16 / kv_dtype.size();
    let dim = |random: &mut Random| match random.below(3) {
        0 => (room / 2 + multiple + multiple * random.below(room / 2 / multiple)).min(room),
        _ => room,
    };
    let head_dim_qk = dim(random);
    let head_dim_v = match random.below(6) {
        0 => multiple * (1 + random.below(head_dim_qk / multiple)),
        _ => head_dim_qk,
    };
    let kv_heads = random.pick(&[1, 2, 2, 3, 4]);
    let sequences = (0..1 + random.below(4))
        .map(|_| {
            let queries = match random.below(6) {
                0 => random.below(3),
                1 => random.below(400),
                _ => random.below(70),
            };
            let before = match random.below(6) {
                0 => 0,
                1 => random.below(2000),
                _ => random.below(300),
            };
            // Sometimes more queries than keys: the first rows see nothing.
            let keys = if random.one_in(12) { random.below(queries + 1) } else { queries + before };
            SequenceShape { queries, keys }
        })
        .collect();
    let layouts = [Layout::Nhd, Layout::Nhd, Layout::Hnd, Layout::Gaps, Layout::Interleaved, Layout::Shared];
    let sizes: &[usize] =
        if hopper { &[16, 16, 32, 64, 128, 256] } else { &[16, 16, 32, 64, 128, 256, 1, 2, 4, 8] };
    Case {
        operation: Operation::Attention,
        q_dtype: dtype,
        kv_dtype,
        q_heads: kv_heads * random.pick(&[1, 1, 2, 3, 4, 4, 5, 7, 8, 20]),
        kv_heads,
        head_dim_qk,
        head_dim_v,
        block_size: random.pick(sizes),
        layout: random.pick(&layouts),
        rows: random.pick(&[Rows::Packed, Rows::Fused]),
        tables: random.pick(&[Tables::Padded, Tables::Csr]),
        // Nothing of Hopper's own knows bits: those rows would go one by one.
        mask: match random.below(if hopper { 6 } else { 10 }) {
            // Every variant with bits comes up in 72 turns, and every one without.
            _ if !hopper && turn / 18 % 2 == 1 => CaseMask::Bits,
            0 => CaseMask::None,
            1 | 2 => CaseMask::Window(1 + random.below(300)),
            3..6 => CaseMask::Causal,
            _ => CaseMask::Bits,
        },
        positions: random.one_in(6),
        shared_prefix: random.one_in(4),
        poison_unseen: random.one_in(2),
        softcap: random.one_in(5).then(|| random.pick(&[2.0, 30.0, 50.0])),
        alibi: random.one_in(5),
        sinks: random.one_in(5),
        scale: match kv_dtype.is_fp8() {
            true => random.pick(&[ScaleKind::One, ScaleKind::Tensor, ScaleKind::Head]),
            false => ScaleKind::One,
        },
        scores: random.pick(&[0.5, 8.0, 8.0, 60.0, 1e5]),
        sequences,
        seed: random.next() % 1_000_000_000,
        ..Case::default()
    }
}

#[test]
fn random_cases_agree_with_the_oracle() {
    let Some(context) = cuda::context() else { return };
    let forms = forms(&context);
    let mut subject = cuda_subject::subject(&context);
    let mut receipts = Receipts::default();
    let kernels = all_kernels().unwrap();
    let mut check = |subject: &mut Cuda<'_>, case: &Case| {
        subject.variants.clear();
        let options = subject.options;
        match run_case(subject, case).outcome {
            Outcome::Passed(agreement) => {
                let ran = |kernel: &&pagewise_attention::cuda::ptx::Kernel| {
                    subject.variants.iter().any(|variant| variant == kernel.entry())
                };
                for kernel in
                    kernels.iter().filter(ran).filter(|kernel| kernel.family().starts_with("prefill"))
                {
                    receipts.passed(&context, kernel, agreement.worst);
                }
                true
            }
            Outcome::Skipped(_) => false,
            Outcome::Failed(reason) => panic!("PAGEWISE_CASE=\"{case}\" with {options:?}: {reason}"),
        }
    };
    if let Ok(line) = std::env::var("PAGEWISE_CASE") {
        let case = line.parse().expect("PAGEWISE_CASE is a case of the conformance suite");
        for form in forms.into_iter().map(Some).chain([None]) {
            for prefill_keys in [None, Some(64)] {
                subject.options = AttentionOptions {
                    form,
                    prefill_keys,
                    tiles_from: Some(1),
                    ..AttentionOptions::default()
                };
                assert!(check(&mut subject, &case), "the CUDA backend does not take this case");
            }
        }
        return;
    }
    let mut random = Random::new(run_seed());
    let (mut ran, mut skipped) = (0, 0);
    for form in forms {
        for turn in 0..run_cases(if form == Form::Hopper { 72 } else { 144 }) {
            let case = prefill_case(&mut random, turn, form);
            let tiles = random.pick(&[1, 1, 2, 8, 64]);
            subject.options = AttentionOptions {
                form: Some(form),
                prefill_keys: random.one_in(2).then_some(32 * tiles),
                tiles_from: random.one_in(2).then_some(1),
                ..AttentionOptions::default()
            };
            match check(&mut subject, &case) {
                true => ran += 1,
                false => skipped += 1,
            }
        }
    }
    // What of the suite's own table this backend takes, chosen as it is by default.
    subject.options = AttentionOptions::default();
    for case in quick(random.next()) {
        match check(&mut subject, &case) {
            true => ran += 1,
            false => skipped += 1,
        }
    }
    eprintln!("{}: {ran} cases agree, {skipped} not taken", context.device());
    assert!(run_cases(72) < 20 || ran > skipped, "most cases run");
    receipts.write("prefill");
}

#[test]
fn long_prompts_chunks_and_mixtures_agree_with_the_oracle() {
    let Some(context) = cuda::context() else { return };
    if std::env::var_os("PAGEWISE_SMALL").is_some() {
        return;
    }
    let mut subject = cuda_subject::subject(&context);
    for line in [
        "attention q=bf16 kv=bf16 heads=8/2 dim=128 block=16 mask=causal sequences=1300:1300",
        "attention q=bf16 kv=bf16 heads=4/1 dim=128 block=16 mask=causal layout=hnd sequences=40:9000",
        "attention q=f16 kv=f16 heads=8/8 dim=64 block=32 mask=causal sequences=300:2500,70:70",
        "attention q=bf16 kv=bf16 heads=8/2 dim=128 block=16 mask=causal sequences=12*1:700,300:300,1:20,64:1000",
        "attention q=bf16 kv=bf16 heads=2/1 dim=128 block=16 mask=window:500 sequences=900:1500",
        "attention q=bf16 kv=bf16 heads=4/1 dim=128 block=16 mask=bits poison_unseen sequences=700:1500,64:4000,300:300",
        "attention q=f16 kv=f16 heads=8/1 dim=256 block=32 mask=bits poison_unseen sequences=200:2500",
        "attention q=bf16 kv=fp8_e4m3 heads=8/2 dim=128 block=16 mask=causal scale=head sequences=1300:1300,40:5000",
        "attention q=f16 kv=fp8_e5m2 heads=8/2 dim=128 block=16 mask=causal scale=tensor sequences=12*1:700,300:300",
    ] {
        for form in forms(&context).into_iter().map(Some).chain([None]) {
            subject.options = AttentionOptions { form, ..AttentionOptions::default() };
            let case = Case { seed: run_seed() % 1_000_000_000, ..line.parse().unwrap() };
            let outcome = run_case(&mut subject, &case).outcome;
            let passed = matches!(outcome, Outcome::Passed(_));
            assert!(passed, "PAGEWISE_CASE=\"{case}\", {form:?}: {outcome:?}");
        }
    }
}

fn run(subject: &mut Cuda<'_>, data: &AttentionData) -> Buffer {
    let mut out = data.poisoned_out();
    subject.attention(&data.task().unwrap(), out.as_mut(), None).unwrap();
    out
}

#[test]
fn with_a_fixed_split_a_row_does_not_depend_on_its_batch() {
    let Some(context) = cuda::context() else { return };
    let mut subject = cuda_subject::subject(&context);
    for form in forms(&context) {
        subject.options = AttentionOptions {
            form: Some(form),
            prefill_keys: Some(256),
            tiles_from: Some(1),
            ..AttentionOptions::default()
        };
        let batch: Case =
            "attention q=bf16 kv=bf16 heads=8/2 dim=128 block=16 mask=causal sequences=50:700,3:90,40:1500"
                .parse()
                .unwrap();
        let data = AttentionData::generate(&Case { seed: 5, ..batch });
        let together = bytes(run(&mut subject, &data).as_ref());
        // The first sequence alone, on the same data.
        let mut alone = data.clone();
        alone.query_start.truncate(2);
        alone.seq_lens.truncate(1);
        alone.entries.truncate(alone.max_blocks);
        let first = bytes(run(&mut subject, &alone).as_ref());
        let rows = 50 * data.out_strides.token as usize * 2;
        assert!(together[..rows] == first[..rows], "a row differs alone ({form:?})");
    }
}

/// A graph of a mixture, split tiles and their merge included, captured once and replayed on one stream while another
/// works: the same bits every time.
#[test]
fn replays_give_the_same_bits_every_time() {
    let Some(context) = cuda::context() else { return };
    let engine = context.cudarc().unwrap();
    // SAFETY: buffers of one stream are never used on the other.
    unsafe { engine.disable_event_tracking() };
    let line = "attention q=bf16 kv=bf16 heads=16/4 dim=128 block=16 mask=causal sequences=1:300,200:900,40:3000,3*1:511";
    for form in forms(&context) {
        let options =
            AttentionOptions { form: Some(form), prefill_keys: Some(512), ..AttentionOptions::default() };
        let threads: Vec<_> = (0..2)
            .map(|seed| {
                let data = AttentionData::generate(&Case { seed, ..line.parse().unwrap() });
                let mut subject = cuda_subject::subject(&context);
                subject.options = options;
                let expected = bytes(run(&mut subject, &data).as_ref());
                assert_eq!(subject.variants.len(), 3, "decode, prefill and merge");
                (data, expected)
            })
            .collect();
        std::thread::scope(|scope| {
            for (data, expected) in &threads {
                scope.spawn(|| replay(&context, data, options, expected));
            }
        });
    }
}

fn replay(context: &Context, data: &AttentionData, options: AttentionOptions, expected: &[u8]) {
    let engine = context.cudarc().unwrap();
    engine.bind_to_thread().unwrap();
    let stream = engine.new_stream().unwrap();
    let problem = data.problem().unwrap();
    let plan = AttentionPlan::new(&problem, context.device(), options).unwrap();
    let BlockTables::Padded { entries, .. } = problem.batch().block_tables else { unreachable!() };
    let upload = |bytes: &[u8]| stream.clone_htod(bytes).unwrap();
    let q = upload(&bytes(data.q.as_ref()));
    let k = upload(&bytes(data.k_view()));
    let v = upload(&bytes(data.v_view()));
    let tables = stream.clone_htod(entries).unwrap();
    let mut workspace = AttentionWorkspace::of(&stream, &plan).unwrap();
    workspace.upload_attention(&stream, &plan).unwrap();
    let mut out = upload(&vec![0xff; expected.len()]);
    let call = AttentionCall {
        q: q.device_ptr(&stream).0,
        k_cache: k.device_ptr(&stream).0,
        v_cache: v.device_ptr(&stream).0,
        tables: tables.device_ptr(&stream).0,
        out: out.device_ptr(&stream).0,
        ..workspace.addresses(&stream)
    };
    context.prepare(&plan).unwrap();
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    // SAFETY: all addresses are those of live slices that hold what the plan reaches.
    unsafe { context.attention_raw(&plan, &call, stream.cu_stream().into()) }.unwrap();
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags).unwrap().unwrap();
    for turn in 0..run_cases(50).min(50) {
        stream.memcpy_htod(&vec![0xff; expected.len()], &mut out).unwrap();
        graph.launch().unwrap();
        assert!(stream.clone_dtoh(&out).unwrap() == expected, "replay {turn} differs");
    }
}
