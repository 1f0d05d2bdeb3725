//! The work of one decode step: which keys go to which thread block, and what the caller must bring.
//!
//! Pure host arithmetic: no device, no allocation there. How rows are cut is `split.rs`'s, the kernel that consumes
//! the items [`pagewise_ptx::decode`]'s.

use pagewise_ptx::decode::{
    Decode, DecodeShape, DecodeSpec, DecodeTuning, FRESH_KEYS, Ring, TILE_KEYS, WorkItem, WorkspaceSizes,
};

use super::balance::{Choice, Heads, Step, choose, pace};
use super::decode::ptx_type;
use super::split::most_items;
use super::{CudaError, Device, Order, Shrink};
use crate::plan::{Cut, Keys, MAX_PIECE_KEYS, Piece, count, split, visible_rows};
use crate::{AttentionConfig, BlockTables, CacheLayout, Problem, RowStrides};

/// KV heads of a thread block where the launch is to be the same for many lengths. Many short rows take half the time with
/// several; but plans that share a captured graph must agree in [`DecodePlan::block_heads`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GridHeads {
    /// One.
    #[default]
    One,
    /// One, or the most with which whole rows give nearly every multiprocessor a thread block: that number follows from how
    /// many rows there are.
    OneOrMost,
    /// As many as suit the lengths, as without `grid_items`.
    Any,
}

/// How a plan is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PlanOptions {
    /// Keys of a work item, if fixed: a multiple of 16, at most 2²⁴. Then the split of a row, and so the bits of
    /// its output, depend on its length alone and not on the rest of the batch.
    pub item_keys: Option<u32>,
    /// How work items shrink where their size is not fixed.
    pub shrink: Option<Shrink>,
    /// How the kernel is tuned, if otherwise than by default.
    pub tuning: Option<DecodeTuning>,
    /// How much shared memory the kernel takes, if it is not to be chosen.
    pub ring: Option<Ring>,
    /// KV heads of a thread block, if fixed: a power of two that divides them, at most the kernel's warps.
    pub block_heads: Option<u32>,
    /// Work items of the launch, if more than there is work for: those of [`DecodePlan::bound`] let plans of
    /// different lengths share one captured CUDA graph. Every plan then has the same kernel, with one KV head to
    /// a thread block unless `block_heads` or `grid_heads` says otherwise.
    pub grid_items: Option<u32>,
    /// How the KV heads of a thread block are chosen with `grid_items`.
    pub grid_heads: GridHeads,
    /// When the launch begins. [`Order::Dependent`] is for a GPU and a driver that know such launches: the kernel asks for
    /// its first keys while those before it still run. What it reads so early must be complete when the last ordinary
    /// launch before it begins: work items, block tables, mask bits, and all keys and values of a row but the last
    /// [`FRESH_KEYS`], which may be a [`write_kv`](super::Context::write_kv_raw)'s after that. Queries may come from the
    /// kernel right before. Where there is no variant for it, or a sequence has more query rows than that (and then as
    /// many fresh keys), the launch is an ordinary one.
    pub order: Order,
}

/// The largest step that a workspace or a captured graph is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepLimits {
    /// Query rows of a step.
    pub rows: usize,
    /// Keys that all of them see together.
    pub keys: usize,
}

/// What no step within its [`StepLimits`] exceeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanBound {
    /// Work items, for [`PlanOptions::grid_items`] with the same [`PlanOptions::grid_heads`].
    pub items: u32,
    /// Bytes of the work items in device memory.
    pub work: u64,
    /// Bytes of the workspace.
    pub workspace: WorkspaceSizes,
}

/// Elements that a run reaches in each of the caller's buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extents {
    pub(super) q: u64,
    pub(super) k_cache: u64,
    pub(super) v_cache: u64,
    pub(super) tables: u64,
    pub(super) out: u64,
    pub(super) lse: u64,
    pub(super) mask_bits: u64,
}

