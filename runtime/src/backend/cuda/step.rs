//! A step made ready: its batch filled up to a bucket, planned, and on its way to the device.
//!
//! Owns what is planned and where it goes; the memory is `inputs.rs`'s.

use std::borrow::Cow;

use pagewise_attention::cuda::{
    AttentionOptions, AttentionPlan, DecodePlan, Device, GridHeads, Order, PlanOptions,
    StepLimits as DecodeLimits,
};
use pagewise_attention::{AttentionConfig, CacheLayout, PagedBatch, Problem, ProblemError, RowStrides};

use super::CudaBackend;
use super::buckets::{bucket, fill_up, is_decode, launch_size};
use super::inputs::{Layout, Sizes, Workspace};
use super::tensor::CudaTensor;
use crate::backend::{AttentionSpec, BackendError, LayerPlace, StepBatch};

/// The shape of a step that a captured graph serves.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct GraphKey {
    pub(super) rows: usize,
    /// The launch of each group's attention.
    pub(super) launches: Vec<LaunchSize>,
}

/// What of the launch of a decode's attention depends on the lengths of its sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct LaunchSize {
    /// KV heads of a thread block.
    pub(super) block_heads: u32,
    /// Work items: a power of two.
    pub(super) items: u32,
}

/// How a group's attention is launched.
#[derive(Clone, Copy, Debug)]
pub(super) enum Launching {
    /// As it suits this step alone.
    Once,
    /// As a graph may repeat it: the lengths choose its size.
    Repeatably,
    /// The same, of this size: for graphs that are captured before there are such lengths.
    As(LaunchSize),
}

/// A step on the device.
#[derive(Debug)]
pub struct CudaStep<'a> {
    pub(super) spec: &'a AttentionSpec,
    /// Rows that are computed, those that fill up a bucket included.
    pub(super) rows: usize,
    /// Rows of logits that are computed.
    pub(super) logit_rows: usize,
    /// Rows of logits that were asked for.
    pub(super) asked_logit_rows: usize,
    pub(super) key: Option<GraphKey>,
    pub(super) groups: Vec<GroupStep>,
    pub(super) tokens: u64,
    pub(super) positions: u64,
    pub(super) logit_row_numbers: u64,
    /// Attention's workspace: partial outputs, maxima, tickets.
    pub(super) workspace: [u64; 3],
}

/// What a KV group's layers take.
#[derive(Debug)]
pub(super) struct GroupStep {
    pub(super) layout: CacheLayout,
    pub(super) plan: AttentionPlan,
    pub(super) q: RowStrides,
    pub(super) slots: u64,
    pub(super) work: u64,
    pub(super) tables: u64,
}

impl CudaStep<'_> {
    /// The place of a layer, what its group computes, and what is planned for it.
    pub(super) fn layer(
        &self,
        layer: usize,
    ) -> Result<(LayerPlace, &AttentionConfig, &GroupStep), BackendError> {
        let found = self.spec.place(layer).and_then(|place| {
            Some((place, self.spec.groups.get(place.group)?, self.groups.get(place.group)?))
        });
        found.ok_or_else(|| no_layer(layer))
    }
}

pub(super) fn no_layer(layer: usize) -> BackendError {
    let problem = format!("the cache has no layer {layer}; it was made for another model");
    ProblemError::Input { input: "layer", problem }.into()
}

/// Elements from a row of queries to the next, where queries, keys and values were asked for beside each other.
pub(super) fn query_stride(config: &AttentionConfig) -> usize {
    let (queries, keys) = (config.q_heads * config.head_dim_qk, config.kv_heads * config.head_dim_qk);
    let widths = [queries, keys, config.kv_heads * config.head_dim_v];
    match side_by_side(widths, config.q_dtype.size()) {
        true => widths.iter().sum(),
        false => queries,
    }
}

/// Whether tensors of these widths can lie side by side, each aligned for the widest reads.
pub(super) fn side_by_side<const N: usize>(widths: [usize; N], size: usize) -> bool {
    widths.iter().all(|width| (width * size).is_multiple_of(16))
}

