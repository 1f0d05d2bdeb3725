//! Decode and the `mma.sync` forms of prefill, run on the CPU by an interpreter: right on the cases below, and faults planted
//! in them are found. No GPU is needed; what a GPU's own rounding and scheduling add is for `cuda_decode` and
//! `cuda_prefill` to see.
//!
//! One case again: `PAGEWISE_CASE="attention q=bf16 …" cargo test -p pagewise-tests --test attention_interpreted`;
//! a dependent one of the list below is planned as there.
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
#[path = "gpu/chain.rs"]
mod chain;
#[path = "gpu/decode_cases.rs"]
mod decode_cases;
#[path = "gpu/encode.rs"]
mod encode;
#[path = "gpu/faults/mod.rs"]
mod faults;
#[path = "gpu/fresh.rs"]
mod fresh;
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

use chain::{Late, Step, by_rows, dependent, listed};
use decode_cases::{decode_case, random_options};
use faults::Fault;
use fresh::Side;
use interpreted::Interpreted;
use machine::Machine;
use pagewise_attention::conformance::{Case, Outcome, Subject, run_case};
use pagewise_attention::cuda::ptx::decode::Ring;
use pagewise_attention::cuda::ptx::prefill::Form;
use pagewise_attention::cuda::{AttentionOptions, Device, Order, PlanOptions, PlannedLaunch};
use random::{Random, run_cases, run_seed};

/// Of every type and room for a head the rings that there are, and between them blocks below a tile's, splits in two
/// levels, windows, bits, caps, biases, sinks, scales, groups that fill no tile or several, empty rows, one fresh key more
/// than a dependent launch allows.
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
    ("attention q=bf16 kv=bf16 heads=2/1 dim=128 block=16 mask=causal sequences=17:48", None),
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
        let case = line.parse().unwrap();
        subject.options = listed(&case, DEPENDENT_CASES).map_or(subject.options, by_rows);
        return check(&mut subject, &case).unwrap();
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
        let mut options = random_options(&mut random, &case, &Device::h100());
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

/// The same over fp8 caches: each type with queries of each, scales of all kinds, rows that end in half a chunk.
const PREFILL_FP8_CASES: &[(&str, Option<u32>)] = &[
    (
        "attention q=bf16 kv=fp8_e4m3 heads=8/2 dim=128 block=16 mask=causal scale=head poison_unseen sequences=40:40,17:90,1:0",
        None,
    ),
    (
        "attention q=bf16 kv=fp8_e4m3 heads=4/1 dim=128 block=16 mask=causal scale=tensor scores=60 sequences=33:200",
        Some(64),
    ),
    (
        "attention q=bf16 kv=fp8_e4m3 heads=4/2 dim=128 block=32 mask=bits scale=head poison_unseen sequences=40:150,20:60",
        None,
    ),
    (
        "attention q=f16 kv=fp8_e4m3 heads=4/2 dim=64 block=4 mask=causal softcap=30 alibi sinks scale=head sequences=20:90",
        Some(64),
    ),
    (
        "attention q=bf16 kv=fp8_e5m2 heads=6/2 dim=80 dim_v=72 block=16 layout=shared mask=window:37 scale=tensor poison_unseen sequences=30:101,9:9",
        None,
    ),
    (
        "attention q=f16 kv=fp8_e5m2 heads=2/1 dim=256 block=16 mask=causal scale=tensor sequences=70:100",
        None,
    ),
];

#[test]
fn prefill_agrees_with_the_oracle() {
    let mut subject = Interpreted::new(|_, text| text.to_owned());
    let mut ran = BTreeSet::new();
    for &(line, prefill_keys) in PREFILL_CASES.iter().chain(PREFILL_FP8_CASES) {
        for form in [Form::Large, Form::Small] {
            subject.options = in_tiles(form, prefill_keys);
            check(&mut subject, &draw(line)).unwrap_or_else(|error| panic!("{error}"));
            ran.extend(subject.variants.drain(..));
        }
    }
    println!("{} variants agree: {ran:?}", ran.len());
}

