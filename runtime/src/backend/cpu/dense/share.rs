//! Work shared between the threads of the ambient rayon pool, with as little ceremony as can be: a decoding
//! step has two hundred parallel regions of some ten microseconds each.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Calls `body` once for each of `0..items`, in any order, on as many threads as there are.
///
/// The calling thread starts at once and takes items from a common counter; other threads join in as they
/// wake up, and a late one finds nothing left, so that a slow wake-up costs nothing but its help.
pub(super) fn share(items: usize, body: impl Fn(usize) + Sync) {
    let threads = rayon::current_num_threads().min(items);
    let next = AtomicUsize::new(0);
    join(threads, &|| {
        loop {
            let item = next.fetch_add(1, Ordering::Relaxed);
            if item >= items {
                return;
            }
            body(item);
        }
    });
}

/// Runs `work` on up to `threads` threads, the calling one among them.
fn join(threads: usize, work: &(impl Fn() + Sync)) {
    if threads <= 1 {
        work();
    } else {
        // The calling thread works first and hands out on the way, so that every branch does its share.
        rayon::join(|| join(threads - threads / 2, work), || join(threads / 2, work));
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
