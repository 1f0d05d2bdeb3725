//! Work shared between the threads of the ambient rayon pool, with as little ceremony as can be: a decoding
//! step has two hundred parallel regions of some ten microseconds each.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Calls `body` once for each of `0..items`, in any order, on as many threads as there are.
///
/// Each thread walks through a range of its own, so that what it does next lies behind what it does now, and
/// then helps with the others'. The calling thread starts at once; a thread that wakes up late finds less left
/// to do, so that a slow wake-up costs nothing but its help.
pub(super) fn share(items: usize, body: impl Fn(usize) + Sync) {
    let threads = rayon::current_num_threads().min(items);
    if threads <= 1 {
        return (0..items).for_each(body);
    }
    let ranges: Vec<Range> = (0..threads)
        .map(|t| Range { next: AtomicUsize::new(items * t / threads), end: items * (t + 1) / threads })
        .collect();
    join(0..threads, &|thread| {
        for range in ranges.iter().cycle().skip(thread).take(threads) {
            while let Some(item) = range.take() {
                body(item);
            }
        }
    });
}

/// Items that nobody has taken yet. Alone in its cache lines, since its thread takes from it all the time.
#[repr(align(128))]
struct Range {
    next: AtomicUsize,
    end: usize,
}

impl Range {
    fn take(&self) -> Option<usize> {
        let item = self.next.fetch_add(1, Ordering::Relaxed);
        (item < self.end).then_some(item)
    }
}

/// Calls `work` for each of the numbers, each on a thread of its own if it is free, the first on this one.
fn join(threads: std::ops::Range<usize>, work: &(impl Fn(usize) + Sync)) {
    if threads.len() <= 1 {
        threads.for_each(work);
    } else {
        let middle = threads.start + threads.len().div_ceil(2);
        rayon::join(|| join(threads.start..middle, work), || join(middle..threads.end, work));
    }
}

/// Elements of a cheap operation below which one thread does it all.
const FEW_ELEMENTS: usize = 1 << 15;

/// Calls `body` with blocks of whole rows of `out`, and with the index of each block's first element.
pub(super) fn share_rows(out: &mut [f32], width: usize, body: impl Fn(usize, &mut [f32]) + Sync) {
    if out.len() <= FEW_ELEMENTS || width == 0 {
        return body(0, out);
    }
    let block = (FEW_ELEMENTS / 2).next_multiple_of(width);
    let blocks: Vec<Mutex<&mut [f32]>> = out.chunks_mut(block).map(Mutex::new).collect();
    share(blocks.len(), |i| {
        // Each block is taken once: nobody waits, and nobody can have poisoned it.
        if let Ok(mut out) = blocks[i].try_lock() {
            body(i * block, &mut out);
        }
    });
}
