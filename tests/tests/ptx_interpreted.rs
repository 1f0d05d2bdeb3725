//! The kernels that move and merge what the cache holds, run on the CPU by an interpreter: right on random cases, and with
//! each planted fault wrong on some. No GPU is needed; what a GPU's own rounding and scheduling add is the `cuda_*` tests'
//! to see.
//!
//! One case again: `PAGEWISE_CASE="bf16 fp8_e4m3 8 1234" cargo test -p pagewise-tests --test ptx_interpreted`.
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
#[path = "gpu/encode.rs"]
mod encode;
#[path = "gpu/faults/mod.rs"]
mod faults;
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

use blocks::{BlocksCase, wanted_blocks_case};
use interpreter::Interpreter;
use machine::{Machine, check_blocks, check_merge, check_rotary, check_write};
use merge::MergeCase;
use pagewise_attention::DType;
use pagewise_attention::cuda::ptx::counter::{Counter, CounterArgs, number};
use pagewise_attention::cuda::ptx::{Arg, Launch, all_kernels};
use random::{Random, run_seed};
use write_kv::{Case, wanted_case};

const SOURCES: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];

fn unaltered() -> Interpreter {
    Interpreter::new(|_, text| text.to_owned())
}

fn all_of(family: &str) -> BTreeSet<String> {
    let kernels = all_kernels().unwrap();
    kernels
        .iter()
        .filter(|kernel| kernel.family() == family)
        .map(|kernel| kernel.entry().to_owned())
        .collect()
}

#[test]
fn write_kv_stores_what_plain_code_says_and_turns_what_it_should() {
    let mut machine = unaltered();
    if let Some(case) = wanted_case() {
        check_write(&mut machine, &case).unwrap();
        check_rotary(&mut machine, &case).unwrap();
        return;
    }
    let mut random = Random::new(run_seed());
    let mut ran = BTreeSet::new();
    for (source, cache) in SOURCES.into_iter().flat_map(|s| DType::ALL.into_iter().map(move |c| (s, c))) {
        for unit in [8, 8, 2, 1] {
            let case = Case { source, cache, unit, seed: random.next() };
            let (variant, _) =
                check_write(&mut machine, &case).unwrap_or_else(|e| panic!("PAGEWISE_CASE=\"{case}\": {e}"));
            ran.insert(variant);
            for _ in 0..2 {
                let case = Case { seed: random.next(), ..case };
                let (variant, _) = check_rotary(&mut machine, &case)
                    .unwrap_or_else(|e| panic!("PAGEWISE_CASE=\"{case}\": {e}"));
                ran.insert(variant);
            }
        }
    }
    let variants = all_of("write_kv");
    // Which variants random cases take is chance; most must be among them.
    assert!(ran.len() * 10 >= variants.len() * 7, "only {} of {} variants ran", ran.len(), variants.len());
}

#[test]
fn merge_states_agrees_with_the_definition() {
    let mut machine = unaltered();
    let mut random = Random::new(run_seed());
    let mut ran = BTreeSet::new();
    for (part, out) in SOURCES.into_iter().flat_map(|part| SOURCES.into_iter().map(move |out| (part, out))) {
        for unit in [8, 8, 1] {
            let case = MergeCase { part, out, unit, seed: random.next() };
            let (variant, _) =
                check_merge(&mut machine, &case).unwrap_or_else(|error| panic!("{case:?}: {error}"));
            ran.insert(variant);
        }
    }
    let variants = all_of("merge_states");
    assert!(ran.len() + 2 >= variants.len(), "only {} of {} variants ran", ran.len(), variants.len());
}

#[test]
fn copy_blocks_moves_every_byte_and_no_other() {
    let mut machine = unaltered();
    if let Some(case) = wanted_blocks_case() {
        check_blocks(&mut machine, &case).unwrap();
        return;
    }
    let mut random = Random::new(run_seed());
    let mut ran = BTreeSet::new();
    for dtype in DType::ALL.repeat(3) {
        // 16 bytes, and what the elements themselves are aligned to.
        for unit in [16 / dtype.size(), 4, 1] {
            for within in [true, false] {
                let case = BlocksCase { dtype, unit, within, seed: random.next() };
                let (variant, _) =
                    check_blocks(&mut machine, &case).unwrap_or_else(|error| panic!("{error}"));
                ran.insert(variant);
            }
        }
    }
    assert_eq!(ran, all_of("copy_blocks"), "every variant ran");
}

