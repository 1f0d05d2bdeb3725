//! Which keys go to which thread block: splits the sequences of a decode step into work items of about equal size.
//!
//! Pure host arithmetic: no device, no allocation there. The kernel that consumes the items is
//! [`pagewise_ptx::decode`]'s.

use pagewise_ptx::decode::{
    BLOCKS_PER_MULTIPROCESSOR, Decode, DecodeShape, DecodeSpec, MAX_ITEM_KEYS, ROUND_KEYS, TILE_KEYS,
    WorkItem, WorkspaceSizes,
};

use super::decode::ptx_type;
use super::{CudaError, Device};
use crate::{AttentionConfig, BlockTables, CacheLayout, Mask, Problem, RowStrides};

/// How a plan is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PlanOptions {
    /// Keys of a work item, if fixed: a multiple of 16 from 16 to 2048. Then the split of a sequence, and so the
    /// bits of its output, depend on its length alone and not on the rest of the batch.
    pub item_keys: Option<u32>,
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
    pub(super) table_stride: u32,
    items: Vec<WorkItem>,
    partials: u32,
    sequences: u32,
}

impl DecodePlan {
    /// Plans a step in which each sequence has at most one query row.
    ///
    /// # Errors
    /// [`CudaError::Unsupported`] for what the decode kernel does not do, [`CudaError::TooLarge`] beyond its
    /// 32-bit sizes.
    pub fn new(problem: &Problem<'_>, device: &Device, options: PlanOptions) -> Result<Self, CudaError> {
        let (config, layout) = (problem.config(), *problem.layout());
        let spec = supported(config, &layout)?;
        let BlockTables::Padded { max_blocks, .. } = problem.batch().block_tables else {
            return Err(unsupported("CSR block tables", "pass padded ones"));
        };
        if let Some(keys) = options.item_keys
            && (keys == 0 || keys > MAX_ITEM_KEYS || keys % TILE_KEYS != 0)
        {
            let what = format!("item_keys = {keys}");
            return Err(unsupported(&what, "it must be a multiple of 16 from 16 to 2048"));
        }
        let mut sequences = Vec::with_capacity(problem.num_sequences());
        for index in 0..problem.num_sequences() {
            let sequence = problem.sequence(index);
            match sequence.query_len {
                0 => continue,
                1 => {}
                _ => return Err(unsupported("several query rows of one sequence", "use the prefill kernel")),
            }
            let keys = problem.batch().visible(config.mask, &sequence, 0);
            sequences.push(Keys {
                sequence: small("the number of sequences", index)?,
                row: small("the number of query rows", sequence.query_start)?,
                begin: small("a sequence's length", keys.start)?,
                end: small("a sequence's length", keys.end)?,
            });
        }
        let shape = DecodeShape {
            items: 0,
            kv_heads: small("kv_heads", config.kv_heads)?,
            group: small("the group", config.group())?,
        };
        let blocks_per_item = u64::from(shape.kv_heads) * u64::from(shape.query_tiles());
        let item_keys = options.item_keys.unwrap_or_else(|| {
            let slots = u64::from(device.multiprocessors.max(1)) * u64::from(BLOCKS_PER_MULTIPROCESSOR);
            choose_item_keys(&sequences, blocks_per_item, slots)
        });
        let (items, partials) = split(&sequences, item_keys)?;
        Ok(Self {
            config: config.clone(),
            layout,
            q: problem.q_strides(),
            out: problem.out_strides(),
            spec,
            shape: DecodeShape { items: small("the number of work items", items.len())?, ..shape },
            table_stride: small("max_blocks", max_blocks)?,
            items,
            partials,
            sequences: small("the number of sequences", problem.num_sequences())?,
        })
    }

    /// The kernel variant: `decode_bf16_d128`.
    pub fn variant(&self) -> String {
        self.spec.entry()
    }

    /// The work items.
    pub fn items(&self) -> &[WorkItem] {
        &self.items
    }

    /// The work items as the kernel reads them: to be copied to the device as they are.
    pub fn work(&self) -> Vec<u32> {
        self.items.iter().flat_map(WorkItem::words).collect()
    }

