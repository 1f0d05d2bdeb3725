//! Stored pipeline caches: wgpu looks at whose a cache is, but not whether it came back whole.

/// Bytes of the checksum.
const SUM: usize = 8;

/// FNV-1a, 64 bits: catches what a disk or a cut file does; it is no signature.
fn checksum(data: &[u8]) -> [u8; SUM] {
    let mix = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
    data.iter().fold(0xcbf2_9ce4_8422_2325, mix).to_le_bytes()
}

/// The data with its checksum behind it.
pub(super) fn seal(mut data: Vec<u8>) -> Vec<u8> {
    let sum = checksum(&data);
    data.extend(sum);
    data
}

/// What was sealed; `None` when it is not that any more.
pub(super) fn unseal(sealed: &[u8]) -> Option<&[u8]> {
    let (data, sum) = sealed.split_last_chunk::<SUM>()?;
    (*sum == checksum(data)).then_some(data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_changed_or_cut_is_refused() {
        let sealed = seal(b"a cache".to_vec());
        assert_eq!(unseal(&sealed), Some(&b"a cache"[..]));
        for length in 0..sealed.len() {
            assert_eq!(unseal(&sealed[..length]), None);
        }
        for bit in 0..8 * sealed.len() {
            let mut changed = sealed.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(unseal(&changed), None);
        }
    }
}
