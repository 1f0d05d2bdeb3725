//! `merge_states` through wgpu against plain code and the conformance suite, on every adapter that is there: software
//! Vulkan at least.
//!
//! One case again: `PAGEWISE_CASE="bf16 f16 2 1234" cargo test -p pagewise-tests --test wgpu_merge_states` (types of
//! parts and output, unit, seed).
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    unreachable_pub,
    dead_code,
    reason = "a test"
)]

#[path = "gpu/encode.rs"]
mod encode;
#[path = "gpu/merge.rs"]
mod merge;
#[path = "gpu/random.rs"]
mod random;
#[path = "gpu/wgpu_buffers.rs"]
mod wgpu_buffers;
#[path = "gpu/wgpu_contexts.rs"]
mod wgpu_contexts;

use std::collections::BTreeSet;

use merge::{MergeCase, MergeTensors};
use pagewise_attention::conformance::{Operation, Outcome, Wgpu, quick, run_case};
use pagewise_attention::wgpu::{BufferRange, Context, MergeStatesCall, WgpuError, wgpu};
use pagewise_attention::{DType, ProblemError};
use random::{Random, run_cases, run_seed};
use wgpu::{Buffer, BufferUsages};
use wgpu_buffers::{buffer, read};
use wgpu_contexts::contexts;

const TYPES: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];

/// A case's buffers. Every part begins behind some words that belong to nobody.
struct OnDevice {
    part_out: Buffer,
    part_lse: Buffer,
    out: Buffer,
    lse: Buffer,
}

/// Words before each tensor.
const BEFORE: usize = 3;

impl OnDevice {
    fn new(context: &Context, tensors: &MergeTensors) -> Self {
        let (out, lse) = tensors.outputs();
        let upload = |bytes: &[u8]| {
            let mut contents = vec![0xff; 4 * BEFORE];
            contents.extend(bytes);
            contents.resize(contents.len().max(16).next_multiple_of(4), 0xff);
            buffer(context, &contents, BufferUsages::STORAGE | BufferUsages::COPY_SRC)
        };
        let bytes = |values: &[f32]| -> Vec<u8> { values.iter().flat_map(|x| x.to_le_bytes()).collect() };
        Self {
            part_out: upload(&tensors.part_out),
            part_lse: upload(&bytes(&tensors.part_lse)),
            out: upload(&out),
            lse: upload(&bytes(&lse)),
        }
    }

    fn call(&self, tensors: &MergeTensors) -> MergeStatesCall<'_> {
        fn part(buffer: &Buffer) -> BufferRange<'_> {
            let offset = 4 * BEFORE as u64;
            BufferRange { buffer, offset, size: buffer.size() - offset }
        }
        MergeStatesCall {
            parts: tensors.parts,
            rows: tensors.rows,
            heads: tensors.heads,
            head_dim: tensors.dim,
            part_dtype: tensors.case.part,
            part_out: part(&self.part_out),
            part_out_strides: tensors.part_out_strides,
            // Those that lie backwards are the same parts in another order.
            part_out_stride: tensors.part_out_stride.unsigned_abs(),
            part_lse: part(&self.part_lse),
            part_lse_strides: tensors.part_lse_strides,
            part_lse_stride: tensors.part_lse_stride.unsigned_abs(),
            out_dtype: tensors.case.out,
            out: part(&self.out),
            out_strides: tensors.out_strides,
            lse: tensors.with_lse.then(|| part(&self.lse)),
            lse_strides: tensors.lse_strides,
        }
    }
}

/// Runs a case: the variant and the error, or what is wrong.
fn check(context: &Context, case: &MergeCase) -> Result<(String, f64), String> {
    let tensors = case.build();
    let buffers = OnDevice::new(context, &tensors);
    let mut encoder = context.device().create_command_encoder(&Default::default());
    let prepared = context.merge_states(&mut encoder, &buffers.call(&tensors)).unwrap();
    context.queue().submit([encoder.finish()]);
    let behind = |buffer: &Buffer| read(context, buffer)[4 * BEFORE..].to_vec();
    let mut out = behind(&buffers.out);
    let (expected_len, lse_len) = (tensors.outputs().0.len(), tensors.outputs().1.len());
    assert!(out[expected_len..].iter().all(|&byte| byte == 0xff), "{case}: written past the output");
    out.truncate(expected_len);
    let lse: Vec<f32> = behind(&buffers.lse).as_chunks().0.iter().map(|x| f32::from_le_bytes(*x)).collect();
    let error = tensors.compare(&out, &lse[..lse_len])?;
    Ok((prepared.variant().to_owned(), error))
}

