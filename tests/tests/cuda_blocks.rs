//! `copy_blocks` and `swap_blocks` on an NVIDIA GPU against plain code and the conformance suite: whole caches, byte for
//! byte. Skipped, loudly, without one.
//!
//! One case again: `PAGEWISE_BLOCKS_CASE="bf16 8 true 1234" cargo test -p pagewise-tests --test cuda_blocks`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    unreachable_pub,
    dead_code,
    reason = "a test"
)]

#[path = "gpu/blocks.rs"]
mod blocks;
#[path = "gpu/cuda.rs"]
mod cuda;
#[path = "gpu/cuda_machine.rs"]
mod cuda_machine;
#[path = "gpu/cuda_subject.rs"]
mod cuda_subject;
#[path = "gpu/encode.rs"]
mod encode;
#[path = "gpu/machine.rs"]
mod machine;
#[path = "gpu/merge.rs"]
mod merge;
#[path = "gpu/random.rs"]
mod random;
#[path = "gpu/rotary.rs"]
mod rotary;
#[path = "gpu/slice_cache.rs"]
mod slice_cache;
#[path = "gpu/swap.rs"]
mod swap;
#[path = "gpu/write_kv.rs"]
mod write_kv;

use blocks::{BlocksCase, compare_bytes, wanted_blocks_case};
use cuda::Receipts;
use cuda_machine::Gpu;
use cuda_subject::{pair_bytes, pinned};
use cudarc::driver::CudaSlice;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use machine::check_blocks;
use pagewise_attention::conformance::{AttentionData, Case, Operation, Outcome, Subject, quick, run_case};
use pagewise_attention::conformance::{Cuda, Pinned};
use pagewise_attention::cuda::ptx::all_kernels;
use pagewise_attention::cuda::{
    BlocksWorkspace, CacheBlocks, CopyBlocksCall, CopyBlocksSlices, CudaError, HostCache, LayerAddresses,
    LayerSlices, SwapBlocksCall, SwapBlocksSlices, SwapDirection, SwapMethod, cudarc,
};
use pagewise_attention::{CacheLayout, DType, ProblemError};
use random::{Random, run_cases, run_seed};
use slice_cache::{SliceCache, bits};
use swap::{METHODS, address, check_swap};

#[test]
fn random_cases_move_every_byte_and_no_other() {
    let Some(context) = cuda::context() else { return };
    let mut machine = Gpu::new(&context);
    if let Some(case) = wanted_blocks_case() {
        check_blocks(&mut machine, &case).unwrap();
        return;
    }
    let mut receipts = Receipts::default();
    let kernels = all_kernels().unwrap();
    let mut random = Random::new(run_seed());
    for dtype in DType::ALL {
        for unit in [16 / dtype.size(), 4, 1] {
            for turn in 0..run_cases(20) {
                let case = BlocksCase { dtype, unit, within: turn % 2 == 0, seed: random.next() };
                let (variant, error) =
                    check_blocks(&mut machine, &case).unwrap_or_else(|error| panic!("{error}"));
                let kernel = kernels.iter().find(|kernel| kernel.entry() == variant).unwrap();
                receipts.passed(&context, kernel, error);
            }
        }
    }
    let checked = receipts.variants().count();
    eprintln!("{}: {checked} variants passed", context.device());
    if run_cases(20) >= 20 {
        assert_eq!(checked, 4, "every variant was chosen for some case");
    }
    receipts.write("copy_blocks");
}

#[test]
fn the_conformance_cases_agree() {
    let Some(context) = cuda::context() else { return };
    let mut subject = cuda_subject::subject(&context);
    let is_ours = |case: &Case| matches!(case.operation, Operation::CopyBlocks | Operation::SwapBlocks);
    let cases: Vec<_> = quick(run_seed() % 1_000_000_000).into_iter().filter(is_ours).collect();
    assert!(cases.len() >= 8);
    for method in METHODS {
        subject.swap = method;
        for case in &cases {
            let outcome = run_case(&mut subject, case).outcome;
            assert!(matches!(outcome, Outcome::Passed(_)), "{case}, {method:?}: {outcome:?}");
        }
    }
    eprintln!("{}: {} cases agree", context.device(), cases.len());
}

