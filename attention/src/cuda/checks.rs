//! What every call checks of its sizes and addresses before it is launched.

use super::CudaError;

/// A size in 32 bits.
pub(super) fn small(what: &'static str, value: u64) -> Result<u32, CudaError> {
    let max = u64::from(u32::MAX);
    u32::try_from(value).map_err(|_| CudaError::TooLarge { what, value, max })
}

/// Whether an address and strides of elements of `size` bytes are multiples of so many bytes.
pub(super) fn aligned(address: u64, strides: &[u64], size: u64, alignment: u32) -> bool {
    let alignment = u64::from(alignment);
    address.is_multiple_of(alignment)
        && strides.iter().all(|stride| stride.wrapping_mul(size).is_multiple_of(alignment))
}

/// Each tensor's address is a multiple of its size in bytes, or the first that is not is named.
pub(super) fn check_addresses(
    addresses: impl IntoIterator<Item = (&'static str, u64, u64)>,
) -> Result<(), CudaError> {
    for (tensor, address, size) in addresses {
        if !address.is_multiple_of(size) {
            return Err(CudaError::Misaligned { tensor, address, size });
        }
    }
    Ok(())
}
