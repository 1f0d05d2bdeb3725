//! How much memory the largest step takes, and what that leaves for the cache.

use super::{CudaBackend, Purpose};
use crate::backend::{AttentionSpec, Backend, BackendError, GroupBatch, StepBatch, StepLimits};
use crate::models::Model;

impl CudaBackend {
    /// Computes the largest steps that there can be, a prompt's and a decode's, over a cache of one block: after that
    /// all kernels are loaded, and activations lie where they stay.
    ///
    /// # Errors
    /// [`BackendError::DeviceMemory`] if there is no room for it.
    pub fn profile(&self, model: &dyn Model<Self>, spec: &AttentionSpec) -> Result<(), BackendError> {
        let small = AttentionSpec { num_blocks: 1, host_blocks: 0, ..spec.clone() };
        let mut cache = self.cache(&small)?;
        // The first of each finds out how much it takes, the second takes it.
        for batch in [largest_prompts(&small), largest_decode(&small)] {
            for _ in 0..2 {
                let step = self.prepare(&small, &batch)?;
                model.forward(self, &step, &mut cache)?;
                self.synchronize()?;
            }
        }
        self.seal()
    }

    /// Bytes for the cache, if `utilization` of the device's memory may be used in all.
    ///
    /// # Errors
    /// [`BackendError::DeviceMemory`] if nothing is left.
    pub fn cache_budget(&self, utilization: f64) -> Result<u64, BackendError> {
        let (free, total) = self.memory()?;
        let used = total.saturating_sub(free);
        let budget = (total as f64 * utilization) as usize;
        match budget.checked_sub(used) {
            Some(left) if left > 0 => Ok(left.min(free) as u64),
            _ => {
                let Purpose { what, .. } = Purpose::CACHE;
                let hint = "a larger --gpu-memory-utilization, or --max-batch-tokens or --max-num-seqs";
                Err(BackendError::DeviceMemory { what, wanted: 1, free: budget.saturating_sub(used), hint })
            }
        }
    }
}

/// As many tokens as a step can have, in sequences as long as can be; as many logits as there can be sequences.
fn largest_prompts(spec: &AttentionSpec) -> StepBatch {
    let StepLimits { max_rows, max_sequences, max_seq_len } = spec.limits;
    let longest = max_seq_len.max(1);
    let mut lens = vec![longest; max_rows / longest];
    lens.extend(Some(max_rows % longest).filter(|&rest| rest > 0));
    let mut batch = made_up(spec, &lens, |len| len);
    batch.logit_rows = (0..max_sequences.min(batch.rows())).collect();
    batch
}

/// A token of as many sequences as can be, each as long as can be.
fn largest_decode(spec: &AttentionSpec) -> StepBatch {
    let StepLimits { max_rows, max_sequences, max_seq_len } = spec.limits;
    decode(spec, &vec![max_seq_len.max(1); max_sequences.min(max_rows).max(1)])
}

/// A token of each of these sequences.
pub(super) fn decode(spec: &AttentionSpec, lens: &[usize]) -> StepBatch {
    let mut batch = made_up(spec, lens, |_| 1);
    batch.logit_rows = (0..batch.rows()).collect();
    batch
}

/// Sequences of these lengths, of whose last tokens so many are computed. All is read from block 0, nothing is written.
fn made_up(spec: &AttentionSpec, lens: &[usize], computed: impl Fn(usize) -> usize) -> StepBatch {
    let blocks = |len: usize| len.div_ceil(spec.block_size.max(1));
    let mut batch = StepBatch { query_start: vec![0], ..StepBatch::default() };
    let mut indptr = vec![0];
    for &len in lens {
        let rows = computed(len);
        batch.positions.extend((len - rows..len).map(|position| position as i32));
        batch.query_start.push(batch.positions.len() as i32);
        batch.seq_lens.push(len as i32);
        indptr.push(indptr.last().copied().unwrap_or(0) + blocks(len) as i32);
    }
    let rows = batch.positions.len();
    batch.tokens = vec![0; rows];
    let indices = vec![0; indptr.last().map_or(0, |&end| end as usize)];
    let group = GroupBatch { indptr, indices, slots: vec![-1; rows] };
    batch.groups = vec![group; spec.groups.len()];
    batch
}

#[cfg(test)]
mod tests {
    use super::*;
    use pagewise_attention::{AttentionConfig, CacheLayout, DType, Problem};

    #[test]
    fn the_largest_steps_are_sound_and_as_large_as_the_limits() {
        for (max_rows, max_sequences, max_seq_len) in
            [(512, 256, 2048), (4096, 8, 1000), (1, 1, 1), (64, 256, 100)]
        {
            let config = AttentionConfig::new(4, 2, 16, DType::Bf16);
            let spec = AttentionSpec {
                layer_groups: vec![0, 1],
                groups: vec![config.clone(), config.clone()],
                rope: None,
                block_size: 16,
                num_blocks: 1,
                host_blocks: 0,
                limits: StepLimits { max_rows, max_sequences, max_seq_len },
            };
            let prompts = largest_prompts(&spec);
            assert_eq!(prompts.rows(), max_rows);
            assert_eq!(prompts.logit_rows.len(), max_sequences.min(max_rows));
            let decode = largest_decode(&spec);
            assert_eq!(decode.rows(), max_sequences.min(max_rows));
            for batch in [prompts, decode] {
                assert!(batch.seq_lens.iter().all(|&len| len as usize <= max_seq_len));
                let layout = CacheLayout::nhd(1, 16, &config);
                for group in &batch.groups {
                    assert_eq!(group.slots.len(), batch.rows());
                    Problem::new(&config, layout, batch.paged(group)).unwrap();
                }
            }
        }
    }
}
