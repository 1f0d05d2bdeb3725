//! Finding the likeliest tokens without sorting the vocabulary.
//!
//! A candidate is one `u64` key: the logit, mapped so that larger bits mean a larger logit, above the
//! inverted id. A larger key is a better candidate, the lower id wins among equal logits, and no two keys of
//! a row are equal: selection is a comparison of integers.

/// A candidate as one number; better is larger. The logit must not be NaN.
pub(super) fn key(logit: f32, id: u32) -> u64 {
    // Adding zero turns −0 into +0: the two are equal logits.
    let bits = (logit + 0.0).to_bits();
    let ordered = if bits >> 31 == 0 { bits | 1 << 31 } else { !bits };
    u64::from(ordered) << 32 | u64::from(!id)
}

/// The token of a key.
pub(super) fn id(key: u64) -> u32 {
    !(key as u32)
}

/// The logit of a key.
pub(super) fn logit(key: u64) -> f32 {
    let ordered = (key >> 32) as u32;
    f32::from_bits(if ordered >> 31 == 1 { ordered & !(1 << 31) } else { !ordered })
}

/// Leaves in `keys` the `k` best candidates of the row in no order, or all of them where there are fewer.
/// Logits of −∞ and NaN are no candidates. O(row) time and O(k) memory.
pub(super) fn top_k(row: &[f32], k: usize, keys: &mut Vec<u64>) {
    keys.clear();
    if k == 0 {
        return;
    }
    // Cutting back to k whenever twice as many have gathered keeps the work per candidate constant.
    let full = k.saturating_mul(2).max(256);
    let mut bar = f32::NEG_INFINITY;
    let mut worst = 0;
    for (id, &logit) in (0u32..).zip(row) {
        // Also false for NaN.
        let passes = logit >= bar && logit > f32::NEG_INFINITY;
        if !passes {
            continue;
        }
        let key = key(logit, id);
        if key <= worst {
            continue;
        }
        keys.push(key);
        if keys.len() == full {
            worst = cut(keys, k);
            bar = self::logit(worst);
        }
    }
    if keys.len() > k {
        cut(keys, k);
    }
}

/// Cuts to the `k` best and returns the worst of them; `1 <= k <= keys.len()`.
fn cut(keys: &mut Vec<u64>, k: usize) -> u64 {
    let (_, &mut worst, _) = keys.select_nth_unstable_by(k - 1, |a, b| b.cmp(a));
    keys.truncate(k);
    worst
}

/// The worst key of the smallest set of best candidates whose weights add up to `target`, or of all of them
/// where they do not reach it; 0, which is below all keys, where there are none. Reorders `keys`. O(keys)
/// expected: each round halves the range in which the set ends.
pub(super) fn nucleus(keys: &mut [u64], target: f64, weight: impl Fn(u64) -> f32) -> u64 {
    // All before `low` are in the set and weigh `mass`, less than the target; none from `high` on is.
    let (mut low, mut high, mut mass) = (0, keys.len(), 0.0);
    while high - low > 1 {
        let half = (high - low) / 2;
        let range = &mut keys[low..high];
        range.select_nth_unstable_by(half, |a, b| b.cmp(a));
        let better: f64 = range[..half].iter().map(|&key| f64::from(weight(key))).sum();
        if mass + better >= target {
            high = low + half;
        } else {
            mass += better;
            low += half;
        }
    }
    keys.get(low).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::random::Draw;

    fn sorted(row: &[f32]) -> Vec<u32> {
        let mut ids: Vec<u32> =
            (0..row.len() as u32).filter(|&i| row[i as usize] > f32::NEG_INFINITY).collect();
        ids.sort_by(|&a, &b| row[b as usize].partial_cmp(&row[a as usize]).unwrap().then(a.cmp(&b)));
        ids
    }

    fn row(seed: u64, len: usize, levels: f64) -> Vec<f32> {
        (0..len as u64)
            .map(|position| {
                let u = Draw { seed, sample: 0, position }.uniform();
                match (u * 1000.0) as u32 {
                    0..=19 => f32::NAN,
                    20..=39 => f32::NEG_INFINITY,
                    40..=59 => -0.0,
                    // Few levels make many ties.
                    _ => ((u * levels).floor() - levels / 2.0) as f32,
                }
            })
            .collect()
    }

    #[test]
    fn keys_order_as_logits_then_ids() {
        let logits = [f32::INFINITY, f32::MAX, 1.5, f32::MIN_POSITIVE, 0.0, -1e-40, -1.5, f32::MIN];
        for pair in logits.windows(2) {
            assert!(key(pair[0], 9) > key(pair[1], 0), "{pair:?}");
        }
        assert!(key(-0.0, 1) > key(0.0, 2) && key(0.0, 1) > key(-0.0, 2));
        for logit_in in logits {
            assert_eq!((logit(key(logit_in, 77)), id(key(logit_in, 77))), (logit_in, 77));
        }
    }

    #[test]
    fn top_k_is_the_head_of_a_full_sort() {
        for case in 0..300u64 {
            let len = [1, 2, 7, 300, 5000][case as usize % 5];
            let row = row(case, len, [3.0, 50.0, 1e6][case as usize % 3]);
            let expected = sorted(&row);
            for k in [0, 1, 2, 5, 130, len, len + 3] {
                let mut keys = vec![1, 2, 3];
                top_k(&row, k, &mut keys);
                keys.sort_unstable_by(|a, b| b.cmp(a));
                let found: Vec<u32> = keys.iter().map(|&key| id(key)).collect();
                assert_eq!(found, expected[..k.min(expected.len())], "case {case}, k {k}");
            }
        }
    }

    #[test]
    fn the_nucleus_ends_where_a_sorted_sum_crosses_the_target() {
        for case in 0..300u64 {
            let row = row(case + 1000, [1, 2, 3, 40, 700][case as usize % 5], [2.0, 20.0][case as usize % 2]);
            let order = sorted(&row);
            if order.is_empty() {
                continue;
            }
            // Whole numbers add up exactly, in any order.
            let weight = |logit: f32| logit + 11.0;
            let total: f64 = order.iter().map(|&i| f64::from(weight(row[i as usize]))).sum();
            for step in 0..=10 {
                let target = (total * f64::from(step) / 10.0).round();
                let mut sum = 0.0;
                let expected = order
                    .iter()
                    .copied()
                    .find(|&i| {
                        sum += f64::from(weight(row[i as usize]));
                        sum >= target
                    })
                    .unwrap();
                let mut keys: Vec<u64> = order.iter().rev().map(|&i| key(row[i as usize], i)).collect();
                assert_eq!(
                    id(nucleus(&mut keys, target, |key| weight(logit(key)))),
                    expected,
                    "case {case}, target {target}"
                );
            }
        }
    }
}
