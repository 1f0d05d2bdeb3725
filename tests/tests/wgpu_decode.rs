//! Attention through wgpu against the conformance suite's oracle, on every adapter that is there: software Vulkan at
//! least.
//!
//! One case again: `PAGEWISE_CASE="attention q=bf16 …" cargo test -p pagewise-tests --test wgpu_decode`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub, reason = "a test")]

#[path = "gpu/random.rs"]
mod random;
#[path = "gpu/wgpu_cases.rs"]
mod wgpu_cases;
#[path = "gpu/wgpu_contexts.rs"]
mod wgpu_contexts;

use std::collections::BTreeMap;

use pagewise_attention::conformance::{AttentionData, Case, Outcome, SequenceShape, Wgpu, quick, run_case};
use pagewise_attention::wgpu::shaders::decode::DecodeTuning;
use pagewise_attention::wgpu::wgpu::Features;
use pagewise_attention::wgpu::{
    AttentionCall, BufferRange, Context, HeadTerms, PlanOptions, PreparedAttention, StepLimits, WgpuError,
    wgpu,
};
use pagewise_attention::{AttentionConfig, DType, ProblemError};
use random::{Random, run_cases, run_seed};
use wgpu_cases::{Kind, other_case, random_case};
use wgpu_contexts::{contexts, plain_contexts};

/// Random cases of each context.
const CASES: usize = 30;

/// A random case of what the kernel takes: `turn` walks through the types.
fn decode_case(random: &mut Random, turn: usize) -> Case {
    let kind = Kind {
        rooms: &[64, 64, 80, 96, 128, 128, 256],
        kv_heads: &[1, 2, 2, 3, 4],
        groups: &[1, 1, 2, 3, 4, 5, 7, 8, 9, 16],
        window: 300,
        kv_turn: |turn| turn / 3,
        sequences: |random| {
            let count = 1 + random.below(5);
            let shape = |_| SequenceShape {
                queries: random.pick(&[0, 1, 1, 1, 1, 1, 1, 2, 5]),
                keys: match random.below(8) {
                    0 => random.below(3),
                    1 => 16 * random.below(20),
                    2 => random.below(1500),
                    _ => random.below(400),
                },
            };
            (0..count).map(shape).collect()
        },
    };
    random_case(random, turn, &kind)
}

/// How a case is planned: mostly as by default.
fn random_options(random: &mut Random) -> PlanOptions {
    let item_keys = random.one_in(2).then(|| 16 * random.pick(&[2, 3, 8, 64]));
    PlanOptions {
        item_keys,
        workgroups: random.pick(&[1, 64, 1024]),
        smallest: random.pick(&[16, 128]),
        largest: random.pick(&[16, 512]),
        ..PlanOptions::default()
    }
}

/// Another tuning than the default, one that every configuration has.
fn random_tuning(random: &mut Random, half: bool) -> DecodeTuning {
    let (kept, ahead) = (random.one_in(2), random.one_in(2));
    DecodeTuning { rows: random.pick(&[1, 2]), workgroup_size: 64, kept, ahead, half }
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
            if turn % 3 == 0 {
                // Of f16 caches all are read as such that can be, one time in two.
                let halves = case.kv_dtype == DType::F16 && context.features().contains(Features::SHADER_F16);
                let half = halves && random.one_in(2);
                subject.tuning = (half || random.one_in(3)).then(|| random_tuning(&mut random, half));
            }
            kind = case.clone();
            subject.options = random_options(&mut random);
            match check(&mut subject, &case) {
                true => ran += 1,
                false => skipped += 1,
            }
        }
        (subject.options, subject.tuning) = (PlanOptions::default(), None);
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

#[test]
fn no_plan_exceeds_its_bound() {
    let mut random = Random::new(run_seed());
    for (_, context) in contexts().into_iter().take(1) {
        for turn in 0..run_cases(60) {
            let case = decode_case(&mut random, turn);
            let options = random_options(&mut random);
            let data = AttentionData::generate(&case);
            let problem = data.problem().unwrap();
            let plan = match context.plan_attention(&problem, options) {
                Ok(plan) => plan,
                Err(error) => panic!("{case}: {error}"),
            };
            let keys = (0..problem.num_sequences()).map(|index| {
                let sequence = problem.sequence(index);
                sequence.query_len * sequence.len
            });
            let limits = StepLimits {
                rows: problem.total_queries(),
                keys: keys.sum(),
                table_entries: data.entries.len(),
                mask_words: data.mask_words.len(),
            };
            let bound = context.attention_bound(problem.config(), limits, options).unwrap();
            let (plan_bytes, workspace_bytes) = (plan.plan_bytes(), plan.workspace_bytes());
            assert!(plan_bytes <= bound.plan, "{case}, {options:?}: {plan_bytes} > {bound:?}");
            assert!(workspace_bytes <= bound.workspace, "{case}, {options:?}: {workspace_bytes} > {bound:?}");
        }
    }
}

