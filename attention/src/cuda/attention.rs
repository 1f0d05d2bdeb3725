//! Attention on CUDA, whatever a step holds: decodes, prefills and chunks of prefills in one plan.
//!
//! Owns which sequences go to the decode kernel and which to the prefill kernel, and the order of the launches.

use pagewise_ptx::decode::WorkspaceSizes;
use pagewise_ptx::prefill::Form;
use pagewise_ptx::{Arg, Kernel, Launch};

use super::call::Planned;
use super::prefill_plan::PrefillPart;
use super::{AttentionCall, Context, CudaError, DecodePlan, Device, PlanOptions, RawStream};
use crate::Problem;
use crate::plan::visible_rows;

/// Query rows of a sequence, times the query heads that share a KV head, from which on its rows are worked on in
/// tiles. Below that reading the keys once for each row, mostly from the L2, is no slower than filling up a tile.
const TILES_FROM: usize = 16;

/// How a plan is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AttentionOptions {
    /// How rows that are worked on one by one are planned.
    pub decode: PlanOptions,
    /// Form of the prefill kernel, if it is not to be chosen.
    pub form: Option<Form>,
    /// Keys of a prefill's work item, if fixed. Then the split of a tile, and so the bits of its rows, depend on its
    /// sequence alone and not on the rest of the batch.
    pub prefill_keys: Option<u32>,
    /// Query rows of a sequence from which on they are worked on in tiles, if that is not to be chosen.
    pub tiles_from: Option<usize>,
}

/// One launch of a plan: what a driver is to be given.
#[derive(Clone, Debug)]
pub struct PlannedLaunch {
    /// The rendered kernel.
    pub kernel: Kernel,
    /// Its grid and block.
    pub launch: Launch,
    /// The values of its parameters, in order.
    pub args: Vec<Arg>,
}

/// The work of one step, the same for all layers of a model that share heads and layout: query rows that are worked on
/// one by one (decode), and those of longer sequences in tiles (prefill).
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionPlan {
    pub(super) decode: DecodePlan,
    prefill: Option<PrefillPart>,
}

impl AttentionPlan {
    /// Plans a step. Sequences with few query rows go to the decode kernel, and so do those that the prefill kernel
    /// has no variant for: f32, fp8 caches before sm_89, queries whose windows lie apart.
    ///
    /// # Errors
    /// [`CudaError::Unsupported`] for what neither kernel does, [`CudaError::TooLarge`] beyond their 32-bit sizes.
    pub fn new(problem: &Problem<'_>, device: &Device, options: AttentionOptions) -> Result<Self, CudaError> {
        let AttentionOptions { decode, form, prefill_keys, tiles_from } = options;
        let config = problem.config();
        let spec = PrefillPart::spec(problem, device, form);
        let from = tiles_from.unwrap_or(TILES_FROM.div_ceil(config.group()).max(2));
        let tiled: Vec<usize> = spec.map_or(Vec::new(), |spec| {
            let fits = |&index: &usize| {
                let rows = problem.sequence(index).query_len;
                rows > 0 && rows >= from && PrefillPart::takes(problem, spec, index)
            };
            (0..problem.num_sequences()).filter(fits).collect()
        });
        let rows = visible_rows(problem, |index| tiled.binary_search(&index).is_err())?;
        let decode = DecodePlan::of_rows(problem, &rows, device, decode)?;
        let prefill = match spec {
            Some(spec) if !tiled.is_empty() => {
                Some(PrefillPart::new(problem, &tiled, spec, device, prefill_keys)?)
            }
            _ => None,
        };
        Ok(Self { decode, prefill })
    }

    /// The kernel variants that a run launches, in that order.
    pub fn variants(&self) -> Vec<String> {
        let decode = (!self.decode.items().is_empty()).then(|| self.decode.variant());
        let prefill = self.prefill.as_ref();
        let merge = prefill.and_then(PrefillPart::merge_variant);
        decode.into_iter().chain(prefill.map(PrefillPart::variant)).chain(merge).collect()
    }

    /// Work items of the rows that are worked on one by one, without those that only fill a grid of fixed size.
    pub fn decode_items(&self) -> usize {
        self.decode.items().len()
    }

    /// KV heads of a thread block of those rows' launch.
    pub fn decode_block_heads(&self) -> u32 {
        self.decode.block_heads()
    }

    /// The same plan with a launch of so many work items for the rows that are worked on one by one, of which those
    /// without work end at once. Plans that were made with [`PlanOptions::grid_items`] and agree in this number, in
    /// [`AttentionPlan::decode_block_heads`] and in their rows can share a captured CUDA graph, however long their
    /// sequences are.
    ///
    /// # Errors
    /// [`CudaError::TooLarge`] if there is more work than that.
    pub fn with_decode_grid(mut self, items: u32) -> Result<Self, CudaError> {
        let needed = self.decode_items();
        if needed > items as usize {
            let (value, max) = (needed as u64, u64::from(items));
            return Err(CudaError::TooLarge { what: "the number of work items", value, max });
        }
        self.decode.shape.items = items;
        Ok(self)
    }

