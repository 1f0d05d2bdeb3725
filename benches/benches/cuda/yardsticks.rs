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
    /// What it takes to read whole blocks in random order and nothing else.
    pub pieces: Vec<Pieces>,
}

/// Memory read in pieces that lie in random order.
#[derive(Clone, Copy)]
pub struct Pieces {
    /// Bytes of a piece: K and V of all heads of a block, side by side.
    pub piece: usize,
    /// Bytes in all.
    pub bytes: f64,
    /// GB/s of the best grid.
    pub rate: f64,
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

    /// GB/s of reading so many bytes in pieces of this size in random order; of the nearest size measured, if it is
    /// at least half as much.
    pub fn piece_rate(&self, piece: usize, bytes: f64) -> Option<f64> {
        let near = |size: f64| (size / bytes).ln().abs();
        let measured =
            self.pieces.iter().filter(|pieces| pieces.piece == piece && pieces.bytes <= 2.0 * bytes);
        measured.min_by(|a, b| near(a.bytes).total_cmp(&near(b.bytes))).map(|pieces| pieces.rate)
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
#[allow(dead_code, reason = "not every bench asks for it alone")]
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
    let pieces = pieces(&reader);
    // The merge gives the exclusive or of all words, whatever the grid.
    let ticket = gpu.stream.clone_dtoh(&reader.ticket).unwrap();
    assert_eq!(ticket, [0], "the ticket is reset");
    Yardsticks { ceiling, floor, pieces }
}

/// What DRAM gives for blocks in random order, without a merge: the most that any kernel can get that reads a paged
/// cache. Blocks of 16 keys of 8 and of 32 heads of 128 elements in 16 bits.
fn pieces(reader: &Reader<'_, '_>) -> Vec<Pieces> {
    let mut measured = Vec::new();
    for piece in [64 << 10, 256 << 10] {
        let pages = piece / PAGE_BYTES as usize;
        for bytes in [BYTES / 4, BYTES / 2, BYTES] {
            let order = Random(7).permutation(bytes / piece);
            let page = |first: i32| (0..pages as i32).map(move |page| first * pages as i32 + page);
            let table: Vec<i32> = order.into_iter().flat_map(page).collect();
            let table = reader.gpu.stream.clone_htod(&table).unwrap();
            let grid = |per_block| {
                let launch = |_| reader.launch(false, &table, 0, bytes / PAGE_BYTES as usize, per_block);
                bytes as f64 / reader.gpu.time(4, launch) / 1e3
            };
            let rate = [4, 8, 16, 32, 64].map(grid).into_iter().fold(0.0, f64::max);
            println!("blocks of {:3} KiB in random order, {bytes:10} bytes: {rate:5.0} GB/s", piece >> 10);
            measured.push(Pieces { piece, bytes: bytes as f64, rate });
        }
    }
    measured
}
