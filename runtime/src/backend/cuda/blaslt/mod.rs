//! Products of many rows with a weight, through cuBLASLt.
//!
//! Owns the choice of algorithms, asked once for each shape, and their workspace. Row-major `out[rows, n] = x[rows, k] ·
//! weight[n, k]ᵀ` is to the library, which counts columns first, `outᵀ = weightᵀ-transposed · xᵀ`.

mod library;

use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use library::{
    Algorithm, COMPUTE_32F, DESC_BIAS_POINTER, DESC_EPILOGUE, DESC_TRANSA, EPILOGUE_BIAS, Functions, Handle,
    NOT_SUPPORTED, OP_T, PREF_MAX_WORKSPACE_BYTES, PREF_MIN_ALIGNMENT_A_BYTES, PREF_REDUCTION_SCHEME_MASK,
    Proposal, R_16BF, R_16F, R_32F, REDUCTION_COMPUTE_TYPE, Status, status_name,
};
use pagewise_attention::DType;

use super::gpu::{DeviceMemory, Gpu, Purpose};
use crate::backend::BackendError;

/// Workspace for split sums: what NVIDIA advises for Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;

/// The widest alignment that algorithms ask for.
const MAX_ALIGNMENT: u64 = 256;

/// Proposals that are asked for; the first that works is taken.
const PROPOSALS: usize = 4;

/// Where a matrix of rows lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Matrix {
    pub(super) address: u64,
    /// Elements from a row to the next.
    pub(super) stride: usize,
    pub(super) dtype: DType,
}

impl Matrix {
    fn alignment(&self) -> u64 {
        u64::from(alignment(self.address))
    }
}

/// `out = x · weightᵀ + bias`, or `out += …`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Product {
    pub(super) rows: usize,
    /// `[rows, k]`
    pub(super) x: Matrix,
    pub(super) k: usize,
    /// `[n, k]`, packed and of the type of `x`.
    pub(super) weight: u64,
    pub(super) n: usize,
    /// `[n]` of the type of `out`; 0 for none.
    pub(super) bias: u64,
    /// `[rows, n]`
    pub(super) out: Matrix,
    /// Whether to add to what is there.
    pub(super) adds: bool,
}

/// What an algorithm is chosen for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    rows: usize,
    n: usize,
    k: usize,
    strides: [usize; 2],
    dtypes: [DType; 2],
    alignments: [u32; 3],
    bias: bool,
    adds: bool,
}

/// The library, a handle of it, and what it chose.
#[derive(Debug)]
pub(super) struct BlasLt {
    functions: &'static Functions,
    handle: Handle,
    gpu: Arc<Gpu>,
    workspace: DeviceMemory,
    chosen: Mutex<HashMap<Key, Algorithm>>,
}

// SAFETY: the handle is one that any thread may use; it is the library that locks.
unsafe impl Send for BlasLt {}
// SAFETY: as above.
unsafe impl Sync for BlasLt {}

/// The library's version, if it is there: for reports.
///
/// # Errors
/// A sentence that says what to install.
pub(super) fn find() -> Result<String, String> {
    Functions::get().map(|functions| version_text(functions.version))
}

fn version_text(version: usize) -> String {
    // 120304 is 12.3.4.
    format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
}

impl BlasLt {
    pub(super) fn new(gpu: &Arc<Gpu>) -> Result<Self, BackendError> {
        gpu.bind()?;
        let functions = Functions::get().map_err(BackendError::Library)?;
        let workspace = DeviceMemory::new(gpu, WORKSPACE_BYTES, Purpose::STEP)?;
        let mut handle = ptr::null_mut();
        // SAFETY: writes a handle through a valid pointer; the context is current.
        checked("cublasLtCreate", unsafe { (functions.create)(&raw mut handle) })?;
        Ok(Self { functions, handle, gpu: Arc::clone(gpu), workspace, chosen: Mutex::default() })
    }

    pub(super) fn version(&self) -> String {
        version_text(self.functions.version)
    }

    /// Puts a product on the computing stream. `false`, and nothing done, if the library has no algorithm for it.
    ///
    /// # Safety
    /// Addresses and strides are those of device memory that is valid for the shapes, until the product has completed.
    pub(super) unsafe fn product(&self, product: &Product) -> Result<bool, BackendError> {
        self.gpu.bind()?;
        let call = Call::new(self.functions, product, product.rows)?;
        let key = Key::of(product);
        let known = self.chosen().get(&key).copied();
        if let Some(algorithm) = known {
            // SAFETY: the caller's.
            match unsafe { self.run(&call, product, &algorithm) } {
                0 => return Ok(true),
                // Chosen for the bucket's rows, it need not work for fewer; then it is asked again for these alone.
                _ => tracing::debug!(?key, rows = product.rows, "cuBLASLt refuses the algorithm of a bucket"),
            }
        }
        let bucket = Call::new(self.functions, product, key.rows)?;
        let mut proposals = self.propose(&bucket, &key)?;
        if key.rows != product.rows {
            proposals.extend(self.propose(&call, &key)?);
        }
        let mut last = NOT_SUPPORTED;
        for proposal in &proposals {
            // SAFETY: the caller's.
            last = unsafe { self.run(&call, product, &proposal.algorithm) };
            if last == 0 {
                self.chosen().insert(key, proposal.algorithm);
                return Ok(true);
            }
        }
        match last {
            NOT_SUPPORTED => Ok(false),
            status => Err(failed("cublasLtMatmul", status)),
        }
    }

