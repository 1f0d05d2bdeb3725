//! What can go wrong before a kernel's text exists.

use crate::DType;

/// Why a kernel variant cannot be had, or a shape cannot be launched.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The kernel has no variant for this pair of element types.
    #[error("{kernel} cannot read {source_dtype} and store {cache}: the source must be f32, f16 or bf16")]
    UnsupportedTypes {
        /// Kernel family.
        kernel: &'static str,
        /// Element type that is read.
        source_dtype: DType,
        /// Element type that is written.
        cache: DType,
    },
    /// The decode kernel has no variant for these types or this head dimension, or the tuning is out of bounds.
    #[error(
        "decode has no variant for {q_dtype} queries over a {kv_dtype} cache with room for {head_dim} elements: it takes f32, f16 and bf16 over a cache of the same type, f16 and bf16 over fp8, with 64, 128 or 256"
    )]
    UnsupportedDecode {
        /// Element type of the queries.
        q_dtype: DType,
        /// Element type of the cache.
        kv_dtype: DType,
        /// Elements of a head that there is to be room for.
        head_dim: u32,
    },
    /// The prefill kernel has no variant for these types, this head dimension or this form.
    #[error(
        "prefill has no variant for {dtype} queries over a {kv_dtype} cache with room for {head_dim} elements: it takes f16 and bf16 over a cache of the same type or an fp8 one, with 64, 128 or 256"
    )]
    UnsupportedPrefill {
        /// Element type of queries and output.
        dtype: DType,
        /// Element type of the cache.
        kv_dtype: DType,
        /// Elements of a head that there is to be room for.
        head_dim: u32,
    },
    /// A thread block cannot work for so many KV heads.
    #[error(
        "decode cannot give {block_heads} of {kv_heads} KV heads to a thread block of {most} warps: take a power of two that divides them, at most one a warp"
    )]
    BlockHeads {
        /// KV heads of a thread block.
        block_heads: u32,
        /// KV heads in all.
        kv_heads: u32,
        /// Warps of a thread block.
        most: u32,
    },
    /// A thread can move only one element or one 16-byte load of them.
    #[error("{kernel} cannot move {vector} {source_dtype} elements at once: use 1 or {widest}")]
    UnsupportedVector {
        /// Kernel family.
        kernel: &'static str,
        /// Elements asked for.
        vector: u32,
        /// Element type that is read.
        source_dtype: DType,
        /// Elements in a 16-byte load of that type.
        widest: u32,
    },
    /// A head's elements do not divide into vectors.
    #[error(
        "{kernel} moves {vector} elements at once, which does not divide {field} = {value}: use the one-element variant"
    )]
    NotDivisible {
        /// Kernel family.
        kernel: &'static str,
        /// Elements moved at once.
        vector: u32,
        /// The field in question.
        field: &'static str,
        /// Its value.
        value: u32,
    },
    /// A dimension is zero where the kernel needs at least one.
    #[error("{kernel} needs {field} to be at least 1")]
    Zero {
        /// Kernel family.
        kernel: &'static str,
        /// The field in question.
        field: &'static str,
    },
    /// A tuning that no kernel can be made of.
    #[error("{kernel} cannot be tuned so: {what} must be {bounds}")]
    UnsupportedTuning {
        /// Kernel family.
        kernel: &'static str,
        /// What is out of bounds.
        what: &'static str,
        /// Its bounds.
        bounds: &'static str,
    },
    /// A size beyond what the kernel's 32-bit indices hold.
    #[error("{kernel}: {field} = {value} is more than {limit}: split the call")]
    TooLarge {
        /// Kernel family.
        kernel: &'static str,
        /// The field in question.
        field: &'static str,
        /// Its value.
        value: u32,
        /// The most that is allowed.
        limit: u32,
    },
    /// A launch would need a larger grid than CUDA allows.
    #[error(
        "{kernel}: {field} = {value} needs {needed} thread blocks along one axis, CUDA allows {limit}: split the call"
    )]
    GridTooLarge {
        /// Kernel family.
        kernel: &'static str,
        /// The field in question.
        field: &'static str,
        /// Its value.
        value: u32,
        /// Thread blocks that it would take.
        needed: u32,
        /// The most that CUDA allows.
        limit: u32,
    },
    /// A template of this crate did not render: a defect of this crate, not of its caller.
    #[error("the template of {kernel} does not render (please report this): {reason}")]
    Template {
        /// Template file.
        kernel: &'static str,
        /// What the template engine said, with the line.
        reason: String,
    },
}
