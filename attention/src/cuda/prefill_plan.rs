//! The prefill part of a step: which rows and keys go to which work item.
//!
//! Owns how sequences are cut into tiles and tiles into items; how long those are, and who works on them, is
//! `schedule`'s. Pure host arithmetic; the launch is `prefill.rs`'s, the kernels that consume the items
//! [`pagewise_ptx::prefill`]'s.

mod schedule;
#[cfg(test)]
mod tests;

use std::cmp::Reverse;

use pagewise_ptx::decode::WorkspaceSizes;
use pagewise_ptx::prefill::{Form, MergeItem, NO_PARTIAL, PrefillItem, PrefillMerge, PrefillSpec};
use schedule::{deal, piece};

use super::decode::ptx_type;
use super::plan::small;
use super::{CudaError, Device};
use crate::plan::first_entry;
use crate::{Mask, Problem};

/// The smallest blocks whose rows fill a box of the copy engine as it likes them.
const HOPPER_BLOCK: usize = 16;

/// The prefill part of a step: tiles of the rows of some of its sequences.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct PrefillPart {
    pub(super) spec: PrefillSpec,
    pub(super) group: u32,
    /// For the Hopper form in rounds: one for each thread block of `grid`, then the next of each, and so on.
    pub(super) items: Vec<PrefillItem>,
    /// Thread blocks of the Hopper form.
    pub(super) grid: u32,
    pub(super) merges: Vec<MergeItem>,
    /// First key that a query row sees, end, position, 0.
    ranges: Vec<[i32; 4]>,
    /// Words of a row of the mask's bits.
    pub(super) mask_words: u32,
    partials: u32,
}

/// A tile of rows of one sequence, for every KV head.
struct Tile {
    item: PrefillItem,
    /// Tiles of keys.
    keys: u64,
}

impl PrefillPart {
    /// The variant for a configuration, or `None` where prefill has none, and decode takes the rows one by one. The
    /// Hopper form knows neither bits nor fp8 caches: where it is not asked for, the large one stands in. fp8 caches are
    /// for GPUs and drivers that convert them.
    pub(super) fn spec(problem: &Problem<'_>, device: &Device, form: Option<Form>) -> Option<PrefillSpec> {
        let (config, block_size) = (problem.config(), problem.layout().block_size);
        let room = u32::try_from(config.head_dim_qk.max(config.head_dim_v)).ok()?;
        let fp8 = config.kv_dtype.is_fp8();
        let readable = if fp8 { device.converts_fp8() } else { config.q_dtype == config.kv_dtype };
        let whole = config.head_dim_qk.is_multiple_of(8) && config.head_dim_v.is_multiple_of(8);
        if !(readable && whole) {
            return None;
        }
        let bits = config.mask == Mask::Bits;
        let (dtype, kv_dtype) = (ptx_type(config.q_dtype), ptx_type(config.kv_dtype));
        let spec = |form| PrefillSpec::for_head(dtype, kv_dtype, room, form, bits);
        let form = match form {
            // The large form has no variant for both.
            None | Some(Form::Large) if bits && fp8 => Some(Form::Small),
            form => form,
        };
        match form {
            Some(Form::Hopper) if block_size < HOPPER_BLOCK => None,
            Some(form) => spec(form),
            None => match device.prefill_form() {
                Form::Hopper if block_size >= HOPPER_BLOCK => {
                    spec(Form::Hopper).or_else(|| spec(Form::Large))
                }
                Form::Hopper => spec(Form::Large),
                form => spec(form),
            },
        }
    }

