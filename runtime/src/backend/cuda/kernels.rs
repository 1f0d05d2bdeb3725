//! The hand-written kernels of the dense layers, loaded once each and launched.
//!
//! Owns the choice of variant (vectors, dependent launches) and the launches; the kernels are
//! [`pagewise_attention::cuda::ptx::model`]'s. Every launch is on the computing stream.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};

use pagewise_attention::DType;
use pagewise_attention::cuda::ptx::model::activate::{Activate, ActivateArgs, ActivateSpec};
use pagewise_attention::cuda::ptx::model::add::{Add, AddArgs, AddSpec};
use pagewise_attention::cuda::ptx::model::argmax::{Argmax, ArgmaxArgs, ArgmaxSpec};
use pagewise_attention::cuda::ptx::model::embed::{Embed, EmbedArgs, EmbedSpec};
use pagewise_attention::cuda::ptx::model::fill_weights::{FillWeights, FillWeightsArgs, FillWeightsSpec};
use pagewise_attention::cuda::ptx::model::gather_rows::{GatherRows, GatherRowsArgs, GatherRowsSpec};
use pagewise_attention::cuda::ptx::model::log_softmax::{LogSoftmax, LogSoftmaxArgs, LogSoftmaxSpec};
use pagewise_attention::cuda::ptx::model::matvec::{self, Matvec, MatvecArgs, MatvecSpec};
use pagewise_attention::cuda::ptx::model::norm::{Norm, NormArgs, NormSpec};
use pagewise_attention::cuda::ptx::model::penalize::{Penalize, PenalizeArgs, PenalizeSpec};
use pagewise_attention::cuda::ptx::model::sample::{Sample, SampleArgs, SampleSpec};
use pagewise_attention::cuda::ptx::model::scale::{Scale, ScaleArgs, ScaleSpec};
use pagewise_attention::cuda::ptx::model::top_candidates::{
    TopCandidates, TopCandidatesArgs, TopCandidatesSpec,
};
use pagewise_attention::cuda::ptx::model::widest;
use pagewise_attention::cuda::ptx::{self, Arg, Kernel, Launch};
use pagewise_attention::cuda::{CudaError, Order, OwnKernel, ptx_type};

use super::gpu::Gpu;
use crate::backend::BackendError;

/// All kernels that were asked for so far.
#[derive(Debug)]
pub(super) struct Kernels {
    gpu: Arc<Gpu>,
    /// Whether each may start before the one before it has ended.
    dependent: bool,
    activate: Family<ActivateSpec, Activate>,
    add: Family<AddSpec, Add>,
    argmax: Family<ArgmaxSpec, Argmax>,
    embed: Family<EmbedSpec, Embed>,
    fill_weights: Family<FillWeightsSpec, FillWeights>,
    gather_rows: Family<GatherRowsSpec, GatherRows>,
    log_softmax: Family<LogSoftmaxSpec, LogSoftmax>,
    matvec: Family<MatvecSpec, Matvec>,
    norm: Family<NormSpec, Norm>,
    penalize: Family<PenalizeSpec, Penalize>,
    sample: Family<SampleSpec, Sample>,
    scale: Family<ScaleSpec, Scale>,
    top_candidates: Family<TopCandidatesSpec, TopCandidates>,
}

/// The loaded variants of a family.
#[derive(Debug)]
struct Family<S, D> {
    loaded: Mutex<HashMap<S, Arc<Loaded<D>>>>,
}

#[derive(Debug)]
struct Loaded<D> {
    descriptor: D,
    kernel: OwnKernel,
}

impl<S, D> Default for Family<S, D> {
    fn default() -> Self {
        Self { loaded: Mutex::default() }
    }
}

impl<S: Copy + Eq + Hash, D> Family<S, D> {
    /// The variant, loaded the first time.
    fn get(
        &self,
        gpu: &Gpu,
        spec: S,
        make: impl FnOnce(S) -> Result<D, ptx::Error>,
        kernel: impl FnOnce(&D) -> &Kernel,
    ) -> Result<Arc<Loaded<D>>, BackendError> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = loaded.get(&spec) {
            return Ok(Arc::clone(found));
        }
        let descriptor = make(spec).map_err(CudaError::from)?;
        let kernel = OwnKernel::new(&gpu.context, kernel(&descriptor))?;
        let entry = Arc::new(Loaded { descriptor, kernel });
        loaded.insert(spec, Arc::clone(&entry));
        Ok(entry)
    }
}