#[test]
fn the_counter_writes_the_numbers_that_the_host_knows() {
    for dtype in Counter::TYPES {
        let counter = Counter::new(dtype).unwrap();
        let size = dtype.size() as usize;
        let count = 304u64;
        let mut machine = unaltered();
        let data = machine.upload(&vec![0xff; (count as usize + 8) * size]);
        let args = CounterArgs { data, count, seed: 7 };
        machine.run(counter.kernel(), counter.launch(count).unwrap(), &args.values()).unwrap();
        let found = machine.download(data);
        let attention_type =
            SOURCES.into_iter().find(|source| source.to_string() == dtype.to_string()).unwrap();
        for (index, bytes) in found.chunks_exact(size).enumerate() {
            let value = encode::decode(attention_type, bytes);
            match index < count as usize {
                true => assert_eq!(value, f64::from(number(7, index as u64))),
                false => assert!(value.is_nan(), "element {index} was written"),
            }
        }
    }
    // Not one number twice in a row for long, and all over the range.
    let values: Vec<f32> = (0..10_000).map(|i| number(1, (1 << 33) + i)).collect();
    let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / 1e4;
    assert!(mean.abs() < 0.05, "{mean}");
    assert!(values.contains(&-2.0) && values.contains(&1.984_375));
}

/// Each thread copies 16 bytes and then 8 with as many zeros; its neighbour stores both.
const COPIES: &str = r"
.visible .entry copies(
.param .u64 from,
.param .u64 to,
)
{
.shared .align 16 .b8 tile[1024];
ld.param.u64 %rd_from, [from];
ld.param.u64 %rd_to, [to];
mov.u32 %r_tid, %tid.x;
mad.wide.u32 %rd_from, %r_tid, 16, %rd_from;
mad.wide.u32 %rd_to, %r_tid, 16, %rd_to;
mov.u32 %r_tile, tile;
mad.lo.u32 %r_mine, %r_tid, 16, %r_tile;
xor.b32 %r_other, %r_mine, 16;
mov.u32 %r_half, 8;
cp.async.cg.shared.global [%r_mine], [%rd_from], 16;
cp.async.commit_group;
cp.async.cg.shared.global.L2::128B [%r_mine + 512], [%rd_from + 512], 16, %r_half;
cp.async.commit_group;
cp.async.wait_group 1;
bar.sync 0;
ld.shared.v4.u32 {%r_a, %r_b, %r_c, %r_d}, [%r_other];
st.global.v4.u32 [%rd_to], {%r_a, %r_b, %r_c, %r_d};
cp.async.wait_group 0;
bar.sync 0;
ld.shared.v4.u32 {%r_a, %r_b, %r_c, %r_d}, [%r_other + 512];
st.global.v4.u32 [%rd_to + 512], {%r_a, %r_b, %r_c, %r_d};
ret;
}
";

/// What comes out of `COPIES` with one line changed.
fn copied(line: &'static str, instead: &'static str) -> Result<Vec<u8>, String> {
    assert!(COPIES.contains(line));
    let mut machine = Interpreter::new(move |_, _| COPIES.replace(line, instead));
    let from: Vec<u8> = (0..1024u32).map(|i| (i * 7 % 251) as u8).collect();
    let (from, to) = (machine.upload(&from), machine.upload(&[0xee; 1024]));
    let counter = Counter::new(Counter::TYPES[0]).unwrap();
    let launch = Launch { grid: [1, 1, 1], block: [32, 1, 1], dynamic_shared: 0 };
    machine.run(counter.kernel(), launch, &[Arg::pointer(from), Arg::pointer(to)])?;
    Ok(machine.download(to))
}

