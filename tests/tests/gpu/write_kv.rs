//! Random `write_kv` cases for the GPU backends, and the plain code that says what they must store.

use std::fmt;

use pagewise_attention::{AttentionConfig, CacheLayout, DType, KvStrides, RowStrides};

use super::encode::{decode, encode};
use super::random::Random;

/// Fills what no kernel may read or write: a NaN in every element type.
const POISON: u8 = 0xff;

/// A case, wholly determined by these: print it, and it can be run again.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Type of the new rows.
    pub source: DType,
    /// Type of the cache.
    pub cache: DType,
    /// Every offset, stride and head dimension is a multiple of so many elements.
    pub unit: usize,
    pub seed: u64,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {} {}", self.source, self.cache, self.unit, self.seed)
    }
}

impl std::str::FromStr for Case {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let words: Vec<&str> = text.split_whitespace().collect();
        let [source, cache, unit, seed] = words[..] else {
            return Err(format!("'{text}' is not SOURCE CACHE UNIT SEED"));
        };
        Ok(Self {
            source: source.parse().map_err(|e| format!("{e}"))?,
            cache: cache.parse().map_err(|e| format!("{e}"))?,
            unit: unit.parse().map_err(|e| format!("{e}"))?,
            seed: seed.parse().map_err(|e| format!("{e}"))?,
        })
    }
}

/// The one case that `PAGEWISE_CASE` asks for.
pub fn wanted_case() -> Option<Case> {
    let text = std::env::var("PAGEWISE_CASE").ok()?;
    Some(text.parse().unwrap_or_else(|error| panic!("PAGEWISE_CASE: {error}")))
}

/// Scales of an fp8 cache: one, or one for each head.
#[derive(Clone, Debug)]
pub struct CaseScales {
    pub k: Vec<f32>,
    pub v: Vec<f32>,
}

/// The tensors of a case in host memory, as bytes.
#[derive(Clone, Debug)]
pub struct Tensors {
    pub config: AttentionConfig,
    pub layout: CacheLayout,
    pub source: DType,
    pub slots: Vec<i64>,
    pub k_strides: RowStrides,
    pub v_strides: RowStrides,
    pub k: Vec<u8>,
    pub v: Vec<u8>,
    /// First element of each, in bytes.
    pub k_offset: usize,
    pub v_offset: usize,
    /// One buffer each for K and V, or one that holds both, interleaved.
    pub caches: Vec<Vec<u8>>,
    /// First element of each, in bytes.
    pub k_cache_offset: usize,
    pub v_cache_offset: usize,
    pub scales: Option<CaseScales>,
}

