//! Random cases of `copy_blocks` and `swap_blocks` with any layout, and the plain code that says what must be where.

use std::fmt;

use pagewise_attention::cuda::{
    BlockNumberType, BlockPairs, CacheBlocks, CopyBlocksCall, LayerAddresses, SwapBlocksCall, SwapMethod,
};
use pagewise_attention::{AttentionConfig, CacheLayout, DType, KvStrides};

use super::random::Random;

/// A case, wholly determined by these: print it, and it can be run again.
#[derive(Clone, Copy, Debug)]
pub struct BlocksCase {
    pub dtype: DType,
    /// Every offset, stride and head dimension is a multiple of so many elements.
    pub unit: usize,
    /// Whether blocks are copied within one cache, or from one to another of another layout.
    pub within: bool,
    pub seed: u64,
}

impl fmt::Display for BlocksCase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {} {}", self.dtype, self.unit, self.within, self.seed)
    }
}

impl std::str::FromStr for BlocksCase {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let words: Vec<&str> = text.split_whitespace().collect();
        let [dtype, unit, within, seed] = words[..] else {
            return Err(format!("'{text}' is not DTYPE UNIT WITHIN SEED"));
        };
        Ok(Self {
            dtype: dtype.parse().map_err(|e| format!("{e}"))?,
            unit: unit.parse().map_err(|e| format!("{e}"))?,
            within: within.parse().map_err(|e| format!("{e}"))?,
            seed: seed.parse().map_err(|e| format!("{e}"))?,
        })
    }
}

/// The one case that `PAGEWISE_BLOCKS_CASE` asks for.
pub fn wanted_blocks_case() -> Option<BlocksCase> {
    let text = std::env::var("PAGEWISE_BLOCKS_CASE").ok()?;
    Some(text.parse().unwrap_or_else(|error| panic!("PAGEWISE_BLOCKS_CASE: {error}")))
}

/// K and V of all layers on one side: random bytes everywhere, also between blocks and rows.
#[derive(Clone, Debug)]
pub struct Side {
    pub layout: CacheLayout,
    /// Of each layer: a buffer each for K and V, or one that holds both.
    pub buffers: Vec<Vec<u8>>,
    /// Of each layer: buffer and first byte of K and of V.
    pub places: Vec<[(usize, usize); 2]>,
}

impl Side {
    /// The addresses of the layers, once the buffers have some.
    pub fn layers(&self, addresses: &[u64]) -> LayerAddresses {
        let at = |(buffer, first): (usize, usize)| addresses[buffer] + first as u64;
        LayerAddresses::new(self.places.iter().map(|[k, v]| (at(*k), at(*v))))
    }

    fn build(random: &mut Random, case: &BlocksCase, config: &AttentionConfig, shape: [usize; 3]) -> Self {
        let [num_blocks, block_size, layers] = shape;
        let unit = case.unit;
        let gap = |random: &mut Random| if random.one_in(2) { 0 } else { (unit * random.below(5)) as u64 };
        let is_packed = random.one_in(2);
        let strides = |dim: usize, random: &mut Random| {
            let (block_size, heads, dim) = (block_size as u64, config.kv_heads as u64, dim as u64);
            let gap = |random: &mut Random| if is_packed { 0 } else { gap(random) };
            if random.one_in(2) {
                let head = dim + gap(random);
                let token = head * heads + gap(random);
                KvStrides { head, token, block: token * block_size + gap(random) }
            } else {
                let token = dim + gap(random);
                let head = token * block_size + gap(random);
                KvStrides { head, token, block: head * heads + gap(random) }
            }
        };
        let (k, v) = (strides(config.head_dim_qk, random), strides(config.head_dim_v, random));
        let mut layout = CacheLayout { num_blocks, block_size, k, v };
        let v_start = layout.k.block as usize;
        let is_interleaved = random.one_in(3);
        if is_interleaved {
            layout = layout.interleaved();
        }
        let size = config.kv_dtype.size();
        let (mut buffers, mut places) = (Vec::new(), Vec::new());
        let mut buffer = |elements: usize, random: &mut Random| {
            let bytes = (elements * size).max(16).next_multiple_of(16);
            let words = (0..bytes / 8).flat_map(|_| random.next().to_le_bytes());
            buffers.push(words.collect());
            buffers.len() - 1
        };
        let (k_extent, v_extent) = (layout.k_extent(config) as usize, layout.v_extent(config) as usize);
        for _ in 0..layers {
            let first = unit * random.below(4);
            places.push(if is_interleaved {
                let both = buffer(first + k_extent.max(v_start + v_extent), random);
                [(both, first * size), (both, (first + v_start) * size)]
            } else {
                let v_first = unit * random.below(4);
                let (k, v) = (buffer(first + k_extent, random), buffer(v_first + v_extent, random));
                [(k, first * size), (v, v_first * size)]
            });
        }
        Self { layout, buffers, places }
    }
}

