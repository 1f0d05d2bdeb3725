//! NVIDIA GPUs as a [`Backend`]: weights and activations of one type (f32, f16, bf16), sums and the residual stream in
//! f32; attention and all that is small by kernels written by hand, large products by cuBLASLt.
//!
//! Everything goes on one stream in the order of the calls; the host waits when it wants logits, and before it fills a
//! pinned piece whose copy is still under way. Steps of single tokens are filled up to a bucket and, once captured,
//! replayed as a CUDA graph: their inputs lie at addresses that depend on the bucket alone (`inputs`), and so do their
//! activations (`arena`).
//!
//! Owns the device and what belongs to it; nothing is global.

mod arena;
mod asked;
mod blaslt;
mod buckets;
mod cache;
mod choose;
mod dense;
mod download;
mod gpu;
mod graphs;
mod inputs;
mod kernels;
mod layers;
mod profile;
mod staging;
mod step;
mod tensor;
mod upload;
mod warm_up;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pagewise_attention::DType;
use pagewise_attention::cuda::{CudaError, Device, devices};
use pagewise_kvcache::BlockOps;

pub use cache::CudaCache;
pub use download::CudaOutput;
pub use step::CudaStep;
pub use tensor::{CudaTensor, CudaWeight};
pub use warm_up::WarmUp;

use super::{Activated, AttentionSpec, Backend, BackendError, Heads, Input, Linear, Norm, StepBatch};
use crate::executor::{RowOutput, RowWanted, StepOutput};
use crate::model_dir::WeightTensor;
use arena::Arena;
use asked::Asked;
use blaslt::BlasLt;
use choose::Chooser;
use download::Download;
use gpu::{DeviceMemory, Gpu, Purpose};
use graphs::Graphs;
use inputs::Inputs;
use kernels::Kernels;
use layers::RotaryTable;
use upload::Uploads;

/// What a device is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CudaOptions {
    /// Which GPU, as CUDA counts.
    pub ordinal: usize,
    /// Type of the weights, activations and cache: f32, f16 or bf16.
    pub dtype: DType,
    /// Whether steps of single tokens are captured and replayed.
    pub graphs: bool,
}

/// A GPU; a clone is another handle to the same.
#[derive(Clone, Debug)]
pub struct CudaBackend {
    shared: Arc<Shared>,
}

/// In the order in which they may go.
#[derive(Debug)]
struct Shared {
    options: CudaOptions,
    graphs: Mutex<Graphs>,
    inputs: Mutex<Option<Inputs>>,
    room: Mutex<Room>,
    rotary: Mutex<Option<RotaryTable>>,
    uploads: Mutex<Uploads>,
    chooser: Mutex<Chooser>,
    download: Mutex<Download>,
    /// Where attention has written last.
    attended: AtomicU64,
    kernels: Kernels,
    blaslt: BlasLt,
    gpu: Arc<Gpu>,
}

/// The memory of a step's activations.
#[derive(Debug, Default)]
struct Room {
    arena: Arena,
    memory: Option<DeviceMemory>,
    /// What did not fit, until the next step begins.
    beyond: Vec<DeviceMemory>,
    /// Whether the memory stays as it is: the largest step has been seen.
    sealed: bool,
}

/// The GPU that would be computed on, or why there is none: without making anything on it.
///
/// # Errors
/// No driver, no GPU, one that is too old, or no cuBLASLt: a sentence that says so.
pub fn probe(ordinal: usize) -> Result<Device, BackendError> {
    let devices = devices()?;
    let count = devices.len();
    let device = devices.into_iter().nth(ordinal).ok_or(CudaError::NoSuchDevice { ordinal, count })?;
    device.check()?;
    blaslt::find().map_err(BackendError::Library)?;
    Ok(device)
}

