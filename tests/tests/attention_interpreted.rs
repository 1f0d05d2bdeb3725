//! Decode and the `mma.sync` forms of prefill, run on the CPU by an interpreter: right on the cases below, and faults planted
//! in them are found. No GPU is needed; what a GPU's own rounding and scheduling add is for `cuda_decode` and
//! `cuda_prefill` to see.
//!
//! One case again: `PAGEWISE_CASE="attention q=bf16 …" cargo test -p pagewise-tests --test attention_interpreted`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    unreachable_pub,
    dead_code,
    reason = "a test"
)]

#[path = "gpu/blocks.rs"]
mod blocks;
#[path = "gpu/decode_cases.rs"]
mod decode_cases;
#[path = "gpu/encode.rs"]
mod encode;
#[path = "gpu/faults/mod.rs"]
mod faults;
#[path = "gpu/interpreted.rs"]
mod interpreted;
#[path = "gpu/interpreter/mod.rs"]
mod interpreter;
#[path = "gpu/machine.rs"]
mod machine;
#[path = "gpu/merge.rs"]
mod merge;
#[path = "gpu/random.rs"]
mod random;
#[path = "gpu/rotary.rs"]
mod rotary;
#[path = "gpu/write_kv.rs"]
mod write_kv;

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

use decode_cases::{decode_case, random_options};
use faults::Fault;
use interpreted::{Interpreted, h100};
use pagewise_attention::conformance::{Case, Outcome, run_case};
use pagewise_attention::cuda::ptx::decode::Ring;
use pagewise_attention::cuda::ptx::prefill::Form;
use pagewise_attention::cuda::{AttentionOptions, Order, PlanOptions};
use random::{Random, run_cases, run_seed};

/// Of every type and room for a head the rings that there are, and between them blocks below a tile's, splits in two
/// levels, windows, bits, caps, biases, sinks, scales, groups that fill no tile or several, empty rows.
const DECODE_CASES: &[(&str, Option<u32>)] = &[
    ("attention q=bf16 kv=bf16 heads=8/2 dim=128 block=16 mask=causal sequences=1:1,1:17,1:130,1:0", None),
    (
        "attention q=bf16 kv=bf16 heads=20/2 dim=64 block=32 mask=window:37 layout=hnd sequences=1:150,0:9,1:40",
        None,
    ),
    (
        "attention q=f16 kv=f16 heads=4/2 dim=256 block=4 mask=causal softcap=30 alibi sinks sequences=2:90,1:33",
        Some(32),
    ),
    ("attention q=f16 kv=f16 heads=3/3 dim=72 block=64 mask=bits poison_unseen sequences=1:70,2:19", None),
    ("attention q=f32 kv=f32 heads=4/2 dim=128 block=16 mask=causal scores=60 sequences=1:70,1:5", Some(16)),
    ("attention q=f32 kv=f32 heads=2/1 dim=36 block=1 mask=none sinks sequences=1:40", None),
    ("attention q=bf16 kv=bf16 heads=4/4 dim=128 block=16 mask=causal scores=60 sequences=1:600", Some(16)),
    (
        "attention q=bf16 kv=fp8_e4m3 heads=8/2 dim=128 block=16 mask=causal scale=head sequences=1:90,1:16",
        None,
    ),
    (
        "attention q=f16 kv=fp8_e5m2 heads=2/1 dim=64 block=8 mask=causal scale=tensor sequences=1:60",
        Some(32),
    ),
];

/// How a case is planned: in both rings, launched in both ways, with one KV head to a thread block or several.
fn ways(item_keys: Option<u32>) -> impl Iterator<Item = PlanOptions> {
    let ways = [
        (Ring::Large, Order::Stream, None),
        (Ring::Large, Order::Dependent, Some(1)),
        (Ring::Small, Order::Stream, None),
    ];
    ways.into_iter().map(move |(ring, order, block_heads)| PlanOptions {
        item_keys,
        ring: Some(ring),
        order,
        block_heads,
        ..PlanOptions::default()
    })
}

/// Every query row by itself, through the decode kernel.
fn by_rows(decode: PlanOptions) -> AttentionOptions {
    AttentionOptions { decode, tiles_from: Some(usize::MAX), ..AttentionOptions::default() }
}

/// Every query row in tiles.
fn in_tiles(form: Form, prefill_keys: Option<u32>) -> AttentionOptions {
    AttentionOptions { form: Some(form), prefill_keys, tiles_from: Some(1), ..AttentionOptions::default() }
}

fn check(subject: &mut Interpreted, case: &Case) -> Result<(), String> {
    let options = subject.options;
    match run_case(subject, case).outcome {
        Outcome::Passed(_) => Ok(()),
        Outcome::Failed(reason) => Err(format!("PAGEWISE_CASE=\"{case}\" with {options:?}: {reason}")),
        Outcome::Skipped(reason) => Err(format!("PAGEWISE_CASE=\"{case}\" is not taken: {reason}")),
    }
}

fn draw(line: &str) -> Case {
    Case { seed: run_seed() % 1_000_000_000, ..line.parse().unwrap() }
}

#[test]
fn decode_agrees_with_the_oracle() {
    let mut subject = Interpreted::new(|_, text| text.to_owned());
    if let Ok(line) = std::env::var("PAGEWISE_CASE") {
        return check(&mut subject, &line.parse().unwrap()).unwrap();
    }
    let mut ran = BTreeSet::new();
    for &(line, item_keys) in DECODE_CASES {
        for options in ways(item_keys) {
            subject.options = by_rows(options);
            check(&mut subject, &draw(line)).unwrap_or_else(|error| panic!("{error}"));
            ran.extend(subject.variants.drain(..));
        }
    }
    println!("{} variants agree: {ran:?}", ran.len());
}

