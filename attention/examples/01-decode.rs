//! One decoding step: two sequences of different lengths, their keys and values scattered over the blocks of
//! one cache, one new query each.
//!
//! `cargo run -p pagewise-attention --example 01-decode`

use pagewise_attention::cpu::{Inputs, Outputs, Plan};
use pagewise_attention::{
    AttentionConfig, CacheLayout, DType, HostTensor, HostTensorMut, PagedBatch, Problem, ProblemError,
};

fn main() -> Result<(), ProblemError> {
    // Four query heads share two key-value heads of 64 elements; causal, scale 1/√64.
    let config = AttentionConfig::new(4, 2, 64, DType::F32);

    // A cache of eight blocks of 16 tokens: two buffers `[blocks, block_size, kv_heads, head_dim]`.
    let layout = CacheLayout::nhd(8, 16, &config);
    let k: Vec<f32> = (0..layout.k_extent(&config)).map(|i| (i as f32 * 0.37).sin()).collect();
    let v: Vec<f32> = (0..layout.v_extent(&config)).map(|i| (i as f32 * 0.11).cos()).collect();

    // Sequence 0 has 40 tokens in blocks 6, 1 and 3; sequence 1 has 7 tokens in block 4. Each row of the table
    // has room for three blocks; what stands behind a sequence's last block is never followed.
    let seq_lens = [40, 7];
    let block_tables = [6, 1, 3, /**/ 4, -1, -1];
    // One query each: sequence i owns query rows query_start[i]..query_start[i + 1].
    let query_start = [0, 1, 2];
    let batch = PagedBatch::padded(&query_start, &seq_lens, &block_tables, 3);

    // Checked once, planned once a step, run once a layer.
    let problem = Problem::new(&config, layout, batch)?;
    let plan = Plan::new(problem);

    let q: Vec<f32> = (0..problem.q_extent()).map(|i| (i as f32 * 0.73).sin()).collect();
    let mut out = vec![0.0f32; problem.out_extent() as usize];
    let mut lse = vec![0.0f32; problem.lse_extent() as usize];
    let inputs = Inputs::new(HostTensor::F32(&q), HostTensor::F32(&k), HostTensor::F32(&v));
    plan.run(&inputs, &mut Outputs { out: HostTensorMut::F32(&mut out), lse: Some(&mut lse) })?;

    for (sequence, row) in out.chunks_exact(4 * 64).enumerate() {
        for (head, values) in row.chunks_exact(64).enumerate() {
            let lse = lse[sequence * 4 + head];
            println!("sequence {sequence}, head {head}: lse {lse:6.3}, out {:6.3?} …", &values[..4]);
        }
    }
    Ok(())
}
