//! Time as the engine sees it. Only metrics and deadlines need it: what is computed never depends on it, but for
//! which preemption is cheaper.

use std::time::{Duration, Instant};

/// Gives the time since some fixed moment.
pub type Clock = Box<dyn Fn() -> Duration + Send>;

/// The machine's, from now on.
pub(super) fn system() -> Clock {
    let start = Instant::now();
    Box::new(move || start.elapsed())
}
