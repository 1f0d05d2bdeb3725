//! `copy_blocks` and `swap_blocks` through wgpu: the conformance suite's cases, and a round trip through buffers that the
//! host maps, on every adapter that is there: software Vulkan at least.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub, reason = "a test")]

#[path = "gpu/random.rs"]
mod random;
#[path = "gpu/wgpu_buffers.rs"]
mod wgpu_buffers;
#[path = "gpu/wgpu_contexts.rs"]
mod wgpu_contexts;

use pagewise_attention::conformance::{Case, Layout, Operation, Outcome, Wgpu, quick, run_case};
use pagewise_attention::wgpu::{BufferRange, SwapBlocksCall, SwapSide, WgpuError, wgpu};
use pagewise_attention::{AttentionConfig, CacheLayout, DType, KvStrides, ProblemError};
use random::{Random, run_cases, run_seed};
use wgpu::{Buffer, BufferUsages};
use wgpu_buffers::{buffer, mapped};
use wgpu_contexts::{contexts, plain_contexts};

/// Random cases of each operation.
const CASES: usize = 30;

const TYPES: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];

fn block_case(random: &mut Random, operation: Operation) -> Case {
    let dtype = random.pick(&TYPES);
    let head_dim_qk = 2 * (1 + random.below(64));
    let shorter = 2 * (1 + random.below(head_dim_qk / 2));
    Case {
        operation,
        q_dtype: dtype,
        kv_dtype: dtype,
        q_heads: 6,
        kv_heads: random.pick(&[1, 2, 3, 6]),
        head_dim_qk,
        head_dim_v: random.pick(&[head_dim_qk, shorter]),
        block_size: random.pick(&[1, 2, 8, 16, 16, 64]),
        layout: random.pick(&[Layout::Nhd, Layout::Hnd, Layout::Gaps, Layout::Interleaved]),
        count: if random.one_in(6) { 0 } else { 1 + random.below(11) },
        seed: random.next() % 1_000_000_000,
        ..Case::default()
    }
}

#[test]
fn random_cases_and_the_suites_agree() {
    for (adapter, context) in contexts().into_iter().chain(plain_contexts()) {
        let mut subject = Wgpu::new(adapter, &context);
        let mut random = Random::new(run_seed());
        let (mut ran, mut skipped) = (0, 0);
        for operation in [Operation::CopyBlocks, Operation::SwapBlocks] {
            let own = (0..run_cases(CASES)).map(|_| block_case(&mut random, operation));
            let mut cases: Vec<_> = own.collect();
            cases.extend(quick(random.next()).into_iter().filter(|case| case.operation == operation));
            for case in cases {
                match run_case(&mut subject, &case).outcome {
                    Outcome::Passed(_) => ran += 1,
                    // Odd strides of 16-bit caches, and fp8.
                    Outcome::Skipped(_) => skipped += 1,
                    Outcome::Failed(reason) => panic!("{case}: {reason}"),
                }
            }
        }
        assert!(ran > 3 * skipped, "{ran} ran, {skipped} were skipped");
    }
}

/// The bytes of block `block`, one row after the other.
fn block_bytes(bytes: &[u8], config: &AttentionConfig, layout: &CacheLayout, block: u32) -> Vec<u8> {
    let size = config.kv_dtype.size();
    let KvStrides { block: stride, token, head } = layout.k;
    let rows = (0..layout.block_size).flat_map(|t| (0..config.kv_heads).map(move |h| (t as u64, h as u64)));
    rows.flat_map(|(t, h)| {
        let at = (u64::from(block) * stride + t * token + h * head) as usize * size;
        bytes[at..at + config.head_dim_qk * size].to_vec()
    })
    .collect()
}

