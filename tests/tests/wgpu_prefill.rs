//! Prefill, chunked prefill and mixtures with decode through wgpu against the conformance suite's oracle, on every
//! adapter that is there: software Vulkan at least.
//!
//! One case again: `PAGEWISE_CASE="attention q=bf16 …" cargo test -p pagewise-tests --test wgpu_prefill`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub, reason = "a test")]

#[path = "gpu/random.rs"]
mod random;
#[path = "gpu/wgpu_cases.rs"]
mod wgpu_cases;
#[path = "gpu/wgpu_contexts.rs"]
mod wgpu_contexts;

use std::collections::BTreeSet;
use std::io::Write as _;

use pagewise_attention::DType;
use pagewise_attention::conformance::{AttentionData, Case, Outcome, SequenceShape, Wgpu, run_case};
use pagewise_attention::wgpu::shaders::prefill::{MatrixTuning, PrefillTuning};
use pagewise_attention::wgpu::{Context, PlanOptions, PrefillChoice, StepLimits, WgpuError};
use random::{Random, run_cases, run_seed};
use wgpu_cases::{Kind, other_case, random_case};
use wgpu_contexts::{contexts, plain_contexts};

/// Random cases of each context.
const CASES: usize = 24;

/// A batch of prefills and chunks, some with decodes beside them.
fn prefill_case(random: &mut Random, turn: usize) -> Case {
    let kind = Kind {
        rooms: &[64, 64, 80, 96, 128, 128, 192, 256],
        kv_heads: &[1, 1, 2, 3],
        groups: &[1, 1, 2, 3, 4, 4, 5, 7, 8, 16, 40, 71],
        window: 150,
        kv_turn: |turn| turn + turn / 3,
        sequences: |random| {
            let count = 1 + random.below(3);
            let shape = |_| {
                let queries = match random.below(5) {
                    0 => 1 + random.below(2),
                    1 => 2 + random.below(130),
                    _ => 2 + random.below(40),
                };
                let keys = match random.below(8) {
                    0 => random.below(queries + 1),
                    1 => queries,
                    2 => 64 * (1 + random.below(5)),
                    3 => queries + random.below(1200),
                    _ => queries + random.below(200),
                };
                SequenceShape { queries, keys }
            };
            (0..count).map(shape).collect()
        },
    };
    random_case(random, turn, &kind)
}

/// How a case is planned: split or not, in tiles from two rows on or as by default.
fn random_options(random: &mut Random, prefill: PrefillChoice) -> PlanOptions {
    PlanOptions {
        workgroups: random.pick(&[1, 64, 1024]),
        tiles_from: random.pick(&[None, Some(2), Some(2)]),
        prefill_keys: random.pick(&[None, Some(64), Some(128), Some(320)]),
        prefill,
        ..PlanOptions::default()
    }
}

/// Tilings other than the default, for a device with so much workgroup memory.
fn random_tuning(random: &mut Random, memory: u32) -> PrefillTuning {
    let tuning =
        |row_quads, workgroup_size, chunk, gap| PrefillTuning { row_quads, workgroup_size, chunk, gap };
    match memory {
        0..32_768 => random.pick(&[tuning(1, 64, 8, true), tuning(1, 128, 4, true)]),
        _ => random.pick(&[tuning(2, 128, 8, true), tuning(1, 128, 16, false), tuning(2, 64, 8, false)]),
    }
}

#[test]
fn random_cases_agree_with_the_oracle() {
    check_cases(contexts());
}

/// A kind of case that matrix units take, and what the kernel makes of it.
fn matrix_case(random: &mut Random, context: &Context) -> (Case, MatrixTuning) {
    let shape = context.matrices().unwrap();
    let room = random.pick(&[16, 64, 64, 80, 128, 128]);
    let rows = if room <= 64 { random.pick(&[32, 64]) } else { 32 };
    let case = prefill_case(random, 0);
    let head_dim_v = if random.one_in(4) { 4 * (1 + random.below(room / 4)) } else { room };
    let case = Case { q_dtype: DType::F16, kv_dtype: DType::F16, head_dim_qk: room, head_dim_v, ..case };
    (case, MatrixTuning { strips: rows / shape.size })
}

#[test]
fn random_cases_agree_on_matrix_units() {
    let contexts: Vec<_> =
        contexts().into_iter().filter(|(_, context)| context.matrices().is_some()).collect();
    if contexts.is_empty() {
        let _ = writeln!(std::io::stderr(), "SKIPPED: no adapter has cooperative matrices of f16");
    }
    check_with(contexts, |random, turn, context, kind| {
        let (case, tuning) = matrix_case(random, context);
        match kind {
            Some((kind, choice)) if turn % 4 != 0 => (other_case(kind, case), *choice),
            _ => {
                let tuning = random.one_in(2).then_some(tuning);
                (case, PrefillChoice::Matrix(tuning))
            }
        }
    });
}

#[test]
fn random_cases_agree_without_features_and_with_the_default_limits() {
    check_cases(plain_contexts());
}

