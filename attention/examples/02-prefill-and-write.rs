//! A prompt in two chunks: each chunk's keys and values are written into their slots first, then its queries
//! attend to everything that is there. The outputs have the same bits as in one chunk.
//!
//! `cargo run -p pagewise-attention --example 02-prefill-and-write`

use half::bf16;
use pagewise_attention::cpu::{Inputs, KvPair, Outputs, Plan, write_kv};
use pagewise_attention::{
    AttentionConfig, CacheLayout, DType, HostTensor, HostTensorMut, PagedBatch, Problem, ProblemError,
    WriteKv,
};

const BLOCK_SIZE: usize = 16;
const TOKENS: usize = 50;
/// The blocks that the sequence was given, in its order.
const BLOCK_TABLE: [i32; 4] = [5, 0, 7, 2];

fn main() -> Result<(), ProblemError> {
    // f32 queries and outputs over a bf16 cache.
    let config = AttentionConfig { kv_dtype: DType::Bf16, ..AttentionConfig::new(4, 2, 64, DType::F32) };
    let numbers = |n: usize, step: f32| (0..n).map(|i| (i as f32 * step).sin()).collect::<Vec<_>>();
    // What a model's projections would give: `[tokens, heads, head_dim]`.
    let prompt = Prompt {
        q: numbers(TOKENS * 4 * 64, 0.71),
        k: numbers(TOKENS * 2 * 64, 0.37),
        v: numbers(TOKENS * 2 * 64, 0.11),
    };
    let whole = prefill(&config, &prompt, &[TOKENS])?;
    let chunked = prefill(&config, &prompt, &[33, TOKENS - 33])?;
    let same = whole.iter().zip(&chunked).all(|(a, b)| a.to_bits() == b.to_bits());
    println!("last output {:6.3?} …", &whole[(TOKENS - 1) * 4 * 64..][..4]);
    println!("in one chunk and in two: {}", if same { "the same bits" } else { "different bits" });
    Ok(())
}

struct Prompt {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

/// Writes and attends chunk by chunk; gives the outputs of all tokens.
fn prefill(config: &AttentionConfig, prompt: &Prompt, chunks: &[usize]) -> Result<Vec<f32>, ProblemError> {
    let layout = CacheLayout::nhd(8, BLOCK_SIZE, config);
    let mut k = vec![bf16::NAN; layout.k_extent(config) as usize];
    let mut v = vec![bf16::NAN; layout.v_extent(config) as usize];
    let mut outputs = Vec::new();
    let mut done = 0;
    for &tokens in chunks {
        let rows = done..done + tokens;
        // Token t lies in block t / block_size of the table, at place t % block_size.
        let slots: Vec<i64> = rows
            .clone()
            .map(|t| i64::from(BLOCK_TABLE[t / BLOCK_SIZE]) * BLOCK_SIZE as i64 + (t % BLOCK_SIZE) as i64)
            .collect();
        let elements = rows.start * 2 * 64..rows.end * 2 * 64;
        let (new_k, new_v) = (&prompt.k[elements.clone()], &prompt.v[elements]);
        let source = KvPair::new(HostTensor::F32(new_k), HostTensor::F32(new_v));
        let cache = KvPair::new(HostTensorMut::Bf16(&mut k), HostTensorMut::Bf16(&mut v));
        let write = WriteKv::packed(&slots, config);
        write_kv(config, &layout, &write, source, cache, KvPair::default())?;

        let (query_start, seq_lens) = ([0, tokens as i32], [rows.end as i32]);
        let batch = PagedBatch::padded(&query_start, &seq_lens, &BLOCK_TABLE, BLOCK_TABLE.len());
        let problem = Problem::new(config, layout, batch)?;
        let mut out = vec![0.0f32; problem.out_extent() as usize];
        let q = HostTensor::F32(&prompt.q[rows.start * 4 * 64..rows.end * 4 * 64]);
        let inputs = Inputs::new(q, HostTensor::Bf16(&k), HostTensor::Bf16(&v));
        Plan::new(problem).run(&inputs, &mut Outputs::new(HostTensorMut::F32(&mut out)))?;
        outputs.extend(out);
        done = rows.end;
    }
    Ok(outputs)
}
