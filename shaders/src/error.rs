//! What can go wrong before a kernel's text exists.

use crate::DType;

/// Why a kernel variant cannot be had, or a shape cannot be dispatched.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The element-wise f16 variants are for f16 on at least one side, and f32 or f16 on the other.
    #[error(
        "{kernel} has no element-wise f16 variant from {source_dtype} to {cache}: use the access by words"
    )]
    UnsupportedTypes {
        /// Kernel family.
        kernel: &'static str,
        /// Element type that is read.
        source_dtype: DType,
        /// Element type that is written.
        cache: DType,
    },
    /// A specification that is out of its bounds.
    #[error("{kernel} has no variant {name}: lanes, queries and tuning are out of its bounds")]
    NoSuchVariant {
        /// Kernel family.
        kernel: &'static str,
        /// The name that it would have.
        name: String,
    },
    /// A size, offset or stride does not divide into what a variant reads at once.
    #[error(
        "{kernel}: {field} = {value} is not a multiple of the {unit} elements that this variant moves at once: use a narrower access"
    )]
    NotDivisible {
        /// Kernel family.
        kernel: &'static str,
        /// The field in question.
        field: &'static str,
        /// Its value, in elements.
        value: u64,
        /// Elements moved at once.
        unit: u32,
    },
    /// WGSL indexes with 32 bits.
    #[error(
        "{kernel}: {field} = {value} does not fit the 32-bit indices of WGSL: split the call or the buffer"
    )]
    TooLarge {
        /// Kernel family.
        kernel: &'static str,
        /// The field in question.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// A dimension is zero where the kernel needs at least one.
    #[error("{kernel} needs {field} to be at least 1")]
    Zero {
        /// Kernel family.
        kernel: &'static str,
        /// The field in question.
        field: &'static str,
    },
    /// More workgroups than two dimensions of the device hold.
    #[error(
        "{kernel} needs {needed} workgroups, but this device allows {limit} a dimension \
         (max_compute_workgroups_per_dimension): split the call"
    )]
    TooManyWorkgroups {
        /// Kernel family.
        kernel: &'static str,
        /// Workgroups that it would take.
        needed: u64,
        /// The device's limit.
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
