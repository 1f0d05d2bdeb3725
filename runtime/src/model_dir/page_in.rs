//! Brings mapped weights into memory in the background, while the rest of a model is made ready.
//!
//! It only asks: where the operating system does not know the request, pages come on first use as they would
//! have without it.

use super::shard::Shard;
use memmap2::Mmap;
use std::sync::Arc;

/// Bytes whose pages are entered at a time, so that the thread ends soon after the last user of the map.
#[cfg(target_os = "linux")]
const STEP: usize = 8 << 20;

/// Starts reading the shards' files and entering their pages, on a thread of its own.
pub(super) fn start(shards: &[Shard]) {
    let maps: Vec<Arc<Mmap>> = shards.iter().map(|shard| shard.map.clone()).collect();
    let started = std::thread::Builder::new().name("pagewise-page-in".into()).spawn(move || {
        for map in &maps {
            page_in(map);
        }
    });
    if let Err(error) = started {
        tracing::debug!(%error, "no thread to page weights in; they come on first use");
    }
}

#[cfg(target_os = "linux")]
fn page_in(map: &Arc<Mmap>) {
    use memmap2::Advice;
    // First all reads are queued, so that the disk is busy from here on; then pages are entered in order as they
    // arrive, which spares the first step a fault for each few of them.
    if let Err(error) = map.advise(Advice::WillNeed) {
        tracing::debug!(%error, "the weights cannot be read ahead");
    }
    for start in (0..map.len()).step_by(STEP) {
        // The model was dropped, or failed to load.
        if Arc::strong_count(map) == 1 {
            return;
        }
        // Linux 5.14 and later.
        if let Err(error) = map.advise_range(Advice::PopulateRead, start, STEP.min(map.len() - start)) {
            tracing::debug!(%error, "pages of the weights cannot be entered ahead");
            return;
        }
    }
}

#[cfg(all(unix, not(target_os = "linux")))]
fn page_in(map: &Arc<Mmap>) {
    if let Err(error) = map.advise(memmap2::Advice::WillNeed) {
        tracing::debug!(%error, "the weights cannot be read ahead");
    }
}

#[cfg(not(unix))]
fn page_in(_map: &Arc<Mmap>) {}
