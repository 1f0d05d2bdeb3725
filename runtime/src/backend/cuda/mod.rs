//! NVIDIA GPUs as a [`Backend`](super::Backend): weights and activations of one type (f32, f16, bf16), sums and the residual
//! stream in f32; attention and all that is small by kernels written by hand, large products by cuBLASLt.
//!
//! Everything goes on one stream in the order of the calls; the host waits when it wants logits, and before it fills a
//! pinned piece whose copy is still under way. Steps of single tokens are filled up to a bucket and replayed as CUDA graphs,
//! which are captured when a model is loaded (`warm_up`): their inputs lie at addresses that depend on the bucket alone
//! (`inputs`), and so do their activations (`arena`).
//!
//! Owns the device and what belongs to it; nothing is global.

mod activations;
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
mod operations;
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

pub use cache::CudaCache;
pub use download::CudaOutput;
pub use step::CudaStep;
pub use tensor::{CudaTensor, CudaWeight};
pub use warm_up::WarmUp;

use super::BackendError;
use activations::Activations;
use blaslt::BlasLt;
use choose::Chooser;
use download::Download;
use gpu::{Gpu, Purpose};
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
    activations: Mutex<Activations>,
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
            activations: Mutex::default(),
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
}
