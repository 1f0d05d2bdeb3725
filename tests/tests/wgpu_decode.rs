//! Attention through wgpu against the conformance suite's oracle, on every adapter that is there: software Vulkan at
//! least.
//!
//! One case again: `PAGEWISE_CASE="attention q=bf16 …" cargo test -p pagewise-tests --test wgpu_decode`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub, reason = "a test")]

#[path = "gpu/random.rs"]
mod random;
#[path = "gpu/wgpu_contexts.rs"]
mod wgpu_contexts;

use std::collections::BTreeMap;

use pagewise_attention::DType;
use pagewise_attention::conformance::{
    Case, CaseMask, Layout, Operation, Outcome, Rows, ScaleKind, SequenceShape, Tables, Wgpu, quick, run_case,
};
use pagewise_attention::wgpu::PlanOptions;
use random::{Random, run_cases, run_seed};
use wgpu_contexts::contexts;

const TYPES: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];

/// A random case of what the kernel takes: `turn` walks through the types.
fn decode_case(random: &mut Random, turn: usize) -> Case {
    let (q_dtype, kv_dtype) = (TYPES[turn % 3], TYPES[turn / 3 % 3]);
    let room = random.pick(&[64, 64, 80, 96, 128, 128, 256]);
    let head_dim_qk = match random.below(3) {
        0 => 4 * (1 + random.below(room / 4)),
        _ => room,
    };
    let head_dim_v = match random.below(6) {
        0 => 4 * (1 + random.below(head_dim_qk / 4)),
        _ => head_dim_qk,
    };
    let kv_heads = random.pick(&[1, 2, 2, 3, 4]);
    let sequences = (0..1 + random.below(5))
        .map(|_| SequenceShape {
            queries: random.pick(&[0, 1, 1, 1, 1, 1, 1, 2, 5]),
            keys: match random.below(8) {
                0 => random.below(3),
                1 => 16 * random.below(20),
                2 => random.below(1500),
                _ => random.below(400),
            },
        })
        .collect();
    let layouts = [Layout::Nhd, Layout::Nhd, Layout::Hnd, Layout::Gaps, Layout::Interleaved, Layout::Shared];
    Case {
        operation: Operation::Attention,
        q_dtype,
        kv_dtype,
        q_heads: kv_heads * random.pick(&[1, 1, 2, 3, 4, 5, 7, 8, 9, 16]),
        kv_heads,
        head_dim_qk,
        head_dim_v,
        block_size: random.pick(&[16, 16, 32, 64, 128, 256, 1, 2, 4, 8]),
        layout: random.pick(&layouts),
        rows: random.pick(&[Rows::Packed, Rows::Fused]),
        tables: random.pick(&[Tables::Padded, Tables::Csr]),
        mask: match random.below(6) {
            0 => CaseMask::None,
            1 => CaseMask::Window(1 + random.below(300)),
            2 => CaseMask::Bits,
            _ => CaseMask::Causal,
        },
        positions: random.one_in(6),
        shared_prefix: random.one_in(4),
        poison_unseen: random.one_in(2),
        softcap: random.one_in(5).then(|| random.pick(&[2.0, 30.0, 50.0])),
        alibi: random.one_in(5),
        sinks: random.one_in(5),
        scale: random.pick(&[ScaleKind::One, ScaleKind::One, ScaleKind::Tensor, ScaleKind::Head]),
        scores: random.pick(&[0.5, 8.0, 8.0, 60.0, 1e5]),
        sequences,
        seed: random.next() % 1_000_000_000,
        ..Case::default()
    }
}

/// How a case is planned: mostly as by default.
fn random_options(random: &mut Random) -> PlanOptions {
    let item_keys = random.one_in(2).then(|| 16 * random.pick(&[2, 3, 8, 64]));
    PlanOptions { item_keys, workgroups: random.pick(&[1, 64, 1024]), smallest: random.pick(&[16, 128]) }
}

#[test]
fn random_cases_agree_with_the_oracle() {
    for (adapter, context) in contexts() {
        let mut subject = Wgpu::new(adapter.clone(), &context);
        let mut variants = BTreeMap::new();
        let mut worst = 0f64;
        let mut check = |subject: &mut Wgpu<'_>, case: &Case| {
            subject.variants.clear();
            let options = subject.options;
            match run_case(subject, case).outcome {
                Outcome::Passed(agreement) => {
                    worst = worst.max(agreement.worst);
                    subject.variants.iter().take(1).for_each(|name| {
                        *variants.entry(name.clone()).or_insert(0) += 1;
                    });
                    true
                }
                Outcome::Skipped(_) => false,
                Outcome::Failed(reason) => {
                    panic!(
                        "PAGEWISE_CASE=\"{case}\" with {options:?} on {adapter}, {:?}: {reason}",
                        subject.variants
                    )
                }
            }
        };
        if let Ok(line) = std::env::var("PAGEWISE_CASE") {
            let ran =
                check(&mut subject, &line.parse().expect("PAGEWISE_CASE is a case of the conformance suite"));
            assert!(ran, "the wgpu backend does not take this case");
            continue;
        }
        let mut random = Random::new(run_seed());
        let (mut ran, mut skipped) = (0, 0);
        for turn in 0..run_cases(90) {
            let case = decode_case(&mut random, turn);
            subject.options = random_options(&mut random);
            match check(&mut subject, &case) {
                true => ran += 1,
                false => skipped += 1,
            }
        }
        subject.options = PlanOptions::default();
        // What of the suite's own table this backend takes.
        for case in quick(random.next()) {
            match check(&mut subject, &case) {
                true => ran += 1,
                false => skipped += 1,
            }
        }
        eprintln!(
            "{adapter}: {ran} cases agree (worst {worst:.3} of the tolerance), {skipped} not taken; {} variants",
            variants.len()
        );
        assert!(run_cases(90) < 20 || ran > skipped, "most cases run");
    }
}
