//! Random cases of `write_kv` with rotary embedding, and the plain code that says what they must store.

use pagewise_attention::RowStrides;
use pagewise_attention::cuda::ptx::write_kv::RotaryStyle;
use pagewise_attention::cuda::{PositionType, Rotary, RotaryQueries, RotaryTables};

use super::encode::{decode, encode};
use super::random::Random;
use super::write_kv::{Case, Tensors, row_strides};

/// The tensors of a case in host memory: those of `write_kv`, and what turning adds.
#[derive(Clone, Debug)]
pub struct RotaryTensors {
    pub plain: Tensors,
    pub style: RotaryStyle,
    pub dim: usize,
    /// Cosines and sines, f32; each row `stride` elements after the last.
    pub table: Vec<f32>,
    pub cos_offset: usize,
    pub sin_offset: usize,
    pub stride: usize,
    pub num_positions: usize,
    pub positions: Vec<i64>,
    pub position_type: PositionType,
    pub q: Vec<u8>,
    pub q_offset: usize,
    pub q_strides: RowStrides,
    /// Where turned queries go, if not where they come from; all poison.
    pub out: Option<(Vec<u8>, RowStrides)>,
    pub with_queries: bool,
}

/// Where they have been copied to.
#[derive(Clone, Copy, Debug)]
pub struct RotaryAddresses {
    pub table: u64,
    pub positions: u64,
    pub q: u64,
    pub out: u64,
}

/// What a case must give.
pub struct Turned {
    pub caches: Vec<Vec<u8>>,
    /// The turned queries, in the buffer that they go to.
    pub queries: Vec<u8>,
    /// Elements that went through arithmetic: buffer (the caches, then the queries), byte, value, tolerance.
    turned: Vec<(usize, usize, f64, f64)>,
}

impl RotaryTensors {
    pub fn build(case: &Case) -> Self {
        let mut plain = case.build();
        let mut random = Random::new(!case.seed);
        let unit = case.unit;
        let (heads, dim_k) = (plain.config.kv_heads, plain.config.head_dim_qk);
        plain.config.q_heads = heads * random.pick(&[1, 2, 3]);
        // Case dimensions are multiples of the unit, half of the rotary one must be too, or the scalar variant runs.
        let most = dim_k / 2 / unit;
        let half = match most {
            0 => (dim_k / 2).max(1),
            _ if random.one_in(2) => most * unit,
            _ => unit * (1 + random.below(most)),
        };
        if dim_k < 2 {
            // No pair fits; the smallest head that has one, in an otherwise equal case.
            return Self::build(&Case { seed: case.seed.wrapping_add(1), ..*case });
        }
        let num_positions = 1 + random.below(300);
        let gap = unit * random.below(3);
        // One table with cosines and sines side by side, or one behind the other.
        let (stride, sin_offset) = if random.one_in(2) {
            (2 * half + gap, half)
        } else {
            (half + gap, (half + gap) * num_positions)
        };
        let cos_offset = unit * random.below(3);
        let sin_offset = sin_offset + cos_offset;
        let mut table = vec![f32::NAN; sin_offset + stride * num_positions];
        for position in 0..num_positions {
            for pair in 0..half {
                let angle = if random.one_in(9) { 0.0 } else { random.unit() * 9.0 };
                table[cos_offset + position * stride + pair] = angle.cos() as f32;
                table[sin_offset + position * stride + pair] = angle.sin() as f32;
            }
        }
        let tokens = plain.slots.len();
        let position_type = random.pick(&[PositionType::I32, PositionType::I64]);
        let outside = match position_type {
            PositionType::I32 => vec![-1, num_positions as i64],
            PositionType::I64 => vec![-1, num_positions as i64, 1 << 32],
        };
        let positions =
            (0..tokens)
                .map(|_| {
                    if random.one_in(12) { random.pick(&outside) } else { random.below(num_positions) as i64 }
                })
                .collect();
        let q_heads = plain.config.q_heads;
        let gaps = |random: &mut Random| if random.one_in(2) { 0 } else { (unit * random.below(9)) as u64 };
        let strides = |random: &mut Random| row_strides(random, tokens, q_heads, dim_k, gaps);
        let q_strides = strides(&mut random);
        let q_offset = unit * random.below(5) * case.source.size();
        let q = case.rows(&mut random, q_strides, q_offset, [tokens, q_heads, dim_k]);
        let out = random.one_in(2).then(|| {
            let strides = strides(&mut random);
            let bytes = strides.extent(tokens, q_heads, dim_k) as usize * case.source.size();
            (vec![0xff; bytes.max(16).next_multiple_of(16)], strides)
        });
        Self {
            plain,
            style: random.pick(&RotaryStyle::ALL),
            dim: 2 * half,
            table,
            cos_offset,
            sin_offset,
            stride,
            num_positions,
            positions,
            position_type,
            q,
            q_offset,
            q_strides,
            out,
            with_queries: !random.one_in(5),
        }
    }

    /// The positions as the kernel reads them.
    pub fn position_bytes(&self) -> Vec<u8> {
        match self.position_type {
            PositionType::I32 => self.positions.iter().flat_map(|&p| (p as i32).to_le_bytes()).collect(),
            PositionType::I64 => self.positions.iter().flat_map(|p| p.to_le_bytes()).collect(),
        }
    }