impl Extents {
    fn of(problem: &Problem<'_>) -> Self {
        let (config, layout, batch) = (problem.config(), problem.layout(), problem.batch());
        Self {
            q: problem.q_extent(),
            k_cache: layout.k_extent(config),
            v_cache: layout.v_extent(config),
            tables: match batch.block_tables {
                BlockTables::Padded { max_blocks, .. } => (problem.num_sequences() * max_blocks) as u64,
                BlockTables::Csr { indptr, .. } => {
                    indptr.last().map_or(0, |&end| u64::from(end.max(0) as u32))
                }
            },
            out: problem.out_extent(),
            lse: problem.lse_extent(),
            mask_bits: batch.mask_bits.map_or(0, |bits| (problem.total_queries() * bits.row_words) as u64),
        }
    }
}

/// The work of one decode step, the same for all layers of a model that share heads and layout.
#[derive(Clone, Debug, PartialEq)]
pub struct DecodePlan {
    pub(super) config: AttentionConfig,
    pub(super) layout: CacheLayout,
    pub(super) q: RowStrides,
    pub(super) out: RowStrides,
    pub(super) spec: DecodeSpec,
    pub(super) shape: DecodeShape,
    pub(super) mask_words: u32,
    pub(super) extents: Extents,
    items: Vec<WorkItem>,
    partials: u32,
}

impl DecodePlan {
    /// Plans a step. Every query row is planned by itself: with one row a sequence, each key is read once; with
    /// several rows of a sequence, once for each.
    ///
    /// # Errors
    /// [`CudaError::Unsupported`] for what the decode kernel does not do, [`CudaError::TooLarge`] beyond its
    /// 32-bit sizes or the items of a fixed grid.
    pub fn new(problem: &Problem<'_>, device: &Device, options: PlanOptions) -> Result<Self, CudaError> {
        Self::of_rows(problem, &visible_rows(problem, |_| true)?, device, options)
    }

    /// Plans some of a step's rows.
    pub(super) fn of_rows(
        problem: &Problem<'_>,
        rows: &[Keys],
        device: &Device,
        options: PlanOptions,
    ) -> Result<Self, CudaError> {
        let (config, layout) = (problem.config(), *problem.layout());
        let options = PlanOptions { order: order_for(rows, options)?, ..options };
        let choices = Kind::choices(config, device, options)?;
        // The heads of a thread block are part of a launch, which a captured graph repeats.
        let heads = match (options.block_heads, options.grid_items) {
            (Some(heads), _) => Heads::Fixed(heads),
            (None, None) => Heads::Any,
            (None, Some(_)) => match options.grid_heads {
                GridHeads::One => Heads::Fixed(1),
                GridHeads::OneOrMost => Heads::OneOrMost,
                GridHeads::Any => Heads::Any,
            },
        };
        let choose = |kind: &Kind| match options.item_keys {
            Some(keys) => {
                let block_heads = options.block_heads.unwrap_or(1);
                Choice { block_heads, cut: Cut::Equal(keys), cost: 0.0, floor: 0.0 }
            }
            None => choose(rows, &kind.step, heads, options.shrink),
        };
        let mut best: Option<(&Kind, Choice)> = None;
        for kind in &choices {
            let choice = choose(kind);
            if best.as_ref().is_none_or(|(_, so_far)| choice.cost < so_far.cost) {
                best = Some((kind, choice));
            }
            if choice.is_good() {
                break;
            }
        }
        let Some((kind, Choice { block_heads, cut, .. })) = best else {
            return Err(unsupported("this tuning", "see DecodeTuning for its bounds"));
        };
        let (pieces, partials) = split(rows, kind.step.blocks_per_item(block_heads), cut)?;
        let items: Vec<WorkItem> = pieces.into_iter().map(work_item).collect();
        let grid = match options.grid_items {
            Some(most) if items.len() > most as usize => {
                let (value, max) = (items.len() as u64, u64::from(most));
                return Err(CudaError::TooLarge { what: "the number of work items", value, max });
            }
            Some(most) => most,
            None => small("the number of work items", items.len())?,
        };
        let shape = DecodeShape { items: grid, block_heads, ..kind.shape };
        Ok(Self {
            config: config.clone(),
            layout,
            q: problem.q_strides(),
            out: problem.out_strides(),
            spec: kind.spec,
            shape,
            mask_words: small(
                "row_words of the mask",
                problem.batch().mask_bits.map_or(0, |bits| bits.row_words),
            )?,
            extents: Extents::of(problem),
            items,
            partials,
        })
    }

