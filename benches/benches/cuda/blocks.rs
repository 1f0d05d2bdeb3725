//! `copy_blocks` against a device copy, and `swap_blocks` by both methods against one long copy over the link.
//!
//! The shape is a model of 32 layers with 8 KV heads of 128 bf16 elements (LLaMA 3 8B) and blocks of 16 tokens: 2 MiB a
//! block over all layers, in 64 runs of 32 KiB; each layer's K and V is an allocation of its own.

use std::sync::Arc;
use std::time::Instant;

use cudarc::driver::sys::CUevent_flags;
use cudarc::driver::{CudaSlice, CudaStream, PinnedHostSlice};
use pagewise_attention::cuda::ptx::copy_blocks::CopyBlocksTuning;
use pagewise_attention::cuda::{
    BlockNumberType, BlockPairs, CacheBlocks, CopyBlocksCall, LayerAddresses, SwapBlocksCall, SwapMethod,
    cudarc,
};
use pagewise_attention::{AttentionConfig, CacheLayout, DType};
use serde_json::{Value, json};

use crate::gpu::{Gpu, Random};

const LAYERS: usize = 32;
const BLOCK: usize = 16;
const DEVICE_BLOCKS: usize = 1024;
const HOST_BLOCKS: usize = 256;
/// Bytes of a block over all layers.
const BLOCK_BYTES: usize = LAYERS * 2 * BLOCK * 8 * 128 * 2;

fn config() -> AttentionConfig {
    AttentionConfig::new(32, 8, 128, DType::Bf16)
}

/// The caches of all layers on the device.
struct Caches {
    config: AttentionConfig,
    layout: CacheLayout,
    tensors: Vec<CudaSlice<u8>>,
    layers: LayerAddresses,
    table: CudaSlice<u64>,
}

impl Caches {
    fn new(gpu: &Gpu<'_>) -> Self {
        let config = config();
        let layout = CacheLayout::nhd(DEVICE_BLOCKS, BLOCK, &config);
        let extent = layout.k_extent(&config) as usize;
        let tensors: Vec<_> = (0..2 * LAYERS).map(|_| gpu.filled(DType::Bf16, extent)).collect();
        let addresses = tensors.as_chunks::<2>().0.iter().map(|[k, v]| (gpu.address(k), gpu.address(v)));
        let layers = LayerAddresses::new(addresses);
        let table = gpu.stream.clone_htod(layers.words()).unwrap();
        Self { config, layout, tensors, layers, table }
    }

    fn side<'a>(&'a self, gpu: &Gpu<'_>) -> CacheBlocks<'a> {
        CacheBlocks { layout: &self.layout, layers: &self.layers, table: gpu.address(&self.table) }
    }

    /// What a block holds on the device, of one tensor.
    fn block(&self, gpu: &Gpu<'_>, tensor: usize, block: u32) -> Vec<u8> {
        let len = self.layout.k.block as usize * 2;
        gpu.stream
            .clone_dtoh(&self.tensors[tensor].slice(block as usize * len..(block as usize + 1) * len))
            .unwrap()
    }

    fn copy_call<'a>(
        &'a self,
        gpu: &Gpu<'_>,
        pairs: u64,
        count: usize,
        tuning: Option<CopyBlocksTuning>,
    ) -> CopyBlocksCall<'a> {
        CopyBlocksCall {
            config: &self.config,
            from: self.side(gpu),
            to: self.side(gpu),
            pairs: BlockPairs { address: pairs, number_type: BlockNumberType::I32, count, count_at: 0 },
            thread_blocks: None,
            tuning,
        }
    }
}

/// GB/s, read and written together, of the driver's device copy of so many bytes, in pieces that do not repeat.
fn device_copy(gpu: &Gpu<'_>, bytes: usize) -> f64 {
    let sets = ((512 << 20) / bytes).clamp(1, 64);
    let source = gpu.filled(DType::Bf16, sets * bytes / 2);
    let mut target = gpu.filled(DType::Bf16, sets * bytes / 2);
    let us = gpu.time(sets.max(2), |set| {
        let range = set % sets * bytes..(set % sets + 1) * bytes;
        let mut target = target.slice_mut(range.clone());
        gpu.stream.memcpy_dtod(&source.slice(range), &mut target).unwrap();
    });
    2.0 * bytes as f64 / us / 1e3
}

/// Random pairs whose sources and targets are disjoint, as i32 in device memory: `sets` times `count` of them.
fn copy_pairs(gpu: &Gpu<'_>, count: usize) -> (CudaSlice<i32>, usize, Vec<(u32, u32)>) {
    let order = Random(5).permutation(DEVICE_BLOCKS);
    let sets = (DEVICE_BLOCKS / 2 / count).clamp(1, 64);
    let pairs: Vec<(u32, u32)> =
        (0..sets * count).map(|i| (order[i] as u32, order[DEVICE_BLOCKS / 2 + i] as u32)).collect();
    let flat: Vec<i32> = pairs.iter().flat_map(|&(from, to)| [from as i32, to as i32]).collect();
    (gpu.stream.clone_htod(&flat).unwrap(), sets, pairs)
}

