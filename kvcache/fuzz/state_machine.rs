//! The cache beside its naive model, driven by bytes that libFuzzer makes up. The machine is the one of
//! `tests/state_machine.rs`; a crash prints a line that runs the case there.
//!
//! ```sh
//! cargo install cargo-fuzz
//! cd kvcache && cargo +nightly fuzz run state_machine fuzz/corpus/state_machine tests/seeds
//! ```

#![no_main]

#[path = "../tests/machine/mod.rs"]
mod machine;

libfuzzer_sys::fuzz_target!(|case: &[u8]| {
    machine::Machine::run(case);
});