impl Case {
    pub fn build(&self) -> Tensors {
        let mut random = Random::new(self.seed);
        let unit = self.unit;
        let heads = 1 + random.below(9);
        let dim = |random: &mut Random| {
            let usual = [64, 80, 96, 128, 192, 256];
            let any = unit * (1 + random.below(256 / unit));
            if random.one_in(2) { random.pick(&usual) } else { any }
        };
        let (dim_k, dim_v) = (dim(&mut random), dim(&mut random));
        let mut config = AttentionConfig::new(heads, heads, dim_k, DType::F32);
        config.head_dim_v = dim_v;
        config.kv_dtype = self.cache;

        let block_size = 1 << random.below(7);
        let num_blocks = 1 + random.below(12);
        let gap = |random: &mut Random| if random.one_in(2) { 0 } else { (unit * random.below(9)) as u64 };
        let interleaved = random.one_in(4);
        let (mut k, mut v);
        if interleaved {
            // [blocks, 2, block_size, heads, dim] with rows as long as the longer of K's and V's.
            let dim = dim_k.max(dim_v) as u64;
            let token = heads as u64 * dim;
            let strides = KvStrides { block: 2 * block_size as u64 * token, token, head: dim };
            (k, v) = (strides, strides);
        } else {
            k = cache_strides(&mut random, block_size, heads, dim_k, gap);
            v = cache_strides(&mut random, block_size, heads, dim_v, gap);
        }
        // A block stride of a cache with one block is never used; it may be anything.
        if num_blocks == 1 {
            k.block = k.block.next_multiple_of(unit as u64);
            v.block = v.block.next_multiple_of(unit as u64);
        }
        let layout = CacheLayout { num_blocks, block_size, k, v };

        let offset = |random: &mut Random, size: usize| unit * random.below(5) * size;
        let cache_size = self.cache.size();
        let (k_extent, v_extent) =
            (layout.k_extent(&config) as usize * cache_size, layout.v_extent(&config) as usize * cache_size);
        let k_cache_offset = offset(&mut random, cache_size);
        let (caches, v_cache_offset) = if interleaved {
            let between = k.block as usize / 2 * cache_size;
            let bytes = (k_cache_offset + between + k_extent.max(v_extent)).next_multiple_of(16);
            (vec![vec![POISON; bytes]], k_cache_offset + between)
        } else {
            let v_cache_offset = offset(&mut random, cache_size);
            let k_bytes = (k_cache_offset + k_extent).next_multiple_of(16);
            let v_bytes = (v_cache_offset + v_extent).next_multiple_of(16);
            (vec![vec![POISON; k_bytes], vec![POISON; v_bytes]], v_cache_offset)
        };

        let slots = slots(&mut random, layout.slots() as usize);
        let tokens = slots.len();
        let k_strides = row_strides(&mut random, tokens, heads, dim_k, gap);
        let v_strides = row_strides(&mut random, tokens, heads, dim_v, gap);
        let k_offset = offset(&mut random, self.source.size());
        let v_offset = offset(&mut random, self.source.size());
        let scales = self.cache.is_fp8().then(|| {
            let count = if random.one_in(2) { 1 } else { heads };
            let mut scale = || (0..count).map(|_| 2f64.powf(random.unit() * 4.0) as f32).collect();
            CaseScales { k: scale(), v: scale() }
        });
        let k = self.rows(&mut random, k_strides, k_offset, [tokens, heads, dim_k]);
        let v = self.rows(&mut random, v_strides, v_offset, [tokens, heads, dim_v]);
        Tensors {
            config,
            layout,
            source: self.source,
            slots,
            k_strides,
            v_strides,
            k,
            v,
            k_offset,
            v_offset,
            caches,
            k_cache_offset,
            v_cache_offset,
            scales,
        }
    }

    /// New rows, with poison in the gaps.
    pub fn rows(
        &self,
        random: &mut Random,
        strides: RowStrides,
        offset: usize,
        shape: [usize; 3],
    ) -> Vec<u8> {
        let [tokens, heads, dim] = shape;
        let size = self.source.size();
        let bytes = offset + strides.extent(tokens, heads, dim) as usize * size;
        let mut rows = vec![POISON; bytes.max(16).next_multiple_of(16)];
        for (token, head) in (0..tokens).flat_map(|token| (0..heads).map(move |head| (token, head))) {
            let first = strides.token as usize * token + strides.head as usize * head;
            for index in first..first + dim {
                let place = offset + index * size;
                rows[place..place + size].copy_from_slice(&encode(self.source, number(random)));
            }
        }
        rows
    }
}

/// Mostly ordinary numbers; sometimes those where conversions go wrong.
fn number(random: &mut Random) -> f32 {
    let ordinary = random.unit() * 4.0;
    let value = match random.below(64) {
        0 => 0.0,
        1 => -0.0,
        2 => ordinary * 3e4,
        3 => ordinary * 1e-5,
        4 => ordinary * 1e-7,
        5 => f64::INFINITY,
        6 => f64::NAN,
        7 => ordinary * 1e30,
        _ => ordinary,
    };
    value as f32
}

/// NHD or HND, with gaps.
fn cache_strides(
    random: &mut Random,
    block_size: usize,
    heads: usize,
    dim: usize,
    mut gap: impl FnMut(&mut Random) -> u64,
) -> KvStrides {
    let (block_size, heads, dim) = (block_size as u64, heads as u64, dim as u64);
    if random.one_in(2) {
        let head = dim + gap(random);
        let token = head * heads + gap(random);
        KvStrides { head, token, block: token * block_size + gap(random) }
    } else {
        let token = dim + gap(random);
        let head = token * block_size + gap(random);
        KvStrides { head, token, block: head * heads + gap(random) }
    }
}