#[test]
fn swaps_move_the_same_bytes_by_engines_and_kernel_both_ways() {
    let Some(context) = cuda::context() else { return };
    let engine = context.cudarc().unwrap();
    // The engines' batches are not for the default stream.
    let streams = [engine.default_stream(), engine.new_stream().unwrap()];
    let mut random = Random::new(run_seed());
    let mut cases = 0;
    for dtype in DType::ALL {
        for unit in [16 / dtype.size(), 1] {
            for _ in 0..run_cases(4) {
                let case = BlocksCase { dtype, unit, within: false, seed: random.next() };
                let tensors = case.build();
                for (stream, method, out) in streams.iter().flat_map(|stream| {
                    METHODS.into_iter().flat_map(move |method| [true, false].map(|out| (stream, method, out)))
                }) {
                    check_swap(&context, stream, &tensors, method, out)
                        .unwrap_or_else(|error| panic!("{case}, {method:?}, out {out}: {error}"));
                    cases += 1;
                }
            }
        }
    }
    eprintln!("{}: {cases} swaps agree", context.device());
}

/// A call over one layer that is nowhere: for what is refused before anything is done.
fn with_call<R>(test: impl Fn(CopyBlocksCall<'_>, SwapBlocksCall<'_>) -> R) -> R {
    let tensors = BlocksCase { dtype: DType::Bf16, unit: 8, within: false, seed: 3 }.build();
    let layers: Vec<LayerAddresses> =
        tensors.sides.iter().map(|side| side.layers(&vec![0; side.buffers.len()])).collect();
    test(tensors.call(&layers, &[0, 0], 0, 0), tensors.swap(&layers, &[], SwapMethod::CopyEngines))
}

