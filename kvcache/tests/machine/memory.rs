//! Simulated block memory: what a backend's tensors would hold, with one number in place of a token's keys
//! and values. The number stands for everything they depend on: salt, KV group, and all tokens up to it.

use std::collections::VecDeque;

use pagewise_kvcache::{BlockCopy, BlockId, BlockOps, CacheConfig};

/// Never the digest of a token: memory that nobody has written.
const POISON: u64 = 0;

/// The content of the cell of each position of `tokens` in one group.
pub(super) fn digests(salt: u64, group: usize, tokens: &[u32]) -> Vec<u64> {
    let mut digest = salt.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (group as u64 + 1);
    tokens
        .iter()
        .map(|&token| {
            digest = (digest ^ (u64::from(token) + 1)).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(29);
            digest | 1
        })
        .collect()
}

type Blocks = Vec<Vec<u64>>;

struct InFlight {
    ops: BlockOps,
    /// What the sources of the swaps held when the copy began.
    swap_out: Vec<Vec<u64>>,
    swap_in: Vec<Vec<u64>>,
}

pub(super) struct SimulatedMemory {
    device: Blocks,
    host: Blocks,
    in_flight: VecDeque<InFlight>,
}

impl SimulatedMemory {
    pub(super) fn new(config: &CacheConfig) -> Self {
        let blocks = |count| vec![vec![POISON; config.block_size]; count];
        Self {
            device: blocks(config.device_blocks),
            host: blocks(config.host_blocks),
            in_flight: VecDeque::new(),
        }
    }

    pub(super) fn read(&self, block: BlockId, offset: usize) -> u64 {
        self.device[block as usize][offset]
    }

    pub(super) fn write(&mut self, block: BlockId, offset: usize, digest: u64) {
        self.device[block as usize][offset] = digest;
    }

    /// Carries out a list in its fixed order. Within each of its three parts everything is read before
    /// anything is written, as a backend may do that launches each part once.
    pub(super) fn execute(&mut self, ops: BlockOps) {
        for copies in [&ops.swap_out, &ops.swap_in, &ops.copy] {
            let mut written: Vec<_> = copies.iter().map(|copy| copy.dst).collect();
            written.sort_unstable();
            assert!(written.windows(2).all(|pair| pair[0] != pair[1]), "a block is written twice: {ops:?}");
        }
        let swap_out = read(&self.device, &ops.swap_out);
        write(&mut self.host, &ops.swap_out, &swap_out);
        let swap_in = read(&self.host, &ops.swap_in);
        write(&mut self.device, &ops.swap_in, &swap_in);
        let copy = read(&self.device, &ops.copy);
        write(&mut self.device, &ops.copy, &copy);
        self.in_flight.push_back(InFlight { ops, swap_out, swap_in });
    }

    /// The oldest list is confirmed. Had its swaps only been made now, they must still have moved the same:
    /// no source was overwritten while its block was pending.
    pub(super) fn confirm(&mut self) {
        let InFlight { ops, swap_out, swap_in } = self.in_flight.pop_front().unwrap();
        assert_eq!(read(&self.device, &ops.swap_out), swap_out, "a block was reused while being swapped out");
        assert_eq!(read(&self.host, &ops.swap_in), swap_in, "a block was reused while being swapped in");
    }

    pub(super) fn unconfirmed(&self) -> usize {
        self.in_flight.len()
    }
}

fn read(blocks: &Blocks, copies: &[BlockCopy]) -> Vec<Vec<u64>> {
    copies.iter().map(|copy| blocks[copy.src as usize].clone()).collect()
}

fn write(blocks: &mut Blocks, copies: &[BlockCopy], contents: &[Vec<u64>]) {
    for (copy, content) in copies.iter().zip(contents) {
        blocks[copy.dst as usize].clone_from(content);
    }
}
