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
use pagewise_attention::wgpu::{Context, PlanOptions};
use random::{Random, run_cases, run_seed};
use wgpu_contexts::{contexts, plain_contexts};

/// Random cases of each context.
const CASES: usize = 45;

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

/// A case with the other's data that is computed by the same variant as `kind`.
fn other_case(kind: &Case, other: Case) -> Case {
    let group = kind.q_heads / kind.kv_heads;
    let bits = |case: &Case| case.mask == CaseMask::Bits;
    Case {
        q_dtype: kind.q_dtype,
        kv_dtype: kind.kv_dtype,
        q_heads: other.kv_heads * group,
        head_dim_qk: kind.head_dim_qk,
        head_dim_v: kind.head_dim_v,
        mask: if bits(kind) == bits(&other) { other.mask } else { kind.mask },
        ..other
    }
}

/// How a case is planned: mostly as by default.
fn random_options(random: &mut Random) -> PlanOptions {
    let item_keys = random.one_in(2).then(|| 16 * random.pick(&[2, 3, 8, 64]));
    PlanOptions { item_keys, workgroups: random.pick(&[1, 64, 1024]), smallest: random.pick(&[16, 128]) }
}

#[test]
fn random_cases_agree_with_the_oracle() {
    check_cases(contexts(), true);
}

#[test]
fn random_cases_agree_without_features_and_with_the_default_limits() {
    check_cases(plain_contexts(), false);
}

/// Random cases on each context, and the suite's own table, a part of it unless `whole_table`. A software driver
/// takes a second or two to compile a variant, so cases come in threes that share one.
fn check_cases(contexts: Vec<(String, Context)>, whole_table: bool) {
    for (adapter, context) in contexts {
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
        let mut kind = decode_case(&mut random, 0);
        for turn in 0..run_cases(CASES) {
            let next = decode_case(&mut random, turn / 3);
            let case = match turn % 3 {
                0 => next,
                _ => other_case(&kind, next),
            };
            kind = case.clone();
            subject.options = random_options(&mut random);
            match check(&mut subject, &case) {
                true => ran += 1,
                false => skipped += 1,
            }
        }
        subject.options = PlanOptions::default();
        for case in quick(random.next()) {
            if !whole_table && !random.one_in(4) {
                continue;
            }
            match check(&mut subject, &case) {
                true => ran += 1,
                false => skipped += 1,
            }
        }
        eprintln!(
            "{adapter}: {ran} cases agree (worst {worst:.3} of the tolerance), {skipped} not taken; {} variants",
            variants.len()
        );
        assert!(run_cases(CASES) < 20 || ran > skipped, "most cases run");
    }
}
