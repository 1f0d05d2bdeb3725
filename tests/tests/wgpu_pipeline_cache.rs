//! Pipelines from a stored cache compute what freshly compiled ones do, and damaged caches do no harm; on every adapter
//! that keeps any.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub, reason = "a test")]

#[path = "gpu/wgpu_contexts.rs"]
mod wgpu_contexts;

use std::io::Write as _;

use pagewise_attention::conformance::{Case, Outcome, Wgpu, run_case};
use pagewise_attention::wgpu::wgpu::Features;
use pagewise_attention::wgpu::{self as backend, AdapterReport, Context};

/// One case for each family of kernels, small ones.
const CASES: [&str; 4] = [
    "attention q=f16 kv=f16 heads=2/1 dim=16 block=16 mask=causal sequences=1:40,1:7 seed=1",
    "attention q=f32 kv=f16 heads=2/1 dim=16 block=16 mask=causal sequences=20:40 seed=2",
    "write_kv q=f32 kv=bf16 heads=2/2 dim=16 block=16 sequences=5:5 seed=3",
    "merge_states q=f32 kv=f32 heads=2/2 dim=16 block=16 sequences=3:3 seed=4",
];

fn context(report: &AdapterReport, data: Option<&[u8]>) -> Context {
    let (device, queue) = pollster::block_on(backend::open(report.index)).unwrap();
    // SAFETY: a context's data, or such that were damaged, which are left out.
    unsafe { Context::with_pipeline_cache(device, queue, data) }.unwrap()
}

/// Runs the cases; how far each is from the oracle, to the last bit.
fn outcomes(context: &Context) -> Vec<(String, u64)> {
    let mut subject = Wgpu::new("cache", context);
    let run = |line: &&str| {
        let case: Case = line.parse().expect("a case's line");
        match run_case(&mut subject, &case).outcome {
            Outcome::Passed(agreement) => ((*line).to_owned(), agreement.worst.to_bits()),
            other => panic!("{line}: {other:?}"),
        }
    };
    CASES.iter().map(run).collect()
}

#[test]
fn pipelines_come_back_from_a_stored_cache() {
    let reports = pollster::block_on(backend::adapters());
    let mut tried = 0;
    for report in reports.iter().filter(|report| report.features.contains(Features::PIPELINE_CACHE)) {
        let first = context(report, None);
        let empty = first.pipeline_cache_data().expect("the device has the feature").len();
        let expected = outcomes(&first);
        let data = first.pipeline_cache_data().unwrap();
        // Some drivers, Mesa 22's software one among them, have a cache that keeps nothing.
        let keeps = data.len() > empty;

        let second = context(report, Some(&data));
        let taken = second.pipeline_cache_data().unwrap().len();
        assert_eq!(
            taken > empty,
            keeps,
            "{report}: the data are in the second cache before anything is compiled"
        );
        assert_eq!(outcomes(&second), expected, "{report}");

        let middle = data.len() / 2;
        let mut flipped = data.clone();
        flipped[middle] ^= 0x10;
        let of_another = [&data[..], b"more"].concat();
        for damaged in [&flipped[..], &data[..middle], &of_another, &data[..0], b"no cache at all"] {
            let third = context(report, Some(damaged));
            assert_eq!(third.pipeline_cache_data().unwrap().len(), empty, "{report}: nothing of it is taken");
            assert_eq!(outcomes(&third), expected, "{report}");
        }
        eprintln!("{report}: {} bytes, {empty} of them when empty; damaged data are left out", data.len());
        tried += 1;
    }
    if tried == 0 {
        let _ = writeln!(std::io::stderr(), "SKIPPED: no adapter keeps pipeline caches");
    }
}

#[test]
fn devices_without_the_feature_have_no_data_and_take_any() {
    for (adapter, plain) in wgpu_contexts::plain_contexts() {
        assert_eq!(plain.pipeline_cache_data(), None, "{adapter}");
    }
}