    /// What no plan of a step within `limits` exceeds.
    ///
    /// # Errors
    /// As [`DecodePlan::new`].
    pub fn bound(
        config: &AttentionConfig,
        device: &Device,
        limits: StepLimits,
        options: PlanOptions,
    ) -> Result<PlanBound, CudaError> {
        config.validate()?;
        let choices = Kind::choices(config, device, options)?;
        let (rows, keys) = (limits.rows as u64, limits.keys as u64);
        let shrink = options.shrink.unwrap_or_default();
        let heads = options.block_heads.unwrap_or(1);
        let most = |kind: &Kind| most_items(rows, keys, &kind.step, heads, options.item_keys, shrink);
        let items = choices.iter().map(most).max().unwrap_or(0);
        // Where the lengths choose the heads of a thread block, a row may be cut into as many pieces with several as fill the
        // GPU once.
        let free = options.block_heads.is_none() && options.item_keys.is_none();
        let wave = choices.iter().map(|kind| kind.step.slots()).max().filter(|_| free).unwrap_or(0);
        let (with_heads, number) = (items.max(rows + wave), "the number of work items");
        // Plans of no fixed grid are within work and workspace too.
        let partials = small(number, usize::try_from(with_heads).unwrap_or(usize::MAX))?;
        let items = if options.grid_heads == GridHeads::One { items } else { with_heads };
        let items = small(number, usize::try_from(items).unwrap_or(usize::MAX))?;
        let Some(kind) = choices.first() else {
            return Err(unsupported("this tuning", "see DecodeTuning for its bounds"));
        };
        Ok(PlanBound {
            items,
            work: u64::from(partials) * 4 * WorkItem::WORDS as u64,
            workspace: Decode::workspace_of(kind.spec, partials, kind.shape),
        })
    }

    /// The kernel variant: `decode_bf16_bf16_d128`.
    pub fn variant(&self) -> String {
        self.spec.entry()
    }

    /// KV heads of a thread block.
    pub fn block_heads(&self) -> u32 {
        self.shape.block_heads
    }

    /// The work items, without those that only fill a grid of fixed size.
    pub fn items(&self) -> &[WorkItem] {
        &self.items
    }

    /// The work items as the kernel reads them: to be copied to the device as they are.
    pub fn work(&self) -> Vec<u32> {
        let mut words: Vec<u32> = self.items.iter().flat_map(WorkItem::words).collect();
        words.resize(self.work_words() as usize, 0);
        words
    }

    /// Length of [`DecodePlan::work`].
    pub(super) fn work_words(&self) -> u64 {
        u64::from(self.shape.items) * WorkItem::WORDS as u64
    }

    /// Bytes of the workspace that a run of this plan needs.
    pub fn workspace(&self) -> WorkspaceSizes {
        Decode::workspace_of(self.spec, self.partials, self.shape)
    }
}

/// The order of a launch for these rows: a dependent one reads early what a step with many query rows of a sequence has
/// just written.
fn order_for(rows: &[Keys], options: PlanOptions) -> Result<Order, CudaError> {
    if options.order == Order::Stream {
        return Ok(Order::Stream);
    }
    // Rows of a sequence follow each other and share a block table. Those that see no key, of which a step that is filled
    // up has many, may share one too.
    let reading = |rows: &[Keys]| rows.iter().filter(|row| row.begin < row.end).count();
    let most = rows.chunk_by(|a, b| a.table == b.table).map(reading).max().unwrap_or(0);
    if most <= FRESH_KEYS as usize {
        return Ok(Order::Dependent);
    }
    match options.grid_items {
        None => Ok(Order::Stream),
        Some(_) => Err(unsupported(
            &format!("a dependent launch of fixed size for {most} query rows of a sequence"),
            "give a sequence at most FRESH_KEYS (16) query rows, or take Order::Stream",
        )),
    }
}

/// What follows from the configuration alone.
struct Kind {
    spec: DecodeSpec,
    /// Without items, with one KV head to a thread block.
    shape: DecodeShape,
    step: Step,
}

