//! A CUDA context, the GPU behind it, and the kernels that were loaded into it.

use std::collections::HashMap;
use std::hash::Hash;
use std::ptr;
use std::sync::{Arc, PoisonError, RwLock};

use cudarc::driver::{CudaContext, result, sys};
use pagewise_ptx::Kernel;
use pagewise_ptx::copy_blocks::{CopyBlocks, CopyBlocksSpec};
use pagewise_ptx::decode::{Decode, DecodeSpec};
use pagewise_ptx::merge_states::{MergeStates, MergeStatesSpec};
use pagewise_ptx::prefill::{Prefill, PrefillMerge, PrefillSpec};
use pagewise_ptx::write_kv::{WriteKv, WriteKvSpec};

use super::launch::LoadedKernel;
use super::{CudaError, Device, device};

/// Kernels of one GPU, loaded into a context that is ours, cudarc's or another engine's.
///
/// Each kernel is compiled by the driver when it is first asked for (tens of milliseconds, cached on disk by
/// the driver) and kept. Calls are safe from any number of threads. Ask for what a CUDA graph will capture
/// before capture begins, since loading is not allowed during it.
#[derive(Debug)]
pub struct Context {
    device: Device,
    raw: RawContext,
    /// Keeps cudarc's context alive; `None` where another engine does.
    cudarc: Option<Arc<CudaContext>>,
    pub(super) write_kv: Cache<WriteKvSpec, WriteKv>,
    pub(super) decode: Cache<DecodeSpec, Decode>,
    pub(super) merge_states: Cache<MergeStatesSpec, MergeStates>,
    pub(super) copy_blocks: Cache<CopyBlocksSpec, CopyBlocks>,
    pub(super) prefill: Cache<PrefillSpec, Prefill>,
    pub(super) prefill_merge: Cache<PrefillSpec, PrefillMerge>,
    #[cfg(feature = "conformance")]
    alteration: Option<crate::conformance::Alteration>,
}

/// A context handle, which any thread may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct RawContext(sys::CUcontext);

// SAFETY: a handle that the driver lets any thread make current.
unsafe impl Send for RawContext {}
// SAFETY: as above.
unsafe impl Sync for RawContext {}

impl Context {
    /// The primary context of a GPU, which the CUDA runtime, and so most other libraries, use too.
    ///
    /// # Errors
    /// [`CudaError::NoDriver`], [`CudaError::NoDevice`], [`CudaError::NoSuchDevice`],
    /// [`CudaError::GpuTooOld`], [`CudaError::DriverTooOld`], or what the driver says.
    pub fn primary(ordinal: usize) -> Result<Self, CudaError> {
        let devices = device::devices()?;
        let count = devices.len();
        let device = devices.into_iter().nth(ordinal).ok_or(CudaError::NoSuchDevice { ordinal, count })?;
        device.check()?;
        Self::from_cudarc(CudaContext::new(ordinal)?)
    }

    /// A context that cudarc holds.
    ///
    /// # Errors
    /// [`CudaError::GpuTooOld`], [`CudaError::DriverTooOld`], or what the driver says.
    pub fn from_cudarc(context: Arc<CudaContext>) -> Result<Self, CudaError> {
        let driver = device::driver_version()?;
        let device = device::describe(context.cu_device(), context.ordinal(), driver)?;
        device.check()?;
        let raw = RawContext(context.cu_ctx());
        Ok(Self::new(device, raw, Some(context)))
    }

    /// The context that is current on this thread, whoever made it.
    ///
    /// # Safety
    /// That context must outlive the result.
    ///
    /// # Errors
    /// [`CudaError::NoDriver`], [`CudaError::NoCurrentContext`], [`CudaError::GpuTooOld`],
    /// [`CudaError::DriverTooOld`], or what the driver says.
    pub unsafe fn current() -> Result<Self, CudaError> {
        let driver = device::driver_version()?;
        let mut raw = ptr::null_mut();
        // SAFETY: writes a handle through a valid pointer.
        match unsafe { sys::cuCtxGetCurrent(&raw mut raw) } {
            // The driver was never initialised, so nothing can be current.
            sys::CUresult::CUDA_ERROR_NOT_INITIALIZED => return Err(CudaError::NoCurrentContext),
            code => CudaError::check("cuCtxGetCurrent", code)?,
        }
        if raw.is_null() {
            return Err(CudaError::NoCurrentContext);
        }
        let mut handle = 0;
        // SAFETY: a context is current; writes an integer through a valid pointer.
        CudaError::check("cuCtxGetDevice", unsafe { sys::cuCtxGetDevice(&raw mut handle) })?;
        let count = result::device::get_count()?;
        let is_this = |ordinal: &i32| result::device::get(*ordinal).is_ok_and(|device| device == handle);
        let ordinal = (0..count).find(is_this).unwrap_or(0);
        let device = device::describe(handle, ordinal as usize, driver)?;
        device.check()?;
        Ok(Self::new(device, RawContext(raw), None))
    }

