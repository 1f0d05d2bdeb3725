//! Kernels that are no part of a model, on an NVIDIA GPU: the counter against its numbers on the host, `page_read` against
//! a plain exclusive or. Skipped, loudly, without a GPU.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    unreachable_pub,
    dead_code,
    reason = "a test"
)]

#[path = "gpu/cuda.rs"]
mod cuda;
#[path = "gpu/random.rs"]
mod random;

use std::sync::Arc;

use cuda::Receipts;
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DeviceRepr};
use half::{bf16, f16};
use pagewise_attention::cuda::ptx::counter::{Counter, CounterArgs, number};
use pagewise_attention::cuda::ptx::page_read::{PAGE_BYTES, PageRead, PageReadArgs};
use pagewise_attention::cuda::ptx::{Arg, DType, Kernel, Launch};
use pagewise_attention::cuda::{Context, Order, OwnKernel, cudarc};
use random::{Random, run_cases, run_seed};

/// A GPU with one stream.
struct Gpu {
    context: Arc<Context>,
    stream: Arc<CudaStream>,
}

impl Gpu {
    fn new() -> Option<Self> {
        let context = Arc::new(cuda::context()?);
        let stream = context.cudarc().unwrap().default_stream();
        Some(Self { context, stream })
    }

    fn address<T>(&self, slice: &CudaSlice<T>) -> u64 {
        slice.device_ptr(&self.stream).0
    }

    fn upload<T: DeviceRepr>(&self, values: &[T]) -> CudaSlice<T> {
        self.stream.clone_htod(values).unwrap()
    }

    fn run(&self, kernel: &Kernel, launch: Launch, args: &[Arg]) {
        let own = OwnKernel::new(&self.context, kernel).unwrap();
        // SAFETY: the arguments are the descriptor's, and the callers' slices hold what the launch reaches.
        unsafe { own.launch(launch, args, self.stream.cu_stream().into(), Order::Stream) }.unwrap();
        self.stream.synchronize().unwrap();
    }
}

#[test]
fn the_counter_writes_the_numbers_that_the_host_knows() {
    let Some(gpu) = Gpu::new() else { return };
    let mut random = Random::new(run_seed());
    let mut receipts = Receipts::default();
    for dtype in Counter::TYPES {
        let counter = Counter::new(dtype).unwrap();
        for _ in 0..run_cases(8) {
            let (count, seed) = (8 * (1 + random.below(40_000)), random.next() as u32);
            let size = dtype.size() as usize;
            // Behind them poison, which must stay.
            let data = gpu.upload(&vec![0xffu8; (count + 64) * size]);
            let args = CounterArgs { data: gpu.address(&data), count: count as u64, seed };
            gpu.run(counter.kernel(), counter.launch(count as u64).unwrap(), &args.values());
            for (index, bytes) in gpu.stream.clone_dtoh(&data).unwrap().chunks(size).enumerate() {
                if index >= count {
                    assert!(bytes.iter().all(|&byte| byte == 0xff), "{dtype}, {count}: wrote past its end");
                    continue;
                }
                let found = match dtype {
                    DType::F32 => f32::from_le_bytes(bytes.try_into().unwrap()),
                    DType::F16 => f16::from_le_bytes(bytes.try_into().unwrap()).to_f32(),
                    _ => bf16::from_le_bytes(bytes.try_into().unwrap()).to_f32(),
                };
                let expected = number(seed, index as u64);
                assert!(found == expected, "{dtype}, seed {seed}: number {index} is {found}, not {expected}");
            }
            receipts.passed(&gpu.context, counter.kernel(), 0.0);
        }
    }
    receipts.write("counter");
}

#[test]
fn pages_are_all_read_once() {
    let Some(gpu) = Gpu::new() else { return };
    let mut random = Random::new(run_seed());
    let mut receipts = Receipts::default();
    let words = PAGE_BYTES as usize / 4;
    let pages = 300;
    let data: Vec<u32> = (0..pages * words).map(|_| random.next() as u32).collect();
    let on_device = gpu.upload(&data);
    let ticket = gpu.upload(&[0u32]);
    for _ in 0..run_cases(20) {
        let count = 1 + random.below(pages);
        let per_block = 1 + random.below(20) as u32;
        let table: Vec<u32> = (0..count).map(|_| random.below(pages) as u32).collect();
        let read =
            |page: &u32| data[*page as usize * words..][..words].iter().fold(0, |sum, word| sum ^ word);
        let expected = table.iter().map(read).fold(0, |sum, word| sum ^ word);
        for merges in [false, true] {
            let page_read = PageRead::new(merges).unwrap();
            let launch = page_read.launch(count as u32, per_block).unwrap();
            let (device_table, out) = (gpu.upload(&table), gpu.upload(&[0xffff_ffffu32]));
            let partial = gpu.upload(&vec![0xffff_ffffu32; launch.grid[0] as usize]);
            let args = PageReadArgs {
                data: gpu.address(&on_device),
                table: gpu.address(&device_table),
                partial: gpu.address(&partial),
                ticket: gpu.address(&ticket),
                out: gpu.address(&out),
                count: count as u32,
                per_block,
            };
            gpu.run(page_read.kernel(), launch, &args.values());
            let found = gpu.stream.clone_dtoh(&out).unwrap()[0];
            // Without a merge nothing is written, but for one sum of a thread in 2^32.
            let right = if merges { expected } else { 0xffff_ffff };
            assert_eq!(found, right, "{count} pages, {per_block} a thread block, merges: {merges}");
            assert_eq!(gpu.stream.clone_dtoh(&ticket).unwrap(), [0], "the ticket is reset");
            receipts.passed(&gpu.context, page_read.kernel(), 0.0);
        }
    }
    receipts.write("page_read");
}