/// Bytes that plans within the limits of `spec` need, as far as that is known beforehand.
pub(super) fn sizes(backend: &CudaBackend, spec: &AttentionSpec) -> Result<Sizes, BackendError> {
    let limits = spec.limits;
    // Rows that are worked on one by one: each of a decode, in f32 each of all.
    let narrow = spec.groups.first().is_some_and(|config| config.q_dtype.size() == 2);
    let rows = if narrow { limits.max_sequences } else { limits.max_rows };
    let keys = rows.saturating_mul(limits.max_seq_len);
    let mut sizes = Sizes { work_bytes: 0, least_bytes: 0, workspace: Workspace::default() };
    for config in &spec.groups {
        let limits = DecodeLimits { rows, keys };
        let options = PlanOptions { grid_heads: GridHeads::Any, ..PlanOptions::default() };
        let bound = DecodePlan::bound(config, backend.gpu().device(), limits, options)?;
        let items = launch_size(bound.items as usize, 1)
            .map_or(bound.work, |items| bound.work / u64::from(bound.items.max(1)) * u64::from(items));
        sizes.work_bytes = sizes.work_bytes.max(usize::try_from(items).unwrap_or(usize::MAX));
        let (most, own) = (&mut sizes.workspace, bound.workspace);
        most.partial_out = most.partial_out.max(own.partial_out);
        most.partial_max = most.partial_max.max(own.partial_max);
        most.tickets = most.tickets.max(own.tickets);
    }
    Ok(sizes)
}

impl CudaBackend {
    /// Makes a step ready. Where it is a decode, each group's attention is launched as its lengths ask for, or as
    /// `launches` says.
    pub(super) fn prepare_step<'a>(
        &'a self,
        spec: &'a AttentionSpec,
        batch: &StepBatch,
        launches: &[LaunchSize],
    ) -> Result<CudaStep<'a>, BackendError> {
        self.gpu().bind()?;
        self.finish_new_uploads()?;
        let asked_logit_rows = batch.logit_rows.len();
        let filled = bucket(batch.rows(), spec.limits.max_sequences).filter(|_| is_decode(batch));
        let mut batch = Cow::Borrowed(batch);
        if let Some(rows) = filled {
            fill_up(batch.to_mut(), rows);
        }
        let batch = &*batch;
        let planner = self.planner(spec);
        let planned = spec
            .groups
            .iter()
            .zip(&batch.groups)
            .enumerate()
            .map(|(index, (config, group))| {
                let launching = match (filled, launches.get(index)) {
                    (None, _) => Launching::Once,
                    (Some(_), None) => Launching::Repeatably,
                    (Some(_), Some(&size)) => Launching::As(size),
                };
                let planned = planner.plan_group(config, batch.paged(group), launching)?;
                self.gpu().context.prepare(&planned.plan)?;
                Ok(planned)
            })
            .collect::<Result<Vec<_>, BackendError>>()?;

        let works: Vec<Vec<u32>> = planned.iter().map(|group| group.plan.work()).collect();
        let words: Vec<usize> = works.iter().map(Vec::len).collect();
        let layout = Layout::new(batch.rows(), batch.logit_rows.len(), &words);
        let mut bytes = vec![0u8; layout.bytes];
        let mut put = |at: usize, part: &[u8]| {
            if let Some(place) = bytes.get_mut(at..at + part.len()) {
                place.copy_from_slice(part);
            }
        };
        let logit_rows: Vec<u32> = batch.logit_rows.iter().map(|&row| row as u32).collect();
        put(layout.tokens, bytemuck::cast_slice(&batch.tokens));
        put(layout.positions, bytemuck::cast_slice(&batch.positions));
        put(layout.logit_rows, bytemuck::cast_slice(&logit_rows));
        for ((group, work), (&slots, &at)) in
            batch.groups.iter().zip(&works).zip(layout.slots.iter().zip(&layout.work))
        {
            put(slots, bytemuck::cast_slice(&group.slots));
            put(at, bytemuck::cast_slice(work));
        }

        let mut workspace = Workspace::default();
        for group in &planned {
            let own = group.plan.workspace();
            workspace.partial_out = workspace.partial_out.max(own.partial_out);
            workspace.partial_max = workspace.partial_max.max(own.partial_max);
            workspace.tickets = workspace.tickets.max(own.tickets);
        }
        let tables: Vec<&[i32]> = batch.groups.iter().map(|group| group.indices.as_slice()).collect();
        let table_bytes = tables.iter().map(|table| size_of_val(*table)).max().unwrap_or(0);
        self.begin_step()?;
        let mut inputs = self.inputs();
        let Some(inputs) = inputs.as_mut() else {
            let problem = "a step is prepared before there is a cache".to_owned();
            return Err(ProblemError::Input { input: "step", problem }.into());
        };
        let moved = inputs.make_room(layout.bytes, table_bytes, workspace);
        // Where it failed some of it may have moved.
        if !matches!(moved, Ok(false)) {
            self.forget_graphs()?;
        }
        moved?;
        inputs.send(&bytes, &tables)?;
        // SAFETY: the tokens are part of what was just made room for, one a row.
        unsafe { self.place_earlier(&batch.earlier, inputs.part(layout.tokens)) }?;

        let launches = planned.iter().map(|group| group.size).collect();
        let key = filled.map(|rows| GraphKey { rows, launches });
        let groups = planned
            .into_iter()
            .enumerate()
            .map(|(index, Planned { q, plan, .. })| GroupStep {
                layout: self.cache_layout(spec, spec.groups.get(index)),
                plan,
                q,
                slots: layout.slots.get(index).map_or(0, |&at| inputs.part(at)),
                work: layout.work.get(index).map_or(0, |&at| inputs.part(at)),
                tables: inputs.table(index),
            })
            .collect();
        Ok(CudaStep {
            spec,
            rows: batch.rows(),
            logit_rows: batch.logit_rows.len(),
            asked_logit_rows,
            key,
            groups,
            tokens: inputs.part(layout.tokens),
            positions: inputs.part(layout.positions),
            logit_row_numbers: inputs.part(layout.logit_rows),
            workspace: inputs.workspace(),
        })
    }

    /// Where blocks lie in every cache buffer.
    pub(super) fn cache_layout(&self, spec: &AttentionSpec, config: Option<&AttentionConfig>) -> CacheLayout {
        let fallback = AttentionConfig::new(1, 1, 1, self.dtype());
        CacheLayout::nhd(spec.num_blocks, spec.block_size, config.unwrap_or(&fallback))
    }

    /// What plans are made for.
    pub(super) fn planner<'a>(&'a self, spec: &'a AttentionSpec) -> Planner<'a> {
        Planner { spec, device: self.gpu().device(), order: self.gpu().order() }
    }
}

