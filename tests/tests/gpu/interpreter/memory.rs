//! Device memory and the shared memory of one block, which refuse what lies outside of them.

/// Device memory: allocations far apart, so that no wrong address hits another one by chance.
#[derive(Debug, Default)]
pub struct Memory {
    allocations: Vec<Vec<u8>>,
    /// Of the block that runs.
    pub(super) shared: Vec<u8>,
}

/// Address bits within an allocation.
const SPAN: u32 = 36;

/// What shared memory's addresses have among all of them.
pub(super) const SHARED_WINDOW: u64 = 1 << 63;

impl Memory {
    /// Copies bytes into a new allocation; its address.
    pub fn upload(&mut self, bytes: &[u8]) -> u64 {
        self.allocations.push(bytes.to_vec());
        (self.allocations.len() as u64) << SPAN
    }

    /// What an allocation holds.
    pub fn download(&self, address: u64) -> &[u8] {
        &self.allocations[(address >> SPAN) as usize - 1]
    }

    pub(super) fn shared_slice(&mut self, address: u64, size: usize) -> Result<&mut [u8], String> {
        let (at, len) = (address as u32 as usize, self.shared.len());
        if !at.is_multiple_of(size) {
            return Err(format!("{size} shared bytes at {at}: misaligned"));
        }
        self.shared
            .get_mut(at..at + size)
            .ok_or_else(|| format!("{size} shared bytes at {at}: outside of {len}"))
    }

    pub(super) fn slice(&mut self, address: u64, size: usize) -> Result<&mut [u8], String> {
        if !address.is_multiple_of(size as u64) {
            return Err(format!("{size} bytes at {address:#x}: misaligned"));
        }
        self.bytes(address, size)
    }

    /// The same at any address.
    pub(super) fn bytes(&mut self, address: u64, size: usize) -> Result<&mut [u8], String> {
        let offset = (address & ((1 << SPAN) - 1)) as usize;
        let number = ((address >> SPAN) as usize).wrapping_sub(1);
        let allocation = self.allocations.get_mut(number);
        let len = allocation.as_ref().map_or(0, |allocation| allocation.len());
        allocation.and_then(|allocation| allocation.get_mut(offset..offset + size)).ok_or_else(|| {
            format!("{size} bytes at {address:#x}: outside of allocation {number} of {len} bytes")
        })
    }
}
