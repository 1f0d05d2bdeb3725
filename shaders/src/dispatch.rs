//! What the kernels' hosts compute alike: sizes in the units that a variant moves, and workgroups along two axes.

use crate::Error;

/// A value in units, which must fit an index of 32 bits.
pub(crate) fn in_units(
    kernel: &'static str,
    field: &'static str,
    value: u64,
    unit: u32,
) -> Result<u32, Error> {
    if !value.is_multiple_of(u64::from(unit)) {
        return Err(Error::NotDivisible { kernel, field, value, unit });
    }
    u32::try_from(value / u64::from(unit)).map_err(|_| Error::TooLarge { kernel, field, value })
}

/// Workgroups of `count` on a device that allows `per_dimension` of them along one axis.
///
/// # Errors
/// [`Error::TooManyWorkgroups`] beyond two axes of them.
pub fn workgroups(kernel: &'static str, count: u64, per_dimension: u32) -> Result<[u32; 3], Error> {
    let limit = u64::from(per_dimension.max(1));
    let x = count.min(limit);
    let y = count.div_ceil(x.max(1));
    // The last row of workgroups runs past the end; its indices must not wrap around either.
    match (u32::try_from(x), u32::try_from(y), u32::try_from(x * y)) {
        (Ok(x), Ok(y), Ok(_)) if u64::from(y) <= limit => Ok([x, y, 1]),
        _ => Err(Error::TooManyWorkgroups { kernel, needed: count, limit: per_dimension }),
    }
}

/// The work of a kernel whose invocations have an element, or a piece of a row, each.
pub(crate) struct Invocations {
    pub(crate) kernel: &'static str,
    /// What there are too many of, where an index would not fit 32 bits.
    pub(crate) field: &'static str,
    pub(crate) count: u64,
    pub(crate) workgroup_size: u32,
}

impl Invocations {
    pub(crate) fn workgroups(&self, per_dimension: u32) -> Result<[u32; 3], Error> {
        let &Self { kernel, field, count, workgroup_size } = self;
        let [x, y, z] = workgroups(kernel, count.div_ceil(workgroup_size.into()), per_dimension)?;
        // The last row of workgroups runs past the end; its invocations must not wrap around either.
        match u64::from(x) * u64::from(y) <= u64::from(u32::MAX / workgroup_size) {
            true => Ok([x, y, z]),
            false => Err(Error::TooLarge { kernel, field, value: count }),
        }
    }
}