/// Plans the attention of steps. Host arithmetic alone.
#[derive(Clone, Copy, Debug)]
pub(super) struct Planner<'a> {
    pub(super) spec: &'a AttentionSpec,
    pub(super) device: &'a Device,
    pub(super) order: Order,
}

/// A group's attention.
pub(super) struct Planned {
    /// Strides of the queries.
    q: RowStrides,
    plan: AttentionPlan,
    /// The size of its launch.
    pub(super) size: LaunchSize,
}

impl Planner<'_> {
    /// Plans a group's attention. A launch that graphs repeat is filled up, so that few of them serve sequences of all
    /// lengths.
    pub(super) fn plan_group(
        &self,
        config: &AttentionConfig,
        batch: PagedBatch<'_>,
        launching: Launching,
    ) -> Result<Planned, BackendError> {
        let layout = CacheLayout::nhd(self.spec.num_blocks, self.spec.block_size, config);
        let q = RowStrides { token: query_stride(config) as u64, head: config.head_dim_qk as u64 };
        let out = RowStrides::packed(config.q_heads, config.head_dim_v);
        let rows = batch.total_queries();
        let problem = Problem::with_strides(config, layout, q, out, batch)?;
        let (grid_items, block_heads, least) = match launching {
            Launching::Once => (None, None, 0),
            // With a fixed grid every plan has the same kernel.
            Launching::Repeatably => (Some(u32::MAX), None, 0),
            Launching::As(size) => (Some(u32::MAX), Some(size.block_heads), size.items),
        };
        let decode = PlanOptions {
            grid_items,
            block_heads,
            // Of several groups every size of one meets every size of another.
            grid_heads: if self.spec.groups.len() == 1 { GridHeads::Any } else { GridHeads::OneOrMost },
            order: self.order,
            ..PlanOptions::default()
        };
        let options = AttentionOptions { decode, ..AttentionOptions::default() };
        let mut plan = AttentionPlan::new(&problem, self.device, options)?;
        let mut size = LaunchSize { block_heads: plan.decode_block_heads(), items: 0 };
        if grid_items.is_some()
            && let Some(items) = launch_size(plan.decode_items(), rows.max(least as usize))
        {
            size.items = items;
            plan = plan.with_decode_grid(items)?;
        }
        Ok(Planned { q, plan, size })
    }
}

impl CudaTensor {
    /// The strides of heads of so many elements.
    pub(super) fn heads(&self, head_dim: usize) -> RowStrides {
        RowStrides { token: self.stride as u64, head: head_dim as u64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pagewise_attention::DType;

    #[test]
    fn queries_lie_beside_keys_where_all_stay_aligned() {
        let config = AttentionConfig::new(32, 8, 128, DType::Bf16);
        assert_eq!(query_stride(&config), 4096 + 2 * 1024);
        // Rows of 3 · 2 elements of 4 bytes.
        let config = AttentionConfig::new(3, 3, 2, DType::F32);
        assert_eq!(query_stride(&config), 6);
        assert!(side_by_side([8, 16], 2));
        assert!(!side_by_side([8, 12], 2));
    }
}