    /// Bytes of the workspace that a run of this plan needs.
    ///
    /// # Errors
    /// As rendering the kernel, which cannot fail for a plan that exists.
    pub fn workspace(&self) -> Result<WorkspaceSizes, CudaError> {
        Ok(Decode::new(self.spec)?.workspace(self.partials, self.sequences, self.shape))
    }
}

/// The keys that one query row sees.
#[derive(Clone, Copy, Debug)]
struct Keys {
    sequence: u32,
    row: u32,
    begin: u32,
    end: u32,
}

impl Keys {
    /// Keys from the first tile's begin on.
    fn span(&self) -> u32 {
        (self.end - self.begin.min(self.end)).saturating_add(self.begin % TILE_KEYS)
    }
}

/// Keys of an item such that the thread blocks fill the GPU once when there is little to do, and about eight
/// times when there is much, so that the last ones to finish leave it idle for a short time only.
fn choose_item_keys(sequences: &[Keys], blocks_per_item: u64, slots: u64) -> u32 {
    let total: u64 = sequences.iter().map(|keys| u64::from(keys.span())).sum::<u64>() * blocks_per_item;
    let per_slot = total.div_ceil(slots);
    let keys = if per_slot <= 512 { per_slot } else { (per_slot / 8).max(512) };
    // A sequence's partial results are merged by one thread block, so there should not be too many.
    let longest = sequences.iter().map(Keys::span).max().unwrap_or(0);
    let keys = keys.max(u64::from(longest) / 128).clamp(u64::from(ROUND_KEYS), u64::from(MAX_ITEM_KEYS));
    (keys as u32).next_multiple_of(ROUND_KEYS).min(MAX_ITEM_KEYS)
}

/// Cuts every sequence into pieces of at most `item_keys`, as equal as tiles allow; the largest come first.
/// Gives the items and the number of partial results.
fn split(sequences: &[Keys], item_keys: u32) -> Result<(Vec<WorkItem>, u32), CudaError> {
    let mut items = Vec::with_capacity(sequences.len());
    let mut partials = 0u32;
    for keys in sequences {
        let splits = keys.span().div_ceil(item_keys).max(1);
        let each = keys.span().div_ceil(splits).next_multiple_of(TILE_KEYS).max(TILE_KEYS);
        // Rounding to tiles may leave fewer pieces than planned.
        let splits = keys.span().div_ceil(each).max(1);
        let first_tile = keys.begin - keys.begin % TILE_KEYS;
        let first_partial = partials;
        if splits > 1 {
            partials = partials.checked_add(splits).ok_or(CudaError::TooLarge {
                what: "the number of splits",
                value: u64::from(partials) + u64::from(splits),
                max: u64::from(u32::MAX),
            })?;
        }
        items.extend((0..splits).map(|split| WorkItem {
            sequence: keys.sequence,
            row: keys.row,
            begin: keys.begin.max(first_tile + split * each),
            end: keys.end.min(first_tile.saturating_add((split + 1).saturating_mul(each))),
            split,
            splits,
            first_partial,
        }));
    }
    items.sort_by_key(|item| std::cmp::Reverse(item.end.saturating_sub(item.begin)));
    Ok((items, partials))
}

/// The variant for a configuration, or why there is none.
fn supported(config: &AttentionConfig, layout: &CacheLayout) -> Result<DecodeSpec, CudaError> {
    let AttentionConfig { head_dim_qk, head_dim_v, q_dtype, kv_dtype, mask, .. } = *config;
    if q_dtype != kv_dtype {
        return Err(unsupported(
            &format!("{q_dtype} queries over a {kv_dtype} cache"),
            "use one type for both",
        ));
    }
    if head_dim_qk != head_dim_v {
        return Err(unsupported("head_dim_qk other than head_dim_v", "use another backend"));
    }
    if mask == Mask::Bits {
        return Err(unsupported("a bit mask", "use another backend"));
    }
    for (asked, what) in [
        (config.softcap.is_some(), "a soft cap"),
        (config.alibi, "ALiBi"),
        (config.sinks, "attention sinks"),
        (layout.block_size < TILE_KEYS as usize, "blocks of fewer than 16 tokens"),
    ] {
        if asked {
            return Err(unsupported(what, "use another backend"));
        }
    }
    let spec = DecodeSpec { dtype: ptx_type(q_dtype), head_dim: small("head_dim", head_dim_qk)? };
    if !spec.exists() {
        let what = format!("{q_dtype} with head_dim {head_dim_qk}");
        return Err(unsupported(&what, "it takes bf16 and f16 with 64 or 128"));
    }
    Ok(spec)
}