/// Plants each fault; those that no case finds. What stands beside a case says how it is planned.
fn survivors<Way: Copy>(
    faults: &[Fault],
    cases: &[(&str, Way)],
    options: impl Fn(Way) -> AttentionOptions,
) -> Vec<&'static str> {
    let survives = |fault: &&Fault| {
        let (alter, planted) = fault.planted();
        let mut subject = Interpreted::new(alter);
        // The same data every time: chance must not hide a fault.
        let found = cases.iter().any(|&(line, way)| {
            subject.options = options(way);
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

/// What makes a dependent launch of the variant for bf16 with heads of 128 wait at one place or another: rows that fill the
/// rings of all warps with old keys, as many query rows as a sequence may have, around all ends of a tile, small blocks,
/// bits, windows, several KV heads to a thread block, rows that see nothing, items without work, nothing else.
const DEPENDENT_CASES: &[(&str, PlanOptions)] = &[
    (
        "attention q=bf16 kv=bf16 heads=4/2 dim=128 block=16 mask=causal sequences=1:310,1:0",
        dependent(Some(4096), None, None),
    ),
    (
        "attention q=bf16 kv=bf16 heads=2/1 dim=128 block=16 mask=causal sequences=16:79,16:3",
        dependent(Some(4096), None, None),
    ),
    (
        "attention q=bf16 kv=bf16 heads=8/1 dim=128 block=16 mask=causal sequences=0:9",
        dependent(None, None, Some(3)),
    ),
    (
        "attention q=bf16 kv=bf16 heads=2/1 dim=128 block=4 mask=none layout=hnd sequences=16:95,3:48",
        dependent(None, None, Some(40)),
    ),
    (
        "attention q=bf16 kv=bf16 heads=4/2 dim=128 block=16 mask=bits poison_unseen sequences=5:79,1:200",
        dependent(Some(128), None, Some(20)),
    ),
    (
        "attention q=bf16 kv=bf16 heads=8/4 dim=128 block=32 mask=window:40 sequences=7:100,1:64",
        dependent(None, Some(4), None),
    ),
    (
        "attention q=bf16 kv=bf16 heads=8/8 dim=128 block=16 mask=causal sequences=2:95,1:17",
        dependent(Some(64), Some(8), Some(13)),
    ),
    (
        "attention q=bf16 kv=bf16 heads=8/8 dim=128 block=16 mask=bits sequences=16:31",
        dependent(None, Some(8), None),
    ),
];

#[test]
fn faults_of_decode_are_found() {
    let large =
        |item_keys| by_rows(PlanOptions { item_keys, ring: Some(Ring::Large), ..PlanOptions::default() });
    let left = survivors(faults::DECODE, DECODE_FAULT_CASES, large);
    assert!(left.is_empty(), "no case finds {left:?}");
}

#[test]
fn dependent_decode_reads_and_writes_nothing_too_early() {
    let mut subject = Interpreted::new(|_, text| text.to_owned());
    for &(line, options) in DEPENDENT_CASES {
        subject.options = by_rows(options);
        check(&mut subject, &draw(line)).unwrap_or_else(|error| panic!("{error}"));
        let all_depend = subject.variants.drain(..).all(|variant| variant.ends_with("_pdl"));
        assert!(all_depend, "{line} with {options:?} has no dependent launch");
    }
}

/// What `cuda_dependent` launches on a GPU, one after the other.
#[test]
fn a_chain_of_launches_writes_what_decode_reads() {
    let mut subject = Interpreted::new(|_, text| text.to_owned());
    for &(line, options) in DEPENDENT_CASES {
        let step = Step::new(&draw(line));
        if step.data.total_queries() == 0 {
            continue; // Nothing to write.
        }
        let plan = step.plan(&Device::h100(), options);
        let machine = &mut subject.machine;
        machine.clear();
        let launches = step.place(&plan, Late::BOTH, &mut |bytes| machine.upload(bytes));
        let (no_slots, rotary) = &launches.write_queries;
        for variant in [
            machine.write_kv(&launches.write_keys, None).unwrap(),
            machine.write_kv(no_slots, Some(rotary)).unwrap(),
        ] {
            assert!(variant.ends_with("_pdl"), "{variant} is no dependent variant");
        }
        let call = &launches.decode;
        let queries = step.data.q.as_ref().to_bytes();
        let (k, v) = (step.cache(Side::K), step.cache(Side::V));
        let early =
            [(call.q, [queries.clone(), vec![0xff; queries.len()]]), (call.k_cache, k), (call.v_cache, v)];
        for (address, [after, before]) in early {
            assert!(machine.download(address) == after, "{line}: not all is written");
            machine.set_early(address, before);
        }
        for PlannedLaunch { kernel, launch, args } in plan.launches(call).unwrap() {
            machine.run(&kernel, launch, &args).unwrap();
        }
        let found = machine.download(call.out);
        let mut expected = step.data.poisoned_out();
        subject.options = by_rows(PlanOptions { order: Order::Stream, ..options });
        subject.attention(&step.data.task().unwrap(), expected.as_mut(), None).unwrap();
        assert!(found == expected.as_ref().to_bytes(), "PAGEWISE_CASE=\"{}\": other bits", step.data.case);
    }
}

#[test]
fn faults_of_dependent_decode_are_found() {
    let faults = [faults::DECODE_READS, faults::DECODE_WRITES].concat();
    let left = survivors(&faults, DEPENDENT_CASES, by_rows);
    assert!(left.is_empty(), "no case finds {left:?}");
}

#[test]
fn faults_of_prefill_over_fp8_are_found() {
    let faults = [faults::PREFILL_FP8, faults::PREFILL_FP8_ORDER].concat();
    let left = survivors(&faults, PREFILL_FP8_CASES, |keys| in_tiles(Form::Large, keys));
    assert!(left.is_empty(), "no case finds {left:?}");
}

#[test]
fn faults_of_prefill_are_found() {
    let left = survivors(faults::PREFILL, PREFILL_CASES, |keys| in_tiles(Form::Large, keys));
    assert!(left.is_empty(), "no case finds {left:?}");
}
