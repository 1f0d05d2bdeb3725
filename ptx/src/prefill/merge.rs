//! `prefill_merge`: puts the partial results of tiles whose keys were split together.

use minijinja::context;

use super::PrefillSpec;
use crate::Error;
use crate::decode::Rows;
use crate::kernel::{Kernel, Launch, Source, Target, parameters};

/// Family and template name.
const FAMILY: &str = "prefill_merge";

/// Warps of a thread block, each with a row.
const WARPS: u32 = 4;

/// One tile whose keys were split. Eight u32 in device memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct MergeItem {
    /// The sequence's first row of the output.
    pub row: u32,
    /// First row of the tile, as in [`super::PrefillItem`].
    pub first: u32,
    /// Rows of the tile; 0 marks an item without work.
    pub rows: u32,
    /// KV head.
    pub head: u32,
    /// Number of the first partial result; the others follow.
    pub first_partial: u32,
    /// How many there are.
    pub splits: u32,
}

impl MergeItem {
    /// Words of an item in device memory.
    pub const WORDS: usize = 8;

    /// The item as the kernel reads it.
    pub fn words(&self) -> [u32; Self::WORDS] {
        let Self { row, first, rows, head, first_partial, splits } = *self;
        [row, first, rows, head, first_partial, splits, 0, 0]
    }
}

/// What one launch works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrefillMergeArgs {
    /// Device address of the [`MergeItem`]s.
    pub work: u64,
    /// Device address of the partial outputs.
    pub partial_out: u64,
    /// Device address of the partial maxima and sums.
    pub partial_max: u64,
    /// Output.
    pub out: Rows,
    /// Device address of the log-sum-exp, f32 `[rows, q_heads]`, or 0.
    pub lse: u64,
    /// Device address of the sinks, f32 `[q_heads]`, or 0.
    pub sinks: u64,
    /// Query heads.
    pub q_heads: u32,
    /// Query heads that share a KV head.
    pub group: u32,
    /// Elements of a head of V.
    pub head_dim_v: u32,
}

parameters! {
    /// The parameter list.
    const PARAMS of pub fn PrefillMergeArgs::values(&self);
    work: Pointer = self.work,
    partial_out: Pointer = self.partial_out,
    partial_max: Pointer = self.partial_max,
    out: Pointer = self.out.address,
    lse: Pointer = self.lse,
    sinks: Pointer = self.sinks,
    out_row_stride: U64 = self.out.row_stride,
    out_head_stride: U64 = self.out.head_stride,
    q_heads: U64 = u64::from(self.q_heads),
    group: U32 = self.group,
    dim_v: U32 = self.head_dim_v,
}

/// One variant, rendered: it belongs to a type of output, room for a head, and rows of a tile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrefillMerge {
    tile_rows: u32,
    kernel: Kernel,
}

impl PrefillMerge {
    /// A variant of prefill for every variant of this kernel.
    pub fn all() -> impl Iterator<Item = PrefillSpec> {
        PrefillSpec::all().filter(|spec| spec.usual() == *spec)
    }

    /// The entry point of the variant that goes with one of prefill.
    pub fn entry(spec: PrefillSpec) -> String {
        format!("{FAMILY}_{}_d{}", spec.dtype, spec.head_dim)
    }

    /// Renders the variant that goes with one of prefill.
    ///
    /// # Errors
    /// [`Error::UnsupportedPrefill`] for a type or a head dimension without a variant.
    pub fn new(spec: PrefillSpec) -> Result<Self, Error> {
        let PrefillSpec { dtype, kv_dtype, head_dim, .. } = spec;
        if !spec.exists() {
            return Err(Error::UnsupportedPrefill { dtype, kv_dtype, head_dim });
        }
        let source = Source {
            family: FAMILY,
            text: include_str!("../../kernels/prefill_merge.ptx"),
            params: &PARAMS,
            max_threads: WARPS * 32,
            static_shared: 0,
            dynamic_shared: 0,
        };
        let tile_rows = spec.tile_rows();
        let variables = context! { dtype => dtype.name(), head_dim, tile_rows, warps => WARPS };
        let kernel = source.render(Self::entry(spec), Target::from(80, (7, 0)), variables)?;
        Ok(Self { tile_rows, kernel })
    }

    /// The rendered kernel.
    pub fn kernel(&self) -> &Kernel {
        &self.kernel
    }

    /// The rendered kernel, by value.
    pub fn into_kernel(self) -> Kernel {
        self.kernel
    }

    /// Grid and block for so many tiles.
    ///
    /// # Errors
    /// [`Error::Zero`] for none.
    pub fn launch(&self, merges: u32) -> Result<Launch, Error> {
        if merges == 0 {
            return Err(Error::Zero { kernel: FAMILY, field: "merges" });
        }
        Ok(Launch { grid: [merges, self.tile_rows / WARPS, 1], block: [WARPS * 32, 1, 1], dynamic_shared: 0 })
    }
}