#[test]
fn refusals_are_typed() {
    with_call(|call, _| {
        assert!(call.variant().is_ok());
        let refused = |call: CopyBlocksCall<'_>| call.variant().unwrap_err();
        let other = CacheLayout { block_size: 2 * call.to.layout.block_size, ..*call.to.layout };
        let error = refused(CopyBlocksCall { to: CacheBlocks { layout: &other, ..call.to }, ..call });
        // Twice the tokens overlap first, unless the layout has room for them.
        assert!(matches!(error, CudaError::Problem(_)), "{error}");
        let none = LayerAddresses::default();
        let error = refused(CopyBlocksCall { to: CacheBlocks { layers: &none, ..call.to }, ..call });
        assert!(matches!(error, CudaError::Problem(ProblemError::Input { input: "layers", .. })), "{error}");
        let error = refused(CopyBlocksCall { to: CacheBlocks { table: 4, ..call.to }, ..call });
        assert!(matches!(error, CudaError::Misaligned { size: 8, .. }), "{error}");
    });
    let Some(context) = cuda::context() else { return };
    let stream = context.cudarc().unwrap().default_stream();
    with_call(|_, swap| {
        let (from, to) = (swap.from.layout.num_blocks as u32, swap.to.layout.num_blocks as u32);
        for (pairs, says) in [
            (&[(from, 0)][..], "blocks to read"),
            (&[(0, to)][..], "to write"),
            (&[(0, 1), (1, 1)][..], "block 1 is written twice"),
        ] {
            let call = SwapBlocksCall { pairs, ..swap };
            // SAFETY: nothing is touched when a call is refused.
            let error =
                unsafe { context.swap_blocks_raw(&call, stream.cu_stream().into()) }.unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    });
    let not_pinned = [0u8; 64];
    let error = context.pinned_address(not_pinned.as_ptr()).unwrap_err();
    assert!(matches!(error, CudaError::NotPinned { .. }), "{error}");
}

#[test]
fn slices_are_copied_and_swapped() {
    let Some(context) = cuda::context() else { return };
    let stream = context.cudarc().unwrap().new_stream().unwrap();
    let mut random = Random::new(run_seed());
    let mut cache = SliceCache::new(&mut random, 12, 3);
    let mut device = cache.upload(&stream);
    let mut workspace = BlocksWorkspace::new(&stream, 3, 4).unwrap();
    let (config, layout) = (cache.config.clone(), cache.layout);
    let len = layout.k_extent(&config) as usize;
    // SAFETY: written before it is read.
    let mut pinned =
        unsafe { context.cudarc().unwrap().alloc_pinned_with_flags::<half::bf16>(6 * len, 0) }.unwrap();
    pinned.as_mut_slice().unwrap().fill(half::bf16::NAN);
    let starts: Vec<_> = (0..3).map(|layer| (2 * layer * len, (2 * layer + 1) * len)).collect();

    fn layers<'a>(
        device: &'a mut [(CudaSlice<half::bf16>, CudaSlice<half::bf16>)],
    ) -> Vec<LayerSlices<'a, half::bf16>> {
        device
            .iter_mut()
            .map(|(k, v)| LayerSlices::Apart { k: k.as_view_mut(), v: v.as_view_mut() })
            .collect()
    }
    let copies = [(3, 7), (3, 8), (0, 11)];
    let mut slices = layers(&mut device);
    let copy = CopyBlocksSlices { config: &config, layout: &layout, layers: &mut slices, pairs: &copies };
    context.copy_blocks(&stream, &mut workspace, copy).unwrap();
    cache.copy(&copies);
    // Out and in again, to other blocks, by each method.
    for method in METHODS {
        for (direction, pairs) in
            [(SwapDirection::Out, [(3, 5), (9, 0)]), (SwapDirection::In, [(5, 1), (0, 2)])]
        {
            let host = HostCache { layout: &layout, memory: &mut pinned, starts: &starts };
            let swap = SwapBlocksSlices {
                config: &config,
                layout: &layout,
                layers: &mut slices,
                host,
                pairs: &pairs,
                method,
            };
            context.swap_blocks(&stream, &mut workspace, direction, swap).unwrap();
        }
    }
    cache.copy(&[(3, 1), (9, 2)]);
    drop(slices);
    for ((k, v), (expected_k, expected_v)) in device.iter().zip(&cache.host) {
        assert!(bits(&stream.clone_dtoh(k).unwrap()) == bits(expected_k), "K");
        assert!(bits(&stream.clone_dtoh(v).unwrap()) == bits(expected_v), "V");
    }

    // What is refused.
    let mut slices = layers(&mut device);
    let mut refused = |layout: &CacheLayout, pairs: &[(u32, u32)], workspace: &mut BlocksWorkspace| {
        let copy = CopyBlocksSlices { config: &config, layout, layers: &mut slices, pairs };
        context.copy_blocks(&stream, workspace, copy).unwrap_err().to_string()
    };
    let larger = CacheLayout { num_blocks: 13, ..layout };
    for (layout, pairs, says) in [
        (&layout, &[(0, 1), (1, 2)][..], "block 1 is read and written"),
        (&layout, &[(0, 2), (1, 2)][..], "block 2 is written twice"),
        (&layout, &[(0, 12)][..], "12 blocks to read"),
        (&larger, &[(0, 1)][..], "the K cache"),
        (&layout, &[(0, 1), (0, 2), (0, 3), (0, 4), (0, 5)][..], "the workspace's pairs"),
    ] {
        let error = refused(layout, pairs, &mut workspace);
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn a_graph_copies_as_many_pairs_as_stand_in_device_memory() {
    let Some(context) = cuda::context() else { return };
    let stream = context.cudarc().unwrap().new_stream().unwrap();
    let mut random = Random::new(run_seed());
    // A case of which every pair names blocks.
    let tensors = std::iter::repeat_with(|| {
        BlocksCase { dtype: DType::F16, unit: 8, within: true, seed: random.next() }.build()
    })
    .find(|tensors| tensors.pairs.len() >= 3 && tensors.named(&tensors.pairs).len() == tensors.pairs.len())
    .unwrap();
    let side = &tensors.sides[0];
    let upload = || -> Vec<CudaSlice<u8>> {
        side.buffers.iter().map(|bytes| stream.clone_htod(bytes).unwrap()).collect()
    };
    let mut slices = upload();
    let addresses: Vec<u64> = slices.iter().map(|slice| address(slice, &stream)).collect();
    let layers = [side.layers(&addresses)];
    let table = stream.clone_htod(layers[0].words()).unwrap();
    let pairs = stream.clone_htod(&tensors.pair_bytes()).unwrap();
    let mut count = stream.clone_htod(&[0u32]).unwrap();
    let call = tensors.call(
        &layers,
        &[address(&table, &stream)],
        address(&pairs, &stream),
        address(&count, &stream),
    );
    context.prepare_copy_blocks(&call).unwrap();
    stream.synchronize().unwrap();
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    // SAFETY: all addresses are those of live slices that hold what shapes and strides reach.
    unsafe { context.copy_blocks_raw(&call, stream.cu_stream().into()) }.unwrap();
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags).unwrap().unwrap();
    for pairs in [0, 1, 2, tensors.pairs.len(), tensors.pairs.len() + 5] {
        for (slice, bytes) in slices.iter_mut().zip(&side.buffers) {
            stream.memcpy_htod(bytes, slice).unwrap();
        }
        stream.memcpy_htod(&[pairs as u32], &mut count).unwrap();
        graph.launch().unwrap();
        let found: Vec<Vec<u8>> = slices.iter().map(|slice| stream.clone_dtoh(slice).unwrap()).collect();
        let named = tensors.named(&tensors.pairs[..pairs.min(tensors.pairs.len())]);
        compare_bytes(&tensors.expected_of(&named), &found).unwrap();
    }
}

