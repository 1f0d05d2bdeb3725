//! The tensors of an attention task in device memory, a GPU's or what plays one, and the call over them.

use pagewise_ptx::decode::WorkspaceSizes;

use super::super::subject::{AttentionTask, ProbabilityRounding, Refusal, Scale};
use crate::cuda::{AttentionCall, CacheScales};
use crate::{AttentionConfig, BlockTables, DType, HostTensor};

/// Copies bytes to device memory; where they are then.
pub type Upload<'a> = dyn FnMut(&[u8]) -> Result<u64, Refusal> + 'a;

/// What a plan asks for beside the task's tensors.
#[derive(Clone, Debug)]
pub struct PlannedMemory {
    /// Its work items.
    pub work: Vec<u32>,
    /// Sizes of its workspace.
    pub workspace: WorkspaceSizes,
}

/// Copies a task's tensors, with outputs that hold `out` and `lse` so far, the plan's work and a poisoned workspace.
///
/// # Errors
/// Those of `upload`.
pub fn place_attention(
    task: &AttentionTask<'_>,
    planned: &PlannedMemory,
    out: HostTensor<'_>,
    lse: Option<&[f32]>,
    upload: &mut Upload<'_>,
) -> Result<AttentionCall, Refusal> {
    let batch = task.problem.batch();
    let entries = match batch.block_tables {
        BlockTables::Padded { entries, .. } => entries,
        BlockTables::Csr { indices, .. } => indices,
    };
    let tables: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    let mut floats =
        |values: Option<&[f32]>| values.map_or(Ok(0), |values| upload(&HostTensor::F32(values).to_bytes()));
    let (alibi_slopes, sinks, lse) = (floats(task.alibi_slopes)?, floats(task.sinks)?, floats(lse)?);
    let scales = match (task.k_scale, task.v_scale) {
        (Scale::One, Scale::One) => CacheScales::default(),
        (k, v) => {
            let (k, v) = (scale_list(k), scale_list(v));
            CacheScales { per_head: k.len() > 1, k: floats(Some(&k))?, v: floats(Some(&v))? }
        }
    };
    let sizes = planned.workspace;
    Ok(AttentionCall {
        q: upload(&task.q.to_bytes())?,
        k_cache: upload(&task.k.to_bytes())?,
        v_cache: upload(&task.v.to_bytes())?,
        tables: upload(&tables)?,
        scales,
        alibi_slopes,
        sinks,
        mask_bits: batch.mask_bits.map_or(Ok(0), |bits| upload(&words(bits.words)))?,
        out: upload(&out.to_bytes())?,
        lse,
        work: upload(&words(&planned.work))?,
        partial_out: upload(&vec![0xff; sizes.partial_out as usize])?,
        partial_max: upload(&vec![0xff; sizes.partial_max as usize])?,
        tickets: upload(&vec![0; sizes.tickets as usize])?,
    })
}

/// The factors of stored elements, one or one a KV head.
pub(super) fn scale_list(scale: Scale<'_>) -> Vec<f32> {
    match scale {
        Scale::One => vec![1.0],
        Scale::PerTensor(scale) => vec![scale],
        Scale::PerHead(scales) => scales.to_vec(),
    }
}

/// How the CUDA kernels round probabilities, by the variants that ran, in their order. Rows over an fp8 cache are worked on
/// in f16 one by one, in tiles, which come last, in the queries' type.
pub fn cuda_rounding(config: &AttentionConfig, ran: &[String]) -> ProbabilityRounding {
    let tiles = ran.last().is_some_and(|variant| variant.starts_with("prefill"));
    match (config.q_dtype, config.kv_dtype.is_fp8() && !tiles) {
        (DType::F32, _) => ProbabilityRounding::default(),
        // The absolute error is that of f16, below, of rows of a mixture that are worked on one by one.
        (DType::Bf16, false) if config.kv_dtype.is_fp8() => {
            ProbabilityRounding { relative: DType::Bf16.unit_roundoff(), absolute: 2f64.powi(-40) }
        }
        (DType::Bf16, false) => ProbabilityRounding { relative: DType::Bf16.unit_roundoff(), absolute: 0.0 },
        // f16, multiplied by 2^15 first: half its smallest number is 2^-25.
        _ => ProbabilityRounding { relative: DType::F16.unit_roundoff(), absolute: 2f64.powi(-40) },
    }
}
