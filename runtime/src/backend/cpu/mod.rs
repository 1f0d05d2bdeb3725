//! The CPU as a [`Backend`]: weights stay mapped as they are stored, activations are f32, everything runs in
//! one thread pool, and the bits of a row depend on that row alone.

mod cache;
pub mod dense;

pub use cache::CpuCache;

use super::{Activated, AttentionSpec, Backend, BackendError, Heads, Input, Linear, Norm, StepBatch};
use crate::executor::{RowWanted, StepOutput};
use crate::model_dir::WeightTensor;
use dense::RopeAngles;
use pagewise_attention::cpu::{self as attention, Inputs, KvPair, Outputs, Plan};
use pagewise_attention::{CacheLayout, HostTensor, HostTensorMut, Problem, WriteKv};
use pagewise_kvcache::BlockOps;

/// More threads than any machine has cores.
const MAX_THREADS: usize = 1024;

/// A pool of threads and nothing else: the CPU has no memory of its own to manage.
#[derive(Debug)]
pub struct CpuBackend {
    pool: rayon::ThreadPool,
}

impl CpuBackend {
    /// A backend with this many threads; `None` is one for each core.
    ///
    /// # Errors
    /// [`BackendError::Threads`] if they cannot be started.
    pub fn new(threads: Option<usize>) -> Result<Self, BackendError> {
        if let Some(wanted) = threads.filter(|&wanted| wanted > MAX_THREADS) {
            let problem = format!("{wanted} threads are asked for; at most {MAX_THREADS} can be had");
            return Err(BackendError::Threads(problem));
        }
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads.unwrap_or(0))
            .thread_name(|i| format!("pagewise-cpu-{i}"))
            .build()
            .map_err(|error| BackendError::Threads(error.to_string()))?;
        Ok(Self { pool })
    }

    /// Threads in the pool.
    pub fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }
}

/// Rows of f32 in host memory.
#[derive(Clone, Debug, PartialEq)]
pub struct CpuTensor {
    data: Vec<f32>,
    width: usize,
}

impl CpuTensor {
    fn rows(&self) -> usize {
        self.data.len().checked_div(self.width).unwrap_or(0)
    }
}

/// A step on the CPU: the attention plan of each KV group and the angles of each row, if it is rotated.
#[derive(Debug)]
pub struct CpuStep<'a> {
    spec: &'a AttentionSpec,
    batch: &'a StepBatch,
    layouts: Vec<CacheLayout>,
    plans: Vec<Plan<'a>>,
    angles: Option<RopeAngles>,
}

impl CpuStep<'_> {
    /// Rotates heads by their rows' positions.
    fn rotate(&self, heads: [&mut CpuTensor; 2]) -> Result<(), BackendError> {
        let (Some(rope), Some(angles)) = (&self.spec.rope, &self.angles) else { return Ok(()) };
        for x in heads {
            let count = x.width.checked_div(rope.head_dim()).unwrap_or(0);
            dense::rope(&mut x.data, count, angles)?;
        }
        Ok(())
    }
}

fn norm_rows(x: &[f32], norm: &Norm<WeightTensor>, out: &mut [f32]) -> Result<(), dense::DenseError> {
    match norm {
        Norm::Rms { weight, eps } => dense::rms_norm(x, weight.host(), *eps, out),
        Norm::Layer { weight, bias, eps } => dense::layer_norm(x, weight.host(), bias.host(), *eps, out),
    }
}

/// What goes into a product, normed if it must be.
fn rows_of<'a>(input: Input<'a, WeightTensor, CpuTensor>) -> Result<&'a CpuTensor, BackendError> {
    match input {
        Input::Rows(x) => Ok(x),
        Input::Normed { x, norm, room } => {
            norm_rows(&x.data, norm, &mut room.data)?;
            Ok(room)
        }
    }
}

impl Backend for CpuBackend {
    type Weight = WeightTensor;
    type Tensor = CpuTensor;
    type Cache = CpuCache;
    type Step<'a> = CpuStep<'a>;
    type Output = StepOutput;