fn unsupported(what: &str, advice: &'static str) -> CudaError {
    CudaError::Unsupported { kernel: "decode", what: what.to_owned(), advice }
}

fn small(what: &'static str, value: usize) -> Result<u32, CudaError> {
    // The kernel adds tiles to these, so that some room is left below 2^32.
    let max = u32::MAX - MAX_ITEM_KEYS;
    match u32::try_from(value) {
        Ok(small) if small <= max => Ok(small),
        _ => Err(CudaError::TooLarge { what, value: value as u64, max: u64::from(max) }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn keys() -> impl Strategy<Value = Vec<Keys>> {
        let one = prop_oneof![Just((0, 0)), (0..40u32, 0..100u32), (0..3000u32, 0..200_000u32)];
        prop::collection::vec(one, 1..40).prop_map(|list| {
            let number = |(index, (begin, len)): (usize, (u32, u32))| Keys {
                sequence: index as u32,
                row: index as u32,
                begin,
                end: begin + len,
            };
            list.into_iter().enumerate().map(number).collect()
        })
    }

    proptest! {
        #[test]
        fn every_key_is_in_exactly_one_item(
            sequences in keys(),
            fixed in prop::option::of(1..=128u32),
            blocks in 1..64u64,
            slots in 1..1000u64,
        ) {
            let item_keys = match fixed {
                Some(tiles) => tiles * TILE_KEYS,
                None => choose_item_keys(&sequences, blocks, slots),
            };
            prop_assert!(item_keys % TILE_KEYS == 0 && (TILE_KEYS..=MAX_ITEM_KEYS).contains(&item_keys));
            let (items, partials) = split(&sequences, item_keys).unwrap();
            let mut seen_partials = vec![false; partials as usize];
            for keys in &sequences {
                let mut mine: Vec<&WorkItem> =
                    items.iter().filter(|item| item.sequence == keys.sequence).collect();
                mine.sort_by_key(|item| item.split);
                let mut next = keys.begin;
                for (index, item) in mine.iter().enumerate() {
                    prop_assert_eq!((item.begin, item.row), (next, keys.row));
                    prop_assert_eq!((item.split, item.splits), (index as u32, mine.len() as u32));
                    prop_assert!(item.end - item.begin / TILE_KEYS * TILE_KEYS <= item_keys);
                    prop_assert!(item.end > item.begin || mine.len() == 1);
                    if item.splits > 1 {
                        let seen = &mut seen_partials[(item.first_partial + item.split) as usize];
                        prop_assert!(!*seen, "two items share a partial result");
                        *seen = true;
                    }
                    next = item.end;
                }
                prop_assert_eq!(next, keys.end);
            }
            prop_assert!(seen_partials.into_iter().all(|seen| seen), "a partial result belongs to no item");
        }

        #[test]
        fn the_split_of_a_sequence_does_not_depend_on_its_batch_when_fixed(
            sequences in keys(),
            tiles in 1..=128u32,
        ) {
            let (together, _) = split(&sequences, tiles * TILE_KEYS).unwrap();
            for keys in &sequences {
                let (alone, _) = split(&[*keys], tiles * TILE_KEYS).unwrap();
                let ranges = |items: &[WorkItem]| -> Vec<(u32, u32)> {
                    let mut ranges: Vec<(u32, u32)> = items
                        .iter()
                        .filter(|item| item.sequence == keys.sequence)
                        .map(|item| (item.begin, item.end))
                        .collect();
                    ranges.sort_unstable();
                    ranges
                };
                prop_assert_eq!(ranges(&together), ranges(&alone));
            }
        }
    }
}