/// `[tokens, heads, dim]` or `[heads, tokens, dim]`, with gaps.
pub fn row_strides(
    random: &mut Random,
    tokens: usize,
    heads: usize,
    dim: usize,
    mut gap: impl FnMut(&mut Random) -> u64,
) -> RowStrides {
    let dim = dim as u64;
    let inner = dim + gap(random);
    // A fused projection has its heads side by side. The other order overlaps unless tokens are bounded, which
    // the description cannot say, so it is drawn only where heads do not repeat.
    if heads == 1 && random.one_in(2) {
        return RowStrides { token: inner, head: inner * tokens.max(1) as u64 };
    }
    RowStrides { head: inner, token: inner * heads as u64 + gap(random) }
}

/// Distinct slots in random order, among them skipped tokens: negative ones, and ones past the cache.
fn slots(random: &mut Random, count: usize) -> Vec<i64> {
    let mut all: Vec<i64> = (0..count as i64).collect();
    for index in (1..all.len()).rev() {
        all.swap(index, random.below(index + 1));
    }
    all.truncate(1 + random.below(70));
    for slot in &mut all {
        if random.one_in(6) {
            *slot = random.pick(&[-1, -7, i64::from(i32::MIN)]);
        }
    }
    all
}

impl Tensors {
    /// The offset of an element of the caches, in bytes, and which buffer it is in.
    pub fn cache_place(&self, is_value: bool, slot: usize, head: usize, element: usize) -> (usize, usize) {
        let (strides, offset) = match is_value {
            false => (self.layout.k, self.k_cache_offset),
            true => (self.layout.v, self.v_cache_offset),
        };
        let (block, place) = (slot / self.layout.block_size, slot % self.layout.block_size);
        let index = strides.block as usize * block
            + strides.token as usize * place
            + strides.head as usize * head
            + element;
        let buffer = if is_value { self.caches.len() - 1 } else { 0 };
        (buffer, offset + index * self.config.kv_dtype.size())
    }

    /// The caches as they must be afterwards: one element after the other, by the definition.
    pub fn expected(&self) -> Vec<Vec<u8>> {
        let (source, cache) = (self.source, self.config.kv_dtype);
        let mut caches = self.caches.clone();
        for (token, &slot) in self.slots.iter().enumerate() {
            if slot < 0 {
                continue;
            }
            for is_value in [false, true] {
                let (rows, strides, first, dim) = match is_value {
                    false => (&self.k, self.k_strides, self.k_offset, self.config.head_dim_qk),
                    true => (&self.v, self.v_strides, self.v_offset, self.config.head_dim_v),
                };
                for head in 0..self.config.kv_heads {
                    for element in 0..dim {
                        let index = strides.token as usize * token + strides.head as usize * head + element;
                        let from = first + index * source.size();
                        let bytes = &rows[from..from + source.size()];
                        let stored = if source == cache {
                            bytes.to_vec()
                        } else {
                            encode(cache, decode(source, bytes) as f32 * self.reciprocal(is_value, head))
                        };
                        let (buffer, to) = self.cache_place(is_value, slot as usize, head, element);
                        caches[buffer][to..to + cache.size()].copy_from_slice(&stored);
                    }
                }
            }
        }
        caches
    }

    /// One over the scale, in f32 as the kernels do it; 1 without scales.
    pub fn reciprocal(&self, is_value: bool, head: usize) -> f32 {
        self.scales.as_ref().map_or(1.0, |scales| {
            let list = if is_value { &scales.v } else { &scales.k };
            1.0 / list[if list.len() == 1 { 0 } else { head }]
        })
    }

    /// Compares every element of the caches, also those that must be untouched. Rounding is exactly defined, so
    /// the bits must agree; only NaN may be any NaN. Gives the largest difference relative to the largest
    /// expected magnitude, which is 0 when they do.
    pub fn compare(&self, expected: &[Vec<u8>], found: &[Vec<u8>]) -> Result<f64, String> {
        let dtype = self.config.kv_dtype;
        for (buffer, (expected, found)) in expected.iter().zip(found).enumerate() {
            assert_eq!(expected.len(), found.len());
            let pairs = expected.chunks_exact(dtype.size()).zip(found.chunks_exact(dtype.size()));
            for (index, (expected, found)) in pairs.enumerate() {
                let (want, have) = (decode(dtype, expected), decode(dtype, found));
                if expected != found && !(want.is_nan() && have.is_nan()) {
                    return Err(format!("cache {buffer}, element {index}: expected {want}, found {have}"));
                }
            }
        }
        Ok(0.0)
    }
}
