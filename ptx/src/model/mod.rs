//! The dense layers of a decoding engine: products of few rows with weights, norms, embeddings, activations, and the
//! choice of tokens.
//!
//! Shared conventions, which every kernel here keeps:
//!
//! - weights are f32, f16 or bf16, row-major `[out_features, in_features]`; activations have the weights' type (the
//!   *compute type*) or are f32 (the residual stream, logits); vectors that are read once a layer (norm weights,
//!   biases) are f32; sums are f32, never TF32;
//! - a tensor is a view `[rows, width]` with a stride between rows ([`Rows`]), so that tensors can lie side by side;
//! - each kernel has a variant of 16-byte accesses and one that takes any alignment and width; [`widest`] says which;
//! - each kernel of a step has a variant for *programmatic dependent launch* (sm_90 on): it may be started while the
//!   kernel before it in the stream still runs, waits for it before it reads or writes anything that is not a weight,
//!   and lets the next one start early. Launched in the plain way, such a variant works as well. [`fill_weights`], which
//!   runs before any step, has none.
//!
//! Owns the types that these kernels share; each kernel's variants, parameters and geometry are its own module's.

pub mod activate;
pub mod add;
pub mod argmax;
pub mod carry_tokens;
pub mod embed;
pub mod fill_weights;
pub mod gather_rows;
pub mod log_softmax;
pub mod matvec;
pub mod norm;
pub mod penalize;
pub mod sample;
pub mod scale;
pub mod select;
pub mod top_candidates;
pub mod vocab;

use minijinja::{Value, context};

pub use norm::NormKind;

use crate::kernel::{Kernel, Launch, Source, Target, descriptor};
use crate::{DType, Error};

/// The element types of weights and activations.
pub const COMPUTE_TYPES: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];

/// The most blocks along y and z that CUDA allows.
const MAX_GRID_YZ: u32 = 65_535;

/// Where a tensor `[rows, width]` lies; elements of a row are next to each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Rows {
    /// Device address of the first element.
    pub address: u64,
    /// Elements from a row to the next.
    pub stride: u64,
}

/// A function that is applied element by element.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Activation {
    /// The number itself.
    #[default]
    None,
    /// `x · sigmoid(x)`
    Silu,
    /// GELU with Φ approximated by a hyperbolic tangent.
    GeluTanh,
    /// `x · Φ(x)`
    Gelu,
    /// `max(x, 0)`
    Relu,
}

impl Activation {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::None, Self::Silu, Self::GeluTanh, Self::Gelu, Self::Relu];

    /// The number by which kernels know it.
    pub const fn code(self) -> u32 {
        match self {
            Self::None => 0,
            Self::Silu => 1,
            Self::GeluTanh => 2,
            Self::Gelu => 3,
            Self::Relu => 4,
        }
    }
}

/// How many elements of a type a kernel may move at once: as many as fit 16 bytes where the width, every stride (in
/// elements) and every address (in bytes) allow it, 1 otherwise. Tensors of other types are listed as well: `strides`
/// and `addresses` are those of all tensors that a kernel touches with vectors.
pub fn widest(dtype: DType, width: u32, strides: &[u64], addresses: &[u64]) -> u32 {
    let vector = 16 / dtype.size();
    let fits = width.is_multiple_of(vector)
        && strides.iter().all(|stride| stride.is_multiple_of(u64::from(vector)))
        && addresses.iter().all(|address| address.is_multiple_of(16));
    if fits { vector } else { 1 }
}

impl Source {
    fn kernel(&self, entry: String, dependent: bool, variables: Value) -> Result<Kernel, Error> {
        // PTX 7.4 brought cache hints; dependent launches came with Hopper, PTX 8.0 its prefetches.
        let target = if dependent { Target::from(90, (8, 0)) } else { Target::from(80, (7, 4)) };
        self.render(entry, target, context! { dependent, ..variables })
    }
}

/// The end of an entry point's name.
const fn suffix(dependent: bool) -> &'static str {
    if dependent { "_pdl" } else { "" }
}

/// Checks the element type and the vector of a variant.
fn check_types(kernel: &'static str, dtype: DType, vector: u32) -> Result<(), Error> {
    if dtype.is_fp8() {
        return Err(Error::UnsupportedTypes { kernel, source_dtype: dtype, cache: dtype });
    }
    let widest = 16 / dtype.size();
    if vector != 1 && vector != widest {
        return Err(Error::UnsupportedVector { kernel, vector, source_dtype: dtype, widest });
    }
    Ok(())
}

