//! `page_read`: reads pages through a page table. The yardstick of benches, part of no model.
//!
//! Owns the two variants (with and without a merge by the last thread block), parameters and geometry; the kernel
//! is `kernels/page_read.ptx`.

use minijinja::context;

use crate::Error;
use crate::kernel::{Kernel, Launch, Source, Target, parameters};

/// Family and template name.
const FAMILY: &str = "page_read";

/// Threads of a block, each of which reads 16 bytes of a page.
const THREADS: u32 = 256;

/// Bytes of a page: 16 tokens of 128 16-bit elements.
pub const PAGE_BYTES: u32 = THREADS * 16;

/// Pages on their way at a time.
const PAGES_IN_FLIGHT: u32 = 8;

/// What one launch works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageReadArgs {
    /// Device address of the pages.
    pub data: u64,
    /// Device address of the page numbers, u32 `[count]`.
    pub table: u64,
    /// Device address of one u32 for each thread block of [`PageRead::launch`], for the merging variant.
    pub partial: u64,
    /// Device address of a u32 that is zero before the first launch and zero again after each.
    pub ticket: u64,
    /// Device address of the result, one u32: the exclusive or of all words.
    pub out: u64,
    /// Pages.
    pub count: u32,
    /// Pages that a thread block reads.
    pub per_block: u32,
}

parameters! {
    /// The parameter list, the same for both variants.
    const PARAMS of pub fn PageReadArgs::values(&self);
    data: Pointer = self.data,
    table: Pointer = self.table,
    partial: Pointer = self.partial,
    ticket: Pointer = self.ticket,
    out: Pointer = self.out,
    count: U32 = self.count,
    per_block: U32 = self.per_block,
}

/// One variant, rendered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageRead {
    kernel: Kernel,
}

impl PageRead {
    /// Renders a variant.
    ///
    /// # Errors
    /// [`Error::Template`], which is a defect of this crate.
    pub fn new(merges: bool) -> Result<Self, Error> {
        let source = Source {
            family: FAMILY,
            text: include_str!("../kernels/page_read.ptx"),
            params: &PARAMS,
            max_threads: THREADS,
            static_shared: if merges { 4 + THREADS / 8 } else { 0 },
            dynamic_shared: 0,
        };
        let entry = format!("{FAMILY}{}", if merges { "_merged" } else { "" });
        let variables = context! { threads => THREADS, pages_in_flight => PAGES_IN_FLIGHT, merges };
        Ok(Self { kernel: source.render(entry, Target::from(80, (7, 0)), variables)? })
    }

    /// The rendered kernel.
    pub fn kernel(&self) -> &Kernel {
        &self.kernel
    }

    /// The rendered kernel, by value.
    pub fn into_kernel(self) -> Kernel {
        self.kernel
    }

    /// Grid and block for so many pages, so many of them a thread block.
    ///
    /// # Errors
    /// [`Error::Zero`] without pages.
    pub fn launch(&self, count: u32, per_block: u32) -> Result<Launch, Error> {
        for (field, value) in [("count", count), ("per_block", per_block)] {
            if value == 0 {
                return Err(Error::Zero { kernel: FAMILY, field });
            }
        }
        Ok(Launch { grid: [count.div_ceil(per_block), 1, 1], block: [THREADS, 1, 1], dynamic_shared: 0 })
    }
}