    /// Whether every tile of a sequence sees one interval of keys, as the kernel takes it: always, unless queries with
    /// a window stand at positions of their own.
    pub(super) fn takes(problem: &Problem<'_>, spec: PrefillSpec, index: usize) -> bool {
        let batch = problem.batch();
        if batch.query_positions.is_none() || !matches!(problem.config().mask, Mask::Window { .. }) {
            return true;
        }
        let sequence = problem.sequence(index);
        let group = problem.config().group();
        let tile = spec.tile_rows() as usize;
        (0..(sequence.query_len * group).div_ceil(tile)).all(|number| {
            let (first, end) = (number * tile, ((number + 1) * tile).min(sequence.query_len * group));
            let mut ranges: Vec<_> = (first / group..=(end - 1) / group)
                .map(|query| batch.visible(problem.config().mask, &sequence, query))
                .filter(|range| !range.is_empty())
                .collect();
            ranges.sort_unstable_by_key(|range| range.start);
            let mut reached = ranges.first().map_or(0, |range| range.start);
            ranges.iter().all(|range| {
                let connected = range.start <= reached;
                reached = reached.max(range.end);
                connected
            })
        })
    }

    /// Cuts the sequences that are asked for into tiles and items.
    pub(super) fn new(
        problem: &Problem<'_>,
        sequences: &[usize],
        spec: PrefillSpec,
        device: &Device,
        item_keys: Option<u32>,
    ) -> Result<Self, CudaError> {
        let config = problem.config();
        let group = small("the group", config.group())?;
        let kv_heads = small("kv_heads", config.kv_heads)?;
        let mut ranges = vec![[0; 4]; problem.total_queries()];
        let mut tiles = Vec::new();
        for &index in sequences {
            see(problem, index, &mut ranges)?;
            tile_sequence(problem, index, spec, group, &ranges, &mut tiles)?;
        }
        // The longest first, heads of one tile side by side.
        tiles.sort_by_key(|tile| Reverse(tile.keys));
        let blocks =
            u64::from(spec.blocks_per_multiprocessor().min(device.blocks_that_fit(spec.shared_bytes())));
        let slots = u64::from(device.multiprocessors.max(1)) * blocks.max(1);
        let piece = match item_keys {
            Some(keys) => u64::from(keys.div_ceil(spec.tile_keys()).max(1)),
            None => piece(&tiles, u64::from(kv_heads), slots),
        };
        let mask_words = problem.batch().mask_bits.map_or(0, |bits| bits.row_words);
        let mut part = Self {
            spec,
            group,
            items: Vec::new(),
            grid: 0,
            merges: Vec::new(),
            ranges,
            mask_words: small("row_words of the mask", mask_words)?,
            partials: 0,
        };
        for tile in &tiles {
            for head in 0..kv_heads {
                part.add(tile, head, piece)?;
            }
        }
        if part.partials > 0 {
            part.items.sort_by_key(|item| Reverse(item.end - item.begin));
        }
        part.grid = small("the number of work items", part.items.len())?;
        if spec.form == Form::Hopper {
            part.grid = part.grid.min(device.multiprocessors.max(1));
            part.items = deal(&part.items, part.grid as usize, spec.tile_keys());
        }
        Ok(part)
    }

    /// Adds a tile for one head: as one item, or as several of about equal length with a merge.
    fn add(&mut self, tile: &Tile, head: u32, piece: u64) -> Result<(), CudaError> {
        let item = PrefillItem { head, ..tile.item };
        let splits = tile.keys.div_ceil(piece.max(1)).max(1);
        if splits == 1 {
            self.items.push(item);
            return Ok(());
        }
        let too_many = CudaError::TooLarge {
            what: "the number of splits",
            value: u64::from(self.partials) + splits,
            max: u64::from(u32::MAX / self.spec.tile_rows()),
        };
        let first_partial = self.partials;
        let keys = u64::from(self.spec.tile_keys());
        let base = u64::from(item.begin) / keys;
        for split in 0..splits {
            // In whole tiles of keys, so that no tile is worked on twice.
            let at = |split: u64| ((base + tile.keys * split / splits) * keys) as u32;
            self.items.push(PrefillItem {
                begin: at(split).max(item.begin),
                end: if split + 1 == splits { item.end } else { at(split + 1) },
                partial: first_partial + split as u32,
                ..item
            });
        }
        self.partials = u32::try_from(u64::from(first_partial) + splits)
            .ok()
            .filter(|&partials| partials <= u32::MAX / self.spec.tile_rows())
            .ok_or(too_many)?;
        let PrefillItem { row, first, rows, .. } = item;
        let splits = splits as u32;
        self.merges.push(MergeItem { row, first, rows, head, first_partial, splits });
        Ok(())
    }