    fn upload(&self, weight: WeightTensor) -> Result<WeightTensor, BackendError> {
        // Weights that are made up are so now, not in the first step.
        if weight.made_up().is_some() {
            let _ = weight.host();
        }
        Ok(weight)
    }

    fn cache(&self, spec: &AttentionSpec) -> Result<CpuCache, BackendError> {
        CpuCache::new(spec)
    }

    fn prepare<'a>(
        &'a self,
        spec: &'a AttentionSpec,
        batch: &'a StepBatch,
    ) -> Result<CpuStep<'a>, BackendError> {
        let layout = |config| CacheLayout::nhd(spec.num_blocks, spec.block_size, config);
        let layouts: Vec<_> = spec.groups.iter().map(layout).collect();
        let mut plans = Vec::with_capacity(spec.groups.len());
        for ((config, layout), group) in spec.groups.iter().zip(&layouts).zip(&batch.groups) {
            plans.push(Plan::new(Problem::new(config, *layout, batch.paged(group))?));
        }
        let angles = spec.rope.as_ref().map(|rope| {
            let angles = RopeAngles::new(rope.frequencies(), &batch.positions);
            angles.in_heads_of(rope.head_dim()).stretched(rope.magnitude())
        });
        Ok(CpuStep { spec, batch, layouts, plans, angles })
    }

    fn block_ops(&self, cache: &mut CpuCache, ops: &BlockOps) -> Result<(), BackendError> {
        cache.apply(ops)
    }

    fn rows(&self, step: &CpuStep<'_>) -> usize {
        step.batch.rows()
    }

    fn logit_rows(&self, step: &CpuStep<'_>) -> usize {
        step.batch.logit_rows.len()
    }

    fn tensor(&self, rows: usize, width: usize) -> Result<CpuTensor, BackendError> {
        Ok(CpuTensor { data: vec![0.0; rows * width], width })
    }

    fn stream(&self, rows: usize, width: usize) -> Result<CpuTensor, BackendError> {
        self.tensor(rows, width)
    }

    fn beside<const N: usize>(
        &self,
        rows: usize,
        widths: [usize; N],
    ) -> Result<[CpuTensor; N], BackendError> {
        Ok(widths.map(|width| CpuTensor { data: vec![0.0; rows * width], width }))
    }

    fn embed(
        &self,
        step: &CpuStep<'_>,
        table: &WeightTensor,
        out: &mut CpuTensor,
    ) -> Result<(), BackendError> {
        Ok(dense::embed(table.host(), &step.batch.tokens, &mut out.data)?)
    }

    fn add_positions(
        &self,
        step: &CpuStep<'_>,
        table: &WeightTensor,
        offset: usize,
        x: &mut CpuTensor,
    ) -> Result<(), BackendError> {
        Ok(dense::add_positions(table.host(), &step.batch.positions, offset, &mut x.data)?)
    }

    fn norm(
        &self,
        x: &CpuTensor,
        norm: &Norm<WeightTensor>,
        out: &mut CpuTensor,
    ) -> Result<(), BackendError> {
        Ok(norm_rows(&x.data, norm, &mut out.data)?)
    }

    fn norm_in_place(&self, x: &mut CpuTensor, norm: &Norm<WeightTensor>) -> Result<(), BackendError> {
        let before = x.data.clone();
        Ok(norm_rows(&before, norm, &mut x.data)?)
    }

    fn linear(
        &self,
        input: Input<'_, WeightTensor, CpuTensor>,
        outputs: &mut [(&Linear<WeightTensor>, &mut CpuTensor)],
    ) -> Result<(), BackendError> {
        let x = rows_of(input)?;
        let mut projections: Vec<_> = outputs
            .iter_mut()
            .map(|(linear, out)| dense::Projection {
                weight: linear.weight.host(),
                bias: linear.bias.as_ref().map(WeightTensor::host),
                out: &mut out.data,
            })
            .collect();
        Ok(dense::linear_many(&x.data, x.rows(), &mut projections)?)
    }

    fn activated_linear(
        &self,
        input: Input<'_, WeightTensor, CpuTensor>,
        activated: Activated<'_, WeightTensor>,
        [inner, factor]: &mut [CpuTensor; 2],
        out: &mut CpuTensor,
    ) -> Result<(), BackendError> {
        match activated {
            Activated::Gated { activation, gate, up } => {
                self.linear(input, &mut [(gate, inner), (up, factor)])?;
                Ok(dense::gated_activation(activation, &inner.data, &factor.data, &mut out.data)?)
            }
            Activated::Plain { activation, up } => {
                self.linear(input, &mut [(up, inner)])?;
                Ok(dense::activate(activation, &inner.data, &mut out.data)?)
            }
        }
    }

    fn write_kv(
        &self,
        step: &CpuStep<'_>,
        cache: &mut CpuCache,
        layer: usize,
        Heads { q, k, v }: Heads<'_, CpuTensor>,
    ) -> Result<(), BackendError> {
        step.rotate([q, &mut *k])?;
        let place = cache::place(step.spec, layer)?;
        let (Some(config), Some(layout), Some(group)) = (
            step.spec.groups.get(place.group),
            step.layouts.get(place.group),
            step.batch.groups.get(place.group),
        ) else {
            return Err(cache::no_layer(layer));
        };
        let (k_cache, v_cache) = cache.layer_mut(place.buffer)?;
        let write = WriteKv::packed(&group.slots, config);
        attention::write_kv(
            config,
            layout,
            &write,
            KvPair::new(HostTensor::F32(&k.data), HostTensor::F32(&v.data)),
            KvPair::new(k_cache, v_cache),
            KvPair::default(),
        )?;
        Ok(())
    }

    fn attention(
        &self,
        step: &CpuStep<'_>,
        cache: &CpuCache,
        layer: usize,
        q: &CpuTensor,
        out: &mut CpuTensor,
    ) -> Result<(), BackendError> {
        let place = cache::place(step.spec, layer)?;
        let Some(plan) = step.plans.get(place.group) else { return Err(cache::no_layer(layer)) };
        let (k, v) = cache.layer(place.buffer)?;
        let mut outputs = Outputs::new(HostTensorMut::F32(&mut out.data));
        plan.run(&Inputs::new(HostTensor::F32(&q.data), k, v), &mut outputs)?;
        Ok(())
    }

    fn scale(&self, factor: f32, x: &mut CpuTensor) -> Result<(), BackendError> {
        dense::scale(factor, &mut x.data);
        Ok(())
    }

    fn softcap(&self, cap: f32, x: &mut CpuTensor) -> Result<(), BackendError> {
        dense::softcap(cap, &mut x.data);
        Ok(())
    }

    fn add(&self, x: &mut CpuTensor, y: &CpuTensor) -> Result<(), BackendError> {
        Ok(dense::add(&y.data, &mut x.data)?)
    }

    fn gather_logit_rows(&self, step: &CpuStep<'_>, x: &CpuTensor) -> Result<CpuTensor, BackendError> {
        let row = |&row: &usize| x.data.get(row * x.width..(row + 1) * x.width).unwrap_or_default();
        let data = step.batch.logit_rows.iter().flat_map(row).copied().collect();
        Ok(CpuTensor { data, width: x.width })
    }

    fn output(&self, logits: Option<CpuTensor>, _: &[RowWanted]) -> Result<StepOutput, BackendError> {
        Ok(logits.map_or_else(StepOutput::default, |logits| StepOutput::of_logits(logits.data, logits.width)))
    }

    fn wait(&self, output: StepOutput) -> Result<StepOutput, BackendError> {
        Ok(output)
    }

    fn scope<T: Send>(&self, step: impl FnOnce() -> T + Send) -> T {
        self.pool.install(step)
    }
}
