//! `copy_blocks`: copies blocks of all layers' K and V, within a cache or from one to another, in one launch.
//!
//! The paper's fused block copy (Kwon et al., SOSP 2023, section 5.1); with one side in pinned host memory it is
//! swapping (section 4.5). Owns the variants, the parameter list and the launch geometry; the kernel is
//! `kernels/copy_blocks.ptx`.

use minijinja::context;

use crate::Error;
use crate::kernel::{Launch, Source, Target, descriptor, parameters};

/// Family and template name.
const FAMILY: &str = "copy_blocks";

/// The most work items: their numbers are 32 bits wide, and a loop adds the grid's size to them.
const MAX_ITEMS: u32 = i32::MAX as u32;

/// What moves the clock but not the result, fixed when the text is rendered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CopyBlocksTuning {
    /// Threads of a thread block: 32 to 1024, a multiple of 32.
    pub threads: u32,
    /// Moves of a thread that are under way together: 1 to 8.
    pub in_flight: u32,
}

impl Default for CopyBlocksTuning {
    fn default() -> Self {
        Self { threads: 128, in_flight: 4 }
    }
}

/// Which variant: fixed when the text is rendered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CopyBlocksSpec {
    /// Bytes that a thread moves at once, of which every address, stride and row is a multiple: 16, 4, 2 or 1.
    pub bytes: u32,
    /// What it is tuned for.
    pub tuning: CopyBlocksTuning,
}

impl CopyBlocksSpec {
    /// The bytes that a thread may move at once, widest first.
    pub const BYTES: [u32; 4] = [16, 4, 2, 1];

    /// The widest variant for addresses, strides and rows that are all multiples of `alignment` bytes (0: of any).
    pub fn for_alignment(alignment: u64) -> Self {
        let fits = |bytes: &u32| alignment.is_multiple_of(u64::from(*bytes));
        let bytes = Self::BYTES.into_iter().find(fits).unwrap_or(1);
        Self { bytes, tuning: CopyBlocksTuning::default() }
    }

    /// Every variant, tuned as it is when nothing else is asked for.
    pub fn all() -> impl Iterator<Item = Self> {
        Self::BYTES.into_iter().map(|bytes| Self { bytes, tuning: CopyBlocksTuning::default() })
    }

    /// The entry point: `copy_blocks_b16`, and what is tuned otherwise than by default.
    pub fn entry(self) -> String {
        let Self { bytes, tuning } = self;
        if tuning == CopyBlocksTuning::default() {
            return format!("{FAMILY}_b{bytes}");
        }
        format!("{FAMILY}_b{bytes}_t{}_u{}", tuning.threads, tuning.in_flight)
    }

    /// Bytes of a work item.
    const fn chunk(self) -> u32 {
        self.bytes * self.tuning.threads * self.tuning.in_flight
    }
}

/// Strides of the blocks of one tensor in one cache, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct BlockStrides {
    /// From a block to the next.
    pub block: u64,
    /// From an outer row to the next.
    pub outer: u64,
    /// From an inner row to the next.
    pub inner: u64,
}

/// A block of K or of V: `outer` times `inner` rows of bytes that lie side by side in both caches. A block that is one run
/// of bytes is one row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockRows {
    /// Outer rows.
    pub outer: u32,
    /// Inner rows of an outer one.
    pub inner: u32,
    /// Bytes of a row.
    pub row_bytes: u32,
    /// Where they are read.
    pub from: BlockStrides,
    /// Where they are written.
    pub to: BlockStrides,
}

impl BlockRows {
    /// Bytes of a block, without what lies between its rows.
    pub const fn bytes(self) -> u64 {
        self.outer as u64 * self.inner as u64 * self.row_bytes as u64
    }
}

/// The sizes that decide the grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CopyBlocksShape {
    /// Pairs of blocks.
    pub pairs: u32,
    /// Layers.
    pub layers: u32,
    /// Blocks of K.
    pub key: BlockRows,
    /// Blocks of V.
    pub value: BlockRows,
}

/// What one launch works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CopyBlocksArgs {
    /// Sizes and strides; the same as given to [`CopyBlocks::launch`].
    pub shape: CopyBlocksShape,
    /// Device address of the addresses of block 0, u64 `[layers, 2]`: of K and of V, where they are read.
    pub from: u64,
    /// The same of where they are written.
    pub to: u64,
    /// Device address of the pairs, i32 or i64 `[pairs, 2]`: block that is read, block that is written.
    pub pairs: u64,
    /// Bytes of a block number: 4 or 8.
    pub pair_bytes: u32,
    /// Device address of the number of pairs, u32, which takes the place of `shape.pairs` if it is smaller; 0 for none.
    pub count: u64,
    /// Blocks of the cache that is read. Pairs with numbers outside are skipped.
    pub from_blocks: u32,
    /// Blocks of the cache that is written.
    pub to_blocks: u32,
}

