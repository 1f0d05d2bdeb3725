//! The work of one step for the wgpu backend: which rows go to which kernel, which keys to which workgroup, and what lies
//! in the plan's buffer.
//!
//! How rows are cut is `crate::plan`'s, how tiles of rows are `prefill_plan.rs`'s; the kernels that consume the items are
//! [`pagewise_shaders::decode`]'s and [`pagewise_shaders::prefill`]'s. Block tables and mask bits travel in the plan: with them the kernel has the eight
//! storage buffers that WebGPU grants, and the tables on the device are those that were checked.

use std::sync::Arc;

use pagewise_shaders::decode::{
    DecodeSpec, FEW_SPLITS, HEADER_WORDS, MAX_SPLITS, MERGE_WORDS, WorkItem, merge_heads, workgroups,
};
use pagewise_shaders::prefill::{MatrixTuning, Prefill, PrefillItem, PrefillTuning};

use super::context::Pipeline;
use super::prefill_plan::{Pieces, PrefillPart, most_pieces};
use super::{Context, WgpuError};
use crate::plan::{Cut, MAX_PIECE_KEYS, Piece, TILE_KEYS, split, visible_rows};
use crate::{AttentionConfig, BlockTables, CacheLayout, Mask, Problem, RowStrides};

/// How a plan is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanOptions {
    /// Keys of a work item, if fixed: a multiple of 16, at most 2²⁴. Then the split of a row, and so the bits of
    /// its output, depend on its length alone and not on the rest of the batch.
    pub item_keys: Option<u32>,
    /// Otherwise: about how many workgroups the GPU should have to choose from. WebGPU does not say how many it can
    /// run at once.
    pub workgroups: u32,
    /// Otherwise: keys of the smallest work item, at least 16.
    pub smallest: u32,
    /// Otherwise: keys of a work item from which on there are rather more workgroups, up to four times as many, so
    /// that the last ones to end are a small part of all.
    pub largest: u32,
    /// Query rows of a sequence from which on they are worked on in tiles (prefill), if that is not to be chosen.
    pub tiles_from: Option<usize>,
    /// Keys of a tile's work item, if fixed. Then the split of a tile, and so the bits of its rows, depend on its
    /// sequence alone and not on the rest of the batch.
    pub prefill_keys: Option<u32>,
    /// Which prefill kernel there is, and how it is tuned.
    pub prefill: PrefillChoice,
}

/// Which kernel works on tiles, and how it is tuned if otherwise than by default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PrefillChoice {
    /// On matrix units where the [`Context`] knows of some and they take the types and heads, else in registers.
    #[default]
    Fastest,
    /// In registers and workgroup memory, in f32.
    Tiled(Option<PrefillTuning>),
    /// On matrix units: probabilities are rounded to f16.
    Matrix(Option<MatrixTuning>),
}

/// Query rows of a sequence, times the query heads that share a KV head, from which on its rows are worked on in
/// tiles. Below that reading the keys once for each row is no slower than filling up a tile.
const TILES_FROM: usize = 16;

impl Default for PlanOptions {
    fn default() -> Self {
        Self {
            item_keys: None,
            workgroups: 512,
            smallest: 128,
            largest: 2048,
            tiles_from: None,
            prefill_keys: None,
            prefill: PrefillChoice::Fastest,
        }
    }
}

/// The largest step that buffers are made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepLimits {
    /// Query rows of a step.
    pub rows: usize,
    /// Keys that all of them see together.
    pub keys: usize,
    /// Entries of all block tables: `sequences * max_blocks`, or the length of CSR's `indices`.
    pub table_entries: usize,
    /// Words of all mask bits.
    pub mask_words: usize,
}

/// Bytes that no step within its [`StepLimits`] exceeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanBound {
    /// Of the plan's buffer.
    pub plan: u64,
    /// Of the workspace.
    pub workspace: u64,
}