/// What a case works on.
#[derive(Clone, Debug)]
pub struct BlocksTensors {
    pub config: AttentionConfig,
    /// One side, or two.
    pub sides: Vec<Side>,
    /// As the kernel gets them, some of them to be skipped.
    pub pairs: Vec<(i64, i64)>,
    pub number_type: BlockNumberType,
    /// What stands in device memory, if anything does.
    pub count_at: Option<u32>,
    pub thread_blocks: Option<u32>,
}

impl BlocksCase {
    pub fn build(&self) -> BlocksTensors {
        let mut random = Random::new(self.seed);
        let unit = self.unit;
        let heads = 1 + random.below(5);
        let mut dim = || {
            let any = unit * (1 + random.below(256 / unit));
            random.pick(&[64, 80, 128, any, any])
        };
        let (dim_k, dim_v) = (dim(), dim());
        let mut config = AttentionConfig::new(heads, heads, dim_k, DType::F32);
        config.head_dim_v = if random.one_in(2) { dim_k } else { dim_v };
        config.kv_dtype = self.dtype;
        let (layers, block_size) = (1 + random.below(3), 1 << random.below(5));
        let blocks = |random: &mut Random| 2 + random.below(12);
        let sides: Vec<Side> = (0..if self.within { 1 } else { 2 })
            .map(|_| {
                let shape = [blocks(&mut random), block_size, layers];
                Side::build(&mut random, self, &config, shape)
            })
            .collect();
        let numbers = |side: &Side, random: &mut Random| {
            let mut numbers: Vec<i64> = (0..side.layout.num_blocks as i64).collect();
            (1..numbers.len()).rev().for_each(|at| numbers.swap(at, random.below(at + 1)));
            numbers
        };
        let (from, to) = if self.within {
            let mut from = numbers(&sides[0], &mut random);
            let to = from.split_off(1 + random.below(from.len() - 1));
            (from, to)
        } else {
            (numbers(&sides[0], &mut random), numbers(&sides[1], &mut random))
        };
        let count = random.below(to.len() + 1);
        let number_type = random.pick(&[BlockNumberType::I32, BlockNumberType::I64]);
        // What names no block: negative, past the end, and where there is room for that, past 32 bits.
        let last = sides.iter().map(|side| side.layout.num_blocks).max().unwrap_or(0) as i64;
        let none = match number_type {
            BlockNumberType::I32 => [-1, last, i64::from(i32::MIN), i64::from(i32::MAX)],
            BlockNumberType::I64 => [-1, last, 1 << 32, (1 << 32) + 1],
        };
        let pairs: Vec<(i64, i64)> = to[..count]
            .iter()
            .map(|&to| {
                let from = random.pick(&from);
                match random.below(6) {
                    0 => (random.pick(&none), to),
                    1 => (from, random.pick(&none)),
                    _ => (from, to),
                }
            })
            .collect();
        let count_at = random.one_in(3).then(|| random.below(count + 3) as u32);
        let thread_blocks = random.one_in(3).then(|| 1 + random.below(4) as u32);
        BlocksTensors { config, sides, pairs, number_type, count_at, thread_blocks }
    }
}

impl BlocksTensors {
    /// The pairs as bytes.
    pub fn pair_bytes(&self) -> Vec<u8> {
        let numbers = self.pairs.iter().flat_map(|&(from, to)| [from, to]);
        match self.number_type {
            BlockNumberType::I32 => numbers.flat_map(|number| (number as i32).to_le_bytes()).collect(),
            BlockNumberType::I64 => numbers.flat_map(i64::to_le_bytes).collect(),
        }
    }