/// µs of one copy of `count` blocks, checked first.
fn copy_us(gpu: &Gpu<'_>, caches: &Caches, count: usize, tuning: Option<CopyBlocksTuning>) -> f64 {
    let (device_pairs, sets, pairs) = copy_pairs(gpu, count);
    let call = |set: usize| {
        let first = gpu.address(&device_pairs) + (8 * count * (set % sets)) as u64;
        caches.copy_call(gpu, first, count, tuning)
    };
    gpu.context.prepare_copy_blocks(&call(0)).unwrap();
    let us = gpu.time(sets.max(4), |set| {
        // SAFETY: all addresses are those of live slices that hold what shapes and strides reach; pairs are disjoint.
        unsafe { gpu.context.copy_blocks_raw(&call(set), gpu.raw_stream()) }.unwrap();
    });
    for &(from, to) in [pairs.first(), pairs.get(count - 1), pairs.last()].into_iter().flatten() {
        for tensor in [0, 1, 2 * LAYERS - 1] {
            assert!(caches.block(gpu, tensor, from) == caches.block(gpu, tensor, to), "block {from} to {to}");
        }
    }
    us
}

pub fn copy_blocks(gpu: &Gpu<'_>) -> Value {
    let caches = Caches::new(gpu);
    let best_copy = device_copy(gpu, 512 << 20);
    let rows: Vec<Value> = [1usize, 4, 16, 64, 256]
        .into_iter()
        .map(|count| {
            let us = copy_us(gpu, &caches, count, None);
            let bytes = count * BLOCK_BYTES;
            let (rate, same) = (2.0 * bytes as f64 / us / 1e3, device_copy(gpu, bytes));
            println!(
                "copy_blocks {count:3} blocks, {:6.1} MB: {us:7.1} us, {rate:4.0} GB/s read + written; device copies: of as many bytes {same:.0} GB/s ({:.0}%), of 512 MiB {best_copy:.0} GB/s ({:.0}%)",
                bytes as f64 / 1e6,
                100.0 * rate / same,
                100.0 * rate / best_copy
            );
            json!({ "blocks": count, "us": us, "gb_s": rate, "same_copy_gb_s": same, "of_copy": rate / best_copy })
        })
        .collect();
    json!({ "copy_gb_s": best_copy, "rows": rows })
}

/// Other tunings of the copy.
pub fn sweep(gpu: &Gpu<'_>) -> Vec<Value> {
    let caches = Caches::new(gpu);
    let mut results = Vec::new();
    for count in [1usize, 16, 256] {
        let mut tried = Vec::new();
        for threads in [64, 128, 256, 512] {
            for in_flight in [1, 2, 4, 8] {
                let tuning = CopyBlocksTuning { threads, in_flight };
                let us = copy_us(gpu, &caches, count, Some(tuning));
                results.push(
                    json!({ "copy_blocks": count, "threads": threads, "in_flight": in_flight, "us": us }),
                );
                tried.push((us, tuning));
            }
        }
        tried.sort_by(|a, b| a.0.total_cmp(&b.0));
        let usual = tried.iter().find(|(_, tuning)| *tuning == CopyBlocksTuning::default()).unwrap().0;
        println!(
            "copy_blocks {count} blocks: {usual:.1} us as chosen, x{:.3} of the best",
            usual / tried[0].0
        );
        tried.iter().for_each(|(us, tuning)| println!("  {us:8.1} us {tuning:?}"));
    }
    results
}

/// The caches of all layers in pinned host memory: one buffer.
struct Host {
    layout: CacheLayout,
    memory: PinnedHostSlice<u8>,
    layers: LayerAddresses,
    table: CudaSlice<u64>,
}

impl Host {
    fn new(gpu: &Gpu<'_>, config: &AttentionConfig) -> Self {
        let layout = CacheLayout::nhd(HOST_BLOCKS, BLOCK, config);
        let bytes = 2 * layout.k_extent(config);
        // SAFETY: filled before it is read.
        let mut memory =
            unsafe { gpu.engine.alloc_pinned_with_flags::<u8>(2 * LAYERS * bytes as usize, 0) }.unwrap();
        let bytes_of_host = memory.as_mut_slice().unwrap();
        bytes_of_host.iter_mut().enumerate().for_each(|(i, byte)| *byte = (i ^ (i >> 15)) as u8);
        let base = gpu.context.pinned_address(memory.as_ptr().unwrap()).unwrap();
        let at = |tensor: usize| base + tensor as u64 * bytes;
        let layers = LayerAddresses::new((0..LAYERS).map(|layer| (at(2 * layer), at(2 * layer + 1))));
        let table = gpu.stream.clone_htod(layers.words()).unwrap();
        Self { layout, memory, layers, table }
    }

