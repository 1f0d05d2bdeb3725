//! The device itself: its context, our two streams, and memory on both sides.
//!
//! Owns allocation and plain copies; what is put where is its callers'.

use std::ptr::NonNull;
use std::sync::Arc;

use pagewise_attention::cuda::cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};
use pagewise_attention::cuda::{Context, CudaError, Device, Order, RawStream};

use crate::backend::BackendError;

/// A GPU that is ours to compute on.
#[derive(Debug)]
pub(super) struct Gpu {
    pub(super) context: Arc<Context>,
    cudarc: Arc<CudaContext>,
    /// What is computed.
    pub(super) stream: Arc<CudaStream>,
    /// Blocks that are swapped, and weights on their way.
    pub(super) copies: Arc<CudaStream>,
}

impl Gpu {
    /// The GPU of this number, in its primary context.
    pub(super) fn new(ordinal: usize) -> Result<Arc<Self>, BackendError> {
        let context = Context::primary(ordinal)?;
        let Some(cudarc) = context.cudarc().cloned() else { return Err(CudaError::NoCurrentContext.into()) };
        // SAFETY: we use no slices of cudarc's, whose memory these events would guard; our streams wait for each other
        // where they must.
        unsafe { cudarc.disable_event_tracking() };
        let stream = checked("cuStreamCreate", cudarc.new_stream())?;
        let copies = checked("cuStreamCreate", cudarc.new_stream())?;
        Ok(Arc::new(Self { context: Arc::new(context), cudarc, stream, copies }))
    }

    pub(super) fn device(&self) -> &Device {
        self.context.device()
    }

    /// Makes the context current on this thread.
    pub(super) fn bind(&self) -> Result<(), BackendError> {
        checked("cuCtxSetCurrent", self.cudarc.bind_to_thread())
    }

    /// When kernels begin: where the GPU lets them, before the one before them has ended.
    pub(super) fn order(&self) -> Order {
        if self.device().launches_dependently() { Order::Dependent } else { Order::Stream }
    }

    /// The computing stream, for raw launches.
    pub(super) fn raw_stream(&self) -> RawStream {
        self.stream.cu_stream().into()
    }

    /// Waits until all work on the computing stream has completed.
    pub(super) fn synchronize(&self) -> Result<(), BackendError> {
        checked("cuStreamSynchronize", self.stream.synchronize())
    }

    /// Bytes that are free on the device, and all of them.
    pub(super) fn memory(&self) -> Result<(usize, usize), BackendError> {
        self.bind()?;
        checked("cuMemGetInfo", result::mem_get_info())
    }

    /// Puts a copy to the device on a stream.
    ///
    /// # Safety
    /// `target` is valid for so many bytes, and nothing changes the source before the copy has completed.
    pub(super) unsafe fn copy_in(
        &self,
        target: u64,
        bytes: &[u8],
        stream: &CudaStream,
    ) -> Result<(), BackendError> {
        if bytes.is_empty() {
            return Ok(());
        }
        // SAFETY: the caller's.
        checked("cuMemcpyHtoDAsync", unsafe { result::memcpy_htod_async(target, bytes, stream.cu_stream()) })
    }

    /// Puts a copy from the device on the computing stream.
    ///
    /// # Safety
    /// `source` is valid for so many bytes, and nothing reads the target before the copy has completed.
    pub(super) unsafe fn copy_out(&self, source: u64, bytes: &mut [u8]) -> Result<(), BackendError> {
        if bytes.is_empty() {
            return Ok(());
        }
        // SAFETY: the caller's.
        let copied = unsafe { result::memcpy_dtoh_async(bytes, source, self.stream.cu_stream()) };
        checked("cuMemcpyDtoHAsync", copied)
    }
}

/// Says which call failed.
pub(super) fn checked<T>(call: &'static str, result: Result<T, DriverError>) -> Result<T, BackendError> {
    match result {
        Ok(value) => Ok(value),
        Err(DriverError(code)) => match CudaError::check(call, code) {
            Err(error) => Err(error.into()),
            // cudarc keeps an error that it could not hand back at once; success is none of them.
            Ok(()) => Err(CudaError::from(DriverError(code)).into()),
        },
    }
}

/// What memory is for, and which option asks for less of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Purpose {
    pub(super) what: &'static str,
    pub(super) hint: &'static str,
}

