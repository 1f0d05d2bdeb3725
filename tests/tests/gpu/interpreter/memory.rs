//! Device memory and the shared memory of one block, which refuse what lies outside of them; and what the kernels before
//! the one that runs have not written yet.

/// Device memory: allocations far apart, so that no wrong address hits another one by chance.
#[derive(Debug, Default)]
pub struct Memory {
    allocations: Vec<Allocation>,
    /// Of the block that runs.
    pub(super) shared: Vec<u8>,
    /// Whether the thread that runs has waited for the kernels before its own, or its own begins after their end.
    pub(super) waited: bool,
}

#[derive(Debug)]
struct Allocation {
    bytes: Vec<u8>,
    /// What a thread finds here that has not waited, if the kernels before its own write here.
    early: Option<Vec<u8>>,
}

/// Address bits within an allocation.
const SPAN: u32 = 36;

/// What shared memory's addresses have among all of them.
pub(super) const SHARED_WINDOW: u64 = 1 << 63;

impl Memory {
    /// Copies bytes into a new allocation; its address.
    pub fn upload(&mut self, bytes: &[u8]) -> u64 {
        self.allocations.push(Allocation { bytes: bytes.to_vec(), early: None });
        (self.allocations.len() as u64) << SPAN
    }

    /// What an allocation holds.
    pub fn download(&self, address: u64) -> &[u8] {
        &self.allocations[(address >> SPAN) as usize - 1].bytes
    }

    /// What a thread finds in an allocation that has not waited for the kernels before its own.
    pub fn set_early(&mut self, address: u64, bytes: Vec<u8>) {
        let allocation = &mut self.allocations[(address >> SPAN) as usize - 1];
        assert_eq!(bytes.len(), allocation.bytes.len(), "bytes of an allocation");
        allocation.early = Some(bytes);
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

    /// What the thread that runs reads.
    pub(super) fn load(&self, address: u64, size: usize) -> Result<&[u8], String> {
        aligned(address, size)?;
        self.seen(address, size, self.waited)
    }

    /// What a thread reads at any address, before or after it has waited.
    pub(super) fn seen(&self, address: u64, size: usize, waited: bool) -> Result<&[u8], String> {
        let (number, offset) = place(address);
        let allocation = self.allocations.get(number);
        let bytes = allocation.map(|Allocation { bytes, early }| match early {
            Some(early) if !waited => early,
            _ => bytes,
        });
        bytes
            .and_then(|bytes| bytes.get(offset..offset + size))
            .ok_or_else(|| outside(address, size, bytes.map_or(0, Vec::len)))
    }

    /// Where the thread that runs writes. Before it has waited, kernels before its own may still read or write there.
    pub(super) fn store(&mut self, address: u64, size: usize) -> Result<&mut [u8], String> {
        aligned(address, size)?;
        if !self.waited {
            return Err(format!(
                "{size} bytes at {address:#x}: written without a wait for the kernels before this one"
            ));
        }
        let (number, offset) = place(address);
        let allocation = self.allocations.get_mut(number);
        let len = allocation.as_ref().map_or(0, |allocation| allocation.bytes.len());
        allocation
            .and_then(|allocation| allocation.bytes.get_mut(offset..offset + size))
            .ok_or_else(|| outside(address, size, len))
    }
}

/// The number of the allocation that an address is in, and the place in it.
fn place(address: u64) -> (usize, usize) {
    (((address >> SPAN) as usize).wrapping_sub(1), (address & ((1 << SPAN) - 1)) as usize)
}

fn aligned(address: u64, size: usize) -> Result<(), String> {
    match address.is_multiple_of(size as u64) {
        true => Ok(()),
        false => Err(format!("{size} bytes at {address:#x}: misaligned")),
    }
}

fn outside(address: u64, size: usize, len: usize) -> String {
    let (number, _) = place(address);
    format!("{size} bytes at {address:#x}: outside of allocation {number} of {len} bytes")
}