/// The version of cuBLASLt that would be used: for reports.
///
/// # Errors
/// A sentence that says what to install.
pub fn blaslt_version() -> Result<String, String> {
    blaslt::find()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is inside is changed as a whole, or left to the next step's beginning.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl CudaBackend {
    /// Takes a GPU.
    ///
    /// # Errors
    /// As of [`probe`], and if the device has no memory left.
    pub fn new(options: CudaOptions) -> Result<Self, BackendError> {
        if options.dtype.is_fp8() {
            let problem = format!("weights cannot be {}; use f32, f16 or bf16", options.dtype);
            return Err(BackendError::Option { option: "--dtype", problem });
        }
        let gpu = Gpu::new(options.ordinal)?;
        let blaslt = BlasLt::new(&gpu)?;
        let kernels = Kernels::new(&gpu);
        let shared = Shared {
            options,
            graphs: Mutex::default(),
            inputs: Mutex::default(),
            room: Mutex::default(),
            rotary: Mutex::default(),
            uploads: Mutex::default(),
            chooser: Mutex::default(),
            download: Mutex::default(),
            attended: AtomicU64::new(0),
            kernels,
            blaslt,
            gpu,
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// The GPU.
    pub fn device(&self) -> &Device {
        self.gpu().device()
    }

    /// The compute type.
    pub fn dtype(&self) -> DType {
        self.shared.options.dtype
    }

    /// The version of cuBLASLt.
    pub fn library_version(&self) -> String {
        self.blaslt().version()
    }

    /// Bytes that are free on the device, and all of them.
    ///
    /// # Errors
    /// The driver does not answer.
    pub fn memory(&self) -> Result<(usize, usize), BackendError> {
        self.gpu().memory()
    }

    /// Shapes of steps for which there is a CUDA graph.
    pub fn captured_graphs(&self) -> usize {
        lock(&self.shared.graphs).captured()
    }

    fn gpu(&self) -> &Arc<Gpu> {
        &self.shared.gpu
    }

    fn kernels(&self) -> &Kernels {
        &self.shared.kernels
    }

    fn blaslt(&self) -> &BlasLt {
        &self.shared.blaslt
    }

    /// Where attention has written last.
    fn attended(&self) -> u64 {
        self.shared.attended.load(Ordering::Relaxed)
    }

    fn set_attended(&self, address: u64) {
        self.shared.attended.store(address, Ordering::Relaxed);
    }

    fn uploads(&self) -> MutexGuard<'_, Uploads> {
        lock(&self.shared.uploads)
    }

    fn inputs(&self) -> MutexGuard<'_, Option<Inputs>> {
        lock(&self.shared.inputs)
    }

    fn rotary(&self) -> MutexGuard<'_, Option<RotaryTable>> {
        lock(&self.shared.rotary)
    }

    /// Puts tokens that the last step chose where this one reads its own.
    ///
    /// # Safety
    /// As of [`Chooser::place`].
    unsafe fn place_earlier(&self, earlier: &[super::EarlierToken], tokens: u64) -> Result<(), BackendError> {
        // SAFETY: the caller's.
        unsafe { lock(&self.shared.chooser).place(self.gpu(), earlier, tokens) }
    }

    /// Forgets all graphs, after the last of them has run.
    fn forget_graphs(&self) -> Result<(), BackendError> {
        let mut graphs = lock(&self.shared.graphs);
        if graphs.captured() > 0 {
            self.gpu().synchronize()?;
        }
        graphs.clear();
        Ok(())
    }

    /// Takes the last step's activations back.
    fn begin_step(&self) -> Result<(), BackendError> {
        let mut room = lock(&self.shared.room);
        if !room.beyond.is_empty() {
            self.gpu().synchronize()?;
            room.beyond.clear();
        }
        if room.arena.is_too_small() && !room.sealed {
            self.gpu().synchronize()?;
            room.memory = None;
            let bytes = usize::try_from(room.arena.peak()).unwrap_or(usize::MAX);
            let memory = DeviceMemory::zeros(self.gpu(), bytes, Purpose::STEP)?;
            room.arena.replace(memory.address(), memory.bytes() as u64);
            room.memory = Some(memory);
            drop(room);
            return self.forget_graphs();
        }
        room.arena.reset();
        Ok(())
    }

    /// Keeps the memory of activations as it is from now on: what a later step needs beyond it (the logits of a whole
    /// prompt) is allocated for that step alone.
    fn seal(&self) -> Result<(), BackendError> {
        self.begin_step()?;
        lock(&self.shared.room).sealed = true;
        Ok(())
    }

    fn new_tensor(&self, rows: usize, width: usize, dtype: DType) -> Result<CudaTensor, BackendError> {
        let address = self.take(rows, width, dtype)?;
        Ok(CudaTensor { address, rows, width, stride: width, dtype })
    }

    /// Memory for so many elements until the next step begins.
    fn take(&self, rows: usize, width: usize, dtype: DType) -> Result<u64, BackendError> {
        let bytes = rows.checked_mul(width).and_then(|elements| elements.checked_mul(dtype.size()));
        let bytes = bytes.unwrap_or(usize::MAX);
        let mut room = lock(&self.shared.room);
        if let Some(address) = room.arena.take(bytes as u64) {
            return Ok(address);
        }
        let memory = DeviceMemory::new(self.gpu(), bytes, Purpose::STEP)?;
        let address = memory.address();
        room.beyond.push(memory);
        Ok(address)
    }
}

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
        forward: impl FnOnce() -> Result<CudaTensor, BackendError>,
    ) -> Result<CudaTensor, BackendError> {
        let logits = match step.key.as_ref().filter(|_| self.shared.options.graphs) {
            Some(key) => lock(&self.shared.graphs).run(self.gpu(), key, forward),
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
        let dtype = self.dtype();
        let all: usize = widths.iter().sum();
        let apart = !step::side_by_side(widths, dtype.size());
        let mut address = if apart { 0 } else { self.take(rows, all, dtype)? };
        let mut tensors = Vec::with_capacity(N);
        for width in widths {
            if apart {
                tensors.push(self.new_tensor(rows, width, dtype)?);
            } else {
                tensors.push(CudaTensor { address, rows, width, stride: all, dtype });
                address += (width * dtype.size()) as u64;
            }
        }
        let made = tensors.len();
        <[CudaTensor; N]>::try_from(tensors).map_err(|_| tensor::shape_error("tensors", &[made], &[N]))
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
