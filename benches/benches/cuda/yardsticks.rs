//! What this card can do at best: bytes read in order, and pages read through a table with a merge at the end.

use std::sync::Arc;

use cudarc::driver::{CudaFunction, CudaSlice, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::Ptx;
use pagewise_attention::DType;
use pagewise_attention::cuda::cudarc;
use pagewise_attention::cuda::ptx::page_read::{PAGE_BYTES, PageRead};

use crate::gpu::{Gpu, ROTATION, Random};

/// Measured in this run.
pub struct Yardsticks {
    /// GB/s of reading memory in order.
    pub ceiling: f64,
    /// Bytes and µs of reading pages in random order, merge included.
    pub floor: Vec<(f64, f64)>,
}

impl Yardsticks {
    /// µs of the floor for so many bytes: linear between what was measured, the last rate beyond.
    pub fn floor_us(&self, bytes: f64) -> f64 {
        let above = self.floor.iter().position(|(size, _)| *size >= bytes);
        match above {
            Some(0) => self.floor[0].1,
            Some(i) => {
                let ((x0, y0), (x1, y1)) = (self.floor[i - 1], self.floor[i]);
                y0 + (y1 - y0) * (bytes - x0) / (x1 - x0)
            }
            None => {
                let (size, us) = self.floor[self.floor.len() - 1];
                us * bytes / size
            }
        }
    }
}

struct Reader<'a, 'b> {
    gpu: &'a Gpu<'b>,
    read: (PageRead, CudaFunction),
    merged: (PageRead, CudaFunction),
    data: CudaSlice<u8>,
    partial: CudaSlice<u32>,
    ticket: CudaSlice<u32>,
    out: CudaSlice<u32>,
}

impl Reader<'_, '_> {
    fn launch(&self, merges: bool, table: &CudaSlice<i32>, first: usize, count: usize, per_block: u32) {
        let (descriptor, function) = if merges { &self.merged } else { &self.read };
        let launch = descriptor.launch(count as u32, per_block).unwrap();
        let config = LaunchConfig {
            grid_dim: launch.grid.into(),
            block_dim: launch.block.into(),
            shared_mem_bytes: launch.dynamic_shared,
        };
        let stream = &self.gpu.stream;
        let table = self.gpu.address(table) + 4 * first as u64;
        let addresses = [
            self.gpu.address(&self.data),
            table,
            self.gpu.address(&self.partial),
            self.gpu.address(&self.ticket),
            self.gpu.address(&self.out),
        ];
        let count = count as u32;
        let mut builder = stream.launch_builder(function);
        addresses.iter().for_each(|address| {
            builder.arg(address);
        });
        builder.arg(&count).arg(&per_block);
        // SAFETY: the arguments are in the descriptor's order; table and pages are within their slices.
        unsafe { builder.launch(config) }.unwrap();
    }
}

const BYTES: usize = 4 << 30;
const PAGES: usize = BYTES / PAGE_BYTES as usize;

fn reader<'a, 'b>(gpu: &'a Gpu<'b>) -> Reader<'a, 'b> {
    let load = |merges| {
        let descriptor = PageRead::new(merges).unwrap();
        let module = gpu.engine.load_module(Ptx::from_src(descriptor.kernel().text())).unwrap();
        let function = Arc::clone(&module).load_function(descriptor.kernel().entry()).unwrap();
        (descriptor, function)
    };
    Reader {
        gpu,
        read: load(false),
        merged: load(true),
        data: gpu.filled(DType::Bf16, BYTES / 2),
        partial: gpu.stream.alloc_zeros(PAGES).unwrap(),
        ticket: gpu.stream.alloc_zeros(1).unwrap(),
        out: gpu.stream.alloc_zeros(1).unwrap(),
    }
}

/// GB/s of reading memory in order.
pub fn ceiling(gpu: &Gpu<'_>) -> f64 {
    ceiling_of(&reader(gpu))
}

fn ceiling_of(reader: &Reader<'_, '_>) -> f64 {
    let in_order = reader.gpu.stream.clone_htod(&(0..PAGES as i32).collect::<Vec<_>>()).unwrap();
    let mut ceiling = 0.0f64;
    for per_block in [2, 4, 8, 16, 32, 64] {
        let us = reader.gpu.time(3, |_| reader.launch(false, &in_order, 0, PAGES, per_block));
        ceiling = ceiling.max(BYTES as f64 / us / 1e3);
    }
    println!("read ceiling {ceiling:.0} GB/s");
    ceiling
}

pub fn measure(gpu: &Gpu<'_>) -> Yardsticks {
    let reader = reader(gpu);
    let pages = PAGES;
    let random = gpu.stream.clone_htod(&Random(3).permutation(pages)).unwrap();
    let ceiling = ceiling_of(&reader);

    let mut floor = Vec::new();
    for megabytes in [0.5, 1.0, 4.2, 16.8, 33.6, 67.1, 134.2, 268.4, 536.9, 1073.7, 2147.5, 4294.9] {
        let count = (megabytes * 1e6 / f64::from(PAGE_BYTES)) as usize;
        let sets = (ROTATION / (count * PAGE_BYTES as usize)).clamp(1, (pages / count).min(128));
        let launches = sets.max(4);
        let mut best = (f64::INFINITY, 0);
        for per_block in [1u32, 2, 4, 8, 16, 32, 64, 128, 256] {
            let blocks = (count as u32).div_ceil(per_block);
            // Fewer than half the multiprocessors, or a merge of hundreds of rounds, cannot be best.
            if !(64..=70_000).contains(&blocks) {
                continue;
            }
            let us = gpu.time(launches, |i| reader.launch(true, &random, i % sets * count, count, per_block));
            if us < best.0 {
                best = (us, blocks);
            }
        }
        let size = (count * PAGE_BYTES as usize) as f64;
        println!(
            "floor {megabytes:7.1} MB {:8.1} us {:5.0} GB/s with {} blocks",
            best.0,
            size / best.0 / 1e3,
            best.1
        );
        floor.push((size, best.0));
    }
    // The merge gives the exclusive or of all words, whatever the grid.
    let ticket = gpu.stream.clone_dtoh(&reader.ticket).unwrap();
    assert_eq!(ticket, [0], "the ticket is reset");
    Yardsticks { ceiling, floor }
}