parameters! {
    /// The parameter list, the same for all variants.
    const PARAMS of pub fn CopyBlocksArgs::values(&self);
    from: Pointer = self.from,
    to: Pointer = self.to,
    pairs: Pointer = self.pairs,
    count_at: Pointer = self.count,
    key_from_block_stride: U64 = self.shape.key.from.block,
    key_from_outer_stride: U64 = self.shape.key.from.outer,
    key_from_inner_stride: U64 = self.shape.key.from.inner,
    key_to_block_stride: U64 = self.shape.key.to.block,
    key_to_outer_stride: U64 = self.shape.key.to.outer,
    key_to_inner_stride: U64 = self.shape.key.to.inner,
    value_from_block_stride: U64 = self.shape.value.from.block,
    value_from_outer_stride: U64 = self.shape.value.from.outer,
    value_from_inner_stride: U64 = self.shape.value.from.inner,
    value_to_block_stride: U64 = self.shape.value.to.block,
    value_to_outer_stride: U64 = self.shape.value.to.outer,
    value_to_inner_stride: U64 = self.shape.value.to.inner,
    // A block is below 2^32 bytes, as `launch` checks.
    key_block_bytes: U32 = self.shape.key.bytes() as u32,
    key_row_bytes: U32 = self.shape.key.row_bytes,
    key_inner: U32 = self.shape.key.inner,
    value_block_bytes: U32 = self.shape.value.bytes() as u32,
    value_row_bytes: U32 = self.shape.value.row_bytes,
    value_inner: U32 = self.shape.value.inner,
    count: U32 = self.shape.pairs,
    pair_bytes: U32 = self.pair_bytes,
    tensors: U32 = 2 * self.shape.layers,
    from_blocks: U32 = self.from_blocks,
    to_blocks: U32 = self.to_blocks,
}

descriptor!(
    /// One variant, rendered.
    CopyBlocks of CopyBlocksSpec
);

impl CopyBlocks {
    /// Renders a variant.
    ///
    /// # Errors
    /// [`Error::UnsupportedTuning`] for bytes, threads or moves under way that no kernel can be made of.
    pub fn new(spec: CopyBlocksSpec) -> Result<Self, Error> {
        let CopyBlocksSpec { bytes, tuning: CopyBlocksTuning { threads, in_flight } } = spec;
        for (is_valid, what, bounds) in [
            (CopyBlocksSpec::BYTES.contains(&bytes), "the bytes of a move", "16, 4, 2 or 1"),
            (
                (32..=1024).contains(&threads) && threads % 32 == 0,
                "the threads of a thread block",
                "a multiple of 32 up to 1024",
            ),
            ((1..=8).contains(&in_flight), "the moves under way", "1 to 8"),
        ] {
            if !is_valid {
                return Err(Error::UnsupportedTuning { kernel: FAMILY, what, bounds });
            }
        }
        let source = Source {
            family: FAMILY,
            text: include_str!("../kernels/copy_blocks.ptx"),
            params: &PARAMS,
            max_threads: threads,
            static_shared: 0,
            dynamic_shared: 0,
        };
        let variables = context! { threads, bytes, in_flight };
        Ok(Self { spec, kernel: source.render(spec.entry(), Target::from(80, (7, 4)), variables)? })
    }

    /// Grid and block for a shape: a thread block for each work item, but no more than `thread_blocks` if that is given;
    /// then each takes several items in turn.
    ///
    /// # Errors
    /// [`Error::Zero`] without pairs or layers (then there is nothing to launch), for an empty block, and for no thread
    /// block; [`Error::NotDivisible`] when a row is no multiple of what a thread moves at once; [`Error::TooLarge`] for
    /// blocks of 2³¹ bytes or as many work items.
    pub fn launch(&self, shape: CopyBlocksShape, thread_blocks: Option<u32>) -> Result<Launch, Error> {
        let CopyBlocksShape { pairs, layers, key, value } = shape;
        let zero = |field| Err(Error::Zero { kernel: FAMILY, field });
        for (field, value) in
            [("pairs", pairs), ("layers", layers), ("thread_blocks", thread_blocks.unwrap_or(1))]
        {
            if value == 0 {
                return zero(field);
            }
        }
        let too_large = |field, value: u64| {
            let value = u32::try_from(value).unwrap_or(u32::MAX);
            Err(Error::TooLarge { kernel: FAMILY, field, value, limit: MAX_ITEMS })
        };
        let mut most = 0;
        for (field, rows) in [("the bytes of a block of K", key), ("the bytes of a block of V", value)] {
            let (vector, bytes) = (self.spec.bytes, rows.bytes());
            if bytes == 0 {
                return zero(field);
            }
            if rows.row_bytes % vector != 0 {
                let (field, value) = ("the bytes of a row", rows.row_bytes);
                return Err(Error::NotDivisible { kernel: FAMILY, vector, field, value });
            }
            if bytes > u64::from(MAX_ITEMS) {
                return too_large(field, bytes);
            }
            most = most.max(bytes);
        }
        let chunks = most.div_ceil(u64::from(self.spec.chunk()));
        let items = (u64::from(pairs) * 2 * u64::from(layers)).saturating_mul(chunks);
        if items > u64::from(MAX_ITEMS) {
            return too_large("pairs times layers", items);
        }
        // At most 2^31 - 1, as was just checked.
        let grid = (items as u32).min(thread_blocks.unwrap_or(MAX_ITEMS));
        Ok(Launch { grid: [grid, 1, 1], block: [self.spec.tuning.threads, 1, 1], dynamic_shared: 0 })
    }
}