    /// The kernel variant: `prefill_bf16_d128`.
    pub(super) fn variant(&self) -> String {
        self.spec.entry()
    }

    /// That of the merge, if anything is split.
    pub(super) fn merge_variant(&self) -> Option<String> {
        let entry = || PrefillMerge::entry(self.spec);
        (!self.merges.is_empty()).then(entry)
    }

    /// Words of [`PrefillPart::add_work`].
    pub(super) fn work_words(&self) -> u64 {
        (self.items.len() * PrefillItem::WORDS + self.merges.len() * MergeItem::WORDS + self.ranges.len() * 4)
            as u64
    }

    /// Puts items, merges and ranges behind other work.
    pub(super) fn add_work(&self, words: &mut Vec<u32>) {
        words.extend(self.items.iter().flat_map(PrefillItem::words));
        words.extend(self.merges.iter().flat_map(MergeItem::words));
        words.extend(self.ranges.iter().flatten().map(|word| word.cast_unsigned()));
    }

    /// Bytes of workspace that a run needs.
    pub(super) fn workspace(&self) -> WorkspaceSizes {
        let rows = u64::from(self.partials) * u64::from(self.spec.tile_rows());
        WorkspaceSizes {
            partial_out: rows * u64::from(self.spec.head_dim) * 4,
            partial_max: rows * 8,
            tickets: 0,
        }
    }
}

/// Notes what every query row of a sequence sees.
fn see(problem: &Problem<'_>, index: usize, ranges: &mut [[i32; 4]]) -> Result<(), CudaError> {
    let (batch, sequence) = (problem.batch(), problem.sequence(index));
    let rows = ranges.get_mut(sequence.query_start..).unwrap_or_default();
    for (query, range) in rows.iter_mut().take(sequence.query_len).enumerate() {
        let keys = batch.visible(problem.config().mask, &sequence, query);
        let keys = match batch.mask_bits {
            Some(bits) => bits.seen_within(sequence.query_start + query, keys),
            None => keys,
        };
        let position = batch.position(&sequence, query);
        *range = [
            small("a sequence's length", keys.start)?.cast_signed(),
            small("a sequence's length", keys.end)?.cast_signed(),
            position.clamp(i64::from(i32::MIN), i64::from(i32::MAX)) as i32,
            0,
        ];
    }
    Ok(())
}

/// Cuts a sequence's rows into tiles.
fn tile_sequence(
    problem: &Problem<'_>,
    index: usize,
    spec: PrefillSpec,
    group: u32,
    ranges: &[[i32; 4]],
    tiles: &mut Vec<Tile>,
) -> Result<(), CudaError> {
    let sequence = problem.sequence(index);
    let table = small("the block tables' length", first_entry(problem, index))?;
    let row = small("the number of query rows", sequence.query_start)?;
    let total = small("the rows of a sequence", sequence.query_len * group as usize)?;
    for first in (0..total).step_by(spec.tile_rows() as usize) {
        let rows = spec.tile_rows().min(total - first);
        let queries = (row + first / group) as usize..=(row + (first + rows - 1) / group) as usize;
        // All keys that a row sees, and those that all rows see.
        let (mut begin, mut end, mut plain_begin, mut plain_end) = (u32::MAX, 0, 0, u32::MAX);
        for &[from, to, ..] in ranges.get(queries).unwrap_or_default() {
            let (from, to) = (from.cast_unsigned(), to.cast_unsigned());
            if from < to {
                (begin, end) = (begin.min(from), end.max(to));
            }
            (plain_begin, plain_end) = (plain_begin.max(from), plain_end.min(to));
        }
        let begin = begin.min(end);
        let keys = u64::from(end.div_ceil(spec.tile_keys()) - begin / spec.tile_keys());
        let partial = NO_PARTIAL;
        let item =
            PrefillItem { table, row, first, rows, begin, end, plain_begin, plain_end, head: 0, partial };
        tiles.push(Tile { item, keys: if begin < end { keys } else { 0 } });
    }
    Ok(())
}