/// The work of one step, the same for all layers of a model that share heads and layout.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionPlan {
    pub(super) config: AttentionConfig,
    pub(super) layout: CacheLayout,
    pub(super) q: RowStrides,
    pub(super) out: RowStrides,
    pub(super) rows: usize,
    pub(super) dispatch: Option<[u32; 3]>,
    pub(super) prefill: Option<PrefillLaunch>,
    pub(super) merge_dispatch: Option<[u32; 3]>,
    words: Vec<u32>,
    items: usize,
    partials: u32,
}

/// The prefill kernel of a plan, and how many workgroups of it.
#[derive(Clone, Debug)]
pub(super) struct PrefillLaunch {
    pub(super) pipeline: Arc<Pipeline<Prefill>>,
    pub(super) dispatch: [u32; 3],
}

impl PartialEq for PrefillLaunch {
    fn eq(&self, other: &Self) -> bool {
        let key = |launch: &Self| (launch.pipeline.descriptor.kernel(), launch.dispatch);
        key(self) == key(other)
    }
}

impl AttentionPlan {
    /// What the plan's buffer holds: to be written to its begin once a step.
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    /// Bytes of the plan.
    pub fn plan_bytes(&self) -> u64 {
        4 * self.words.len() as u64
    }

    /// Bytes of the workspace that it needs; one workspace serves all layers.
    pub fn workspace_bytes(&self) -> u64 {
        workspace_bytes(&self.config, self.partials.into())
    }

    /// Number of work items of both kernels.
    pub fn items(&self) -> usize {
        self.items
    }

    /// The variant of the prefill kernel, if some rows are worked on in tiles.
    pub fn prefill_variant(&self) -> Option<String> {
        self.prefill.as_ref().map(|prefill| prefill.pipeline.descriptor.kernel().name())
    }

    /// Number of query rows whose keys are split.
    pub fn merged_rows(&self) -> u32 {
        self.words.get(1).copied().unwrap_or(0)
    }
}

/// Bytes of so many partial results.
fn workspace_bytes(config: &AttentionConfig, partials: u64) -> u64 {
    partials * config.q_heads as u64 * (1 + config.head_dim_v.div_ceil(4)) as u64 * 16
}

