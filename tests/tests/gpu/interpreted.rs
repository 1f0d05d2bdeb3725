//! The attention kernels by the interpreter as the conformance suite's subject: planned for an H100, run on the CPU.
//! Dependent variants find NaN, until they have waited, wherever the kernels before them may still write.

use pagewise_attention::conformance::{
    AttentionTask, CopyTask, MergeTask, PlannedMemory, ProbabilityRounding, Refusal, Subject, SwapTask,
    WriteTask, cuda_rounding, place_attention,
};
use pagewise_attention::cuda::{AttentionOptions, AttentionPlan, CudaError, Device, PlannedLaunch};
use pagewise_attention::{AttentionConfig, HostTensorMut};

use super::fresh::{Side, before, fresh_slots};
use super::interpreter::Interpreter;
use super::machine::Machine;

pub struct Interpreted {
    pub machine: Interpreter,
    /// Makes the plans of the next cases.
    pub options: AttentionOptions,
    /// Kernel variants that ran since this was last emptied.
    pub variants: Vec<String>,
}

impl Interpreted {
    pub fn new(alter: impl Fn(&str, &str) -> String + 'static) -> Self {
        Self { machine: Interpreter::new(alter), options: AttentionOptions::default(), variants: Vec::new() }
    }
}

fn refusal(error: CudaError) -> Refusal {
    match error {
        CudaError::Unsupported { .. } => Refusal::Unsupported(error.to_string()),
        other => Refusal::Failed(other.to_string()),
    }
}

fn not_attention<T>() -> Result<T, Refusal> {
    Err(Refusal::Unsupported("attention only".to_owned()))
}

impl Subject for Interpreted {
    fn name(&self) -> String {
        "PTX, interpreted".to_owned()
    }

    fn probability_rounding(&self, config: &AttentionConfig) -> ProbabilityRounding {
        cuda_rounding(config, &self.variants)
    }

    fn attention(
        &mut self,
        task: &AttentionTask<'_>,
        mut out: HostTensorMut<'_>,
        lse: Option<&mut [f32]>,
    ) -> Result<(), Refusal> {
        let plan = AttentionPlan::new(&task.problem, &Device::h100(), self.options).map_err(refusal)?;
        let machine = &mut self.machine;
        machine.clear();
        let memory = PlannedMemory { work: plan.work(), workspace: plan.workspace() };
        let mut upload = |bytes: &[u8]| Ok(machine.upload(bytes));
        let call = place_attention(task, &memory, out.as_ref(), lse.as_deref(), &mut upload)?;
        machine.set_early(call.q, vec![0xff; machine.download(call.q).len()]);
        let slots = fresh_slots(&task.problem);
        for (side, address) in Side::BOTH.into_iter().zip([call.k_cache, call.v_cache]) {
            machine.set_early(address, before(&task.problem, side, &machine.download(address), &slots));
        }
        for PlannedLaunch { kernel, launch, args } in plan.launches(&call).map_err(refusal)? {
            self.variants.push(machine.run(&kernel, launch, &args).map_err(Refusal::Failed)?);
        }
        out.set_bytes(&machine.download(call.out));
        if let Some(lse) = lse {
            HostTensorMut::F32(lse).set_bytes(&machine.download(call.lse));
        }
        match machine.download(call.tickets).iter().all(|&byte| byte == 0) {
            true => Ok(()),
            false => Err(Refusal::Failed("a ticket is not zero after the run".to_owned())),
        }
    }

    fn write_kv(
        &mut self,
        _: &WriteTask<'_>,
        _: HostTensorMut<'_>,
        _: HostTensorMut<'_>,
    ) -> Result<(), Refusal> {
        not_attention()
    }

    fn copy_blocks(
        &mut self,
        _: &CopyTask<'_>,
        _: HostTensorMut<'_>,
        _: HostTensorMut<'_>,
    ) -> Result<(), Refusal> {
        not_attention()
    }

    fn swap_blocks(
        &mut self,
        _: &SwapTask<'_>,
        _: HostTensorMut<'_>,
        _: HostTensorMut<'_>,
    ) -> Result<(), Refusal> {
        not_attention()
    }

    fn merge_states(
        &mut self,
        _: &MergeTask<'_>,
        _: HostTensorMut<'_>,
        _: &mut [f32],
    ) -> Result<(), Refusal> {
        not_attention()
    }
}
