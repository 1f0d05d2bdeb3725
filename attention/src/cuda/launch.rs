//! Loading a kernel through the driver's compiler, and launching it.

use std::ffi::{CString, c_void};
use std::ptr;

use cudarc::driver::sys;
use pagewise_ptx::{Arg, Kernel, Launch};

use super::error::message;
use super::tensor_map::TensorMap;
use super::{CudaError, Device};

/// A raw stream: a `CUstream` (the same as the runtime's `cudaStream_t`) as a number; 0 is the default stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RawStream(pub u64);

impl From<sys::CUstream> for RawStream {
    fn from(stream: sys::CUstream) -> Self {
        Self(stream as u64)
    }
}

/// When a launch begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// When what is before it on the stream has completed.
    #[default]
    Stream,
    /// As soon as all thread blocks of the kernel before it have said that others may begin, or ended (programmatic
    /// dependent launch, from sm_90 on). The kernel itself waits, by `griddepcontrol.wait`, before it touches what those
    /// before it read or write; where it does not wait, its options say what must be there already.
    Dependent,
}

/// Room for the compiler's log.
const LOG_BYTES: usize = 16 * 1024;

/// The most parameters that a kernel has.
const MAX_PARAMS: usize = 64;

/// A loaded kernel: belongs to the context that was current when it was loaded.
#[derive(Debug)]
pub(super) struct LoadedKernel {
    module: sys::CUmodule,
    function: sys::CUfunction,
    entry: String,
    params: usize,
}

// SAFETY: handles of the driver, which any thread may use while their context lives.
unsafe impl Send for LoadedKernel {}
// SAFETY: as above; nothing here changes after loading.
unsafe impl Sync for LoadedKernel {}