/// Random cases on each context. A software driver takes a second or two to compile a variant, so cases come in fours
/// that share one.
fn check_cases(contexts: Vec<(String, Context)>) {
    check_with(contexts, |random, turn, context, kind| {
        let case = prefill_case(random, turn / 4);
        match kind {
            Some((kind, choice)) if turn % 4 != 0 => (other_case(kind, case), *choice),
            _ => {
                let memory = context.limits().max_compute_workgroup_storage_size;
                let tuned =
                    random.one_in(4).then(|| PrefillChoice::Tiled(Some(random_tuning(random, memory))));
                (case, tuned.unwrap_or_default())
            }
        }
    });
}

/// What `next` gives after a case and its choice, on each context.
fn check_with(
    contexts: Vec<(String, Context)>,
    next: impl Fn(&mut Random, usize, &Context, Option<&(Case, PrefillChoice)>) -> (Case, PrefillChoice),
) {
    for (adapter, context) in contexts {
        let mut subject = Wgpu::new(adapter.clone(), &context);
        let mut variants = BTreeSet::new();
        let mut worst = 0f64;
        let mut check = |subject: &mut Wgpu<'_>, case: &Case| {
            subject.variants.clear();
            let options = subject.options;
            match run_case(subject, case).outcome {
                Outcome::Passed(agreement) => {
                    worst = worst.max(agreement.worst);
                    let tiled = subject.variants.iter().filter(|name| name.starts_with("prefill"));
                    let before = variants.len();
                    variants.extend(tiled.cloned());
                    variants.len() > before || subject.variants.iter().any(|name| name.starts_with("prefill"))
                }
                other => panic!(
                    "PAGEWISE_CASE=\"{case}\" with {options:?} on {adapter}, {:?}: {other:?}",
                    subject.variants
                ),
            }
        };
        if let Ok(line) = std::env::var("PAGEWISE_CASE") {
            subject.options.tiles_from = Some(2);
            for prefill_keys in [None, Some(64)] {
                subject.options.prefill_keys = prefill_keys;
                check(&mut subject, &line.parse().expect("PAGEWISE_CASE is a case of the conformance suite"));
            }
            continue;
        }
        let mut random = Random::new(run_seed());
        let (mut tiled, mut kind) = (0, None);
        for turn in 0..run_cases(CASES) {
            let (case, choice) = next(&mut random, turn, &context, kind.as_ref());
            kind = Some((case.clone(), choice));
            subject.options = random_options(&mut random, choice);
            tiled += usize::from(check(&mut subject, &case));
        }
        eprintln!(
            "{adapter}: {} cases agree (worst {worst:.3} of the tolerance), {tiled} of them in tiles; {} variants",
            run_cases(CASES),
            variants.len()
        );
        assert!(
            run_cases(CASES) < 20 || 2 * tiled > run_cases(CASES),
            "most cases have rows for the prefill kernel"
        );
    }
}

#[test]
fn no_plan_exceeds_its_bound() {
    let mut random = Random::new(run_seed());
    for (_, context) in contexts().into_iter().take(1) {
        for turn in 0..run_cases(60) {
            // Plans are made without a GPU, but for the pipeline, which one configuration builds once.
            let kind = "attention q=f16 kv=f16 heads=8/2 dim=64 block=16 mask=causal".parse().unwrap();
            let case = other_case(
                &kind,
                Case { sequences: sequences(&mut random), ..prefill_case(&mut random, turn) },
            );
            let options = random_options(&mut random, PrefillChoice::Fastest);
            let data = AttentionData::generate(&case);
            let problem = data.problem().unwrap();
            let plan = context.plan_attention(&problem, options).unwrap();
            let batch = problem.batch();
            let keys = (0..problem.num_sequences()).flat_map(|index| {
                let sequence = problem.sequence(index);
                let mask = problem.config().mask;
                (0..sequence.query_len).map(move |query| batch.visible(mask, &sequence, query).len())
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

/// Long chunks, so that some are split.
fn sequences(random: &mut Random) -> Vec<SequenceShape> {
    let shape = |random: &mut Random| {
        let queries = 1 + random.below(90);
        SequenceShape { queries, keys: queries + random.below(6000) }
    };
    (0..1 + random.below(3)).map(|_| shape(random)).collect()
}

#[test]
fn a_tiling_that_does_not_fit_names_the_limit() {
    for (_, context) in plain_contexts().into_iter().take(1) {
        let line = "attention q=f16 kv=f16 heads=4/2 dim=64 block=16 mask=causal sequences=20:70";
        let data = AttentionData::generate(&line.parse().unwrap());
        let problem = data.problem().unwrap();
        let tuning = PrefillTuning { row_quads: 2, workgroup_size: 256, chunk: 8, gap: true };
        let options = PlanOptions { prefill: PrefillChoice::Tiled(Some(tuning)), ..PlanOptions::default() };
        let error = context.plan_attention(&problem, options).unwrap_err();
        let limit = "max_compute_workgroup_storage_size";
        assert!(matches!(error, WgpuError::Limit { limit: name, .. } if name == limit), "{error}");
    }
}