impl Context {
    /// Plans a step, and builds the prefill pipeline when it is the first with rows for it. Sequences of few query rows
    /// are worked on row by row (decode), others in tiles (prefill).
    ///
    /// # Errors
    /// [`WgpuError`] for what no kernel variant does, sizes beyond 32 bits, or too many workgroups.
    pub fn plan_attention(
        &self,
        problem: &Problem<'_>,
        options: PlanOptions,
    ) -> Result<AttentionPlan, WgpuError> {
        let config = problem.config();
        let spec = self.usual_spec(config)?;
        let from = options.tiles_from.unwrap_or(TILES_FROM.div_ceil(config.group())).max(2);
        let tiled: Vec<usize> =
            (0..problem.num_sequences()).filter(|&index| problem.sequence(index).query_len >= from).collect();
        let rows = visible_rows(problem, |index| tiled.binary_search(&index).is_err())?;
        let tiles = tiles(config, spec);
        let keys: u64 = rows.iter().map(|keys| u64::from(keys.span())).sum();
        let longest = rows.iter().map(|keys| keys.span()).max().unwrap_or(0);
        let item_keys = options.checked_item_keys(keys, tiles, longest)?;
        let (pieces, partials) = split(&rows, tiles, Cut::Equal(item_keys))?;
        let prefill_kernel = self.prefill_kernel(config, options.prefill)?;
        let tiled = PrefillPart::new(problem, &tiled, prefill_kernel, options.pieces(), partials)?;
        let merges = pieces.iter().filter(|piece| piece.splits > 1 && piece.split == 0);
        let merges = merges.map(|piece| [piece.row, piece.first_partial, piece.splits, 0]);
        let mut merges: Vec<[u32; MERGE_WORDS]> = merges.chain(tiled.merges.iter().copied()).collect();
        // The first row tells the kernel of all.
        let few = merges.iter().all(|[_, _, splits, _]| *splits <= FEW_SPLITS);
        if let Some([.., of_all]) = merges.first_mut() {
            *of_all = u32::from(few);
        }

        let batch = problem.batch();
        let entries = match batch.block_tables {
            BlockTables::Padded { entries, max_blocks } => {
                entries.get(..problem.num_sequences() * max_blocks).unwrap_or(entries)
            }
            BlockTables::Csr { indices, .. } => indices,
        };
        let mask = batch.mask_bits.filter(|_| config.mask == Mask::Bits);
        let mask_words = mask.map_or(&[][..], |bits| bits.words);
        let merges_at = HEADER_WORDS + WorkItem::WORDS * pieces.len();
        let tiled_at = merges_at + MERGE_WORDS * merges.len();
        let ranges_at = tiled_at + PrefillItem::WORDS * tiled.items.len();
        let tables_at = ranges_at + PrefillItem::RANGE_WORDS * tiled.ranges.len();
        let mask_at = tables_at + entries.len();
        let total = word("the plan's length", mask_at + mask_words.len())?;
        let mut words = vec![
            word("the number of work items", pieces.len())?,
            word("the number of split rows", merges.len())?,
            word("the plan's length", tables_at)?,
            word("the plan's length", mask_at)?,
            word("row_words of the mask", mask.map_or(0, |bits| bits.row_words))?,
            word("the plan's length", merges_at)?,
            word("the number of work items", tiled.items.len())?,
            word("the plan's length", tiled_at)?,
        ];
        words.reserve_exact(total as usize - HEADER_WORDS);
        words.extend(pieces.iter().flat_map(|piece| work_item(piece).words()));
        words.extend(merges.iter().flatten());
        let first_range = word("the plan's length", ranges_at)?;
        words.extend(tiled.items.iter().flat_map(|item| {
            let ranges = first_range + item.ranges;
            PrefillItem { ranges, ..*item }.words()
        }));
        words.extend(tiled.ranges.iter().flatten());
        words.extend(entries.iter().map(|entry| entry.cast_unsigned()));
        words.extend(mask_words);

        let per_dimension = self.limits().max_compute_workgroups_per_dimension;
        let dispatch = |kernel, count: u64| match count {
            0 => Ok(None),
            _ => workgroups(kernel, count, per_dimension).map(Some),
        };
        let head_tiles = u64::from(prefill_kernel.head_tiles(word("the group", config.group())?));
        let tiled_workgroups = tiled.items.len() as u64 * config.kv_heads as u64 * head_tiles;
        let prefill = match dispatch("prefill", tiled_workgroups)? {
            Some(dispatch) => {
                let pipeline = self.prefill.get(
                    prefill_kernel,
                    self.builder(),
                    || Ok(Prefill::new(prefill_kernel)?),
                    Prefill::shader,
                )?;
                Some(PrefillLaunch { pipeline, dispatch })
            }
            None => None,
        };
        let merged_heads = merges.len() as u64 * config.q_heads as u64;
        let heads_at_once = match few {
            true => u64::from(merge_heads(word("head_dim_v", config.head_dim_v)?)),
            false => 1,
        };
        Ok(AttentionPlan {
            config: config.clone(),
            layout: *problem.layout(),
            q: problem.q_strides(),
            out: problem.out_strides(),
            rows: problem.total_queries(),
            dispatch: dispatch("decode", pieces.len() as u64 * tiles)?,
            prefill,
            merge_dispatch: dispatch("decode_merge", merged_heads.div_ceil(heads_at_once))?,
            items: pieces.len() + tiled.items.len(),
            words,
            partials: tiled.partials,
        })
    }