    /// The work items as the kernels read them: to be copied to the device as they are.
    pub fn work(&self) -> Vec<u32> {
        let mut words = self.decode.work();
        if let Some(prefill) = &self.prefill {
            prefill.add_work(&mut words);
        }
        words
    }

    /// Length of [`AttentionPlan::work`].
    pub(super) fn work_words(&self) -> u64 {
        self.decode.work_words() + self.prefill.as_ref().map_or(0, PrefillPart::work_words)
    }

    /// The launches of a run over these addresses, one after the other, for those who launch kernels by other means than a
    /// [`Context`]: a binding of their own, or an interpreter. It renders the kernels, which takes far longer than a launch: the
    /// parameters are what changes from layer to layer. Dependent variants may be launched as ordinary ones.
    ///
    /// # Errors
    /// As [`Context::attention_raw`]; [`CudaError::Unsupported`] for the Hopper form of prefill, whose tensor maps are the
    /// driver's to make.
    pub fn launches(&self, call: &AttentionCall) -> Result<Vec<PlannedLaunch>, CudaError> {
        self.check(call)?;
        let mut launches = Vec::new();
        if self.decode.shape.items > 0 {
            launches.push(self.decode.launch(call)?);
        }
        if let Some(prefill) = &self.prefill {
            let (planned, work) = self.prefill_of(call);
            launches.extend(prefill.launches(planned, call, work)?);
        }
        Ok(launches)
    }

    /// What was planned for the prefill, and where its work lies: behind the decode's.
    fn prefill_of(&self, call: &AttentionCall) -> (Planned<'_>, u64) {
        let DecodePlan { config, layout, q, out, .. } = &self.decode;
        (Planned { config, layout, q: *q, out: *out }, call.work + 4 * self.decode.work_words())
    }

    fn check(&self, call: &AttentionCall) -> Result<(), CudaError> {
        let takes_scales = self.decode.config.kv_dtype.is_fp8();
        if self.prefill.is_some() && !takes_scales && (call.scales.k, call.scales.v) != (0, 0) {
            return Err(CudaError::Unsupported {
                kernel: "prefill",
                what: "scales, its caches not being fp8".to_owned(),
                advice: "leave them out, or plan with AttentionOptions::tiles_from = Some(usize::MAX): the decode kernel takes them",
            });
        }
        Ok(())
    }

    /// Bytes of the workspace that a run of this plan needs: decode and prefill use it in turns.
    pub fn workspace(&self) -> WorkspaceSizes {
        let decode = self.decode.workspace();
        let prefill = self.prefill.as_ref().map_or(WorkspaceSizes::default(), PrefillPart::workspace);
        WorkspaceSizes {
            partial_out: decode.partial_out.max(prefill.partial_out),
            partial_max: decode.partial_max.max(prefill.partial_max),
            tickets: decode.tickets,
        }
    }
}

impl Context {
    /// Compiles and loads the kernels of a plan, so that [`Context::attention_raw`], which may be captured in a CUDA
    /// graph, loads nothing.
    ///
    /// # Errors
    /// [`CudaError::Jit`] when the driver's compiler fails.
    pub fn prepare(&self, plan: &AttentionPlan) -> Result<(), CudaError> {
        let _entered = self.enter()?;
        if !plan.decode.items().is_empty() {
            self.prepare_decode(&plan.decode)?;
        }
        plan.prefill.as_ref().map_or(Ok(()), |prefill| self.prepare_prefill(prefill))
    }

    /// Puts attention on a stream.
    ///
    /// # Safety
    /// - Every address is in device memory of this context's GPU and valid, until the launches have completed, for
    ///   what the plan's shapes and strides reach.
    /// - The block tables on the device agree with those that were planned, wherever a query sees a key; so do the
    ///   mask's bits.
    /// - `work` holds the plan's work, and the workspace is used by no other launch meanwhile.
    /// - What [`PlanOptions::order`] asks for, where the decode's is [`Order::Dependent`](super::Order).
    /// - The stream belongs to this context.
    ///
    /// # Errors
    /// [`CudaError::Misaligned`] for an address or stride that is not a multiple of 16 bytes,
    /// [`CudaError::Missing`] for an input that the configuration needs and the call leaves out,
    /// [`CudaError::Unsupported`] for scales where the plan has tiles over a cache that is not fp8, whose kernel takes none,
    /// [`CudaError::Driver`] when a launch fails.
    pub unsafe fn attention_raw(
        &self,
        plan: &AttentionPlan,
        call: &AttentionCall,
        stream: RawStream,
    ) -> Result<(), CudaError> {
        plan.check(call)?;
        let _entered = self.enter()?;
        let decode = &plan.decode;
        // SAFETY: the decode's items come first in the work; the caller answers for the rest.
        unsafe { self.decode_raw(decode, call, stream)? };
        let Some(prefill) = &plan.prefill else { return Ok(()) };
        let (planned, work) = plan.prefill_of(call);
        // SAFETY: the prefill's work follows the decode's; the caller answers for the rest.
        unsafe { self.launch_prefill(prefill, planned, call, work, stream) }
    }
}
