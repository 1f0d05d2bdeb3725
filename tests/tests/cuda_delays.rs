//! Decode under delays of random length before its merge tickets: the same bits in whichever order thread blocks
//! finish, and tickets that come out reset. Skipped, loudly, without an NVIDIA GPU.
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
#[path = "gpu/delays.rs"]
mod delays;
#[path = "gpu/random.rs"]
mod random;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use cuda_subject::by_rows;
use pagewise_attention::conformance::Cuda;
use pagewise_attention::conformance::{AttentionData, Buffer, Case, Outcome, Subject, run_case};
use pagewise_attention::cuda::PlanOptions;
use random::{run_cases, run_seed};

/// Many splits: of one row, of rows of many lengths, of more than one merge level.
const CASES: &[(&str, u32)] = &[
    ("attention q=bf16 kv=bf16 heads=8/2 dim=128 block=16 mask=causal sequences=1:2000", 32),
    (
        "attention q=bf16 kv=bf16 heads=16/2 dim=128 block=16 mask=causal layout=hnd sequences=1:700,1:31,1:90,1:1200",
        64,
    ),
    ("attention q=f16 kv=f16 heads=4/4 dim=64 block=32 mask=window:900 sequences=1:3000,0:9,1:400", 16),
];

#[test]
fn the_order_in_which_thread_blocks_finish_does_not_matter() {
    let Some(context) = cuda::context() else { return };
    let delayed = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&delayed);
    let context = context.with_altered_kernels(move |_, text| {
        let (text, count) = delays::with_delays(text);
        counted.fetch_add(count, Ordering::Relaxed);
        text
    });
    let mut subject = cuda_subject::subject(&context);
    let turns = run_cases(60);
    for &(line, item_keys) in CASES {
        subject.options = by_rows(PlanOptions { item_keys: Some(item_keys), ..PlanOptions::default() });
        let case = Case { seed: run_seed() % 1_000_000_000, ..line.parse().unwrap() };
        let outcome = run_case(&mut subject, &case).outcome;
        assert!(matches!(outcome, Outcome::Passed(_)), "PAGEWISE_CASE=\"{case}\": {outcome:?}");
        assert!(delayed.load(Ordering::Relaxed) > 0, "no line of the kernel is marked {}", delays::MARK);
        let data = AttentionData::generate(&case);
        let run = |subject: &mut Cuda<'_>| -> Buffer {
            let mut out = data.poisoned_out();
            // This also sees that every ticket is zero again.
            subject.attention(&data.task().unwrap(), out.as_mut(), None).unwrap();
            out
        };
        let first = run(&mut subject);
        for turn in 0..turns {
            let again = run(&mut subject);
            let same = (0..first.len()).all(|i| first.bits(i) == again.bits(i));
            assert!(same, "PAGEWISE_CASE=\"{case}\": run {turn} gave other bits");
        }
    }
    eprintln!("{}: {} cases agree under delays, {turns} times each", context.device(), CASES.len());
}

#[test]
fn a_delay_stands_before_each_marked_line() {
    let text = "    mov.u32 %r_x, 1;\n    atom.inc.u32 %r_x, [%rd_x], %r_y; // ticket\n    ret;\n";
    let (delayed, count) = delays::with_delays(text);
    assert_eq!(count, 1);
    let before = delayed.find("nanosleep").unwrap();
    assert!(before < delayed.find("atom.inc").unwrap() && before > delayed.find("mov.u32 %r_x, 1").unwrap());
    assert_eq!(delays::with_delays("ret; // no tickets here\n").1, 0);
}
