//! The CPU backend against the oracle, over the whole case table and random cases.

use pagewise_attention::conformance::{self, Cpu, Random};
use pagewise_attention::cpu::Level;

#[test]
fn cpu_agrees_with_the_oracle() {
    let report = conformance::run(&mut Cpu::default(), &conformance::full(conformance::fresh_seed()));
    println!("{}", report.to_json());
    assert_eq!((report.failed(), report.skipped()), (0, 0), "{report}");
}

#[test]
fn every_instruction_set_agrees_with_the_oracle() {
    for level in Level::ALL.into_iter().filter(|level| level.is_available()) {
        let report =
            conformance::run(&mut Cpu::with_level(level), &conformance::quick(conformance::fresh_seed()));
        assert_eq!((report.failed(), report.skipped()), (0, 0), "{report}");
    }
}

#[test]
fn keys_that_nobody_sees_may_hold_anything() {
    // Stronger than the contract: on the CPU a hidden key takes part in no arithmetic, wherever it is.
    let mut random = Random::new(conformance::fresh_seed());
    let cases: Vec<_> = (0..60)
        .map(|_| conformance::Case {
            operation: conformance::Operation::Attention,
            shared_prefix: false,
            poison_unseen: true,
            ..conformance::random_case(&mut random)
        })
        .collect();
    let report = conformance::run(&mut Cpu::default(), &cases);
    assert_eq!(report.failed(), 0, "{report}");
}
