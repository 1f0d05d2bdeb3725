//! The GPU's copy engines: many runs of bytes on a stream, in one call where the driver has one for that.

use std::ffi::c_void;
use std::mem;
use std::ptr;
use std::sync::OnceLock;

use cudarc::driver::sys;

use super::{CudaError, RawStream};

/// Bytes that go from one address to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CopyRun {
    pub(super) from: u64,
    pub(super) to: u64,
    pub(super) bytes: u64,
}

/// `CUmemLocation`: what kind of memory, and which. Zeros: whatever the address says.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Location {
    kind: u32,
    id: i32,
}

/// `CUmemcpyAttributes` of CUDA 12.8.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Attributes {
    access_order: u32,
    source: Location,
    target: Location,
    flags: u32,
}

impl Attributes {
    /// Sources are read in the stream's order (`CU_MEMCPY_SRC_ACCESS_ORDER_STREAM`), and the engines are preferred to
    /// multiprocessors (`CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE`).
    const IN_STREAM_ORDER: Self = Self {
        access_order: 1,
        source: Location { kind: 0, id: 0 },
        target: Location { kind: 0, id: 0 },
        flags: 1,
    };
}

/// `cuMemcpyBatchAsync` as it is since CUDA 12.8: destinations, sources, sizes, count; attributes, from which copy on each
/// holds, count; the copy that failed; stream.
type Batch = unsafe extern "C" fn(
    *mut u64,
    *mut u64,
    *mut usize,
    usize,
    *mut Attributes,
    *mut usize,
    usize,
    *mut usize,
    sys::CUstream,
) -> sys::CUresult;

/// The CUDA version whose `cuMemcpyBatchAsync` has that signature.
const BATCH_VERSION: i32 = 12_080;

/// The driver's batch call, if it has one.
fn batch() -> Option<Batch> {
    static BATCH: OnceLock<Option<Batch>> = OnceLock::new();
    *BATCH.get_or_init(|| {
        let mut address: *mut c_void = ptr::null_mut();
        let mut status = sys::CUdriverProcAddressQueryResult::CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
        // SAFETY: the name ends in a zero; the driver writes an address and a status through valid pointers.
        let result = unsafe {
            sys::cuGetProcAddress_v2(
                c"cuMemcpyBatchAsync".as_ptr(),
                &raw mut address,
                BATCH_VERSION,
                0,
                &raw mut status,
            )
        };
        let is_there = result == sys::CUresult::CUDA_SUCCESS && !address.is_null();
        // SAFETY: the driver gives a function of the signature that this version documents.
        is_there.then(|| unsafe { mem::transmute::<*mut c_void, Batch>(address) })
    })
}

/// Whether the batch call may be used on a stream: not on the default one, and not while it is captured.
fn takes_batches(stream: RawStream) -> Result<bool, CudaError> {
    // 0 and 1 are the legacy default stream, 2 the default one of each thread.
    if stream.0 <= 2 {
        return Ok(false);
    }
    let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    // SAFETY: writes a status through a valid pointer.
    let result = unsafe { sys::cuStreamIsCapturing(stream.0 as sys::CUstream, &raw mut status) };
    CudaError::check("cuStreamIsCapturing", result)?;
    Ok(status == sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
}

/// Puts copies on a stream of the current context.
///
/// # Safety
/// Each run can be read and written by the context's GPU until the copies have completed, no run overlaps what another
/// writes, and the stream belongs to the current context.
pub(super) unsafe fn copy_runs(runs: &[CopyRun], stream: RawStream) -> Result<(), CudaError> {
    if runs.is_empty() {
        return Ok(());
    }
    if let Some(batch) = batch()
        && takes_batches(stream)?
    {
        let mut to: Vec<u64> = runs.iter().map(|run| run.to).collect();
        let mut from: Vec<u64> = runs.iter().map(|run| run.from).collect();
        let mut sizes: Vec<usize> = runs.iter().map(|run| run.bytes as usize).collect();
        let (mut attributes, mut first, mut failed) = (Attributes::IN_STREAM_ORDER, 0usize, 0usize);
        // SAFETY: the arrays have as many elements as there are runs, the attributes hold from the first on; the caller
        // answers for addresses and stream.
        let result = unsafe {
            batch(
                to.as_mut_ptr(),
                from.as_mut_ptr(),
                sizes.as_mut_ptr(),
                runs.len(),
                &raw mut attributes,
                &raw mut first,
                1,
                &raw mut failed,
                stream.0 as sys::CUstream,
            )
        };
        return CudaError::check("cuMemcpyBatchAsync", result);
    }
    for run in runs {
        // SAFETY: the caller answers for addresses and stream.
        let result =
            unsafe { sys::cuMemcpyAsync(run.to, run.from, run.bytes as usize, stream.0 as sys::CUstream) };
        CudaError::check("cuMemcpyAsync", result)?;
    }
    Ok(())
}

/// The device address of pinned host memory; its context is current.
pub(super) fn device_address(host: *const u8) -> Result<u64, CudaError> {
    use sys::CUpointer_attribute::{CU_POINTER_ATTRIBUTE_DEVICE_POINTER, CU_POINTER_ATTRIBUTE_MEMORY_TYPE};
    let (mut kind, mut address) = (0u32, 0u64);
    let mut attributes = [CU_POINTER_ATTRIBUTE_MEMORY_TYPE, CU_POINTER_ATTRIBUTE_DEVICE_POINTER];
    let mut values = [(&raw mut kind).cast::<c_void>(), (&raw mut address).cast::<c_void>()];
    // The question for several attributes has an answer for any address: zero for memory that the driver does not know.
    // SAFETY: both arrays have the stated length, and each value is as large as its attribute; the address is only looked up.
    let result = unsafe {
        sys::cuPointerGetAttributes(
            attributes.len() as u32,
            attributes.as_mut_ptr(),
            values.as_mut_ptr(),
            host.addr() as sys::CUdeviceptr,
        )
    };
    CudaError::check("cuPointerGetAttributes", result)?;
    match kind == sys::CUmemorytype::CU_MEMORYTYPE_HOST as u32 && address != 0 {
        true => Ok(address),
        false => Err(CudaError::NotPinned { address: host.addr() as u64 }),
    }
}