/// Rows and widths of activations fit 32 bits; what does not is refused by name.
pub(super) fn small(what: &'static str, value: usize) -> Result<u32, BackendError> {
    let max = u64::from(u32::MAX);
    u32::try_from(value).map_err(|_| CudaError::TooLarge { what, value: value as u64, max }.into())
}

impl Kernels {
    pub(super) fn new(gpu: &Arc<Gpu>) -> Self {
        Self {
            gpu: Arc::clone(gpu),
            dependent: gpu.order() == Order::Dependent,
            activate: Family::default(),
            add: Family::default(),
            argmax: Family::default(),
            embed: Family::default(),
            fill_weights: Family::default(),
            gather_rows: Family::default(),
            log_softmax: Family::default(),
            matvec: Family::default(),
            norm: Family::default(),
            penalize: Family::default(),
            sample: Family::default(),
            scale: Family::default(),
            top_candidates: Family::default(),
        }
    }

    /// # Safety
    /// As of [`OwnKernel::launch`].
    unsafe fn launch(
        &self,
        kernel: &OwnKernel,
        launch: Result<Launch, ptx::Error>,
        args: &[Arg],
        dependent: bool,
    ) -> Result<(), BackendError> {
        let order = if dependent { Order::Dependent } else { Order::Stream };
        let launch = launch.map_err(CudaError::from)?;
        // SAFETY: the caller's; variants that are launched dependently wait for what was before them.
        Ok(unsafe { kernel.launch(launch, args, self.gpu.raw_stream(), order) }?)
    }

    /// `out = f(x + bias) · up`; all but the bias of this type.
    ///
    /// # Safety
    /// Every address is valid for what shapes and strides reach until the launch has completed; so it is with all below.
    pub(super) unsafe fn activate(&self, dtype: DType, args: &ActivateArgs) -> Result<(), BackendError> {
        let dtype = ptx_type(dtype);
        let vector = widest(
            dtype,
            args.width,
            &[args.x.stride, args.up.stride, args.out.stride],
            &[args.x.address, args.up.address, args.out.address, args.bias],
        );
        let spec = ActivateSpec { dtype, vector, dependent: self.dependent };
        let entry = self.activate.get(&self.gpu, spec, Activate::new, Activate::kernel)?;
        let launch = entry.descriptor.launch(args.rows, args.width);
        // SAFETY: the caller's; the arguments are the descriptor's.
        unsafe { self.launch(&entry.kernel, launch, &args.values(), self.dependent) }
    }

    /// `x += y + bias`, `y` of this type.
    ///
    /// # Safety
    /// As of [`Kernels::activate`].
    pub(super) unsafe fn add(&self, dtype: DType, args: &AddArgs) -> Result<(), BackendError> {
        let dtype = ptx_type(dtype);
        let vector = widest(
            dtype,
            args.width,
            &[args.x.stride, args.y.stride],
            &[args.x.address, args.y.address, args.bias],
        );
        let spec = AddSpec { dtype, vector, dependent: self.dependent };
        let entry = self.add.get(&self.gpu, spec, Add::new, Add::kernel)?;
        let launch = entry.descriptor.launch(args.rows, args.width);
        // SAFETY: the caller's; the arguments are the descriptor's.
        unsafe { self.launch(&entry.kernel, launch, &args.values(), self.dependent) }
    }

    /// The likeliest token of each row.
    ///
    /// # Safety
    /// As of [`Kernels::activate`].
    pub(super) unsafe fn argmax(&self, rows: u32, args: &ArgmaxArgs) -> Result<(), BackendError> {
        let vector = widest(ptx::DType::F32, args.vocab, &[args.logits.stride], &[args.logits.address]);
        let spec = ArgmaxSpec { vector, dependent: self.dependent };
        let entry = self.argmax.get(&self.gpu, spec, Argmax::new, Argmax::kernel)?;
        let launch = entry.descriptor.launch(rows, args.vocab);
        // SAFETY: the caller's; the arguments are the descriptor's.
        unsafe { self.launch(&entry.kernel, launch, &args.values(), self.dependent) }
    }

