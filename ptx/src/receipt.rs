//! Receipts: which kernel, byte for byte, was last checked on which GPU, and how well it did.
//!
//! Continuous integration has no GPU. So each variant's last run on one is written down under
//! `receipts/`, with fingerprints of its code and of its descriptor, and a test fails when a kernel
//! has changed since. A variant that no GPU has run yet says so: its [`Receipt::run`] is empty.
//! This module owns the fingerprints and the format; `examples/import_receipts.rs` files new ones.

use serde::{Deserialize, Serialize};

use crate::Kernel;

/// The fingerprint of a text: FNV-1a with 128 bits, as 32 hexadecimal digits. It finds changes; it
/// does not withstand forgery.
pub fn fingerprint(text: &str) -> String {
    const BASIS: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    let hash = text.bytes().fold(BASIS, |hash, byte| (hash ^ u128::from(byte)).wrapping_mul(PRIME));
    format!("{hash:032x}")
}

/// One variant and its last run on a GPU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Receipt {
    /// The entry point, which names the variant.
    pub variant: String,
    /// Its last run; `None` (in JSON, `null`): never run on a GPU.
    pub run: Option<Run>,
}

/// What was run, where, and the outcome.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// [`fingerprint`] of [`Kernel::code`].
    pub code: String,
    /// [`fingerprint`] of [`Kernel::description`].
    pub descriptor: String,
    /// The GPU's name, as the driver gives it.
    pub gpu: String,
    /// Its compute capability, `"9.0"`.
    pub compute_capability: String,
    /// The driver and the CUDA version that it supports.
    pub driver: String,
    /// Cases compared with the reference.
    pub cases: u64,
    /// The largest error of any case, relative to the largest magnitude of its reference.
    pub worst_error: f64,
}

/// How a kernel stands to its receipt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Checked on a GPU, unchanged since.
    Checked,
    /// Never run on a GPU.
    NeverRun,
    /// Code or descriptor changed since its last run on a GPU.
    Changed,
}

impl Receipt {
    /// Compares the receipt with the kernel as it is now.
    pub fn standing(&self, kernel: &Kernel) -> Standing {
        match &self.run {
            None => Standing::NeverRun,
            Some(run)
                if run.code == fingerprint(&kernel.code())
                    && run.descriptor == fingerprint(&kernel.description()) =>
            {
                Standing::Checked
            }
            Some(_) => Standing::Changed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::fingerprint;

    #[test]
    fn fingerprints_are_fnv_1a_of_128_bits() {
        // From the published test vectors of FNV.
        assert_eq!(fingerprint(""), "6c62272e07bb014262b821756295c58d");
        assert_eq!(fingerprint("a"), "d228cb696f1a8caf78912b704e4a8964");
    }
}