impl Kind {
    /// What there is to choose from for a configuration, the best for little work first.
    fn choices(
        config: &AttentionConfig,
        device: &Device,
        options: PlanOptions,
    ) -> Result<Vec<Self>, CudaError> {
        let rings = match (options.ring, options.tuning) {
            (Some(ring), _) => vec![ring],
            (None, Some(_)) => vec![Ring::Large],
            (None, None) => {
                let fits = |ring: &Ring| ring.shared() <= device.shared_memory_per_block;
                Ring::ALL.into_iter().filter(fits).collect()
            }
        };
        // A captured graph repeats one kernel.
        let most = if options.grid_items.is_some() { 1 } else { rings.len() };
        rings.into_iter().take(most).map(|ring| Self::new(config, device, ring, options)).collect()
    }

    fn new(
        config: &AttentionConfig,
        device: &Device,
        ring: Ring,
        options: PlanOptions,
    ) -> Result<Self, CudaError> {
        let mut spec = supported(config, ring, options.tuning)?;
        if options.order == Order::Dependent {
            spec = spec.dependently().unwrap_or(spec);
        }
        if let Some(keys) = options.item_keys
            && (keys == 0 || keys > MAX_PIECE_KEYS || keys % TILE_KEYS != 0)
        {
            let what = format!("item_keys = {keys}");
            return Err(unsupported(&what, "it must be a multiple of 16, from 16 to 16777216"));
        }
        let shape = DecodeShape {
            items: 0,
            kv_heads: small("kv_heads", config.kv_heads)?,
            group: small("the group", config.group())?,
            block_heads: 1,
        };
        let heads = options.block_heads.unwrap_or(1);
        if !(DecodeShape { block_heads: heads, ..shape }).divides_heads(spec.tuning.warps) {
            let what = format!("block_heads = {heads} of {} KV heads", shape.kv_heads);
            return Err(unsupported(&what, "take a power of two that divides them, at most one a warp"));
        }
        let fit = device.blocks_that_fit(spec.shared_bytes());
        let step = Step {
            kv_heads: shape.kv_heads,
            query_tiles: shape.query_tiles(),
            tile_rows: shape.tile_rows(),
            warps: spec.tuning.warps,
            multiprocessors: u64::from(device.multiprocessors.max(1)),
            blocks_each: u64::from(spec.tuning.blocks_per_multiprocessor.min(fit)),
            key_bytes: ((config.head_dim_qk + config.head_dim_v) * config.kv_dtype.size()) as u64,
            pace: pace(device),
        };
        Ok(Self { spec, shape, step })
    }
}

/// The variant for a configuration, or why there is none.
fn supported(
    config: &AttentionConfig,
    ring: Ring,
    tuning: Option<DecodeTuning>,
) -> Result<DecodeSpec, CudaError> {
    let AttentionConfig { head_dim_qk, head_dim_v, q_dtype, kv_dtype, .. } = *config;
    let room = small("head_dim", head_dim_qk.max(head_dim_v))?;
    let Some(spec) = DecodeSpec::for_head(ptx_type(q_dtype), ptx_type(kv_dtype), room, ring) else {
        return Err(unsupported(
            &format!("{q_dtype} queries over a {kv_dtype} cache"),
            "it takes a cache of the queries' type, or an fp8 one with f16 and bf16 queries",
        ));
    };
    let multiple = spec.dim_multiple() as usize;
    for (field, dim) in [("head_dim_qk", head_dim_qk), ("head_dim_v", head_dim_v)] {
        if dim % multiple != 0 {
            return Err(unsupported(
                &format!("{field} = {dim} with {q_dtype} queries"),
                "it must be a multiple of 4 in f32 and of 8 in 16 bits",
            ));
        }
    }
    let spec = DecodeSpec { tuning: tuning.unwrap_or(spec.tuning), ..spec };
    match spec.exists() {
        true => Ok(spec),
        false => Err(unsupported("this tuning", "see DecodeTuning for its bounds")),
    }
}

fn unsupported(what: &str, advice: &'static str) -> CudaError {
    CudaError::Unsupported { kernel: "decode", what: what.to_owned(), advice }
}

pub(super) fn small(what: &'static str, value: usize) -> Result<u32, CudaError> {
    Ok(count(what, value)?)
}

fn work_item(piece: Piece) -> WorkItem {
    let Piece { table, row, begin, end, split, splits, first_partial, position } = piece;
    WorkItem { table, row, begin, end, split, splits, first_partial, position }
}

#[cfg(test)]
mod tests;
