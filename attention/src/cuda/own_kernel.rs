//! Kernels that a caller brings: any that [`pagewise_ptx`] describes, loaded into a [`Context`] and launched by hand.
//!
//! Owns loading and unloading; what the arguments mean is the caller's business.

use std::sync::Arc;

use pagewise_ptx::{Arg, Kernel, Launch};

use super::launch::LoadedKernel;
use super::{Context, CudaError, Order, RawStream};

/// A kernel that was loaded into a context; unloaded when dropped.
#[derive(Debug)]
pub struct OwnKernel {
    context: Arc<Context>,
    kernel: LoadedKernel,
}

impl OwnKernel {
    /// Compiles and loads a kernel. Not while a CUDA graph is captured.
    ///
    /// # Errors
    /// [`CudaError::GpuTooOld`], [`CudaError::DriverTooOld`], [`CudaError::SharedMemory`] for a kernel that does not run
    /// on this GPU; [`CudaError::Jit`] when the driver's compiler fails.
    pub fn new(context: &Arc<Context>, kernel: &Kernel) -> Result<Self, CudaError> {
        let _entered = context.enter()?;
        Ok(Self { context: Arc::clone(context), kernel: context.load(kernel)? })
    }

    /// Puts a launch on a stream.
    ///
    /// # Safety
    /// - The arguments are those that the kernel's descriptor asks for, and every address in them is valid for what the
    ///   kernel does with it until the launch has completed.
    /// - The stream belongs to this context.
    /// - With [`Order::Dependent`] the kernel waits for the one before it where it must.
    ///
    /// # Errors
    /// [`CudaError::Driver`] when the launch fails.
    pub unsafe fn launch(
        &self,
        launch: Launch,
        args: &[Arg],
        stream: RawStream,
        order: Order,
    ) -> Result<(), CudaError> {
        let _entered = self.context.enter()?;
        // SAFETY: the caller's.
        unsafe { self.kernel.launch_in_order(launch, args, stream, order) }
    }
}

impl Drop for OwnKernel {
    fn drop(&mut self) {
        // Where the context cannot be entered it is gone, and the kernel with it.
        let _entered = self.context.enter();
        self.kernel.unload();
    }
}
