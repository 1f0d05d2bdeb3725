//! Every row sees every key that it may exactly once, and schedules lose nothing.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::{AttentionConfig, CacheLayout, DType, MaskBits, PagedBatch};

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
        let spec = PrefillPart::spec(&problem, &Device::h100(), Some(form)).unwrap();
        let sequences: Vec<usize> = (0..shapes.len()).collect();
        let part = PrefillPart::new(&problem, &sequences, spec, &Device::h100(), prefill_keys).unwrap();

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
        prop_assert!(PrefillPart::spec(&problem, &Device::h100(), Some(Form::Hopper)).is_none());
        prop_assert_eq!(PrefillPart::spec(&problem, &Device::h100(), None).unwrap().form, Form::Large);
        let spec = PrefillPart::spec(&problem, &Device::h100(), Some(form)).unwrap();
        prop_assert!(spec.bits);
        let part = PrefillPart::new(&problem, &[0], spec, &Device::h100(), prefill_keys).unwrap();
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