    /// What no plan of a step within `limits` exceeds.
    ///
    /// # Errors
    /// As [`Context::plan_attention`].
    pub fn attention_bound(
        &self,
        config: &AttentionConfig,
        limits: StepLimits,
        options: PlanOptions,
    ) -> Result<PlanBound, WgpuError> {
        config.validate()?;
        let tiles = tiles(config, self.usual_spec(config)?);
        let rows = limits.rows as u64;
        // A row that begins within a tile spans up to 15 keys more.
        let span = limits.keys as u64 + rows * u64::from(TILE_KEYS - 1);
        let pieces = match options.item_keys {
            Some(keys) => span / u64::from(keys.max(1)),
            None => (span / options.smallest()).min(MORE * u64::from(options.workgroups).div_ceil(tiles)),
        };
        // A row is worked on by itself or in a tile, whose items and ranges take more words.
        let spec = self.prefill_kernel(config, options.prefill)?;
        let tiled = most_pieces(config, spec, rows, limits.keys as u64, options.pieces());
        let of_row = WorkItem::WORDS.max(PrefillItem::WORDS + PrefillItem::RANGE_WORDS) + MERGE_WORDS;
        let words = HEADER_WORDS as u64
            + rows * of_row as u64
            + pieces * WorkItem::WORDS as u64
            + tiled * PrefillItem::WORDS as u64
            + (limits.table_entries + limits.mask_words) as u64;
        Ok(PlanBound { plan: 4 * words, workspace: workspace_bytes(config, rows + pieces + tiled) })
    }
}

/// How many times as many workgroups there are where work items would be too large.
const MORE: u64 = 4;

impl PlanOptions {
    /// How tiles are split.
    fn pieces(&self) -> Pieces {
        Pieces { keys: self.prefill_keys, workgroups: self.workgroups }
    }

    fn smallest(&self) -> u64 {
        u64::from(self.smallest.clamp(TILE_KEYS, MAX_PIECE_KEYS).next_multiple_of(TILE_KEYS))
    }

    /// Keys of an item, for rows with `keys` keys in all.
    fn checked_item_keys(&self, keys: u64, tiles: u64, longest: u32) -> Result<u32, WgpuError> {
        let tile = u64::from(TILE_KEYS);
        let most = u64::from(MAX_PIECE_KEYS);
        if let Some(keys) = self.item_keys {
            let allowed = keys % TILE_KEYS == 0 && (TILE_KEYS..=MAX_PIECE_KEYS).contains(&keys);
            let splits = longest.div_ceil(keys.max(1));
            if !allowed {
                return Err(WgpuError::ItemKeys {
                    keys,
                    reason: "it must be a multiple of 16, from 16 to 2^24",
                });
            }
            if splits > MAX_SPLITS {
                return Err(WgpuError::ItemKeys { keys, reason: "a row would have more than 1024 splits" });
            }
            return Ok(keys);
        }
        let work = keys * tiles;
        let workgroups = u64::from(self.workgroups.max(1));
        let many = work.div_ceil(MORE * workgroups);
        let share = work.div_ceil(workgroups).min(many.max(u64::from(self.largest)));
        let fewest = u64::from(longest.div_ceil(MAX_SPLITS - 1));
        Ok(share.max(self.smallest()).max(fewest).next_multiple_of(tile).min(most) as u32)
    }
}

/// Workgroups that share an item for its different heads.
fn tiles(config: &AttentionConfig, spec: DecodeSpec) -> u64 {
    config.kv_heads as u64 * (config.group() as u64).div_ceil(spec.queries.into())
}

fn work_item(piece: &Piece) -> WorkItem {
    let Piece { table, row, begin, end, split, splits, first_partial, position } = *piece;
    WorkItem { table, row, begin, end, split, splits, first_partial, position }
}

fn word(field: &'static str, value: usize) -> Result<u32, WgpuError> {
    let too_large = pagewise_shaders::Error::TooLarge { kernel: "decode", field, value: value as u64 };
    u32::try_from(value).map_err(|_| too_large.into())
}