/// Copies and swaps of other blocks go on beside decode on another stream; both give what they give alone.
#[test]
fn copies_overlap_with_decode_on_another_stream() {
    let Some(context) = cuda::context() else { return };
    let line =
        "attention q=bf16 kv=bf16 heads=8/2 dim=128 block=16 mask=causal sequences=1:3000,1:700,1:90,1:1500";
    let case = Case { seed: run_seed() % 1_000_000_000, ..line.parse().unwrap() };
    let data = AttentionData::generate(&case);
    let mut subject = cuda_subject::subject(&context);
    let decode = |subject: &mut Cuda<'_>| {
        let mut out = data.poisoned_out();
        subject.attention(&data.task().unwrap(), out.as_mut(), None).unwrap();
        (0..out.len()).map(|i| out.bits(i)).collect::<Vec<u32>>()
    };
    let alone = decode(&mut subject);

    let engine = context.cudarc().unwrap();
    let stream = engine.new_stream().unwrap();
    let mut random = Random::new(run_seed());
    let cache = SliceCache::new(&mut random, 400, 4);
    let pairs: Vec<(u32, u32)> = (0..200).map(|block| (block, 399 - block)).collect();
    let device = cache.upload(&stream);
    let bytes = 2 * cache.host[0].0.len();
    let pinned: Vec<Pinned> = (0..8).map(|_| pinned(&context, &vec![0; bytes])).collect();
    let on_device =
        LayerAddresses::new(device.iter().map(|(k, v)| (address(k, &stream), address(v, &stream))));
    let on_host = LayerAddresses::new(pinned.as_chunks::<2>().0.iter().map(|[k, v]| (k.address, v.address)));
    let tables = [&on_device, &on_host].map(|layers| stream.clone_htod(layers.words()).unwrap());
    let device_pairs = stream.clone_htod(&pair_bytes(&pairs)).unwrap();
    let side = |layers, at: usize| CacheBlocks {
        layout: &cache.layout,
        layers,
        table: address(&tables[at], &stream),
    };
    let swap = |method| SwapBlocksCall {
        config: &cache.config,
        from: side(&on_device, 0),
        to: side(&on_host, 1),
        pairs: &pairs,
        device_pairs: address(&device_pairs, &stream),
        method,
    };
    let copy = CopyBlocksCall {
        config: &cache.config,
        from: side(&on_device, 0),
        to: side(&on_device, 0),
        pairs: pagewise_attention::cuda::BlockPairs {
            address: address(&device_pairs, &stream),
            number_type: pagewise_attention::cuda::BlockNumberType::I32,
            count: pairs.len(),
            count_at: 0,
        },
        thread_blocks: None,
        tuning: None,
    };
    for method in METHODS {
        context.prepare_swap_blocks(&swap(method)).unwrap();
    }
    context.prepare_copy_blocks(&copy).unwrap();
    for turn in 0..run_cases(12) {
        for _ in 0..10 {
            // SAFETY: all addresses are those of live memory that holds what shapes and strides reach, and this stream
            // alone uses it.
            unsafe {
                context.copy_blocks_raw(&copy, stream.cu_stream().into()).unwrap();
                context.swap_blocks_raw(&swap(METHODS[turn % 3]), stream.cu_stream().into()).unwrap();
            }
        }
        assert!(decode(&mut subject) == alone, "{case}: decode beside copies gives other bits");
    }
    stream.synchronize().unwrap();
    let mut expected = cache.clone();
    expected.copy(&pairs);
    for (layer, (k, v)) in expected.host.iter().enumerate() {
        let (device_k, device_v) = &device[layer];
        assert!(bits(&stream.clone_dtoh(device_k).unwrap()) == bits(k), "K of layer {layer}");
        assert!(bits(&stream.clone_dtoh(device_v).unwrap()) == bits(v), "V of layer {layer}");
        for (tensor, host) in [(k, &pinned[2 * layer]), (v, &pinned[2 * layer + 1])] {
            // Blocks 200 to 399 were swapped out; the others are as they were.
            let first = 2 * cache.block(200).start;
            let bytes: Vec<u8> = tensor.iter().flat_map(|number| number.to_le_bytes()).collect();
            assert!(host.bytes().unwrap()[first..] == bytes[first..], "host memory of layer {layer}");
            assert!(
                host.bytes().unwrap()[..first].iter().all(|&byte| byte == 0),
                "host memory of layer {layer}"
            );
        }
    }
    eprintln!("{}: decode and copies agree with what they give alone", context.device());
}