/// Every type with both of its vectors, each as a plain and as a dependent launch.
fn types_and_vectors() -> impl Iterator<Item = (DType, u32, bool)> {
    let vectors = |dtype: DType| [16 / dtype.size(), 1].map(|vector| (dtype, vector));
    let both = |(dtype, vector)| [false, true].map(|dependent| (dtype, vector, dependent));
    COMPUTE_TYPES.into_iter().flat_map(vectors).flat_map(both)
}

/// Threads of a block of the kernels that work element by element.
const ELEMENTWISE_THREADS: u32 = 256;

/// Grid and block of a kernel that works element by element: thread `x` of block `y` takes vector
/// `y · ntid.x + x` of row `ctaid.x · ntid.y + tid.y`.
fn elementwise(kernel: &'static str, rows: u32, width: u32, vector: u32) -> Result<Launch, Error> {
    for (field, value) in [("rows", rows), ("width", width)] {
        if value == 0 {
            return Err(Error::Zero { kernel, field });
        }
    }
    if !width.is_multiple_of(vector) {
        return Err(Error::NotDivisible { kernel, vector, field: "width", value: width });
    }
    let limit = i32::MAX as u32;
    for (field, value) in [("rows", rows), ("width", width)] {
        if value > limit {
            return Err(Error::TooLarge { kernel, field, value, limit });
        }
    }
    let vectors = width / vector;
    let x = vectors.min(ELEMENTWISE_THREADS);
    let y = rows.min(ELEMENTWISE_THREADS / x);
    let grid = [rows.div_ceil(y), vectors.div_ceil(x), 1];
    if grid[1] > MAX_GRID_YZ {
        let (value, needed) = (width, grid[1]);
        return Err(Error::GridTooLarge { kernel, field: "width", value, needed, limit: MAX_GRID_YZ });
    }
    Ok(Launch { grid, block: [x, y, 1], dynamic_shared: 0 })
}

/// Every variant of every kernel of this module.
pub(crate) fn all_kernels() -> impl Iterator<Item = Result<Kernel, Error>> {
    let activate = activate::ActivateSpec::all().map(|spec| Ok(activate::Activate::new(spec)?.into_kernel()));
    let add = add::AddSpec::all().map(|spec| Ok(add::Add::new(spec)?.into_kernel()));
    let carry = carry_tokens::CarryTokensSpec::all()
        .map(|spec| Ok(carry_tokens::CarryTokens::new(spec)?.into_kernel()));
    let embed = embed::EmbedSpec::all().map(|spec| Ok(embed::Embed::new(spec)?.into_kernel()));
    let fill = fill_weights::FillWeightsSpec::all()
        .map(|spec| Ok(fill_weights::FillWeights::new(spec)?.into_kernel()));
    let gather =
        gather_rows::GatherRowsSpec::all().map(|spec| Ok(gather_rows::GatherRows::new(spec)?.into_kernel()));
    let matvec = matvec::MatvecSpec::all().map(|spec| Ok(matvec::Matvec::new(spec)?.into_kernel()));
    let argmax = argmax::ArgmaxSpec::all().map(|spec| Ok(argmax::Argmax::new(spec)?.into_kernel()));
    let log_softmax =
        log_softmax::LogSoftmaxSpec::all().map(|spec| Ok(log_softmax::LogSoftmax::new(spec)?.into_kernel()));
    let norm = norm::NormSpec::all().map(|spec| Ok(norm::Norm::new(spec)?.into_kernel()));
    let scale = scale::ScaleSpec::all().map(|spec| Ok(scale::Scale::new(spec)?.into_kernel()));
    let penalize = penalize::PenalizeSpec::all().map(|spec| Ok(penalize::Penalize::new(spec)?.into_kernel()));
    let sample = sample::SampleSpec::all().map(|spec| Ok(sample::Sample::new(spec)?.into_kernel()));
    let top = top_candidates::TopCandidatesSpec::all()
        .map(|spec| Ok(top_candidates::TopCandidates::new(spec)?.into_kernel()));
    let logits = argmax.chain(log_softmax).chain(carry).chain(penalize).chain(sample).chain(top);
    activate
        .chain(add)
        .chain(embed)
        .chain(fill)
        .chain(gather)
        .chain(matvec)
        .chain(norm)
        .chain(scale)
        .chain(logits)
}