    /// Rows of a table of this type. Without adding it is a step's first kernel, and an ordinary launch: what later kernels
    /// read early (block tables, work items, keys of earlier steps, copied and swapped blocks) is complete when it begins.
    ///
    /// # Safety
    /// As of [`Kernels::activate`].
    pub(super) unsafe fn embed(&self, dtype: DType, args: &EmbedArgs) -> Result<(), BackendError> {
        let dtype = ptx_type(dtype);
        let vector = widest(
            dtype,
            args.width,
            &[args.table.stride, args.out.stride],
            &[args.table.address, args.out.address],
        );
        let spec = EmbedSpec { dtype, vector, dependent: self.dependent };
        let entry = self.embed.get(&self.gpu, spec, Embed::new, Embed::kernel)?;
        let launch = entry.descriptor.launch(args.rows, args.width);
        // SAFETY: the caller's; the arguments are the descriptor's.
        unsafe { self.launch(&entry.kernel, launch, &args.values(), self.dependent && args.adds) }
    }

    /// Weights made up.
    ///
    /// # Safety
    /// As of [`Kernels::activate`].
    pub(super) unsafe fn fill_weights(
        &self,
        dtype: DType,
        args: &FillWeightsArgs,
    ) -> Result<(), BackendError> {
        let spec = FillWeightsSpec { dtype: ptx_type(dtype) };
        let entry = self.fill_weights.get(&self.gpu, spec, FillWeights::new, FillWeights::kernel)?;
        let launch = entry.descriptor.launch(args.count);
        // SAFETY: the caller's; the arguments are the descriptor's.
        unsafe { self.launch(&entry.kernel, launch, &args.values(), false) }
    }

    /// Rows of a stream by number.
    ///
    /// # Safety
    /// As of [`Kernels::activate`].
    pub(super) unsafe fn gather_rows(&self, args: &GatherRowsArgs) -> Result<(), BackendError> {
        let vector = widest(
            ptx::DType::F32,
            args.width,
            &[args.x.stride, args.out.stride],
            &[args.x.address, args.out.address],
        );
        let spec = GatherRowsSpec { out: ptx::DType::F32, vector, dependent: self.dependent };
        let entry = self.gather_rows.get(&self.gpu, spec, GatherRows::new, GatherRows::kernel)?;
        let launch = entry.descriptor.launch(args.rows, args.width);
        // SAFETY: the caller's; the arguments are the descriptor's.
        unsafe { self.launch(&entry.kernel, launch, &args.values(), self.dependent) }
    }

    /// Log-probabilities of tokens.
    ///
    /// # Safety
    /// As of [`Kernels::activate`].
    pub(super) unsafe fn log_softmax(&self, rows: u32, args: &LogSoftmaxArgs) -> Result<(), BackendError> {
        let vector = widest(ptx::DType::F32, args.vocab, &[args.logits.stride], &[args.logits.address]);
        let spec = LogSoftmaxSpec { vector, dependent: self.dependent };
        let entry = self.log_softmax.get(&self.gpu, spec, LogSoftmax::new, LogSoftmax::kernel)?;
        let launch = entry.descriptor.launch(rows, args.vocab);
        // SAFETY: the caller's; the arguments are the descriptor's.
        unsafe { self.launch(&entry.kernel, launch, &args.values(), self.dependent) }
    }

    /// A product of few rows with a matrix of this type; `false`, and nothing done, if its rows do not fit the kernel's
    /// shared memory.
    ///
    /// # Safety
    /// As of [`Kernels::activate`].
    pub(super) unsafe fn matvec(
        &self,
        dtype: DType,
        input: matvec::Input,
        gated: bool,
        beside: bool,
        args: &MatvecArgs,
    ) -> Result<bool, BackendError> {
        let dtype = ptx_type(dtype);
        let norm = args.norm.map_or([0, 0], |norm| [norm.weight, norm.bias]);
        let vector = widest(
            dtype,
            args.shape.width,
            &[args.x.stride, args.weight.stride],
            &[args.x.address, args.weight.address, norm[0], norm[1]],
        );
        let spec = MatvecSpec { dtype, input, gated, vector, dependent: self.dependent };
        let shared = self.gpu.device().shared_memory_per_block;
        let new = |spec| Ok(Matvec::new(spec)?.with_shared(shared));
        let entry = self.matvec.get(&self.gpu, spec, new, Matvec::kernel)?;
        let geometry = entry.descriptor.geometry(
            args.shape,
            self.gpu.device().multiprocessors,
            beside && self.dependent,
        );
        let launch = entry.descriptor.launch(args.shape, geometry);
        if let (Err(ptx::Error::TooLarge { .. }), matvec::Input::Staged) = (&launch, input) {
            return Ok(false);
        }
        // SAFETY: the caller's; the arguments are the descriptor's.
        unsafe { self.launch(&entry.kernel, launch, &args.values(geometry), self.dependent) }?;
        Ok(true)
    }

