//! A random load for an engine: requests that come and go in a cache that is far too small for them.

use pagewise_attention::DType;
use pagewise_attention::cuda::cudarc::driver::result::mem_get_info;
use pagewise_runtime::load::BackendChoice;
use pagewise_runtime::request::{Event, Request};
use pagewise_runtime::scheduler::Preemption;
use pagewise_tests::{Numbers, fixture};
use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

use super::engine_machine::config;
use super::engine_oracle::{Oracle, Way, empty, engine, requests, way};

/// A cache that a few of the load's requests fill: the largest alone takes 36 of these blocks of four tokens (a prompt of
/// 40 tokens and three beams of 30), and 24 are there at a time.
const LOAD_BLOCKS: usize = 64;

/// What became of a load.
#[derive(Debug, Default)]
struct Served {
    done: usize,
    same: usize,
    cancelled: usize,
    preemptions: u64,
    swaps: u64,
    /// Free device memory after 200 requests and at the end, where there is a device.
    free_memory: Option<(usize, usize)>,
}

/// Arrivals, cancellations, samples and beams in a cache that is far too small for them, for some time; every answer is
/// compared with the oracle's, and nothing may be left behind.
fn serve_load(dir: &Path, way: Way, oracle: &mut Oracle, time: Duration) -> Served {
    let vocab_size = config(dir).vocab_size;
    let mut engine = engine(dir, way);
    let mut numbers = Numbers(99);
    let mut served = Served::default();
    let mut open: HashMap<_, (String, Request)> = HashMap::new();
    let free = || match way.backend {
        BackendChoice::Cuda => mem_get_info().ok().map(|(free, _)| free),
        _ => None,
    };
    let mut free_before = None;
    let until = Instant::now() + time;
    let mut round = 0u64;
    while Instant::now() < until || engine.has_work() {
        round += 1;
        if Instant::now() < until && open.len() < 24 {
            let mut pick = requests(vocab_size, 29, round);
            let index = numbers.below(pick.len());
            let request = pick.swap_remove(index);
            let label = format!("{:?}, seed {round}, request {index}", way.preemption);
            open.insert(engine.add(request.clone()).unwrap(), (label, request));
        }
        if numbers.below(40) == 0
            && let Some(&id) = open.keys().next()
        {
            assert!(engine.cancel(id));
            open.remove(&id);
            served.cancelled += 1;
        }
        for event in engine.step().unwrap() {
            match event {
                Event::Token { .. } => {}
                Event::Finished { request, output } => {
                    let Some((label, asked)) = open.remove(&request) else { continue };
                    served.same += usize::from(oracle.check(&label, &asked, &output));
                    served.done += 1;
                    if served.done == 200 {
                        free_before = free();
                    }
                }
                Event::Failed { error, .. } => panic!("{error:?}"),
            }
        }
    }
    assert!(open.is_empty(), "{} requests were never answered", open.len());
    empty(&format!("{:?}", way.preemption), &engine);
    let stats = engine.stats();
    (served.preemptions, served.swaps) = (stats.scheduler.preemptions, stats.scheduler.swaps);
    served.free_memory = free_before.zip(free());
    served
}

/// Whether no other test has engines of its own on the device meanwhile.
fn tests_run_alone() -> bool {
    std::env::args().any(|argument| argument == "--test-threads=1")
        || std::env::var("RUST_TEST_THREADS").is_ok_and(|number| number == "1")
}

/// Both kinds of preemption, half of the time each. Device memory must not grow, which can be seen where tests run one after
/// the other (`--test-threads=1`).
pub fn serve_loads(backend: BackendChoice, seconds: f64) {
    let dir = fixture("llama_gqa");
    let dtype = DType::F32;
    let mut oracle = Oracle::new(&dir, dtype);
    for preemption in [Preemption::Recompute, Preemption::Swap] {
        let way = Way { preemption, blocks: Some(LOAD_BLOCKS), budget: 96, ..way(backend, dtype) };
        let served = serve_load(&dir, way, &mut oracle, Duration::from_secs_f64(seconds / 2.0));
        println!("{preemption:?}: {served:?}");
        assert!(served.done > 0, "{served:?}");
        // The load must press as it is meant to: every tenth request has to make room once.
        let made_room = if preemption == Preemption::Swap { served.swaps } else { served.preemptions };
        assert!(made_room as usize * 10 >= served.done, "{preemption:?}: {served:?}");
        if let Some((before, now)) = served.free_memory {
            if !tests_run_alone() {
                println!(
                    "SKIPPED: whether device memory grows, which other tests change; --test-threads=1 shows it"
                );
                continue;
            }
            // Graphs of shapes that had not been met yet; nothing that grows with the requests.
            assert!(before.saturating_sub(now) < 64 << 20, "{before} bytes were free, {now} are");
        }
    }
}