    /// # Safety
    /// As of [`BlasLt::product`].
    unsafe fn run(&self, call: &Call, product: &Product, algorithm: &Algorithm) -> Status {
        let (one, beta) = (1.0f32, if product.adds { 1.0f32 } else { 0.0 });
        let out = product.out.address as *mut c_void;
        // SAFETY: the descriptions are whole, the workspace is as large as said, and the caller answers for the rest.
        unsafe {
            (self.functions.matmul)(
                self.handle,
                call.desc.object,
                (&raw const one).cast(),
                product.weight as *const c_void,
                call.weight.object,
                product.x.address as *const c_void,
                call.x.object,
                (&raw const beta).cast(),
                out.cast_const(),
                call.out.object,
                out,
                call.out.object,
                &raw const *algorithm,
                self.workspace.address() as *mut c_void,
                self.workspace.bytes(),
                self.gpu.stream.cu_stream().cast(),
            )
        }
    }

    fn propose(&self, call: &Call, key: &Key) -> Result<Vec<Proposal>, BackendError> {
        let functions = self.functions;
        let preference = Object::new("cublasLtMatmulPreferenceCreate", functions.pref_destroy, |object| {
            // SAFETY: writes a handle through a valid pointer.
            unsafe { (functions.pref_create)(object) }
        })?;
        let set = |attribute, value: *const c_void, size| {
            // SAFETY: the object is whole, the value has the attribute's size.
            let status = unsafe { (functions.pref_set)(preference.object, attribute, value, size) };
            checked("cublasLtMatmulPreferenceSetAttribute", status)
        };
        let (workspace, reductions) = (self.workspace.bytes(), REDUCTION_COMPUTE_TYPE);
        set(PREF_MAX_WORKSPACE_BYTES, (&raw const workspace).cast(), size_of_val(&workspace))?;
        set(PREF_REDUCTION_SCHEME_MASK, (&raw const reductions).cast(), size_of::<u32>())?;
        let [weight, x, out] = key.alignments;
        for (index, alignment) in [weight, x, out, out].iter().enumerate() {
            let attribute = PREF_MIN_ALIGNMENT_A_BYTES + index as c_int;
            set(attribute, (&raw const *alignment).cast(), size_of::<u32>())?;
        }
        let mut proposals = [Proposal::default(); PROPOSALS];
        let mut count = 0;
        // SAFETY: all objects are whole, and there is room for as many proposals as are asked for.
        let status = unsafe {
            (functions.heuristic)(
                self.handle,
                call.desc.object,
                call.weight.object,
                call.x.object,
                call.out.object,
                call.out.object,
                preference.object,
                PROPOSALS as c_int,
                proposals.as_mut_ptr(),
                &raw mut count,
            )
        };
        if status != NOT_SUPPORTED {
            checked("cublasLtMatmulAlgoGetHeuristic", status)?;
        }
        let count = usize::try_from(count).unwrap_or(0);
        Ok(proposals.into_iter().take(count).filter(|proposal| proposal.state == 0).collect())
    }