impl LoadedKernel {
    /// Compiles and loads a kernel into the current context; `text` is the kernel's own but in tests of the tests.
    pub(super) fn load(kernel: &Kernel, text: &str, device: &Device) -> Result<Self, CudaError> {
        use sys::CUjit_option::{CU_JIT_ERROR_LOG_BUFFER, CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES};
        device.check_kernel(kernel)?;
        let entry = kernel.entry().to_owned();
        let jit_error = |message: String, log: String| CudaError::Jit {
            kernel: entry.clone(),
            gpu: device.name.clone(),
            message,
            log,
        };
        let text =
            CString::new(text).map_err(|_| jit_error("the text holds a zero byte".into(), String::new()))?;

        let mut log = vec![0u8; LOG_BYTES];
        let mut options = [CU_JIT_ERROR_LOG_BUFFER, CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
        // The driver takes the size as a pointer-sized number.
        let mut values = [log.as_mut_ptr().cast::<c_void>(), ptr::without_provenance_mut(LOG_BYTES)];
        let mut module = ptr::null_mut();
        // SAFETY: the text ends in a zero, both arrays have the stated length, the log buffer its stated size,
        // and all of them outlive the call.
        let result = unsafe {
            sys::cuModuleLoadDataEx(
                &raw mut module,
                text.as_ptr().cast(),
                options.len() as u32,
                options.as_mut_ptr(),
                values.as_mut_ptr(),
            )
        };
        if result != sys::CUresult::CUDA_SUCCESS {
            let end = log.iter().position(|&byte| byte == 0).unwrap_or(log.len());
            let log = String::from_utf8_lossy(log.get(..end).unwrap_or(&log)).into_owned();
            return Err(jit_error(message(result), log));
        }

        let mut loaded = Self { module, function: ptr::null_mut(), entry, params: kernel.params().len() };
        let name = CString::new(kernel.entry()).unwrap_or_default();
        // SAFETY: the module is loaded and the name ends in a zero. On failure `loaded` unloads the module.
        let result = unsafe { sys::cuModuleGetFunction(&raw mut loaded.function, module, name.as_ptr()) };
        CudaError::check("cuModuleGetFunction", result).map_err(|error| error.of_kernel(kernel.entry()))?;
        if kernel.dynamic_shared() > 0 {
            // SAFETY: the function is loaded; the device has that much, as was checked.
            let result = unsafe {
                sys::cuFuncSetAttribute(
                    loaded.function,
                    sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                    kernel.dynamic_shared().cast_signed(),
                )
            };
            CudaError::check("cuFuncSetAttribute", result)
                .map_err(|error| error.of_kernel(kernel.entry()))?;
        }
        tracing::debug!(kernel = kernel.entry(), gpu = device.name, "loaded a CUDA kernel");
        Ok(loaded)
    }

    /// Puts a launch on a stream of the current context; a dependent one as [`Order::Dependent`] says.
    ///
    /// # Safety
    /// As [`LoadedKernel::launch`], and the kernel waits for the one before it where it must.
    pub(super) unsafe fn launch_in_order(
        &self,
        launch: Launch,
        args: &[Arg],
        stream: RawStream,
        order: Order,
    ) -> Result<(), CudaError> {
        match order {
            // SAFETY: the caller's.
            Order::Stream => unsafe { self.launch(launch, args, stream) },
            // SAFETY: the caller's.
            Order::Dependent => unsafe { self.launch_dependent(launch, args, stream) },
        }
    }

    /// # Safety
    /// As [`LoadedKernel::launch_in_order`].
    unsafe fn launch_dependent(
        &self,
        launch: Launch,
        args: &[Arg],
        stream: RawStream,
    ) -> Result<(), CudaError> {
        debug_assert_eq!(args.len(), self.params, "{}", self.entry);
        let mut pointers = [ptr::null_mut::<c_void>(); MAX_PARAMS];
        for (pointer, value) in pointers.iter_mut().zip(args) {
            *pointer = value.as_ptr().cast_mut().cast();
        }
        let mut attribute = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { pad: [0; 64] },
        };
        attribute.value.programmaticStreamSerializationAllowed = 1;
        let ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]) = (launch.grid, launch.block);
        let config = sys::CUlaunchConfig {
            gridDimX: grid_x,
            gridDimY: grid_y,
            gridDimZ: grid_z,
            blockDimX: block_x,
            blockDimY: block_y,
            blockDimZ: block_z,
            sharedMemBytes: launch.dynamic_shared,
            hStream: stream.0 as sys::CUstream,
            attrs: &raw mut attribute,
            numAttrs: 1,
        };
        // SAFETY: the function is loaded, configuration, attribute and arguments are copied before the driver returns,
        // and the caller answers for the rest.
        let result = unsafe {
            sys::cuLaunchKernelEx(&raw const config, self.function, pointers.as_mut_ptr(), ptr::null_mut())
        };
        CudaError::check("cuLaunchKernelEx", result).map_err(|error| error.of_kernel(&self.entry))
    }

    /// Puts a launch on a stream of the current context.
    ///
    /// # Safety
    /// The arguments are those that the kernel's descriptor asks for, every address in them is valid for what
    /// the kernel does with it until the launch has completed, and the stream belongs to the current context.
    pub(super) unsafe fn launch(
        &self,
        launch: Launch,
        args: &[Arg],
        stream: RawStream,
    ) -> Result<(), CudaError> {
        // SAFETY: the caller's.
        unsafe { self.launch_with_maps(launch, &[], args, stream) }
    }

    /// The same for a kernel whose first parameters are tensor maps.
    ///
    /// # Safety
    /// As [`LoadedKernel::launch`], and for what the maps reach.
    pub(super) unsafe fn launch_with_maps(
        &self,
        launch: Launch,
        maps: &[TensorMap],
        args: &[Arg],
        stream: RawStream,
    ) -> Result<(), CudaError> {
        debug_assert_eq!(maps.len() + args.len(), self.params, "{}", self.entry);
        let mut pointers = [ptr::null_mut::<c_void>(); MAX_PARAMS];
        let maps = maps.iter().map(|map| map.as_ptr().cast_mut().cast());
        let args = args.iter().map(|arg| arg.as_ptr().cast_mut().cast());
        for (pointer, value) in pointers.iter_mut().zip(maps.chain(args)) {
            *pointer = value;
        }
        let ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]) = (launch.grid, launch.block);
        // SAFETY: the function is loaded, the driver copies the arguments before it returns, and the caller
        // answers for the rest.
        let result = unsafe {
            sys::cuLaunchKernel(
                self.function,
                grid_x,
                grid_y,
                grid_z,
                block_x,
                block_y,
                block_z,
                launch.dynamic_shared,
                stream.0 as sys::CUstream,
                pointers.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        CudaError::check("cuLaunchKernel", result).map_err(|error| error.of_kernel(&self.entry))
    }

    /// Unloads the kernel from the current context.
    pub(super) fn unload(&mut self) {
        if !self.module.is_null() {
            // SAFETY: loaded by us, unloaded once. An error means that the context is gone and the module
            // with it.
            let _ = unsafe { sys::cuModuleUnload(self.module) };
            self.module = ptr::null_mut();
        }
    }
}

impl Drop for LoadedKernel {
    fn drop(&mut self) {
        self.unload();
    }
}