    fn new(device: Device, raw: RawContext, cudarc: Option<Arc<CudaContext>>) -> Self {
        Self {
            device,
            raw,
            cudarc,
            write_kv: Cache::default(),
            decode: Cache::default(),
            merge_states: Cache::default(),
            copy_blocks: Cache::default(),
            prefill: Cache::default(),
            prefill_merge: Cache::default(),
            #[cfg(feature = "conformance")]
            alteration: None,
        }
    }

    /// The same context, whose kernels are loaded with the text that `alter` makes of each entry point and text: for
    /// tests that plant faults and delays. Kernels loaded before are forgotten.
    #[cfg(feature = "conformance")]
    #[must_use]
    pub fn with_altered_kernels(
        mut self,
        alter: impl Fn(&str, &str) -> String + Send + Sync + 'static,
    ) -> Self {
        self.unload();
        self.alteration = Some(crate::conformance::Alteration::new(alter));
        self
    }

    /// Compiles and loads a kernel into this context, which is current.
    pub(super) fn load(&self, kernel: &Kernel) -> Result<LoadedKernel, CudaError> {
        #[cfg(feature = "conformance")]
        if let Some(alteration) = &self.alteration {
            let text = alteration.text(kernel.entry(), kernel.text());
            return LoadedKernel::load(kernel, &text, &self.device);
        }
        LoadedKernel::load(kernel, kernel.text(), &self.device)
    }

    /// The loaded variant for a key, described and loaded when it is first asked for. The context is current.
    pub(super) fn loaded<K: Copy + Eq + Hash, D>(
        &self,
        variants: &Cache<K, D>,
        key: K,
        describe: impl FnOnce() -> Result<D, pagewise_ptx::Error>,
        kernel: impl FnOnce(&D) -> &Kernel,
    ) -> Result<Arc<Entry<D>>, CudaError> {
        variants.get(key, || {
            let descriptor = describe()?;
            let kernel = self.load(kernel(&descriptor))?;
            Ok(Entry { descriptor, kernel })
        })
    }

    fn unload(&mut self) {
        // Kernels can only be unloaded in their context. Where it cannot be entered it is gone, and they with
        // it: then their handles are forgotten by a failing unload, which is harmless.
        let _entered = self.enter();
        self.write_kv.clear();
        self.decode.clear();
        self.merge_states.clear();
        self.copy_blocks.clear();
        self.prefill.clear();
        self.prefill_merge.clear();
    }

    /// The GPU.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// cudarc's context, if this was made from one.
    pub fn cudarc(&self) -> Option<&Arc<CudaContext>> {
        self.cudarc.as_ref()
    }

    /// Whether a cudarc context is the same context.
    pub(super) fn is(&self, other: &CudaContext) -> bool {
        self.raw.0 == other.cu_ctx()
    }

    /// Makes the context current on this thread until the result is dropped; costs nothing when it is already.
    pub(super) fn enter(&self) -> Result<Entered, CudaError> {
        let mut current = ptr::null_mut();
        // SAFETY: writes a handle through a valid pointer.
        CudaError::check("cuCtxGetCurrent", unsafe { sys::cuCtxGetCurrent(&raw mut current) })?;
        if current == self.raw.0 {
            return Ok(Entered { pushed: false });
        }
        // SAFETY: the context lives as long as `self`: cudarc's is held, another engine's was promised.
        CudaError::check("cuCtxPushCurrent", unsafe { sys::cuCtxPushCurrent_v2(self.raw.0) })?;
        Ok(Entered { pushed: true })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        self.unload();
    }
}

/// A context is current on this thread while this lives.
#[derive(Debug)]
pub(super) struct Entered {
    pushed: bool,
}

impl Drop for Entered {
    fn drop(&mut self) {
        if self.pushed {
            let mut popped = ptr::null_mut();
            // SAFETY: pops what `enter` pushed, on the same thread: the type is neither sent nor shared while
            // it lives, as nothing outside of this module's callers holds it. An error leaves nothing to undo.
            let _ = unsafe { sys::cuCtxPopCurrent_v2(&raw mut popped) };
        }
    }
}

/// A kernel and its descriptor.
#[derive(Debug)]
pub(super) struct Entry<D> {
    pub(super) descriptor: D,
    pub(super) kernel: LoadedKernel,
}

/// The loaded variants of one family.
#[derive(Debug)]
pub(super) struct Cache<K, D> {
    entries: RwLock<HashMap<K, Arc<Entry<D>>>>,
}

impl<K, D> Default for Cache<K, D> {
    fn default() -> Self {
        Self { entries: RwLock::default() }
    }
}

impl<K: Copy + Eq + Hash, D> Cache<K, D> {
    /// The variant for a key; made by `load` the first time.
    fn get(
        &self,
        key: K,
        load: impl FnOnce() -> Result<Entry<D>, CudaError>,
    ) -> Result<Arc<Entry<D>>, CudaError> {
        // A thread that panicked cannot have left the map half changed: inserting is the only change.
        if let Some(entry) = self.entries.read().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Ok(Arc::clone(entry));
        }
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = entries.get(&key) {
            return Ok(Arc::clone(entry));
        }
        let entry = Arc::new(load()?);
        entries.insert(key, Arc::clone(&entry));
        Ok(entry)
    }

    fn clear(&mut self) {
        self.entries.get_mut().unwrap_or_else(PoisonError::into_inner).clear();
    }
}