#[test]
fn what_does_not_fit_is_a_typed_error() {
    for (_, context) in contexts().into_iter().take(1) {
        let line = "attention q=f16 kv=f16 heads=4/2 dim=64 block=16 mask=causal sequences=1:70,1:9";
        let data = AttentionData::generate(&line.parse().unwrap());
        let problem = data.problem().unwrap();
        let plan = context.plan_attention(&problem, PlanOptions::default()).unwrap();
        let buffer = |size: u64, usage| {
            let descriptor = wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false };
            context.device().create_buffer(&descriptor)
        };
        let storage = || buffer(1 << 20, wgpu::BufferUsages::STORAGE);
        let [q, k, out, words, workspace] = std::array::from_fn(|_| storage());
        let short = buffer(64, wgpu::BufferUsages::STORAGE);
        let plain = buffer(1 << 20, wgpu::BufferUsages::COPY_SRC);
        let call = AttentionCall {
            config: problem.config(),
            layout: problem.layout(),
            rows: problem.total_queries(),
            q: BufferRange::whole(&q),
            q_strides: problem.q_strides(),
            k_cache: BufferRange::whole(&k),
            v_cache: BufferRange::whole(&k),
            terms: HeadTerms::default(),
            out: BufferRange::whole(&out),
            out_strides: problem.out_strides(),
            lse: None,
            plan: BufferRange::whole(&words),
            workspace: BufferRange::whole(&workspace),
            tuning: None,
        };
        let refused = |call: &AttentionCall<'_>| context.prepare_attention(call).unwrap_err();
        context.prepare_attention(&call).unwrap();

        let error = refused(&AttentionCall { out: call.q, ..call });
        assert!(matches!(error, WgpuError::SharedBuffer { read: "q", written: "out" }), "{error}");
        let error = refused(&AttentionCall { q: BufferRange::whole(&plain), ..call });
        assert!(matches!(error, WgpuError::Usage { tensor: "q", .. }), "{error}");
        let error = refused(&AttentionCall { k_cache: BufferRange::whole(&short), ..call });
        assert!(matches!(error, WgpuError::Problem(ProblemError::BufferTooShort { .. })), "{error}");
        let odd = BufferRange { offset: 2, size: q.size() - 2, ..call.q };
        let error = refused(&AttentionCall { q: odd, ..call });
        assert!(matches!(error, WgpuError::Alignment { .. }), "{error}");
        let sinks = AttentionConfig { sinks: true, ..call.config.clone() };
        let error = refused(&AttentionCall { config: &sinks, ..call });
        assert!(matches!(error, WgpuError::Missing { what: "the sinks" }), "{error}");
        let fp8 = AttentionConfig { kv_dtype: DType::F8E4M3, ..call.config.clone() };
        let error = refused(&AttentionCall { config: &fp8, ..call });
        assert!(matches!(error, WgpuError::UnsupportedDType { .. }), "{error}");

        // What is encoded must be what was prepared, and fit its buffers.
        let encode = |prepared: &PreparedAttention| {
            let mut encoder = context.device().create_command_encoder(&Default::default());
            prepared.encode(&mut encoder.begin_compute_pass(&Default::default()), &plan)
        };
        let other = AttentionConfig { scale: 1.0, ..call.config.clone() };
        let prepared = context.prepare_attention(&AttentionCall { config: &other, ..call }).unwrap();
        let error = encode(&prepared).unwrap_err();
        assert!(matches!(error, WgpuError::OtherPlan { what: "configuration" }), "{error}");
        let plan_range = BufferRange::whole(&short);
        let prepared = context.prepare_attention(&AttentionCall { plan: plan_range, ..call }).unwrap();
        let error = encode(&prepared).unwrap_err();
        assert!(matches!(error, WgpuError::Range { tensor: "the plan", .. }), "{error}");
        let prepared = context.prepare_attention(&AttentionCall { rows: 1, ..call }).unwrap();
        let error = encode(&prepared).unwrap_err();
        assert!(matches!(error, WgpuError::TooManyTokens { tokens: 2, prepared: 1 }), "{error}");
    }
}
