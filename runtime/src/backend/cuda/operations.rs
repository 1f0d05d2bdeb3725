//! What a model's layers are computed with: the operations of [`Backend`], each by the file that does it.

use pagewise_kvcache::BlockOps;

use super::asked::{self, Asked};
use super::{CudaBackend, CudaCache, CudaOutput, CudaStep, CudaTensor, CudaWeight, gpu, layers, lock};
use crate::backend::{
    Activated, AttentionSpec, Backend, BackendError, Heads, Input, Linear, Norm, StepBatch,
};
use crate::executor::{RowOutput, RowWanted, StepOutput};
use crate::model_dir::WeightTensor;
use pagewise_attention::DType;

impl Backend for CudaBackend {
    type Weight = CudaWeight;
    type Tensor = CudaTensor;
    type Cache = CudaCache;
    type Step<'a> = CudaStep<'a>;
    type Output = CudaOutput;

    fn upload(&self, weight: WeightTensor) -> Result<CudaWeight, BackendError> {
        let mut uploaded = self.upload_all(vec![weight])?;
        uploaded.pop().ok_or(BackendError::LostWeights { sent: 1, left: 0 })
    }

    fn upload_together(&self, weights: Vec<WeightTensor>) -> Result<Vec<CudaWeight>, BackendError> {
        self.upload_all(weights)
    }

    fn cache(&self, spec: &AttentionSpec) -> Result<CudaCache, BackendError> {
        self.new_cache(spec)
    }

