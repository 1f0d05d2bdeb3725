//! cuBLASLt itself, found at run time: a dozen functions of its C interface, of any version from CUDA 12 on.
//!
//! cudarc's own loader looks for the version that it was built for alone; a machine has the one of its toolkit.

use std::ffi::{c_int, c_void};
use std::path::PathBuf;
use std::sync::OnceLock;

use libloading::Library;

/// What the library says: 0 is success.
pub(super) type Status = c_int;
/// The library's objects.
pub(super) type Handle = *mut c_void;

/// `cublasStatus_t`
pub(super) const NOT_SUPPORTED: Status = 15;
/// `cublasComputeType_t`: sums in f32, and no TF32 for f32.
pub(super) const COMPUTE_32F: c_int = 68;
/// `cudaDataType_t`
pub(super) const R_32F: c_int = 0;
/// `cudaDataType_t`
pub(super) const R_16F: c_int = 2;
/// `cudaDataType_t`
pub(super) const R_16BF: c_int = 14;
/// `cublasLtMatmulDescAttributes_t`
pub(super) const DESC_TRANSA: c_int = 3;
/// `cublasLtMatmulDescAttributes_t`
pub(super) const DESC_EPILOGUE: c_int = 7;
/// `cublasLtMatmulDescAttributes_t`
pub(super) const DESC_BIAS_POINTER: c_int = 8;
/// `cublasOperation_t`
pub(super) const OP_T: i32 = 1;
/// `cublasLtEpilogue_t`
pub(super) const EPILOGUE_BIAS: u32 = 4;
/// `cublasLtMatmulPreferenceAttributes_t`
pub(super) const PREF_MAX_WORKSPACE_BYTES: c_int = 1;
/// `cublasLtMatmulPreferenceAttributes_t`
pub(super) const PREF_REDUCTION_SCHEME_MASK: c_int = 3;
/// `cublasLtMatmulPreferenceAttributes_t`, that of A; those of B, C and D follow.
pub(super) const PREF_MIN_ALIGNMENT_A_BYTES: c_int = 5;
/// `cublasLtReductionScheme_t`: partial sums stay in f32.
pub(super) const REDUCTION_COMPUTE_TYPE: u32 = 2;

/// `cublasLtMatmulAlgo_t`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Algorithm {
    data: [u64; 8],
}

/// `cublasLtMatmulHeuristicResult_t`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Proposal {
    pub(super) algorithm: Algorithm,
    pub(super) workspace: usize,
    pub(super) state: Status,
    pub(super) waves: f32,
    reserved: [c_int; 4],
}

type Create = unsafe extern "C" fn(*mut Handle) -> Status;
type Destroy = unsafe extern "C" fn(Handle) -> Status;
type SetAttribute = unsafe extern "C" fn(Handle, c_int, *const c_void, usize) -> Status;
type LayoutCreate = unsafe extern "C" fn(*mut Handle, c_int, u64, u64, i64) -> Status;
type DescCreate = unsafe extern "C" fn(*mut Handle, c_int, c_int) -> Status;
type Heuristic = unsafe extern "C" fn(
    Handle,
    Handle,
    Handle,
    Handle,
    Handle,
    Handle,
    Handle,
    c_int,
    *mut Proposal,
    *mut c_int,
) -> Status;
type Matmul = unsafe extern "C" fn(
    Handle,
    Handle,
    *const c_void,
    *const c_void,
    Handle,
    *const c_void,
    Handle,
    *const c_void,
    *const c_void,
    Handle,
    *mut c_void,
    Handle,
    *const Algorithm,
    *mut c_void,
    usize,
    *mut c_void,
) -> Status;

/// The functions that we call, and the library that they are in.
#[derive(Debug)]
pub(super) struct Functions {
    pub(super) create: Create,
    pub(super) destroy: Destroy,
    pub(super) layout_create: LayoutCreate,
    pub(super) layout_destroy: Destroy,
    pub(super) desc_create: DescCreate,
    pub(super) desc_destroy: Destroy,
    pub(super) desc_set: SetAttribute,
    pub(super) pref_create: Create,
    pub(super) pref_destroy: Destroy,
    pub(super) pref_set: SetAttribute,
    pub(super) heuristic: Heuristic,
    pub(super) matmul: Matmul,
    /// `120304` for 12.3.4.
    pub(super) version: usize,
    _library: Library,
}

