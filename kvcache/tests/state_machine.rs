//! The cache against a naive model, over random sequences of operations on tiny pools.
//!
//! After every operation: reference counts equal the references that exist, nothing leaks or is freed twice,
//! free + used + pending = total, windows are bounded, pinned prefixes are found; a refused call has changed
//! nothing (whole states are compared); and every visible token is where its block table says, in memory
//! that is written and copied as a backend would.

#![allow(clippy::unwrap_used, reason = "a helper that fails should fail the test that called it")]

mod machine;

use machine::{CASE_VARIABLE, Coverage, Machine, Op, SETUP_BYTES, Setup};
use proptest::prelude::*;
use proptest::test_runner::Config;
use proptest_state_machine::{ReferenceStateMachine, StateMachineTest, prop_state_machine};

/// Generates operations. What they do to the model is decided in the machine, which also sees refusals.
struct Operations;

impl ReferenceStateMachine for Operations {
    type State = Setup;
    type Transition = Op;

    fn init_state() -> BoxedStrategy<Setup> {
        any::<[u8; SETUP_BYTES]>().prop_map(Setup).boxed()
    }

    fn transitions(_: &Setup) -> BoxedStrategy<Op> {
        any::<[u8; 4]>().prop_map(Op::decode).boxed()
    }

    fn apply(setup: Setup, _: &Op) -> Setup {
        setup
    }
}

struct CacheAgainstModel;

impl StateMachineTest for CacheAgainstModel {
    type SystemUnderTest = Machine;
    type Reference = Operations;

    fn init_test(setup: &Setup) -> Machine {
        Machine::new(*setup)
    }

    fn apply(mut machine: Machine, _: &Setup, op: Op) -> Machine {
        machine.step(op);
        machine
    }

    fn teardown(machine: Machine, _: Setup) {
        machine.finish();
    }
}

/// 20,000 cases; the variable `PROPTEST_CASES` asks for more.
fn config() -> Config {
    let asked = Config::default();
    Config { cases: asked.cases.max(20_000), failure_persistence: None, ..asked }
}

prop_state_machine! {
    #![proptest_config(config())]

    #[test]
    fn the_cache_agrees_with_a_naive_model(sequential 1..100 => CacheAgainstModel);
}

/// A failing case prints a line that comes here; with `--nocapture` it shows every operation.
#[test]
fn one_case() {
    let Ok(hex) = std::env::var(CASE_VARIABLE) else { return };
    let digits: Vec<u8> = hex.chars().map(|digit| digit.to_digit(16).unwrap() as u8).collect();
    let case: Vec<u8> = digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect();
    let (setup, ops) = case.split_first_chunk().unwrap();
    let setup = Setup(*setup);
    println!("{:?}", setup.config());
    let mut machine = Machine::new(setup);
    for op in ops.chunks_exact(4) {
        let op = Op::decode([op[0], op[1], op[2], op[3]]);
        println!("{op:?}");
        machine.step(op);
        println!("{}", machine.describe());
    }
    machine.finish();
}

/// What the fuzzer has found worth keeping.
#[test]
fn the_seeds_of_the_fuzz_target_pass() {
    let seeds = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/seeds");
    let mut replayed = 0;
    for seed in std::fs::read_dir(seeds).unwrap() {
        Machine::run(&std::fs::read(seed.unwrap().path()).unwrap());
        replayed += 1;
    }
    assert!(replayed >= 20, "{replayed} seeds in {seeds}");
}

/// Bytes for cases that are the same in every run.
fn bytes(seed: u64) -> impl Iterator<Item = u8> {
    let mut state = seed;
    std::iter::repeat_with(move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (mixed ^ mixed >> 31) as u8
    })
}

/// A machine that never gets anywhere would pass everything: each kind of event must occur.
#[test]
fn random_cases_reach_every_kind_of_event() {
    let mut sum = Coverage::default();
    for seed in 0..400 {
        let case: Vec<u8> = bytes(seed << 32).take(SETUP_BYTES + 4 * 120).collect();
        let coverage = Machine::run(&case);
        for (sum, count) in [
            (&mut sum.refusals, coverage.refusals),
            (&mut sum.hits, coverage.hits),
            (&mut sum.evictions, coverage.evictions),
            (&mut sum.copies, coverage.copies),
            (&mut sum.swapped_out, coverage.swapped_out),
            (&mut sum.swapped_in, coverage.swapped_in),
            (&mut sum.shared_swaps, coverage.shared_swaps),
            (&mut sum.behind_window, coverage.behind_window),
            (&mut sum.pins, coverage.pins),
            (&mut sum.resets, coverage.resets),
            (&mut sum.rebuilt_forks, coverage.rebuilt_forks),
        ] {
            *sum += count;
        }
    }
    println!("{sum:?}");
    let Coverage { refusals, hits, evictions, copies, swapped_out, swapped_in, .. } = sum;
    let Coverage { shared_swaps, behind_window, pins, resets, rebuilt_forks, .. } = sum;
    let often =
        [refusals, hits, evictions, copies, swapped_out, swapped_in, shared_swaps, behind_window, pins];
    assert!(often.into_iter().all(|count| count >= 50), "{sum:?}");
    assert!(resets >= 5 && rebuilt_forks >= 20, "{sum:?}");
}