#[test]
fn asynchronous_copies_arrive_when_they_are_waited_for() {
    let expected: Vec<u8> = (0..1024u32)
        .map(|i| match (i ^ 16, i) {
            (_, 512..) if i % 16 >= 8 => 0,
            (from, _) => (from * 7 % 251) as u8,
        })
        .collect();
    assert_eq!(copied("ret;", "ret;").unwrap(), expected);
    let early = copied("cp.async.wait_group 1;", "cp.async.wait_group 2;").unwrap();
    assert!(
        early[..16].iter().all(|&byte| byte == 0xff),
        "the first thread reads before its neighbour has waited"
    );
    assert_eq!(early[512..], expected[512..]);
    for (line, instead, says) in [
        ("[%r_mine], [%rd_from], 16;", "[%r_mine + 8], [%rd_from], 16;", "misaligned"),
        ("[%r_mine], [%rd_from], 16;", "[%r_mine], [%rd_from + 4], 16;", "misaligned"),
        ("[%rd_from + 512], 16,", "[%rd_from + 528], 16,", "outside of allocation"),
        ("[%r_mine + 512]", "[%r_mine + 528]", "outside of 1024"),
        ("%r_half, 8;", "%r_half, 17;", "17 bytes are read into 16"),
    ] {
        let error = copied(line, instead).unwrap_err();
        assert!(error.contains(says), "{instead}: {error}");
    }
}

/// The same faults are planted on a GPU by `cuda_mutations`.
#[test]
fn planted_faults_are_found() {
    let mut random = Random::new(run_seed());
    let mut survived = Vec::new();
    for fault in faults::WRITE_KV.iter().chain(faults::MERGE_STATES).chain(faults::COPY_BLOCKS) {
        let (alter, planted) = fault.planted();
        let mut machine = Interpreter::new(alter);
        let mut found = None;
        // A case finds some faults of copy_blocks with a chance of 1 in 13 only.
        let turns = if fault.family == "copy_blocks" { 250 } else { 40 };
        for turn in 0..turns {
            let source = SOURCES[turn % 3];
            let seed = random.next();
            let unit = [8, 2][turn % 2];
            let cache = DType::ALL[turn % 5];
            let result = match fault.family {
                "merge_states" => {
                    check_merge(&mut machine, &MergeCase { part: source, out: source, unit: 8, seed })
                }
                "copy_blocks" => {
                    let unit = 16 / cache.size();
                    check_blocks(
                        &mut machine,
                        &BlocksCase { dtype: cache, unit, within: turn % 2 == 0, seed },
                    )
                }
                _ if turn % 2 == 0 => check_write(&mut machine, &Case { source, cache, unit, seed }),
                _ => check_rotary(&mut machine, &Case { source, cache, unit: 8, seed }),
            };
            if let Err(error) = result {
                found = Some(error);
                break;
            }
        }
        assert!(planted.load(Ordering::Relaxed) > 0, "{}: its line is in no kernel", fault.name);
        match found {
            None => survived.push(format!("{}: {} ({})", fault.family, fault.name, fault.breaks)),
            // Not outside of its memory, not without end, and not as a text that cannot be read.
            Some(error) => {
                let is_wrong_result = error.contains("expected") || error.contains("was written");
                assert!(is_wrong_result, "{}: {error}", fault.name);
            }
        }
    }
    assert!(survived.is_empty(), "no test found: {survived:#?}");
}

#[test]
fn every_fault_is_listed_in_the_documentation() {
    let listed = include_str!("../../docs/kernel-testing.md");
    for fault in faults::all() {
        let kernel = match fault.family {
            "decode_bf16_bf16_d128_pdl" => "`decode`, dependent".to_owned(),
            "prefill_bf16_d128" => "`prefill`".to_owned(),
            "prefill_bf16_d128_bits" => "`prefill`, bits".to_owned(),
            "prefill_bf16_e4m3_d128" => "`prefill`, fp8".to_owned(),
            "prefill_bf16_d128_hopper" => "`prefill`, Hopper".to_owned(),
            family if family.starts_with("matvec") => "`matvec`".to_owned(),
            family => format!("`{family}`"),
        };
        let row = format!("| {kernel} | {} | {} |", fault.name, fault.breaks);
        assert!(listed.contains(&row), "docs/kernel-testing.md lacks the row\n{row}");
    }
}