fn parse(line: &str) -> Option<MergeCase> {
    let mut words = line.split_whitespace();
    let (part, out) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    Some(MergeCase { part, out, unit: words.next()?.parse().ok()?, seed: words.next()?.parse().ok()? })
}

#[test]
fn random_cases_agree_with_the_definition() {
    for (adapter, context) in contexts() {
        let run = |case: &MergeCase| {
            check(&context, case)
                .unwrap_or_else(|error| panic!("PAGEWISE_CASE=\"{case}\" on {adapter}: {error}"))
        };
        if let Ok(line) = std::env::var("PAGEWISE_CASE") {
            run(&parse(&line).expect("PAGEWISE_CASE is PART OUT UNIT SEED"));
            continue;
        }
        let mut random = Random::new(run_seed());
        let (mut variants, mut worst, mut ran) = (BTreeSet::new(), 0.0f64, 0);
        for (part, out) in TYPES.into_iter().flat_map(|part| TYPES.map(|out| (part, out))) {
            for unit in [4, 2, 1] {
                if unit == 1 && (part, out) != (DType::F32, DType::F32) {
                    continue;
                }
                for _ in 0..run_cases(8) {
                    let (variant, error) = run(&MergeCase { part, out, unit, seed: random.next() });
                    variants.insert(variant);
                    worst = worst.max(error);
                    ran += 1;
                }
            }
        }
        eprintln!(
            "{adapter}: {ran} cases agree (worst error {worst:.1e}); {} variants passed",
            variants.len()
        );
        if run_cases(8) >= 8 {
            assert_eq!(variants.len(), 19, "every variant was chosen for some case: {variants:?}");
        }
    }
}

#[test]
fn the_conformance_cases_agree_with_the_oracle() {
    for (adapter, context) in contexts() {
        let mut subject = Wgpu::new(adapter, &context);
        let cases = quick(run_seed() % 1_000_000_000);
        let merges: Vec<_> =
            cases.into_iter().filter(|case| case.operation == Operation::MergeStates).collect();
        assert!(merges.len() >= 4);
        for case in merges {
            let outcome = run_case(&mut subject, &case).outcome;
            assert!(matches!(outcome, Outcome::Passed(_)), "{case}: {outcome:?}");
        }
    }
}

#[test]
fn refusals_are_typed() {
    for (_, context) in contexts().into_iter().take(1) {
        let tensors = MergeCase { part: DType::Bf16, out: DType::F32, unit: 4, seed: 1 }.build();
        let buffers = OnDevice::new(&context, &tensors);
        let call = buffers.call(&tensors);
        context.prepare_merge_states(&call).unwrap();
        let refused = |call: MergeStatesCall<'_>| context.prepare_merge_states(&call).unwrap_err();
        let error = refused(MergeStatesCall { parts: 0, ..call });
        assert!(matches!(error, WgpuError::Problem(ProblemError::Input { input: "parts", .. })), "{error}");
        let error = refused(MergeStatesCall { head_dim: 257, ..call });
        assert!(matches!(error, WgpuError::Problem(ProblemError::HeadDim { value: 257, .. })), "{error}");
        let error = refused(MergeStatesCall { out_dtype: DType::F8E4M3, ..call });
        assert!(matches!(error, WgpuError::UnsupportedDType { .. }), "{error}");
        let error = refused(MergeStatesCall { out: call.part_out, ..call });
        assert!(matches!(error, WgpuError::SharedBuffer { written: "out", .. }), "{error}");
        let error = refused(MergeStatesCall { part_out_stride: 1 << 40, parts: 2, ..call });
        assert!(matches!(error, WgpuError::Problem(ProblemError::BufferTooShort { .. })), "{error}");
        let odd =
            BufferRange { offset: call.part_out.offset + 2, size: call.part_out.size - 4, ..call.part_out };
        let error = refused(MergeStatesCall { part_out: odd, rows: 1, ..call });
        assert!(matches!(error, WgpuError::Alignment { .. }), "{error}");
    }
}
