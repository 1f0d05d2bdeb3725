//! The shapes that decode is measured at, and what other kernels take for them: `peers/h100_decode.tsv`.
#![allow(dead_code, reason = "each bench uses its part")]

use pagewise_attention::DType;

/// One line of the table of peers.
pub struct Shape {
    pub q_heads: usize,
    pub kv_heads: usize,
    pub dim: usize,
    pub kv_dtype: DType,
    pub name: String,
    pub lens: Vec<i32>,
    pub best_peer: String,
    pub best_us: f64,
    pub vllm_us: f64,
    /// Over a contiguous cache, where it was measured.
    pub sdpa_us: Option<f64>,
}

impl Shape {
    /// Bytes of K and V that it reads.
    pub fn bytes(&self) -> f64 {
        2.0 * (self.kv_heads * self.dim * self.kv_dtype.size()) as f64
            * self.lens.iter().map(|len| f64::from(*len)).sum::<f64>()
    }

    /// Bytes of K and V of a block of so many keys.
    pub fn block_bytes(&self, keys: usize) -> usize {
        2 * keys * self.kv_heads * self.dim * self.kv_dtype.size()
    }

    /// Bytes of a row in shared memory.
    pub fn row_bytes(&self) -> u32 {
        (self.dim.next_power_of_two() * self.kv_dtype.size()) as u32
    }

    /// Whether thread blocks of so many warps can have so many KV heads.
    pub fn divides(&self, block_heads: u32, warps: u32) -> bool {
        block_heads <= warps && self.kv_heads.is_multiple_of(block_heads as usize)
    }

    pub fn sequences(&self) -> u32 {
        self.lens.len() as u32
    }

    pub fn longest(&self) -> u32 {
        self.lens.iter().max().map_or(0, |len| len.cast_unsigned())
    }

    /// Whether it is one of the 52 that the geometric means are of.
    pub fn counts(&self) -> bool {
        self.dim == 128 && self.kv_dtype == DType::Bf16
    }
}

pub fn shapes() -> Vec<Shape> {
    let text = include_str!("../../peers/h100_decode.tsv");
    let ragged =
        text.lines().find_map(|line| line.split_once("log-normal lengths, ")).expect("the ragged lengths").1;
    let ragged: Vec<i32> = ragged.split(',').map(|len| len.parse().unwrap()).collect();
    let rows = text.lines().filter(|line| line.starts_with(|c: char| c.is_ascii_digit()));
    rows.map(|line| {
        let fields: Vec<&str> = line.split('\t').collect();
        let [q_heads, kv_heads, dim, kv, name, best_peer, best_us, vllm_us, sdpa_us] = fields[..] else {
            panic!("{line}")
        };
        let lens = match name.split_once('x') {
            Some((sequences, keys)) => vec![keys.parse().unwrap(); sequences.parse().unwrap()],
            None => ragged.clone(),
        };
        let kv_dtype = if kv == "e4m3" { DType::F8E4M3 } else { kv.parse().unwrap() };
        let kind = if (dim, kv) == ("128", "bf16") { String::new() } else { format!(" d{dim} {kv}") };
        Shape {
            q_heads: q_heads.parse().unwrap(),
            kv_heads: kv_heads.parse().unwrap(),
            dim: dim.parse().unwrap(),
            kv_dtype,
            name: format!("{q_heads}/{kv_heads} {name}{kind}"),
            lens,
            best_peer: best_peer.to_owned(),
            best_us: best_us.parse().unwrap(),
            vllm_us: vllm_us.parse().unwrap(),
            sdpa_us: sdpa_us.parse().ok(),
        }
    })
    .collect()
}
