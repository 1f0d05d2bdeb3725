//! A decoding step on an NVIDIA GPU over a cache that the caller owns: plan once a step, run once a layer, and the
//! same on the CPU beside it. Without a GPU it says why there is none.
//!
//! `cargo run -p pagewise-attention --features cuda --example 03-decode-on-cuda`

use half::bf16;
use pagewise_attention::cpu::{Inputs, Outputs, Plan};
use pagewise_attention::cuda::{
    AttentionSlices, AttentionWorkspace, Context, CudaError, DecodePlan, PlanOptions, StepLimits,
};
use pagewise_attention::{
    AttentionConfig, CacheLayout, DType, HostTensor, HostTensorMut, PagedBatch, Problem,
};

const BLOCK_SIZE: usize = 16;
/// Keys of the two sequences, the new token's included, and the blocks that each was given.
const SEQ_LENS: [i32; 2] = [50, 20];
const BLOCK_TABLES: [i32; 8] = [5, 0, 7, 2, 1, 6, 0, 0];

fn main() -> Result<(), CudaError> {
    let context = match Context::primary(0) {
        Ok(context) => context,
        Err(error) => {
            println!("{error}");
            return Ok(());
        }
    };
    let Some(engine) = context.cudarc() else { return Ok(()) };
    let stream = engine.default_stream();

    // Eight query heads share two key-value heads; K and V of a block lie side by side, which an H100 reads faster.
    let config = AttentionConfig::new(8, 2, 128, DType::Bf16);
    let apart = CacheLayout::nhd(8, BLOCK_SIZE, &config);
    let layout = apart.interleaved();
    let numbers = |n: usize, step: f32| -> Vec<bf16> {
        (0..n).map(|i| bf16::from_f32((i as f32 * step).sin())).collect()
    };
    let v_start = apart.k.block as usize;
    let cache = numbers(v_start + layout.k_extent(&config) as usize, 0.37);
    let q = numbers(SEQ_LENS.len() * 8 * 128, 0.71);

    // The problem is described and checked once, whatever computes it.
    let batch = PagedBatch::padded(&[0, 1, 2], &SEQ_LENS, &BLOCK_TABLES, 4);
    let problem = Problem::new(&config, layout, batch)?;

    // The workspace is made once, for the largest step there will be; a step's plan is copied to it.
    let limits = StepLimits { rows: 64, keys: 64 * 4096 };
    let bound = DecodePlan::bound(&config, context.device(), limits, PlanOptions::default())?;
    let mut workspace = AttentionWorkspace::new(&stream, &bound)?;
    let plan = DecodePlan::new(&problem, context.device(), PlanOptions::default())?;
    workspace.upload(&stream, &plan)?;

    let device_cache = stream.clone_htod(&cache)?;
    let device_q = stream.clone_htod(&q)?;
    let tables = stream.clone_htod(&BLOCK_TABLES)?;
    let mut device_out = stream.alloc_zeros::<bf16>(q.len())?;
    let slices = AttentionSlices {
        q: device_q.as_view(),
        k_cache: device_cache.as_view(),
        v_cache: device_cache.slice(v_start..),
        tables: tables.as_view(),
        out: &mut device_out.as_view_mut(),
        lse: None,
        scales: None,
        alibi_slopes: None,
        sinks: None,
        mask_bits: None,
    };
    // SAFETY: the tables are those that were planned, and the workspace holds this plan.
    unsafe { context.decode(&stream, &plan, &mut workspace, slices) }?;
    let out = stream.clone_dtoh(&device_out)?;

    // The same problem on the CPU.
    let mut expected = vec![bf16::ZERO; q.len()];
    let inputs = Inputs::new(
        HostTensor::Bf16(&q),
        HostTensor::Bf16(&cache),
        HostTensor::Bf16(cache.get(v_start..).unwrap_or(&[])),
    );
    Plan::new(problem).run(&inputs, &mut Outputs::new(HostTensorMut::Bf16(&mut expected)))?;
    let difference =
        out.iter().zip(&expected).map(|(a, b)| (a.to_f32() - b.to_f32()).abs()).fold(0.0f32, f32::max);
    println!("{} with {}", context.device(), plan.variant());
    println!("largest difference to the CPU: {difference:.1e}");
    Ok(())
}
