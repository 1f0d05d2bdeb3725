//! The CPU backend as a subject.

use super::subject::{AttentionTask, CopyTask, MergeTask, Refusal, Scale, Subject, SwapTask, WriteTask};
use crate::cpu::{self, Inputs, KvPair, KvScale, Outputs, Partial, Plan};
use crate::{HostTensorMut, ProblemError};

/// The CPU backend, on the rayon pool that the runner is in.
#[derive(Clone, Copy, Debug)]
pub struct Cpu(cpu::Level);

impl Cpu {
    /// On a certain instruction set, which the processor must have.
    pub const fn with_level(level: cpu::Level) -> Self {
        Self(level)
    }
}

impl Default for Cpu {
    fn default() -> Self {
        Self(cpu::Level::detect())
    }
}

impl<'a> From<Scale<'a>> for KvScale<'a> {
    fn from(scale: Scale<'a>) -> Self {
        match scale {
            Scale::One => Self::One,
            Scale::PerTensor(scale) => Self::PerTensor(scale),
            Scale::PerHead(scales) => Self::PerHead(scales),
        }
    }
}

impl From<ProblemError> for Refusal {
    fn from(error: ProblemError) -> Self {
        Self::Failed(error.to_string())
    }
}

impl Subject for Cpu {
    fn name(&self) -> String {
        format!("cpu ({})", self.0.name())
    }

    fn attention(
        &mut self,
        task: &AttentionTask<'_>,
        out: HostTensorMut<'_>,
        lse: Option<&mut [f32]>,
    ) -> Result<(), Refusal> {
        let inputs = Inputs {
            k_scale: task.k_scale.into(),
            v_scale: task.v_scale.into(),
            alibi_slopes: task.alibi_slopes,
            sinks: task.sinks,
            ..Inputs::new(task.q, task.k, task.v)
        };
        let plan = Plan::new(task.problem).with_level(self.0);
        let plan = plan.ok_or_else(|| Refusal::Unsupported(format!("no {} here", self.0.name())))?;
        Ok(plan.run(&inputs, &mut Outputs { out, lse })?)
    }

    fn write_kv(
        &mut self,
        task: &WriteTask<'_>,
        k: HostTensorMut<'_>,
        v: HostTensorMut<'_>,
    ) -> Result<(), Refusal> {
        let source = KvPair::new(task.k, task.v);
        let scale = KvPair::new(task.k_scale.into(), task.v_scale.into());
        Ok(cpu::write_kv(task.config, &task.layout, &task.write, source, KvPair::new(k, v), scale)?)
    }

    fn copy_blocks(
        &mut self,
        task: &CopyTask<'_>,
        mut k: HostTensorMut<'_>,
        mut v: HostTensorMut<'_>,
    ) -> Result<(), Refusal> {
        Ok(cpu::copy_blocks(task.config, &task.layout, task.pairs, &mut k, &mut v)?)
    }

    fn swap_blocks(
        &mut self,
        task: &SwapTask<'_>,
        k: HostTensorMut<'_>,
        v: HostTensorMut<'_>,
    ) -> Result<(), Refusal> {
        let (from, to) = (&task.source_layout, &task.target_layout);
        let (source, target) = (KvPair::new(task.k, task.v), KvPair::new(k, v));
        Ok(cpu::swap_blocks(task.config, from, to, task.pairs, source, target)?)
    }

    fn merge_states(
        &mut self,
        task: &MergeTask<'_>,
        out: HostTensorMut<'_>,
        lse: &mut [f32],
    ) -> Result<(), Refusal> {
        let parts: Vec<_> = task.parts.iter().map(|part| Partial { out: part.out, lse: part.lse }).collect();
        Ok(cpu::merge_states(task.head_dim, &parts, &mut Outputs { out, lse: Some(lse) })?)
    }
}
