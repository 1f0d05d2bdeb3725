//! Decode that asks for its first keys while kernels before it still write the last ones, and its queries: behind kernels
//! that take their time, the bits of a decode behind nothing. Skipped, loudly, without an NVIDIA GPU of sm_90 or newer.
//!
//! One case again: `PAGEWISE_CASE="attention q=bf16 …" cargo test -p pagewise-tests --test cuda_dependent`; a case of the
//! list below is planned as there.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    unreachable_pub,
    dead_code,
    reason = "a test"
)]

#[path = "gpu/chain.rs"]
mod chain;
#[path = "gpu/cuda.rs"]
mod cuda;
#[path = "gpu/cuda_subject.rs"]
mod cuda_subject;
#[path = "gpu/faults/mod.rs"]
mod faults;
#[path = "gpu/fresh.rs"]
mod fresh;
#[path = "gpu/random.rs"]
mod random;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use chain::{Late, Step, by_rows, dependent, listed};
use cuda_subject::subject;
use pagewise_attention::conformance::{Case, Subject};
use pagewise_attention::cuda::{Context, Order, PlanOptions};
use random::{run_cases, run_seed};

const WAIT: &str = "griddepcontrol.wait;";

/// Decodes of several lengths, and as many fresh keys as a dependent launch allows; types, rooms for a head, block sizes
/// below a tile's and the masks that move where a row's keys begin and end; rows that end at all places of a tile, whole
/// ones; bits; items without work, and rows without keys; several KV heads to a thread block.
const CASES: &[(&str, PlanOptions)] = &[
    (
        "attention q=bf16 kv=bf16 heads=16/4 dim=128 block=16 mask=causal sequences=1:3000,16:700,4:90,1:5,1:1",
        dependent(None, None, None),
    ),
    (
        "attention q=bf16 kv=bf16 heads=8/8 dim=64 block=4 mask=causal layout=hnd sequences=16:257,1:2048,9:100",
        dependent(None, None, None),
    ),
    (
        "attention q=f16 kv=f16 heads=8/1 dim=256 block=32 mask=window:200 sequences=1:1500,16:600,2:31",
        dependent(None, None, None),
    ),
    (
        "attention q=f32 kv=f32 heads=4/2 dim=128 block=16 mask=none sequences=16:900,1:333,3:48",
        dependent(None, None, None),
    ),
    (
        "attention q=bf16 kv=bf16 heads=4/1 dim=128 block=16 mask=causal sequences=16:79,16:240,1:200",
        dependent(Some(4096), Some(1), None),
    ),
    (
        "attention q=bf16 kv=bf16 heads=8/2 dim=128 block=16 mask=bits poison_unseen sequences=1:1500,16:79,5:700",
        dependent(None, None, None),
    ),
    // Items with work for at most 116 thread blocks, so that all of them are there before those without.
    (
        "attention q=bf16 kv=bf16 heads=16/4 dim=128 block=16 mask=causal sequences=1:700,16:60,1:0,1:31",
        dependent(Some(64), None, Some(2000)),
    ),
    (
        "attention q=bf16 kv=bf16 heads=16/8 dim=128 block=16 mask=causal sequences=1:2000,16:127",
        dependent(None, Some(8), None),
    ),
    (
        "attention q=f16 kv=f16 heads=8/4 dim=64 block=16 mask=bits layout=hnd sequences=1:700,16:300",
        dependent(None, Some(4), Some(1000)),
    ),
];

/// What an ordinary launch gives on the whole cache.
fn expected(step: &Step, context: &Context, options: PlanOptions) -> Vec<u8> {
    let mut subject = subject(context);
    subject.options = by_rows(PlanOptions { order: Order::Stream, ..options });
    let mut out = step.data.poisoned_out();
    subject.attention(&step.data.task().unwrap(), out.as_mut(), None).unwrap();
    out.as_ref().to_bytes()
}

/// Keys and values written by one dependent launch, queries by the next, attended to by the third.
fn chain(step: &Step, context: &Context, options: PlanOptions, late: Late) -> Vec<u8> {
    let plan = step.plan(context.device(), options);
    let subject = subject(context);
    // Dependent launches are not for the default stream.
    let stream = context.cudarc().unwrap().new_stream().unwrap();
    let mut slices = Vec::new();
    let launches = step.place(&plan, late, &mut |bytes| {
        let bytes = if bytes.is_empty() { &[0xff; 16] } else { bytes };
        let slice = stream.clone_htod(bytes).unwrap();
        let address = subject.address(&slice);
        slices.push((address, slice));
        address
    });
    let (no_slots, rotary) = &launches.write_queries;
    for writes in [
        context.prepare_write_kv(&launches.write_keys).unwrap(),
        context.prepare_write_kv_rotary(no_slots, rotary).unwrap(),
    ] {
        assert!(writes.spec().dependent, "{} is no dependent variant", writes.name());
    }
    context.prepare(&plan).unwrap();
    let raw = stream.cu_stream().into();
    // SAFETY: the slices live until the stream has been waited for, and are as large as shapes and strides reach.
    unsafe {
        context.write_kv_raw(&launches.write_keys, raw).unwrap();
        context.write_kv_rotary_raw(no_slots, rotary, raw).unwrap();
        context.attention_raw(&plan, &launches.decode, raw).unwrap();
    }
    let read = |address| {
        let (_, slice) = slices.iter().find(|(at, _)| *at == address).unwrap();
        stream.clone_dtoh(slice).unwrap()
    };
    let found = read(launches.decode.out);
    assert!(read(launches.decode.tickets).iter().all(|&byte| byte == 0), "tickets are reset");
    found
}

