//! Decode of many short rows, as an engine's steps have them: as planned, and with a thread block to every KV head of
//! every row.

use pagewise_attention::DType;
use pagewise_attention::cuda::{Order, PlanOptions};
use serde_json::{Value, json};

use crate::cache::{BLOCK, Layout};
use crate::decode::Prepared;
use crate::gpu::Gpu;
use crate::shapes::Shape;
use crate::yardsticks::Yardsticks;

/// Query heads and KV heads: Llama 3 8B's, and OPT-13B's.
const HEADS: [(usize, usize); 2] = [(32, 8), (40, 40)];

pub fn measure(gpu: &Gpu<'_>, yardsticks: &Yardsticks) -> Vec<Value> {
    let mut results = Vec::new();
    println!(
        "many short rows, dependent launches where the GPU has them: us as planned, us with one KV head to a thread block"
    );
    let order = match gpu.context.device().launches_dependently() {
        true => Order::Dependent,
        false => Order::Stream,
    };
    for (q_heads, kv_heads) in HEADS {
        for (rows, keys) in [(64, 64), (64, 192), (64, 512), (256, 64), (256, 192), (256, 512)] {
            let shape = Shape {
                q_heads,
                kv_heads,
                dim: 128,
                kv_dtype: DType::Bf16,
                name: format!("{q_heads}/{kv_heads} {rows}x{keys}"),
                lens: vec![keys; rows],
                best_peer: String::new(),
                best_us: 0.0,
                vllm_us: 0.0,
                sdpa_us: None,
            };
            let prepared = Prepared::new(gpu, &shape, Layout { hnd: false, apart: false, block: BLOCK });
            let planned = prepared.measure(PlanOptions { order, ..PlanOptions::default() });
            let single = PlanOptions { order, block_heads: Some(1), ..PlanOptions::default() };
            let single = prepared.measure(single).us;
            let at_ceiling = shape.bytes() / yardsticks.ceiling / 1e3;
            println!(
                "{:14} {:7.1} us, {single:7.1} us: x{:.2}; at the ceiling {at_ceiling:.1} us, error {:.1e}",
                shape.name,
                planned.us,
                single / planned.us,
                planned.error
            );
            results.push(json!({
                "shape": shape.name, "us": planned.us, "one_head_us": single, "at_ceiling_us": at_ceiling,
                "relative_error": planned.error,
            }));
        }
    }
    results
}
