//! Faults of a line or two each, planted in kernels to see that the tests find them.
//!
//! Owns how a fault gets into a text; the tables are a file for each group of kernels. A fault must end (no endless
//! loop) and stay within the memory that the kernel may touch, so that it shows as a wrong result and not as a dead GPU.

mod cache;
mod decode;
mod model;
mod prefill;
mod wgsl;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

pub use cache::{COPY_BLOCKS, MERGE_STATES, WRITE_KV};
pub use decode::{DECODE, DECODE_READS, DECODE_WRITES};
pub use model::MODEL;
pub use prefill::{PREFILL, PREFILL_FP8, PREFILL_FP8_ORDER, PREFILL_HOPPER};
pub use wgsl::{DECODE_WGSL, PREFILL_MATRIX, PREFILL_TILED};

/// Every fault of every table.
pub fn all() -> impl Iterator<Item = Fault> {
    let ptx = [
        WRITE_KV,
        MERGE_STATES,
        COPY_BLOCKS,
        DECODE,
        DECODE_READS,
        DECODE_WRITES,
        PREFILL,
        PREFILL_FP8,
        PREFILL_FP8_ORDER,
        PREFILL_HOPPER,
        MODEL,
    ];
    let wgsl = [DECODE_WGSL, PREFILL_TILED, PREFILL_MATRIX];
    ptx.into_iter().chain(wgsl).flatten().copied()
}

/// A line of a kernel family's text that becomes another.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    pub name: &'static str,
    /// The kernels that it is planted in: their entry points begin so.
    pub family: &'static str,
    /// The line as it is rendered, without indentation and comment; or several, with nothing but comments between them.
    /// Their first occurrence is meant.
    pub line: &'static str,
    /// What stands there instead; may be nothing, or several lines.
    pub instead: &'static str,
    /// What is wrong then.
    pub breaks: &'static str,
}

impl Fault {
    /// A function that plants the fault wherever its line is, and a count of the kernels that had it.
    pub fn planted(self) -> (impl Fn(&str, &str) -> String + Send + Sync + 'static, Arc<AtomicUsize>) {
        let count = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&count);
        let alter = move |entry: &str, text: &str| {
            if !entry.starts_with(self.family) {
                return text.to_owned();
            }
            let lines: Vec<&str> = text.split_inclusive('\n').collect();
            let code = |at: usize| lines[at].split_once("//").map_or(lines[at], |(code, _)| code).trim();
            let of_code: Vec<usize> = (0..lines.len()).filter(|&at| !code(at).is_empty()).collect();
            let wanted: Vec<&str> = self.line.lines().collect();
            let found = of_code
                .windows(wanted.len())
                .find(|places| places.iter().map(|&at| code(at)).eq(wanted.iter().copied()));
            let Some(&[first, ..]) = found else { return text.to_owned() };
            let behind = found.and_then(|places| places.last()).map_or(first, |last| last + 1);
            counted.fetch_add(1, Ordering::Relaxed);
            [&lines[..first].concat(), self.instead, "\n", &lines[behind..].concat()].concat()
        };
        (alter, count)
    }
}