    /// A norm from one type to another.
    ///
    /// # Safety
    /// As of [`Kernels::activate`].
    pub(super) unsafe fn norm(&self, x: DType, out: DType, args: &NormArgs) -> Result<(), BackendError> {
        let (x, out) = (ptx_type(x), ptx_type(out));
        let vector = widest(
            x,
            args.width,
            &[args.x.row_stride, args.x.part_stride, args.out.row_stride, args.out.part_stride],
            &[args.x.address, args.out.address, args.weight, args.bias],
        );
        let spec = NormSpec { x, out, vector, dependent: self.dependent };
        let entry = self.norm.get(&self.gpu, spec, Norm::new, Norm::kernel)?;
        let launch = entry.descriptor.launch(args.rows, args.parts, args.width);
        // SAFETY: the caller's; the arguments are the descriptor's.
        unsafe { self.launch(&entry.kernel, launch, &args.values(), self.dependent) }
    }

    /// Bias and penalties, forth or back.
    ///
    /// # Safety
    /// As of [`Kernels::activate`].
    pub(super) unsafe fn penalize(&self, args: &PenalizeArgs) -> Result<(), BackendError> {
        let spec = PenalizeSpec { dependent: self.dependent };
        let entry = self.penalize.get(&self.gpu, spec, Penalize::new, Penalize::kernel)?;
        let launch = entry.descriptor.launch(args.count);
        // SAFETY: the caller's; the arguments are the descriptor's.
        unsafe { self.launch(&entry.kernel, launch, &args.values(), self.dependent) }
    }

    /// So many tokens drawn.
    ///
    /// # Safety
    /// As of [`Kernels::activate`].
    pub(super) unsafe fn sample(&self, count: u32, args: &SampleArgs) -> Result<(), BackendError> {
        let vector = widest(ptx::DType::F32, args.vocab, &[args.logits.stride], &[args.logits.address]);
        let spec = SampleSpec { vector, dependent: self.dependent };
        let entry = self.sample.get(&self.gpu, spec, Sample::new, Sample::kernel)?;
        let launch = entry.descriptor.launch(count, args.vocab);
        // SAFETY: the caller's; the arguments are the descriptor's.
        unsafe { self.launch(&entry.kernel, launch, &args.values(), self.dependent) }
    }

    /// The likeliest tokens of so many rows.
    ///
    /// # Safety
    /// As of [`Kernels::activate`].
    pub(super) unsafe fn top_candidates(
        &self,
        count: u32,
        args: &TopCandidatesArgs,
    ) -> Result<(), BackendError> {
        let vector = widest(ptx::DType::F32, args.vocab, &[args.logits.stride], &[args.logits.address]);
        let spec = TopCandidatesSpec { vector, dependent: self.dependent };
        let entry = self.top_candidates.get(&self.gpu, spec, TopCandidates::new, TopCandidates::kernel)?;
        let launch = entry.descriptor.launch(count, args.vocab, args.most);
        // SAFETY: the caller's; the arguments are the descriptor's.
        unsafe { self.launch(&entry.kernel, launch, &args.values(), self.dependent) }
    }

    /// A factor and a soft cap on a stream.
    ///
    /// # Safety
    /// As of [`Kernels::activate`].
    pub(super) unsafe fn scale(&self, args: &ScaleArgs) -> Result<(), BackendError> {
        let vector = widest(ptx::DType::F32, args.width, &[args.x.stride], &[args.x.address]);
        let spec = ScaleSpec { vector, dependent: self.dependent };
        let entry = self.scale.get(&self.gpu, spec, Scale::new, Scale::kernel)?;
        let launch = entry.descriptor.launch(args.rows, args.width);
        // SAFETY: the caller's; the arguments are the descriptor's.
        unsafe { self.launch(&entry.kernel, launch, &args.values(), self.dependent) }
    }
}