    /// The kernel's call. `tables` are those of the sides, `pairs` and `count` lie where said.
    pub fn call<'a>(
        &'a self,
        layers: &'a [LayerAddresses],
        tables: &[u64],
        pairs: u64,
        count_at: u64,
    ) -> CopyBlocksCall<'a> {
        let last = self.sides.len() - 1;
        let side = |at: usize| CacheBlocks {
            layout: &self.sides[at].layout,
            layers: &layers[at],
            table: tables[at],
        };
        CopyBlocksCall {
            config: &self.config,
            from: side(0),
            to: side(last),
            pairs: BlockPairs {
                address: pairs,
                number_type: self.number_type,
                count: self.pairs.len(),
                count_at,
            },
            thread_blocks: self.thread_blocks,
            tuning: None,
        }
    }

    /// A swap of those pairs that name blocks.
    pub fn swap<'a>(
        &'a self,
        layers: &'a [LayerAddresses],
        pairs: &'a [(u32, u32)],
        method: SwapMethod,
    ) -> SwapBlocksCall<'a> {
        let call = self.call(layers, &vec![0; layers.len()], 0, 0);
        SwapBlocksCall { config: call.config, from: call.from, to: call.to, pairs, device_pairs: 0, method }
    }

    /// The pairs that name blocks on both sides.
    pub fn named(&self, pairs: &[(i64, i64)]) -> Vec<(u32, u32)> {
        let blocks = |side: Option<&Side>| side.map_or(0, |side| side.layout.num_blocks as i64);
        let (from, to) = (blocks(self.sides.first()), blocks(self.sides.last()));
        let is_named = |pair: &&(i64, i64)| (0..from).contains(&pair.0) && (0..to).contains(&pair.1);
        pairs.iter().filter(is_named).map(|&(from, to)| (from as u32, to as u32)).collect()
    }

    /// What the buffers of the side that is written must hold after a call: one element after the other.
    pub fn expected(&self) -> Vec<Vec<u8>> {
        let count = self.count_at.map_or(self.pairs.len(), |count| self.pairs.len().min(count as usize));
        self.expected_of(&self.named(&self.pairs[..count]))
    }

    /// The same after a copy of these pairs.
    pub fn expected_of(&self, pairs: &[(u32, u32)]) -> Vec<Vec<u8>> {
        let (source, target) = (&self.sides[0], &self.sides[self.sides.len() - 1]);
        let mut buffers = target.buffers.clone();
        let size = self.config.kv_dtype.size();
        for (from_places, to_places) in source.places.iter().zip(&target.places) {
            for is_value in [0, 1] {
                let dim = [self.config.head_dim_qk, self.config.head_dim_v][is_value];
                let strides = |layout: &CacheLayout| [layout.k, layout.v][is_value];
                for &(from, to) in pairs {
                    for token in 0..target.layout.block_size {
                        for head in 0..self.config.kv_heads {
                            for element in 0..dim {
                                let at = |(_, first): (usize, usize), strides: KvStrides, block: u32| {
                                    let index = u64::from(block) * strides.block
                                        + token as u64 * strides.token
                                        + head as u64 * strides.head
                                        + element as u64;
                                    first + index as usize * size
                                };
                                let (from_place, to_place) = (from_places[is_value], to_places[is_value]);
                                let from = at(from_place, strides(&source.layout), from);
                                let to = at(to_place, strides(&target.layout), to);
                                buffers[to_place.0][to..to + size]
                                    .copy_from_slice(&source.buffers[from_place.0][from..from + size]);
                            }
                        }
                    }
                }
            }
        }
        buffers
    }
}

/// Every byte must be as expected, whatever number it belongs to.
pub fn compare_bytes(expected: &[Vec<u8>], found: &[Vec<u8>]) -> Result<(), String> {
    for (buffer, (expected, found)) in expected.iter().zip(found).enumerate() {
        assert_eq!(expected.len(), found.len());
        if let Some(at) = (0..expected.len()).find(|&at| expected[at] != found[at]) {
            let (want, have) = (expected[at], found[at]);
            return Err(format!("buffer {buffer}, byte {at}: expected {want:#04x}, found {have:#04x}"));
        }
    }
    Ok(())
}
