//! The prefill part of a step: which rows and keys go to which work item.
//!
//! Owns how sequences are cut into tiles, tiles into items, and how items are dealt to thread blocks. Pure host
//! arithmetic; the launch is `prefill.rs`'s, the kernels that consume the items [`pagewise_ptx::prefill`]'s.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use pagewise_ptx::decode::WorkspaceSizes;
use pagewise_ptx::prefill::{Form, MergeItem, NO_PARTIAL, PrefillItem, PrefillMerge, PrefillSpec};

use super::decode::ptx_type;
use super::plan::small;
use super::{CudaError, Device};
use crate::plan::first_entry;
use crate::{Mask, Problem};

/// What starting and ending an item takes, in tiles of keys.
const START: u64 = 2;

/// The smallest blocks whose rows fill a box of the copy engine as it likes them.
const HOPPER_BLOCK: usize = 16;

/// What the merge of split tiles takes, in the same.
const MERGE: u64 = 3;

/// The most thread blocks that a simulated schedule is worth its time for.
const MOST_SIMULATED: usize = 4096;

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
    /// Hopper form knows no bits: where it is not asked for, the large one stands in.
    pub(super) fn spec(problem: &Problem<'_>, device: &Device, form: Option<Form>) -> Option<PrefillSpec> {
        let (config, block_size) = (problem.config(), problem.layout().block_size);
        let room = u32::try_from(config.head_dim_qk.max(config.head_dim_v)).ok()?;
        let same = config.q_dtype == config.kv_dtype;
        let whole = config.head_dim_qk.is_multiple_of(8) && config.head_dim_v.is_multiple_of(8);
        if !(same && whole) {
            return None;
        }
        let bits = config.mask == Mask::Bits;
        let spec = |form| PrefillSpec::for_head(ptx_type(config.q_dtype), room, form, bits);
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

/// The most tiles of keys of an item: all, or fewer where that ends sooner although results must be merged.
fn piece(tiles: &[Tile], heads: u64, slots: u64) -> u64 {
    let longest = tiles.first().map_or(0, |tile| tile.keys);
    let total: u64 = tiles.iter().map(|tile| (tile.keys + START) * heads).sum();
    let share = total.div_ceil(slots);
    let whole = makespan(tiles, heads, slots, longest).unwrap_or(share + longest / 2);
    // Pieces of a share, of half a share and so on: the first that is not worth less than the next.
    let mut best = (whole, longest);
    for parts in [1, 2, 3, 4] {
        let piece = share.div_ceil(parts).max(4);
        if piece >= longest {
            continue;
        }
        if let Some(time) = makespan(tiles, heads, slots, piece)
            && time + MERGE < best.0
        {
            best = (time + MERGE, piece);
        }
    }
    best.1
}

/// Deals items, the longest first, to thread blocks so that all have about equally much to do: in rounds, those that
/// come too short last filled up with items without work.
fn deal(items: &[PrefillItem], blocks: usize, tile_keys: u32) -> Vec<PrefillItem> {
    let mut least: BinaryHeap<Reverse<(u64, usize)>> = (0..blocks).map(|block| Reverse((0, block))).collect();
    let mut hands = vec![Vec::new(); blocks];
    for item in items {
        let Some(Reverse((busy, block))) = least.pop() else { break };
        let tiles = u64::from(item.end.div_ceil(tile_keys) - (item.begin / tile_keys).min(item.end));
        least.push(Reverse((busy + tiles + START, block)));
        if let Some(hand) = hands.get_mut(block) {
            hand.push(*item);
        }
    }
    let rounds = hands.iter().map(Vec::len).max().unwrap_or(0);
    let round = |number: usize| hands.iter().map(move |hand| hand.get(number).copied().unwrap_or_default());
    (0..rounds).flat_map(round).collect()
}

/// When the last of the slots is done, if each takes the longest item that is left; `None` where there are so many
/// that it does not matter.
fn makespan(tiles: &[Tile], heads: u64, slots: u64, piece: u64) -> Option<u64> {
    let mut lengths = Vec::new();
    for tile in tiles {
        let splits = tile.keys.div_ceil(piece.max(1)).max(1);
        let count = splits.saturating_mul(heads) as usize;
        if lengths.len() + count > MOST_SIMULATED {
            return None;
        }
        lengths.resize(lengths.len() + count, tile.keys.div_ceil(splits) + START);
    }
    lengths.sort_unstable_by_key(|&length| Reverse(length));
    let mut busy: BinaryHeap<Reverse<u64>> = (0..slots).map(|_| Reverse(0)).collect();
    let mut last = 0;
    for length in lengths {
        let Reverse(free) = busy.pop()?;
        last = last.max(free + length);
        busy.push(Reverse(free + length));
    }
    Some(last)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;
    use crate::cuda::{CudaVersion, device::ComputeCapability};
    use crate::{AttentionConfig, CacheLayout, DType, MaskBits, PagedBatch};

    /// An H100.
    fn device() -> Device {
        Device {
            ordinal: 0,
            name: String::new(),
            compute_capability: ComputeCapability { major: 9, minor: 0 },
            memory: 80 << 30,
            multiprocessors: 132,
            shared_memory_per_block: 232_448,
            driver: CudaVersion { major: 13, minor: 0 },
        }
    }

    proptest! {
        #[test]
        fn every_row_sees_every_key_that_it_may_exactly_once(
            shapes in prop::collection::vec((0..300usize, 0..3000usize), 1..6),
            (kv_heads, group) in (1..4usize, prop::sample::select(vec![1usize, 3, 4, 8, 20])),
            window in prop::option::of(1..400usize),
            form in prop::sample::select(Form::ALL.to_vec()),
            prefill_keys in prop::option::of(1..1000u32),
        ) {
            let mut config = AttentionConfig::new(kv_heads * group, kv_heads, 128, DType::Bf16);
            config.mask = window.map_or(Mask::Causal, |size| Mask::Window { size });
            let lens: Vec<i32> = shapes.iter().map(|(queries, before)| (queries + before) as i32).collect();
            let mut query_start = vec![0];
            for (queries, _) in &shapes {
                query_start.push(query_start.last().unwrap() + *queries as i32);
            }
            let max_blocks = 300;
            let entries: Vec<i32> = (0..(shapes.len() * max_blocks) as i32).collect();
            let layout = CacheLayout::nhd(entries.len(), 16, &config);
            let batch = PagedBatch::padded(&query_start, &lens, &entries, max_blocks);
            let problem = Problem::new(&config, layout, batch).unwrap();
            let spec = PrefillPart::spec(&problem, &device(), Some(form)).unwrap();
            let sequences: Vec<usize> = (0..shapes.len()).collect();
            let part = PrefillPart::new(&problem, &sequences, spec, &device(), prefill_keys).unwrap();

            // Keys of each tile and head, by the tile's first row of the output and its row.
            let mut seen: HashMap<(u32, u32, u32), Vec<(u32, u32)>> = HashMap::new();
            let mut partials = vec![0; part.partials as usize];
            for item in part.items.iter().filter(|item| item.rows > 0) {
                prop_assert!(item.rows <= spec.tile_rows());
                seen.entry((item.row, item.first, item.head)).or_default().push((item.begin, item.end));
                if item.partial != NO_PARTIAL {
                    partials[item.partial as usize] += 1;
                }
            }
            prop_assert!(partials.iter().all(|&count| count == 1));
            let merged: u32 = part.merges.iter().map(|merge| merge.splits).sum();
            prop_assert_eq!(merged, part.partials);
            for (index, (queries, _)) in shapes.iter().enumerate() {
                let sequence = problem.sequence(index);
                for head in 0..kv_heads as u32 {
                    for first in (0..(queries * group) as u32).step_by(spec.tile_rows() as usize) {
                        let mut pieces = seen.remove(&(query_start[index] as u32, first, head)).unwrap();
                        pieces.sort_unstable();
                        let rows = spec.tile_rows().min((queries * group) as u32 - first);
                        let (from, to) = (first as usize / group, (first + rows - 1) as usize / group);
                        let begin = batch.visible(config.mask, &sequence, from).start as u32;
                        let end = batch.visible(config.mask, &sequence, to).end as u32;
                        prop_assert_eq!(pieces.first().unwrap().0, begin.min(end));
                        prop_assert_eq!(pieces.last().unwrap().1, end);
                        for pair in pieces.windows(2) {
                            prop_assert_eq!(pair[0].1, pair[1].0);
                            // No tile of keys is worked on twice.
                            prop_assert_eq!(pair[0].1 % spec.tile_keys(), 0);
                        }
                    }
                }
            }
            prop_assert!(seen.is_empty(), "items of no row: {seen:?}");
        }
    }

    proptest! {
        #[test]
        fn bits_narrow_a_tile_to_the_keys_that_its_rows_see(
            (queries, before) in (1..200usize, 0..1500usize),
            group in prop::sample::select(vec![1usize, 3, 4, 20]),
            form in prop::sample::select(vec![Form::Large, Form::Small]),
            prefill_keys in prop::option::of(1..500u32),
            // Keys that rows see are of the first stretch, counted in words; garbage follows the last key.
            (first, words) in (0..20usize, prop::collection::vec(any::<u32>(), 1..7)),
            blind in 1..5usize,
        ) {
            let mut config = AttentionConfig::new(2 * group, 2, 128, DType::Bf16);
            config.mask = Mask::Bits;
            let len = queries + before;
            let row_words = len.div_ceil(32) + 1;
            let mut bits = vec![0u32; queries * row_words];
            for (row, place) in bits.chunks_exact_mut(row_words).enumerate() {
                if row % blind == 0 {
                    place.iter_mut().skip(first).zip(&words).for_each(|(to, from)| *to = from.rotate_left(row as u32));
                }
                place[row_words - 1] = u32::MAX;
            }
            let (query_start, lens) = ([0, queries as i32], [len as i32]);
            let entries: Vec<i32> = (0..len.div_ceil(16) as i32).collect();
            let layout = CacheLayout::nhd(entries.len(), 16, &config);
            let mut batch = PagedBatch::padded(&query_start, &lens, &entries, entries.len());
            let bits = MaskBits { words: &bits, row_words };
            batch.mask_bits = Some(bits);
            let problem = Problem::new(&config, layout, batch).unwrap();
            prop_assert!(PrefillPart::spec(&problem, &device(), Some(Form::Hopper)).is_none());
            prop_assert_eq!(PrefillPart::spec(&problem, &device(), None).unwrap().form, Form::Large);
            let spec = PrefillPart::spec(&problem, &device(), Some(form)).unwrap();
            prop_assert!(spec.bits);
            let part = PrefillPart::new(&problem, &[0], spec, &device(), prefill_keys).unwrap();
            prop_assert_eq!(part.mask_words as usize, row_words);
            for query in 0..queries {
                let seen: Vec<usize> = (0..len).filter(|&key| bits.sees(query, key)).collect();
                let (begin, end) = seen.first().map_or((0, 0), |first| (*first, seen[seen.len() - 1] + 1));
                prop_assert_eq!(part.ranges[query], [begin as i32, end as i32, (before + query) as i32, 0]);
            }
            for item in &part.items {
                let rows = item.first as usize / group..=(item.first + item.rows - 1) as usize / group;
                let seen = |key: u32| rows.clone().any(|query| bits.sees(query, key as usize));
                // All items of the tile together hold every key that a row sees, and begin and end with one.
                let same = part.items.iter().filter(|other| (other.first, other.head) == (item.first, item.head));
                let begin = same.clone().map(|item| item.begin).min().unwrap();
                let end = same.map(|item| item.end).max().unwrap();
                prop_assert!(end as usize <= len);
                prop_assert!((0..begin).chain(end..len as u32).all(|key| !seen(key)));
                prop_assert!(begin == end || (seen(begin) && seen(end - 1)));
            }
        }
    }

    #[test]
    fn few_long_tiles_are_split_and_many_equal_ones_are_not() {
        let tiles = |count: usize, keys| -> Vec<Tile> {
            (0..count).map(|_| Tile { item: PrefillItem::default(), keys }).collect()
        };
        assert!(piece(&tiles(4, 64), 8, 132) < 64);
        assert_eq!(piece(&tiles(64, 68), 8, 132), 68);
        assert_eq!(piece(&[], 8, 132), 0);
    }

    #[test]
    fn dealing_is_about_equal_and_loses_nothing() {
        let items: Vec<PrefillItem> = (0..1000)
            .rev()
            .map(|i| PrefillItem { rows: 1, end: 128 * (i / 8 + 1), ..PrefillItem::default() })
            .collect();
        let dealt = deal(&items, 132, 128);
        assert_eq!(dealt.len() % 132, 0);
        assert_eq!(dealt.iter().filter(|item| item.rows > 0).count(), 1000);
        let load =
            |block: usize| -> u32 { dealt.iter().skip(block).step_by(132).map(|item| item.end / 128).sum() };
        let (least, most) = (0..132).map(load).fold((u32::MAX, 0), |(l, m), x| (l.min(x), m.max(x)));
        assert!(most - least <= 8, "from {least} to {most}");
    }
}