impl Functions {
    /// The library, which is loaded once and stays: unloaded, it would take along kernels that graphs still name, and what
    /// other threads' ends still call.
    ///
    /// # Errors
    /// What was looked for, in a sentence that says what to install. The next call looks again.
    pub(super) fn get() -> Result<&'static Self, String> {
        static LOADED: OnceLock<Functions> = OnceLock::new();
        match LOADED.get() {
            Some(functions) => Ok(functions),
            None => {
                let functions = Self::load()?;
                Ok(LOADED.get_or_init(|| functions))
            }
        }
    }

    /// Looks for the library as the system does, then in the folders of CUDA toolkits.
    fn load() -> Result<Self, String> {
        let mut problem = None;
        for candidate in candidates() {
            // SAFETY: opens a library of NVIDIA's, whose initialisers its maker answers for.
            match unsafe { Library::new(&candidate) } {
                Ok(library) => match Self::of(library) {
                    Ok(functions) => return Ok(functions),
                    Err(error) => problem = Some(format!("{}: {error}", candidate.display())),
                },
                // One that is there and does not load is worth more than one that is not there.
                Err(error) if candidate.exists() => {
                    problem = Some(format!("{}: {error}", candidate.display()));
                }
                Err(_) => {}
            }
        }
        let problem = problem.map(|problem| format!(" ({problem})")).unwrap_or_default();
        Err(format!(
            "cuBLASLt is not there{problem}: install CUDA's package libcublas (libcublas-13-0, libcublas-12-9, or \
             nvidia-cublas of PyPI), or add the folder of libcublasLt.so.13 or libcublasLt.so.12 to LD_LIBRARY_PATH"
        ))
    }

    fn of(library: Library) -> Result<Self, libloading::Error> {
        /// The address of a function.
        ///
        /// # Safety
        /// It has this type.
        unsafe fn get<T: Copy>(library: &Library, name: &str) -> Result<T, libloading::Error> {
            // SAFETY: the caller's.
            unsafe { library.get::<T>(name.as_bytes()).map(|symbol| *symbol) }
        }
        // SAFETY: the types are those of cublasLt.h, the same in CUDA 12 and 13; the library lives as long as they.
        unsafe {
            let version: unsafe extern "C" fn() -> usize = get(&library, "cublasLtGetVersion")?;
            Ok(Self {
                create: get(&library, "cublasLtCreate")?,
                destroy: get(&library, "cublasLtDestroy")?,
                layout_create: get(&library, "cublasLtMatrixLayoutCreate")?,
                layout_destroy: get(&library, "cublasLtMatrixLayoutDestroy")?,
                desc_create: get(&library, "cublasLtMatmulDescCreate")?,
                desc_destroy: get(&library, "cublasLtMatmulDescDestroy")?,
                desc_set: get(&library, "cublasLtMatmulDescSetAttribute")?,
                pref_create: get(&library, "cublasLtMatmulPreferenceCreate")?,
                pref_destroy: get(&library, "cublasLtMatmulPreferenceDestroy")?,
                pref_set: get(&library, "cublasLtMatmulPreferenceSetAttribute")?,
                heuristic: get(&library, "cublasLtMatmulAlgoGetHeuristic")?,
                matmul: get(&library, "cublasLtMatmul")?,
                version: version(),
                _library: library,
            })
        }
    }
}

/// File names, then paths.
fn candidates() -> Vec<PathBuf> {
    let names: &[&str] = if cfg!(windows) {
        &["cublasLt64_13.dll", "cublasLt64_12.dll"]
    } else {
        &["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"]
    };
    let toolkits = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(std::env::var_os).map(PathBuf::from);
    let folders = toolkits.chain([PathBuf::from("/usr/local/cuda")]).flat_map(|toolkit| {
        let folders = if cfg!(windows) { ["bin", "bin/x64"] } else { ["lib64", "lib"] };
        folders.map(|folder| toolkit.join(folder))
    });
    let paths = folders.flat_map(|folder| names.iter().map(move |name| folder.join(name)));
    names.iter().map(PathBuf::from).chain(paths).collect()
}

/// The name of a status, for messages.
pub(super) fn status_name(status: Status) -> String {
    let name = match status {
        1 => "CUBLAS_STATUS_NOT_INITIALIZED",
        3 => "CUBLAS_STATUS_ALLOC_FAILED",
        7 => "CUBLAS_STATUS_INVALID_VALUE",
        8 => "CUBLAS_STATUS_ARCH_MISMATCH",
        11 => "CUBLAS_STATUS_MAPPING_ERROR",
        13 => "CUBLAS_STATUS_EXECUTION_FAILED",
        14 => "CUBLAS_STATUS_INTERNAL_ERROR",
        NOT_SUPPORTED => "CUBLAS_STATUS_NOT_SUPPORTED",
        other => return format!("status {other}"),
    };
    name.to_owned()
}
