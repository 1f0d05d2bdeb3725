//! Properties over random configurations: every case that can be described agrees with the oracle. A failure
//! prints the line of the smallest case; `cargo test-cpu --test properties one_case -- --nocapture` with
//! `PAGEWISE_CASE="…"` runs a line alone.

use pagewise_attention::DType;
use pagewise_attention::conformance::{
    self, Case, CaseMask, Cpu, Layout, Operation, Outcome, Rows, ScaleKind, SequenceShape, Tables,
};
use pagewise_attention::cpu::Level;
use proptest::prelude::*;

fn sequence() -> impl Strategy<Value = SequenceShape> {
    let queries = prop_oneof![3 => Just(1usize), 1 => Just(0), 2 => 1..9usize, 1 => 1..80usize];
    let keys = prop_oneof![1 => Just(0usize), 2 => 1..20usize, 2 => 1..300usize, 1 => 1..1200usize];
    (queries, keys).prop_map(|(queries, keys)| SequenceShape { queries, keys })
}

fn mask() -> impl Strategy<Value = CaseMask> {
    prop_oneof![
        Just(CaseMask::Causal),
        Just(CaseMask::None),
        (1..400usize).prop_map(CaseMask::Window),
        Just(CaseMask::Bits)
    ]
}

prop_compose! {
    fn shape()(
        (kv_heads, group) in (1..5usize, prop_oneof![1..9usize, Just(70usize)]),
        head_dim_qk in prop_oneof![Just(64usize), Just(128), 1..257usize],
        head_dim_v in prop_oneof![Just(64usize), Just(128), 1..257usize],
        q_dtype in prop::sample::select(vec![DType::F32, DType::F16, DType::Bf16]),
        kv_dtype in prop::sample::select(DType::ALL.to_vec()),
        block_bits in 0..9u32,
        layout in prop::sample::select(vec![
            Layout::Nhd, Layout::Hnd, Layout::Gaps, Layout::Interleaved, Layout::Shared
        ]),
        tables in prop::sample::select(vec![Tables::Padded, Tables::Csr]),
        rows in prop::sample::select(vec![Rows::Packed, Rows::Fused]),
    ) -> Case {
        let head_dim_v = if layout == Layout::Shared { head_dim_v.min(head_dim_qk) } else { head_dim_v };
        Case {
            // A wide group with many heads is only slow.
            kv_heads: if group > 8 { 1 } else { kv_heads },
            q_heads: group * if group > 8 { 1 } else { kv_heads },
            head_dim_qk, head_dim_v, q_dtype, kv_dtype, block_size: 1 << block_bits, layout, tables, rows,
            ..Case::default()
        }
    }
}

prop_compose! {
    fn attention()(
        shape in shape(),
        mask in mask(),
        (positions, shared_prefix, alibi, sinks) in any::<(bool, bool, bool, bool)>(),
        softcap in prop::option::weighted(0.25, prop_oneof![Just(1.5f32), Just(30.0)]),
        scores in prop_oneof![Just(0.01f32), Just(8.0), Just(100.0), Just(1e5)],
        scale in prop::sample::select(vec![ScaleKind::One, ScaleKind::Tensor, ScaleKind::Head]),
        sequences in prop::collection::vec(sequence(), 0..6),
        seed in 0..1_000_000_000u64,
    ) -> Case {
        // Large numbers do not fit 8 bits without a scale.
        let scale = if shape.kv_dtype.is_fp8() && scale == ScaleKind::One { ScaleKind::Head } else { scale };
        Case {
            mask, positions, shared_prefix, alibi, sinks, softcap, scores, scale, sequences, seed, ..shape
        }
    }
}

/// Runs a case on one of the instruction sets of this processor, by its seed.
fn check(case: &Case) -> Result<(), TestCaseError> {
    match conformance::run_case(&mut Cpu::with_level(level(case)), case).outcome {
        Outcome::Passed(_) => Ok(()),
        Outcome::Failed(reason) | Outcome::Skipped(reason) => {
            let level = level(case).name();
            Err(TestCaseError::fail(format!("{level}: {reason}\n    PAGEWISE_CASE=\"{case}\"")))
        }
    }
}

fn level(case: &Case) -> Level {
    let levels: Vec<Level> = Level::ALL.into_iter().filter(|level| level.is_available()).collect();
    levels[case.seed as usize % levels.len()]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn attention_agrees_with_the_oracle(case in attention()) {
        check(&case)?;
    }

    #[test]
    fn write_kv_stores_the_nearest_value(case in attention()) {
        let layout = if case.layout == Layout::Shared { Layout::Nhd } else { case.layout };
        check(&Case { operation: Operation::WriteKv, layout, scores: case.scores.min(100.0), ..case })?;
    }

    #[test]
    fn blocks_move_with_their_bits(shape in shape(), count in 0..7usize, seed in 0..1_000_000_000u64) {
        let layout = if shape.layout == Layout::Shared { Layout::Nhd } else { shape.layout };
        for operation in [Operation::CopyBlocks, Operation::SwapBlocks] {
            check(&Case { operation, layout, count, seed, ..shape.clone() })?;
        }
    }

    #[test]
    fn partial_results_merge(case in attention(), count in 1..9usize) {
        check(&Case { operation: Operation::MergeStates, count, ..case })?;
    }

    #[test]
    fn a_case_reads_back_from_its_line(case in attention()) {
        prop_assert_eq!(case.to_string().parse::<Case>(), Ok(case));
    }
}

#[test]
fn one_case() {
    // Without the variable, some case, so that the way in stays open.
    let line = std::env::var("PAGEWISE_CASE").unwrap_or_else(|_| {
        "attention q=f32 kv=bf16 heads=4/2 dim=64 block=16 mask=causal sequences=3:40 seed=1".into()
    });
    let case: Case = line.parse().unwrap();
    let result = conformance::run_case(&mut Cpu::with_level(level(&case)), &case);
    assert!(matches!(result.outcome, Outcome::Passed(_)), "{result:?}");
}
