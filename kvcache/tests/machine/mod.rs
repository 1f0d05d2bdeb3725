//! A machine that drives the cache with operations decoded from bytes, beside a naive model (a map from
//! sequences to token lists, blocks never shared) and simulated block memory. Shared by the property test, the
//! replay of the fuzz seeds and the fuzz target, so it uses nothing but the crate and `std`.
//!
//! A case is one string of bytes: [`SETUP_BYTES`] for the configuration, then four for each operation. When a
//! check fails or the cache panics, the case is printed in hexadecimal on one line that runs it again.

#![allow(dead_code, reason = "each user of the machine uses its own part")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "this is test code: a surprise should stop it")]

mod checks;
mod memory;
mod steps;

use std::collections::BTreeMap;

use memory::SimulatedMemory;
use pagewise_kvcache::{CacheConfig, CacheManager, KvCacheManager, KvGroup, PinId, PoolUsage, SequenceId};

/// Bytes that [`Setup::config`] reads.
pub(crate) const SETUP_BYTES: usize = 6;

/// The environment variable that holds a case to run again.
pub(crate) const CASE_VARIABLE: &str = "PAGEWISE_KVCACHE_CASE";

/// The configuration of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Setup(pub(crate) [u8; SETUP_BYTES]);

impl Setup {
    pub(crate) fn config(self) -> CacheConfig {
        let [block_size, device, host, windows, watermark, prefix] = self.0;
        let window = |keys: u8| KvGroup { window: Some(1 + keys as usize) };
        let full = KvGroup { window: None };
        let groups = match windows % 8 {
            0..=3 => vec![full],
            4 => vec![window(windows / 8 % 12)],
            5 => vec![full, window(windows / 8 % 12)],
            6 => vec![window(windows / 8 % 4), full, window(windows / 32)],
            _ => vec![full, full],
        };
        CacheConfig {
            block_size: [1, 2, 4, 8][block_size as usize % 4],
            device_blocks: 1 + device as usize % 24,
            host_blocks: host as usize % 16,
            groups,
            watermark: [0.0, 0.0, 0.1, 0.3][watermark as usize % 4],
            prefix_cache: prefix % 4 != 0,
        }
    }
}

/// One operation. Its arguments mean what `steps` makes of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Op {
    pub(crate) kind: Kind,
    pub(crate) args: [u8; 3],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Allocate,
    AllocateGang,
    Append,
    Compute,
    Fork,
    Truncate,
    Free,
    SwapOut,
    SwapIn,
    Take,
    Confirm,
    Pin,
    Unpin,
    Reset,
    Recompute,
}

/// How often each kind comes up among random bytes.
const KINDS: [(Kind, u8); 15] = [
    (Kind::Allocate, 36),
    (Kind::AllocateGang, 8),
    (Kind::Append, 40),
    (Kind::Compute, 56),
    (Kind::Fork, 18),
    (Kind::Truncate, 12),
    (Kind::Free, 14),
    (Kind::SwapOut, 12),
    (Kind::SwapIn, 14),
    (Kind::Take, 8),
    (Kind::Confirm, 20),
    (Kind::Pin, 5),
    (Kind::Unpin, 4),
    (Kind::Reset, 2),
    (Kind::Recompute, 7),
];

impl Op {
    pub(crate) fn decode([kind, a, b, c]: [u8; 4]) -> Self {
        let mut left = kind;
        for (kind, weight) in KINDS {
            if left < weight {
                return Self { kind, args: [a, b, c] };
            }
            left -= weight;
        }
        unreachable!("the weights add up to 256")
    }

    fn encode(self) -> [u8; 4] {
        let before = KINDS.iter().take_while(|(kind, _)| *kind != self.kind).map(|(_, weight)| weight);
        let [a, b, c] = self.args;
        [before.sum(), a, b, c]
    }
}

/// What the model knows of a sequence.
#[derive(Clone, Debug)]
struct Known {
    /// The token of every slot, computed or to be computed.
    tokens: Vec<u32>,
    computed: usize,
    salt: u64,
    swapped_out: bool,
}

struct Pinned {
    id: PinId,
    tokens: Vec<u32>,
    salt: u64,
}

/// How often something that is easy to miss has happened.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Coverage {
    pub(crate) refusals: u64,
    pub(crate) hits: u64,
    pub(crate) evictions: u64,
    pub(crate) copies: u64,
    pub(crate) swapped_out: u64,
    pub(crate) swapped_in: u64,
    pub(crate) shared_swaps: u64,
    pub(crate) behind_window: u64,
    pub(crate) pins: u64,
    pub(crate) resets: u64,
    pub(crate) rebuilt_forks: u64,
}

/// The cache, the model beside it, and the memory below.
pub(crate) struct Machine {
    cache: KvCacheManager,
    known: BTreeMap<SequenceId, Known>,
    memory: SimulatedMemory,
    pins: Vec<Pinned>,
    case: Vec<u8>,
    pub(crate) coverage: Coverage,
}

impl Machine {
    pub(crate) fn new(setup: Setup) -> Self {
        let config = setup.config();
        Self {
            memory: SimulatedMemory::new(&config),
            cache: KvCacheManager::new(config).unwrap(),
            known: BTreeMap::new(),
            pins: Vec::new(),
            case: setup.0.to_vec(),
            coverage: Coverage::default(),
        }
    }

    /// Runs a whole case; bytes that do not make up an operation are ignored.
    pub(crate) fn run(case: &[u8]) -> Coverage {
        let Some((setup, ops)) = case.split_first_chunk() else { return Coverage::default() };
        let mut machine = Self::new(Setup(*setup));
        for op in ops.chunks_exact(4) {
            machine.step(Op::decode([op[0], op[1], op[2], op[3]]));
        }
        machine.finish()
    }

    /// Ends the case: everything is verified, given back, and must then be free.
    pub(crate) fn finish(mut self) -> Coverage {
        self.take_and_execute();
        self.verify_contents();
        for sequence in std::mem::take(&mut self.known).into_keys() {
            self.cache.free(sequence).unwrap();
        }
        for pin in std::mem::take(&mut self.pins) {
            self.cache.unpin_prefix(pin.id).unwrap();
        }
        while self.cache.confirm_block_ops().is_ok() {}
        self.check_state();
        let stats = self.cache.stats();
        for usage in [self.cache.device_usage(), self.cache.host_usage()] {
            let PoolUsage { free, total, .. } = usage;
            assert_eq!(free, total, "a block leaked: {usage:?}");
        }
        self.cache.reset_prefix_cache().unwrap();
        self.check_state();
        self.coverage.hits = stats.hit_tokens;
        self.coverage.evictions = stats.evicted_blocks;
        self.coverage.copies = stats.copied_blocks;
        self.coverage.swapped_out = stats.swapped_out_blocks;
        self.coverage.swapped_in = stats.swapped_in_blocks;
        self.coverage
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let hex: String = self.case.iter().map(|byte| format!("{byte:02x}")).collect();
            eprintln!(
                "run this case again: {CASE_VARIABLE}={hex} cargo test -p pagewise-kvcache --test state_machine one_case"
            );
        }
    }
}
