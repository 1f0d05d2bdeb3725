//! Random masks of bits: the kinds that callers have, and worse.

use super::{Random, SequenceShape};

/// The longest stretch of keys that is seen or hidden together.
const STRETCH: usize = 200;

/// Words of all rows, `[rows, row_words]`. Behind the last key there may be any bits.
pub(super) fn mask_words(sequences: &[SequenceShape], row_words: usize, random: &mut Random) -> Vec<u32> {
    let mut words = Vec::new();
    for shape in sequences {
        let kind = random.below(4);
        let rows = match kind {
            0 => tree(shape, random),
            1 => stretches(shape, random),
            2 => apart(shape, random),
            _ => Vec::new(),
        };
        for row in 0..shape.queries {
            match rows.get(row) {
                _ if random.one_in(16) => words.extend(std::iter::repeat_n(0, row_words)),
                Some(seen) => words.extend((0..row_words).map(|index| word(seen, index, random))),
                None => any(row_words, random, &mut words),
            }
        }
    }
    words
}

/// Bits of word `index` of a row that sees these keys.
fn word(seen: &[bool], index: usize, random: &mut Random) -> u32 {
    let beyond = random.bits() as u32;
    (0..32).fold(0, |word, bit| match seen.get(index * 32 + bit) {
        Some(&seen) => word | u32::from(seen) << bit,
        None => word | beyond & 1 << bit,
    })
}

/// A tree of speculated tokens: each sees what was there before, its ancestors and itself.
fn tree(shape: &SequenceShape, random: &mut Random) -> Vec<Vec<bool>> {
    let before = shape.keys.saturating_sub(shape.queries);
    let mut rows: Vec<Vec<bool>> = Vec::new();
    for node in 0..shape.queries {
        let parent = random.below(node + 1);
        let mut row = match rows.get(parent) {
            Some(ancestors) => ancestors.clone(),
            None => (0..shape.keys).map(|key| key < before).collect(),
        };
        if let Some(own) = row.get_mut(before + node) {
            *own = true;
        }
        rows.push(row);
    }
    rows
}

/// Causal, but of whole stretches of keys no row sees any.
fn stretches(shape: &SequenceShape, random: &mut Random) -> Vec<Vec<bool>> {
    let mut open: Vec<bool> = Vec::new();
    while open.len() < shape.keys {
        let length = 1 + random.below(STRETCH);
        let shown = random.one_in(2);
        open.extend(std::iter::repeat_n(shown, length));
    }
    open.truncate(shape.keys);
    let before = shape.keys as isize - shape.queries as isize;
    let sees = |row: usize, key: usize| key as isize <= before + row as isize;
    let row = |row| open.iter().enumerate().map(|(key, &open)| open && sees(row, key)).collect();
    (0..shape.queries).map(row).collect()
}

/// Rows in runs, each run with a stretch of its own somewhere.
fn apart(shape: &SequenceShape, random: &mut Random) -> Vec<Vec<bool>> {
    let mut rows: Vec<Vec<bool>> = Vec::new();
    while rows.len() < shape.queries {
        let first = random.below(shape.keys);
        let stretch = first..first + 1 + random.below(STRETCH);
        let row: Vec<bool> = (0..shape.keys).map(|key| stretch.contains(&key)).collect();
        rows.extend(std::iter::repeat_n(row, 1 + random.below(50)));
    }
    rows
}

/// A row that sees nothing, everything, few keys or many.
fn any(row_words: usize, random: &mut Random, words: &mut Vec<u32>) {
    let kind = random.below(6);
    for _ in 0..row_words {
        let (a, b) = (random.bits() as u32, random.bits() as u32);
        words.push(match kind {
            0 => 0,
            1 => u32::MAX,
            2 => a & b & (b >> 7),
            3 => a | b,
            _ => a,
        });
    }
}