#[test]
fn random_cases_agree_with_the_oracle() {
    let mut subject = Interpreted::new(|_, text| text.to_owned());
    let mut random = Random::new(run_seed());
    for turn in 0..run_cases(7) {
        let case = decode_case(&mut random, turn, 60);
        let mut options = random_options(&mut random, &case, &h100());
        // At most 8 sequences of 5 rows in 4 tiles: a grid of thousands, most without work, takes long here.
        options.grid_items = options.grid_items.map(|_| 200);
        subject.options = by_rows(options);
        check(&mut subject, &case).unwrap_or_else(|error| panic!("{error}"));
    }
}

/// Diagonals, windows within tiles of keys and over several, short tiles, splits, blocks below a tile's and above, bits over
/// keys that nobody may read, rows that see nothing.
const PREFILL_CASES: &[(&str, Option<u32>)] = &[
    ("attention q=bf16 kv=bf16 heads=8/2 dim=128 block=16 mask=causal sequences=40:40,17:90,1:0", None),
    (
        "attention q=bf16 kv=bf16 heads=6/2 dim=128 block=32 mask=window:37 layout=hnd poison_unseen sequences=30:101,9:9",
        None,
    ),
    ("attention q=bf16 kv=bf16 heads=2/1 dim=128 block=16 mask=window:100 sequences=30:231", None),
    ("attention q=bf16 kv=bf16 heads=4/1 dim=128 block=16 mask=causal scores=60 sequences=33:200", Some(64)),
    ("attention q=bf16 kv=bf16 heads=4/1 dim=128 block=256 mask=causal sequences=40:290", None),
    (
        "attention q=bf16 kv=bf16 heads=4/1 dim=128 block=16 mask=bits poison_unseen sequences=40:150,20:60",
        None,
    ),
    ("attention q=bf16 kv=bf16 heads=4/1 dim=128 block=16 mask=bits poison_unseen sequences=20*8:104", None),
    (
        "attention q=bf16 kv=bf16 heads=1/1 dim=128 block=16 mask=bits poison_unseen sequences=130:200",
        Some(64),
    ),
    ("attention q=bf16 kv=bf16 heads=4/1 dim=128 block=64 mask=bits poison_unseen sequences=4*50:50", None),
    (
        "attention q=f16 kv=f16 heads=4/2 dim=64 block=4 mask=causal softcap=30 alibi sinks sequences=20:90",
        Some(64),
    ),
    ("attention q=f16 kv=f16 heads=2/1 dim=256 block=16 mask=causal sequences=70:100", None),
];

#[test]
fn prefill_agrees_with_the_oracle() {
    let mut subject = Interpreted::new(|_, text| text.to_owned());
    let mut ran = BTreeSet::new();
    for &(line, prefill_keys) in PREFILL_CASES {
        for form in [Form::Large, Form::Small] {
            subject.options = in_tiles(form, prefill_keys);
            check(&mut subject, &draw(line)).unwrap_or_else(|error| panic!("{error}"));
            ran.extend(subject.variants.drain(..));
        }
    }
    println!("{} variants agree: {ran:?}", ran.len());
}

/// Plants each fault; those that no case finds.
fn survivors(
    faults: &[Fault],
    cases: &[(&str, Option<u32>)],
    options: impl Fn(Option<u32>) -> AttentionOptions,
) -> Vec<&'static str> {
    let survives = |fault: &&Fault| {
        let (alter, planted) = fault.planted();
        let mut subject = Interpreted::new(alter);
        // The same data every time: chance must not hide a fault.
        let found = cases.iter().any(|&(line, keys)| {
            subject.options = options(keys);
            check(&mut subject, &Case { seed: 1, ..line.parse().unwrap() }).is_err()
        });
        assert!(planted.load(Ordering::Relaxed) > 0, "{}: no kernel has the line {}", fault.name, fault.line);
        !found
    };
    faults.iter().filter(survives).map(|fault| fault.name).collect()
}

/// What faults of the variant for bf16 with heads of 128 must fail.
const DECODE_FAULT_CASES: &[(&str, Option<u32>)] = &[
    ("attention q=bf16 kv=bf16 heads=8/2 dim=128 block=16 mask=causal sequences=1:1,1:17,1:130,1:0", None),
    (
        "attention q=bf16 kv=bf16 heads=20/2 dim=128 block=32 mask=window:37 layout=hnd sequences=1:150,0:9,1:40",
        None,
    ),
    (
        "attention q=bf16 kv=bf16 heads=8/2 dim=128 block=16 mask=causal scores=60 sequences=1:400,1:33",
        Some(16),
    ),
    ("attention q=bf16 kv=bf16 heads=8/2 dim=128 block=16 mask=causal scores=60 sequences=1:700", Some(4096)),
];

#[test]
fn faults_of_decode_are_found() {
    let large =
        |item_keys| by_rows(PlanOptions { item_keys, ring: Some(Ring::Large), ..PlanOptions::default() });
    let left = survivors(faults::DECODE, DECODE_FAULT_CASES, large);
    assert!(left.is_empty(), "no case finds {left:?}");
}

#[test]
fn faults_of_prefill_are_found() {
    let left = survivors(faults::PREFILL, PREFILL_CASES, |keys| in_tiles(Form::Large, keys));
    assert!(left.is_empty(), "no case finds {left:?}");
}