    pub fn rotary(&self, at: RotaryAddresses) -> Rotary {
        let in_place = (at.q + self.q_offset as u64, self.q_strides);
        let (out, out_strides) = self.out.as_ref().map_or(in_place, |(_, strides)| (at.out, *strides));
        Rotary {
            style: self.style,
            dim: self.dim,
            tables: RotaryTables {
                cos: at.table + 4 * self.cos_offset as u64,
                sin: at.table + 4 * self.sin_offset as u64,
                stride: self.stride as u64,
                positions: self.num_positions,
            },
            positions: at.positions,
            position_type: self.position_type,
            queries: self.with_queries.then_some(RotaryQueries {
                q: at.q + self.q_offset as u64,
                q_strides: self.q_strides,
                out,
                out_strides,
            }),
        }
    }

    /// Element `element` of a row that begins at `first`, turned by a token's position: its value, and what rounding
    /// in f32 may change of it. `None` for elements that do not turn.
    fn turned(&self, bytes: &[u8], first: usize, element: usize, token: usize) -> Option<(f64, f64)> {
        if element >= self.dim {
            return None;
        }
        let size = self.plain.source.size();
        let read = |element: usize| {
            let at = first + element * size;
            decode(self.plain.source, &bytes[at..at + size])
        };
        let half = self.dim / 2;
        let (pair, is_second, other) = match self.style {
            RotaryStyle::NeoX => (element % half, element >= half, (element + half) % self.dim),
            RotaryStyle::GptJ => (element / 2, element % 2 == 1, element ^ 1),
        };
        let Some(position) = usize::try_from(self.positions[token]).ok().filter(|&p| p < self.num_positions)
        else {
            return Some((f64::NAN, 0.0));
        };
        let at = |offset: usize| f64::from(self.table[offset + position * self.stride + pair]);
        let straight = read(element) * at(self.cos_offset);
        let crossed = read(other) * at(self.sin_offset);
        let value = if is_second { straight + crossed } else { straight - crossed };
        // Two roundings to f32, two more for a scale, and those of the bounds themselves.
        Some((value, 6.0 * 2f64.powi(-24) * (straight.abs() + crossed.abs())))
    }

    pub fn expected(&self) -> Turned {
        let plain = &self.plain;
        let mut caches = plain.expected();
        let mut turned = Vec::new();
        let (size, cache_size) = (plain.source.size(), plain.config.kv_dtype.size());
        for (token, &slot) in plain.slots.iter().enumerate().filter(|&(_, &slot)| slot >= 0) {
            for head in 0..plain.config.kv_heads {
                let row = plain.k_strides.token as usize * token + plain.k_strides.head as usize * head;
                for element in 0..plain.config.head_dim_qk {
                    let first = plain.k_offset + row * size;
                    if let Some((value, error)) = self.turned(&plain.k, first, element, token) {
                        let scale = f64::from(plain.reciprocal(false, head));
                        let (buffer, at) = plain.cache_place(false, slot as usize, head, element);
                        turned.push((buffer, at, value * scale, error * scale));
                        // Marked, so that what no arithmetic went through is compared bit for bit.
                        caches[buffer][at..at + cache_size].fill(0xff);
                    }
                }
            }
        }
        let (mut queries, out_strides, out_offset) = match &self.out {
            Some((out, strides)) => (out.clone(), *strides, 0),
            None => (self.q.clone(), self.q_strides, self.q_offset),
        };
        let tokens = if self.with_queries { plain.slots.len() } else { 0 };
        for (token, head) in (0..tokens).flat_map(|t| (0..plain.config.q_heads).map(move |h| (t, h))) {
            let from = self.q_strides.token as usize * token + self.q_strides.head as usize * head;
            let to = out_strides.token as usize * token + out_strides.head as usize * head;
            for element in 0..plain.config.head_dim_qk {
                let first = self.q_offset + from * size;
                let at = out_offset + (to + element) * size;
                match self.turned(&self.q, first, element, token) {
                    Some((value, error)) => {
                        turned.push((caches.len(), at, value, error));
                        queries[at..at + size].fill(0xff);
                    }
                    None => {
                        let from = first + element * size;
                        queries[at..at + size].copy_from_slice(&self.q[from..from + size]);
                    }
                }
            }
        }
        Turned { caches, queries, turned }
    }

    /// Compares the caches and the queries' buffer with what they must hold.
    pub fn compare(&self, expected: &Turned, caches: &[Vec<u8>], queries: &[u8]) -> Result<(), String> {
        let (mut caches, mut queries) = (caches.to_vec(), queries.to_vec());
        for &(buffer, at, value, error) in &expected.turned {
            let (what, dtype, found) = match caches.get_mut(buffer) {
                Some(cache) => ("cache", self.plain.config.kv_dtype, cache),
                None => ("queries", self.plain.source, &mut queries),
            };
            let found = &mut found[at..at + dtype.size()];
            let number = decode(dtype, found);
            // Rounding keeps order: the stored element lies between those of the two bounds.
            let nearest = |value: f64| decode(dtype, &encode(dtype, value as f32));
            let fine = match value.is_finite() {
                true => (nearest(value - error - 1e-44)..=nearest(value + error + 1e-44)).contains(&number),
                false if value.is_nan() => number.is_nan(),
                false => number == nearest(value),
            };
            if !fine {
                let place = at / dtype.size();
                return Err(format!("{what} {buffer}, element {place}: expected {value}, found {number}"));
            }
            found.fill(0xff);
        }
        self.plain.compare(&expected.caches, &caches)?;
        // The queries are compared as one more cache would be, in their own type.
        let as_source = Tensors { config: self.source_config(), ..self.plain.clone() };
        as_source
            .compare(std::slice::from_ref(&expected.queries), &[queries])
            .map_err(|error| format!("queries: {error}"))?;
        Ok(())
    }

    fn source_config(&self) -> pagewise_attention::AttentionConfig {
        let mut config = self.plain.config.clone();
        config.kv_dtype = self.plain.source;
        config
    }
}