    fn side<'a>(&'a self, gpu: &Gpu<'_>) -> CacheBlocks<'a> {
        CacheBlocks { layout: &self.layout, layers: &self.layers, table: gpu.address(&self.table) }
    }

    fn block(&self, tensor: usize, block: u32) -> &[u8] {
        let len = 2 * self.layout.k.block as usize;
        let first = (tensor * HOST_BLOCKS + block as usize) * len;
        &self.memory.as_slice().unwrap()[first..first + len]
    }
}

/// Seconds of work that `issue` puts on streams, the host's part included: the median of seven.
fn seconds(streams: &[&Arc<CudaStream>], mut issue: impl FnMut()) -> f64 {
    let mut times: Vec<f64> = (0..9)
        .map(|_| {
            streams.iter().for_each(|stream| stream.synchronize().unwrap());
            let started = Instant::now();
            issue();
            streams.iter().for_each(|stream| stream.synchronize().unwrap());
            started.elapsed().as_secs_f64()
        })
        // The first two warm up.
        .skip(2)
        .collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// A way to swap, its name, and whether it is measured for every number of blocks.
fn methods() -> Vec<(String, SwapMethod)> {
    let kernel = |blocks: Option<u32>| SwapMethod::Kernel { thread_blocks: blocks };
    let limited = [4u32, 8, 16, 32, 64, 128, 264]
        .map(|blocks| (format!("kernel, {blocks} thread blocks"), kernel(Some(blocks))));
    std::iter::once(("copy engines".to_owned(), SwapMethod::CopyEngines))
        .chain(limited)
        .chain([("kernel, all thread blocks".to_owned(), kernel(Some(u32::MAX >> 1)))])
        .collect()
}

pub fn swap_blocks(gpu: &Gpu<'_>) -> Value {
    let caches = Caches::new(gpu);
    let host = Host::new(gpu, &caches.config);
    // A stream of its own, as an engine would have; batches of copies are not for the default stream anyway.
    let (stream, other) = (&gpu.stream, gpu.engine.new_stream().unwrap());

    // One long copy each way, and both at once.
    let bytes = HOST_BLOCKS * BLOCK_BYTES / 2;
    let long = gpu.filled(DType::Bf16, bytes);
    let base = host.layers.words()[0];
    let copy = |out: bool, on: &Arc<CudaStream>| {
        let half = if out { 0 } else { bytes as u64 };
        let (device, pinned) = (gpu.address(&long) + half, base + half);
        let (to, from) = if out { (pinned, device) } else { (device, pinned) };
        // SAFETY: both ranges are within their buffers.
        let result = unsafe { cudarc::driver::sys::cuMemcpyAsync(to, from, bytes, on.cu_stream()) };
        assert_eq!(result, cudarc::driver::sys::CUresult::CUDA_SUCCESS);
    };
    let rate = |seconds: f64| bytes as f64 / seconds / 1e9;
    let link_out = rate(seconds(&[stream], || copy(true, stream)));
    let link_in = rate(seconds(&[stream], || copy(false, stream)));
    let link_both = rate(seconds(&[stream, &other], || {
        copy(true, stream);
        copy(false, &other);
    }));
    println!(
        "link: one copy of {} MB out {link_out:.1} GB/s, in {link_in:.1} GB/s, both at once {link_both:.1} GB/s each",
        bytes / 1_000_000
    );
    drop(long);

    let order = Random(6).permutation(DEVICE_BLOCKS);
    let places = Random(7).permutation(HOST_BLOCKS);
    let mut rows = Vec::new();
    for count in [1usize, 8, 32, 128] {
        // Out of some blocks to some places; in from other places to other blocks.
        let out: Vec<(u32, u32)> = (0..count).map(|i| (order[i] as u32, places[i] as u32)).collect();
        let back: Vec<(u32, u32)> =
            (0..count).map(|i| (places[128 + i] as u32, order[512 + i] as u32)).collect();
        let flat = |pairs: &[(u32, u32)]| -> Vec<u32> { pairs.iter().flat_map(|&(a, b)| [a, b]).collect() };
        let out_pairs = stream.clone_htod(&flat(&out)).unwrap();
        let back_pairs = stream.clone_htod(&flat(&back)).unwrap();
        for (name, method) in methods() {
            let call = |is_out: bool| SwapBlocksCall {
                config: &caches.config,
                from: if is_out { caches.side(gpu) } else { host.side(gpu) },
                to: if is_out { host.side(gpu) } else { caches.side(gpu) },
                pairs: if is_out { &out } else { &back },
                device_pairs: gpu.address(if is_out { &out_pairs } else { &back_pairs }),
                method,
            };
            let swap = |is_out: bool, on: &Arc<CudaStream>| {
                // SAFETY: all addresses are those of live memory that holds what shapes and strides reach; the blocks of
                // the two directions are disjoint.
                unsafe { gpu.context.swap_blocks_raw(&call(is_out), on.cu_stream().into()) }.unwrap();
            };
            gpu.context.prepare_swap_blocks(&call(true)).unwrap();
            let time_out = seconds(&[stream], || swap(true, stream));
            let time_in = seconds(&[stream], || swap(false, stream));
            let time_both = seconds(&[stream, &other], || {
                swap(true, stream);
                swap(false, &other);
            });
            // The host's part alone.
            let started = Instant::now();
            swap(true, stream);
            let host_us = started.elapsed().as_secs_f64() * 1e6;
            stream.synchronize().unwrap();
            for tensor in [0, 1, 2 * LAYERS - 1] {
                for at in [0, count - 1] {
                    let (block, place) = out[at];
                    assert!(caches.block(gpu, tensor, block) == host.block(tensor, place), "out, {name}");
                    let (place, block) = back[at];
                    assert!(caches.block(gpu, tensor, block) == host.block(tensor, place), "in, {name}");
                }
            }
            let rate = |seconds: f64| (count * BLOCK_BYTES) as f64 / seconds / 1e9;
            let (rate_out, rate_in, rate_both) = (rate(time_out), rate(time_in), rate(time_both));
            println!(
                "swap_blocks {count:3} blocks, {name:25}: out {rate_out:5.1} GB/s ({:3.0}%), in {rate_in:5.1} GB/s ({:3.0}%), both at once {rate_both:5.1} GB/s each; host {host_us:.0} us",
                100.0 * rate_out / link_out,
                100.0 * rate_in / link_in
            );
            rows.push(json!({
                "blocks": count, "method": name, "out_gb_s": rate_out, "in_gb_s": rate_in, "both_gb_s": rate_both,
                "of_link_out": rate_out / link_out, "of_link_in": rate_in / link_in, "host_us": host_us,
            }));
        }
    }
    let beside = beside_copies(gpu, &caches, &host, &order, &other);
    json!({
        "link_out_gb_s": link_out, "link_in_gb_s": link_in, "link_both_gb_s": link_both, "rows": rows,
        "beside_compute": beside,
    })
}

/// How much longer work that fills the memory's bandwidth takes on one stream while swaps go on on another.
fn beside_copies(
    gpu: &Gpu<'_>,
    caches: &Caches,
    host: &Host,
    order: &[i32],
    other: &Arc<CudaStream>,
) -> Vec<Value> {
    // Copies among blocks that no swap touches stand for computing.
    let work: Vec<i32> = (0..64).flat_map(|i| [order[640 + i], order[768 + i]]).collect();
    let work = gpu.stream.clone_htod(&work).unwrap();
    let compute = caches.copy_call(gpu, gpu.address(&work), 64, None);
    let out: Vec<(u32, u32)> = (0..128).map(|i| (order[i] as u32, i as u32)).collect();
    let flat: Vec<u32> = out.iter().flat_map(|&(a, b)| [a, b]).collect();
    let out_pairs = gpu.stream.clone_htod(&flat).unwrap();
    gpu.stream.synchronize().unwrap();
    let run = |method: Option<SwapMethod>| {
        let mut times: Vec<f64> = (0..5)
            .map(|_| {
                if let Some(method) = method {
                    let call = SwapBlocksCall {
                        config: &caches.config,
                        from: caches.side(gpu),
                        to: host.side(gpu),
                        pairs: &out,
                        device_pairs: gpu.address(&out_pairs),
                        method,
                    };
                    // SAFETY: as above; the blocks are others than those of the copies.
                    unsafe { gpu.context.swap_blocks_raw(&call, other.cu_stream().into()) }.unwrap();
                }
                // 20 copies take less time than the swap.
                let event = || gpu.stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).unwrap();
                let start = event();
                for _ in 0..20 {
                    // SAFETY: as above.
                    unsafe { gpu.context.copy_blocks_raw(&compute, gpu.raw_stream()) }.unwrap();
                }
                let end = event();
                let ms = f64::from(start.elapsed_ms(&end).unwrap());
                other.synchronize().unwrap();
                ms
            })
            .collect();
        times.sort_by(f64::total_cmp);
        times[2]
    };
    run(None);
    let alone = run(None);
    methods()
        .into_iter()
        .map(|(name, method)| {
            let slower = run(Some(method)) / alone;
            println!("work beside a swap of 128 blocks by {name}: takes x{slower:.2} of its time");
            json!({ "method": name, "slowdown": slower })
        })
        .collect()
}