impl Purpose {
    pub(super) const WEIGHTS: Self =
        Self { what: "the weights", hint: "a smaller model, or --dtype f16 or bf16 for one in f32" };
    pub(super) const CACHE: Self =
        Self { what: "the KV cache", hint: "--gpu-memory-utilization, --kv-blocks or --kv-memory" };
    pub(super) const SWAP: Self = Self { what: "swapped blocks", hint: "--swap-space" };
    pub(super) const STEP: Self =
        Self { what: "what a step computes", hint: "--max-batch-tokens or --max-num-seqs" };
}

/// Memory on the device, freed when dropped.
#[derive(Debug)]
pub(super) struct DeviceMemory {
    gpu: Arc<Gpu>,
    address: u64,
    bytes: usize,
}

impl DeviceMemory {
    /// So many bytes, but at least a few, so that there is an address.
    pub(super) fn new(gpu: &Arc<Gpu>, bytes: usize, purpose: Purpose) -> Result<Self, BackendError> {
        gpu.bind()?;
        let bytes = bytes.max(256);
        // SAFETY: the context is current, and the size is not zero.
        match unsafe { result::malloc_sync(bytes) } {
            Ok(address) => Ok(Self { gpu: Arc::clone(gpu), address, bytes }),
            Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                let free = gpu.memory().map_or(0, |(free, _)| free);
                let Purpose { what, hint } = purpose;
                Err(BackendError::DeviceMemory { what, wanted: bytes, free, hint })
            }
            Err(error) => checked("cuMemAlloc", Err(error)),
        }
    }

    /// The same, filled with zeros.
    pub(super) fn zeros(gpu: &Arc<Gpu>, bytes: usize, purpose: Purpose) -> Result<Self, BackendError> {
        let memory = Self::new(gpu, bytes, purpose)?;
        // SAFETY: the address is valid for so many bytes.
        let set = unsafe { result::memset_d8_async(memory.address, 0, memory.bytes, gpu.stream.cu_stream()) };
        checked("cuMemsetD8Async", set)?;
        Ok(memory)
    }

    pub(super) fn address(&self) -> u64 {
        self.address
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        // An error means that the context is gone, and the memory with it.
        let _ = self.gpu.bind();
        // SAFETY: allocated by us and freed once; the driver waits for the work that uses it.
        let _ = unsafe { result::free_sync(self.address) };
    }
}

/// Host memory that the device reaches, freed when dropped.
#[derive(Debug)]
pub(super) struct PinnedMemory {
    gpu: Arc<Gpu>,
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: plain memory that this owns.
unsafe impl Send for PinnedMemory {}
// SAFETY: as above; shared references only read.
unsafe impl Sync for PinnedMemory {}

impl PinnedMemory {
    /// So many zeros, but at least a few.
    pub(super) fn new(gpu: &Arc<Gpu>, bytes: usize, purpose: Purpose) -> Result<Self, BackendError> {
        gpu.bind()?;
        let bytes = bytes.max(256);
        let Purpose { what, hint } = purpose;
        let fail = || BackendError::OutOfMemory { what, wanted: bytes, hint };
        // SAFETY: the context is current.
        let start = match unsafe { result::malloc_host(bytes, 0) } {
            Ok(start) => NonNull::new(start.cast::<u8>()).ok_or_else(fail)?,
            Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => return Err(fail()),
            Err(error) => return checked("cuMemHostAlloc", Err(error)),
        };
        // SAFETY: just allocated, for so many bytes.
        unsafe { start.as_ptr().write_bytes(0, bytes) };
        Ok(Self { gpu: Arc::clone(gpu), start, bytes })
    }

    pub(super) fn as_ptr(&self) -> *const u8 {
        self.start.as_ptr()
    }

    pub(super) fn slice(&self) -> &[u8] {
        // SAFETY: allocated for so many bytes, and initialised.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.bytes) }
    }

    pub(super) fn slice_mut(&mut self) -> &mut [u8] {
        // SAFETY: allocated for so many bytes, initialised, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.bytes) }
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        let _ = self.gpu.bind();
        // SAFETY: allocated by us and freed once; the driver waits for the work that uses it.
        let _ = unsafe { result::free_host(self.start.as_ptr().cast()) };
    }
}