/// A context whose kernels that write keys and queries sleep for up to 8 ms before they do, and how many kernels got that;
/// other kernels have the text that `alter` makes of theirs.
fn slow(alter: impl Fn(&str, &str) -> String + Send + Sync + 'static) -> Option<(Context, Arc<AtomicUsize>)> {
    let altered = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&altered);
    let context = cuda::context()?.with_altered_kernels(move |entry, text| {
        if entry.starts_with("write_kv") && text.contains(WAIT) {
            counted.fetch_add(1, Ordering::Relaxed);
            return text.replace(WAIT, &(WAIT.to_owned() + &"\nnanosleep.u32 1000000;".repeat(4)));
        }
        alter(entry, text)
    });
    if !context.device().launches_dependently() {
        eprintln!("SKIPPED: {} launches no kernel before the one before it has ended", context.device());
        return None;
    }
    Some((context, altered))
}

fn unaltered(_: &str, text: &str) -> String {
    text.to_owned()
}

#[test]
fn fresh_keys_and_queries_are_waited_for() {
    let Some((context, altered)) = slow(unaltered) else { return };
    let plain = cuda::context().unwrap();
    if let Ok(line) = std::env::var("PAGEWISE_CASE") {
        let case: Case = line.parse().expect("PAGEWISE_CASE is a case of the conformance suite");
        let options = listed(&case, CASES).unwrap_or(dependent(None, None, None));
        let step = Step::new(&case);
        let (expected, found) =
            (expected(&step, &plain, options), chain(&step, &context, options, Late::BOTH));
        assert!(found == expected, "other bits behind kernels that write");
        return;
    }
    for &(line, options) in CASES {
        let turns = run_cases(10).min(100);
        for turn in 0..turns {
            let seed = run_seed() % 1_000_000_000 + turn as u64;
            let step = Step::new(&Case { seed, ..line.parse().unwrap() });
            let (expected, found) =
                (expected(&step, &plain, options), chain(&step, &context, options, Late::BOTH));
            let case = &step.data.case;
            assert!(
                found == expected,
                "PAGEWISE_CASE=\"{case}\" with {options:?}: other bits behind kernels that write"
            );
        }
    }
    assert!(altered.load(Ordering::Relaxed) > 1, "no kernel that writes was slow");
    eprintln!("{}: {} cases agree behind slow kernels that write", context.device(), CASES.len());
}

/// What the test above would say of a kernel that reads fresh keys, or queries, too early.
#[test]
fn a_decode_that_does_not_wait_is_found_out() {
    // It waits only before it writes itself.
    let hasty = |entry: &str, text: &str| match text.rfind(WAIT) {
        Some(last) if entry.starts_with("decode") => text[..last].replace(WAIT, "") + &text[last..],
        _ => text.to_owned(),
    };
    let Some((context, _)) = slow(hasty) else { return };
    let plain = cuda::context().unwrap();
    for &(line, options) in CASES {
        let step = Step::new(&line.parse().unwrap());
        let expected = expected(&step, &plain, options);
        for late in [Late::KEYS, Late::QUERIES] {
            assert!(chain(&step, &context, options, late) != expected, "{line}, {late:?}: nobody noticed");
        }
    }
}

/// The same faults are planted in the interpreter by `attention_interpreted`.
#[test]
fn planted_faults_are_found() {
    let Some(plain) = cuda::context() else { return };
    let mut survived = Vec::new();
    for fault in faults::DECODE_READS {
        let (alter, planted) = fault.planted();
        let Some((context, _)) = slow(alter) else { return };
        let found = CASES.iter().find(|&&(line, options)| {
            let step = Step::new(&line.parse().unwrap());
            chain(&step, &context, options, Late::BOTH) != expected(&step, &plain, options)
        });
        assert!(planted.load(Ordering::Relaxed) > 0, "{}: no kernel has the line {}", fault.name, fault.line);
        match found {
            Some((line, _)) => eprintln!("found: {} ({}): {line}", fault.name, fault.breaks),
            None => survived.push(format!("{}: {}", fault.name, fault.breaks)),
        }
    }
    assert!(survived.is_empty(), "no case finds: {survived:#?}");
}