#[test]
fn blocks_go_out_to_the_host_and_come_back() {
    for (_, context) in contexts() {
        let mut random = Random::new(run_seed());
        let config = AttentionConfig::new(4, 2, 40, DType::Bf16);
        let (device, host) = (CacheLayout::hnd(7, 16, &config), CacheLayout::nhd(5, 16, &config));
        let mut bytes = |layout: &CacheLayout| -> Vec<u8> {
            (0..2 * layout.k_extent(&config)).map(|_| random.below(256) as u8).collect()
        };
        let cache_usage = BufferUsages::STORAGE | BufferUsages::COPY_SRC | BufferUsages::COPY_DST;
        let (k, v) = (bytes(&device), bytes(&device));
        let caches = [&k, &v].map(|bytes| buffer(&context, bytes, cache_usage));
        let poison = vec![0xff; 2 * host.k_extent(&config) as usize];
        let out =
            [(); 2].map(|()| buffer(&context, &poison, BufferUsages::MAP_READ | BufferUsages::COPY_DST));
        fn side<'a>(layout: &'a CacheLayout, buffers: &'a [Buffer; 2]) -> SwapSide<'a> {
            SwapSide { layout, k: BufferRange::whole(&buffers[0]), v: BufferRange::whole(&buffers[1]) }
        }
        let swap = |from, to, pairs: &[(u32, u32)]| {
            let call = SwapBlocksCall { config: &config, from, to, pairs };
            let mut encoder = context.device().create_command_encoder(&Default::default());
            context.swap_blocks(&mut encoder, &call)?;
            context.queue().submit([encoder.finish()]);
            Ok::<(), WgpuError>(())
        };
        swap(side(&device, &caches), side(&host, &out), &[(6, 0), (0, 4), (3, 2)]).unwrap();
        let host_bytes = [&out[0], &out[1]].map(|buffer| mapped(&context, buffer));
        for (before, after) in [&k, &v].into_iter().zip(&host_bytes) {
            for (from, to) in [(6, 0), (0, 4), (3, 2)] {
                let expected = block_bytes(before, &config, &device, from);
                assert_eq!(block_bytes(after, &config, &host, to), expected);
            }
            // What no pair names is as it was.
            assert!(block_bytes(after, &config, &host, 1).iter().all(|&byte| byte == 0xff));
        }
        let usage = BufferUsages::MAP_WRITE | BufferUsages::COPY_SRC;
        let back = [&host_bytes[0], &host_bytes[1]].map(|bytes| buffer(&context, bytes, usage));
        let fresh = [&k, &v].map(|bytes| buffer(&context, &vec![0; bytes.len()], cache_usage));
        swap(side(&host, &back), side(&device, &fresh), &[(0, 6), (4, 0), (2, 3)]).unwrap();
        let readable = [(); 2]
            .map(|()| buffer(&context, &vec![0; k.len()], BufferUsages::MAP_READ | BufferUsages::COPY_DST));
        let all: Vec<(u32, u32)> = (0..7).map(|block| (block, block)).collect();
        swap(side(&device, &fresh), side(&device, &readable), &all).unwrap();
        for (before, buffer) in [&k, &v].into_iter().zip(&readable) {
            let after = mapped(&context, buffer);
            for block in 0..7 {
                let expected = block_bytes(before, &config, &device, block);
                let moved = [0, 3, 6].contains(&block);
                let found = block_bytes(&after, &config, &device, block);
                assert!(if moved { found == expected } else { found.iter().all(|&byte| byte == 0) });
            }
        }

        // Refusals: the same buffer, a missing usage, another block size, a block past the end.
        let error = swap(side(&device, &caches), side(&device, &caches), &[]).unwrap_err();
        assert!(matches!(error, WgpuError::SharedBuffer { .. }), "{error}");
        let error = swap(side(&host, &out), side(&device, &caches), &[]).unwrap_err();
        assert!(matches!(error, WgpuError::Usage { usage: "COPY_SRC", .. }), "{error}");
        let other = CacheLayout::nhd(5, 8, &config);
        let error = swap(side(&device, &caches), side(&other, &out), &[]).unwrap_err();
        assert!(matches!(error, WgpuError::Problem(ProblemError::Input { .. })), "{error}");
        let error = swap(side(&device, &caches), side(&host, &out), &[(7, 0)]).unwrap_err();
        assert!(matches!(error, WgpuError::Problem(ProblemError::Input { input: "pairs", .. })), "{error}");
    }
}