    fn chosen(&self) -> std::sync::MutexGuard<'_, HashMap<Key, Algorithm>> {
        self.chosen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for BlasLt {
    fn drop(&mut self) {
        let _ = self.gpu.bind();
        // SAFETY: created by us, destroyed once.
        let _ = unsafe { (self.functions.destroy)(self.handle) };
    }
}

impl Key {
    fn of(product: &Product) -> Self {
        let Product { rows, x, k, weight, n, bias, out, adds } = *product;
        Self {
            rows: rows_asked(rows),
            n,
            k,
            strides: [x.stride, out.stride],
            dtypes: [x.dtype, out.dtype],
            alignments: [alignment(weight), x.alignment() as u32, out.alignment() as u32],
            bias: bias != 0,
            adds,
        }
    }
}

/// Rows that an algorithm is asked for: the same for those between two buckets, of which there are few.
fn rows_asked(rows: usize) -> usize {
    match rows {
        0..=64 => rows.next_multiple_of(8),
        65..=256 => rows.next_multiple_of(16),
        257..=512 => rows.next_multiple_of(32),
        513..=2048 => rows.next_multiple_of(128),
        _ => rows.next_multiple_of(512),
    }
}

fn alignment(address: u64) -> u32 {
    (1u64 << address.trailing_zeros().min(63)).min(MAX_ALIGNMENT) as u32
}

/// What the library is told about a product.
struct Call {
    desc: Object,
    weight: Object,
    x: Object,
    out: Object,
}

impl Call {
    fn new(functions: &Functions, product: &Product, rows: usize) -> Result<Self, BackendError> {
        let layout = |dtype: DType, rows: usize, columns: usize, stride: usize| {
            Object::new("cublasLtMatrixLayoutCreate", functions.layout_destroy, |object| {
                // SAFETY: writes a handle through a valid pointer.
                unsafe {
                    (functions.layout_create)(
                        object,
                        data_type(dtype),
                        rows as u64,
                        columns as u64,
                        stride as i64,
                    )
                }
            })
        };
        let Product { x, k, n, bias, out, .. } = *product;
        let desc = Object::new("cublasLtMatmulDescCreate", functions.desc_destroy, |object| {
            // SAFETY: writes a handle through a valid pointer.
            unsafe { (functions.desc_create)(object, COMPUTE_32F, R_32F) }
        })?;
        let set = |attribute, value: *const c_void, size| {
            // SAFETY: the object is whole, the value has the attribute's size.
            let status = unsafe { (functions.desc_set)(desc.object, attribute, value, size) };
            checked("cublasLtMatmulDescSetAttribute", status)
        };
        let (transposed, epilogue) = (OP_T, EPILOGUE_BIAS);
        set(DESC_TRANSA, (&raw const transposed).cast(), size_of::<i32>())?;
        if bias != 0 {
            set(DESC_EPILOGUE, (&raw const epilogue).cast(), size_of::<u32>())?;
            set(DESC_BIAS_POINTER, (&raw const bias).cast(), size_of::<u64>())?;
        }
        Ok(Self {
            weight: layout(x.dtype, k, n, k)?,
            x: layout(x.dtype, k, rows, x.stride)?,
            out: layout(out.dtype, n, rows, out.stride)?,
            desc,
        })
    }
}

/// An object of the library's, destroyed when dropped.
struct Object {
    object: Handle,
    destroy: unsafe extern "C" fn(Handle) -> Status,
}

impl Object {
    fn new(
        call: &'static str,
        destroy: unsafe extern "C" fn(Handle) -> Status,
        create: impl FnOnce(*mut Handle) -> Status,
    ) -> Result<Self, BackendError> {
        let mut object = ptr::null_mut();
        checked(call, create(&raw mut object))?;
        Ok(Self { object, destroy })
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        // SAFETY: created by us, destroyed once; the library stays.
        let _ = unsafe { (self.destroy)(self.object) };
    }
}

fn data_type(dtype: DType) -> c_int {
    match dtype {
        DType::F16 => R_16F,
        DType::Bf16 => R_16BF,
        // Tensors are never fp8: backends refuse such a compute type.
        DType::F32 | DType::F8E4M3 | DType::F8E5M2 => R_32F,
    }
}

fn checked(call: &'static str, status: Status) -> Result<(), BackendError> {
    if status == 0 { Ok(()) } else { Err(failed(call, status)) }
}

fn failed(call: &'static str, status: Status) -> BackendError {
    BackendError::Library(format!("{call} of cuBLASLt failed: {}", status_name(status)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_says_what_to_install() {
        match find() {
            Ok(version) => assert!(version.contains('.'), "{version}"),
            Err(message) => {
                assert!(message.contains("libcublasLt.so.12") && message.contains("install"), "{message}");
            }
        }
    }

    #[test]
    fn alignments_are_powers_of_two_of_at_most_256() {
        for (address, expected) in
            [(0u64, 256), (256, 256), (512 + 16, 16), (2, 2), (1 << 40, 256), (0x7f00_0060, 32)]
        {
            assert_eq!(alignment(address), expected, "{address:#x}");
        }
    }

    #[test]
    fn rows_between_buckets_share_an_algorithm() {
        let mut last = 0;
        for rows in 1..10_000 {
            let asked = rows_asked(rows);
            assert!(asked >= rows && asked >= last && rows_asked(asked) == asked);
            assert!(asked - rows < 8 || asked * 4 <= rows * 6, "{rows}: {asked}");
            last = asked;
        }
    }

    #[test]
    fn objects_are_as_large_as_the_library_thinks() {
        assert_eq!((size_of::<Algorithm>(), size_of::<Proposal>()), (64, 64 + 8 + 4 + 4 + 16));
    }
}