    fn prepare<'a>(
        &'a self,
        spec: &'a AttentionSpec,
        batch: &'a StepBatch,
    ) -> Result<CudaStep<'a>, BackendError> {
        self.prepare_step(spec, batch, &[])
    }

    fn block_ops(&self, cache: &mut CudaCache, ops: &BlockOps) -> Result<(), BackendError> {
        cache.apply(ops)
    }

    fn record(
        &self,
        step: &CudaStep<'_>,
        mut forward: impl FnMut() -> Result<CudaTensor, BackendError>,
    ) -> Result<CudaTensor, BackendError> {
        let logits = match step.key.as_ref().filter(|_| self.shared.options.graphs) {
            Some(key) => lock(&self.shared.graphs).run(self.gpu(), key, self.repeatable(forward)),
            None => forward(),
        };
        Ok(logits?.first_rows(step.asked_logit_rows))
    }

    fn rows(&self, step: &CudaStep<'_>) -> usize {
        step.rows
    }

    fn logit_rows(&self, step: &CudaStep<'_>) -> usize {
        step.logit_rows
    }

    fn tensor(&self, rows: usize, width: usize) -> Result<CudaTensor, BackendError> {
        self.new_tensor(rows, width, self.dtype())
    }

    fn stream(&self, rows: usize, width: usize) -> Result<CudaTensor, BackendError> {
        self.new_tensor(rows, width, DType::F32)
    }

    fn beside<const N: usize>(
        &self,
        rows: usize,
        widths: [usize; N],
    ) -> Result<[CudaTensor; N], BackendError> {
        self.new_tensors_beside(rows, widths)
    }

    fn embed(
        &self,
        step: &CudaStep<'_>,
        table: &CudaWeight,
        out: &mut CudaTensor,
    ) -> Result<(), BackendError> {
        self.look_up(table, layers::Ids { address: step.tokens, offset: 0 }, false, out)
    }

    fn add_positions(
        &self,
        step: &CudaStep<'_>,
        table: &CudaWeight,
        offset: usize,
        x: &mut CudaTensor,
    ) -> Result<(), BackendError> {
        self.look_up(table, layers::Ids { address: step.positions, offset: offset as u64 }, true, x)
    }

    fn norm(
        &self,
        x: &CudaTensor,
        norm: &Norm<CudaWeight>,
        out: &mut CudaTensor,
    ) -> Result<(), BackendError> {
        self.norm_into(x, norm, out)
    }

    fn norm_in_place(&self, x: &mut CudaTensor, norm: &Norm<CudaWeight>) -> Result<(), BackendError> {
        self.norm_into(x, norm, x)
    }

    fn linear(
        &self,
        input: Input<'_, CudaWeight, CudaTensor>,
        outputs: &mut [(&Linear<CudaWeight>, &mut CudaTensor)],
    ) -> Result<(), BackendError> {
        self.products(input, outputs)
    }

    fn linear_add(
        &self,
        x: &CudaTensor,
        linear: &Linear<CudaWeight>,
        _room: &mut CudaTensor,
        sum: &mut CudaTensor,
    ) -> Result<(), BackendError> {
        self.add_product(x, linear, sum)
    }

    fn activated_linear(
        &self,
        input: Input<'_, CudaWeight, CudaTensor>,
        activated: Activated<'_, CudaWeight>,
        room: &mut [CudaTensor; 2],
        out: &mut CudaTensor,
    ) -> Result<(), BackendError> {
        self.activated_products(input, activated, room, out)
    }

    fn write_kv(
        &self,
        step: &CudaStep<'_>,
        cache: &mut CudaCache,
        layer: usize,
        heads: Heads<'_, CudaTensor>,
    ) -> Result<(), BackendError> {
        self.write_heads(step, cache, layer, heads)
    }

    fn attention(
        &self,
        step: &CudaStep<'_>,
        cache: &CudaCache,
        layer: usize,
        q: &CudaTensor,
        out: &mut CudaTensor,
    ) -> Result<(), BackendError> {
        self.attend(step, cache, layer, q, out)
    }

    fn scale(&self, factor: f32, x: &mut CudaTensor) -> Result<(), BackendError> {
        self.scale_stream(factor, 0.0, x)
    }

    fn softcap(&self, cap: f32, x: &mut CudaTensor) -> Result<(), BackendError> {
        self.scale_stream(1.0, cap, x)
    }

    fn add(&self, x: &mut CudaTensor, y: &CudaTensor) -> Result<(), BackendError> {
        self.add_rows(x, y)
    }

    fn gather_logit_rows(&self, step: &CudaStep<'_>, x: &CudaTensor) -> Result<CudaTensor, BackendError> {
        self.gather(step, x)
    }

    fn answers(&self, wanted: &RowWanted) -> bool {
        asked::answers(wanted)
    }

    fn runs_ahead(&self) -> bool {
        true
    }

    fn output(&self, logits: Option<CudaTensor>, wanted: &[RowWanted]) -> Result<CudaOutput, BackendError> {
        let Some(logits) = logits.filter(|logits| logits.rows > 0) else { return Ok(CudaOutput::default()) };
        let asked = Asked::new(wanted, logits.rows);
        let wants_logits = asked.wants_logits();
        if asked.is_empty() && !wants_logits {
            return Ok(CudaOutput { nothing: logits.rows, ..CudaOutput::default() });
        }
        let chosen = match asked.is_empty() {
            true => None,
            false => Some(lock(&self.shared.chooser).answer(self.gpu(), self.kernels(), &logits, asked)?),
        };
        Ok(CudaOutput { logits: Some(logits).filter(|_| wants_logits), chosen, nothing: 0 })
    }

    fn wait(&self, output: CudaOutput) -> Result<StepOutput, BackendError> {
        let CudaOutput { logits, chosen, nothing } = output;
        let rows = match &chosen {
            Some(chosen) => Some(lock(&self.shared.chooser).arrived(chosen)?),
            None => None,
        };
        let mut output = match logits {
            Some(logits) => {
                let rows = lock(&self.shared.download).rows(self.gpu(), &logits)?;
                StepOutput::of_logits(rows, logits.width)
            }
            None => StepOutput { rows: vec![RowOutput::Nothing; nothing], ..StepOutput::default() },
        };
        if let Some(rows) = rows {
            output.rows = rows;
        }
        Ok(output)
    }

    fn synchronize(&self) -> Result<(), BackendError> {
        self.gpu().bind()?;
        gpu::checked("cuStreamSynchronize", self.gpu().copies.synchronize())?;
        self.gpu().synchronize()
    }
}
