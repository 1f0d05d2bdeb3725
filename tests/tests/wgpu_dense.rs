//! The dense kernels in WGSL against plain f64, on every adapter that is there: random shapes, rows with gaps, NaN in
//! everything that no kernel may read or leave unwritten. What is made of logits runs on devices without any feature,
//! with WebGPU's default limits, as well.
//!
//! A failure names its seed: `PAGEWISE_SEED=… cargo test -p pagewise-tests --test wgpu_dense NAME` runs it again.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub, reason = "a test")]

#[path = "gpu/dense/mod.rs"]
mod dense;
#[allow(dead_code, reason = "its tables are those of the CUDA kernels")]
#[path = "gpu/faults/mod.rs"]
mod faults;
#[path = "gpu/random.rs"]
mod random;
#[path = "gpu/wgpu_contexts.rs"]
mod wgpu_contexts;

use dense::machine::Machine;
use dense::{elementwise, likeliest, made_up, products, rows, sampling};
use pagewise_attention::wgpu::Context;
use random::run_seed;

/// Runs cases on every device, with a fresh seed each.
fn on(contexts: Vec<(String, Context)>, cases: fn(&mut Machine, u64)) {
    for (name, context) in contexts {
        let seed = run_seed();
        eprintln!("{name}: PAGEWISE_SEED={seed}");
        cases(&mut Machine::new(context), seed);
    }
}

fn on_all(cases: fn(&mut Machine, u64)) {
    on(wgpu_contexts::contexts(), cases);
    on(wgpu_contexts::plain_contexts(), cases);
}

#[test]
fn products() {
    on(wgpu_contexts::contexts(), products::products);
}

#[test]
fn norms() {
    on(wgpu_contexts::contexts(), rows::norms);
}

#[test]
fn lookups() {
    on(wgpu_contexts::contexts(), rows::lookups);
}

#[test]
fn rotations() {
    on(wgpu_contexts::contexts(), rows::rotations);
}

#[test]
fn element_by_element() {
    on(wgpu_contexts::contexts(), elementwise::element_by_element);
}

#[test]
fn likeliest_tokens() {
    on(wgpu_contexts::contexts(), likeliest::likeliest_tokens);
}

#[test]
fn chosen_tokens() {
    on_all(sampling::chosen_tokens);
}

#[test]
fn biases_and_penalties() {
    on_all(sampling::biases_and_penalties);
}

#[test]
fn log_probabilities() {
    on_all(sampling::log_probabilities);
}

#[test]
fn likeliest_of_many() {
    on_all(sampling::likeliest_of_many);
}

#[test]
fn made_up_weights() {
    on_all(made_up::made_up_weights);
}

#[test]
fn planted_faults_are_found() {
    for (_, context) in wgpu_contexts::contexts() {
        dense::faults::every_fault_is_found(&context, run_seed());
    }
}
