//! Batch sizes that steps of single tokens are filled up to, so that few captured graphs serve all of them; and how a
//! batch is filled up.
//!
//! Rows that fill up write nothing (slot −1) and read nothing (length 0). Their results are never looked at.

use crate::backend::StepBatch;

/// The smallest bucket that holds `rows` sequences, of at most `most`: 1, 2, 4, 8, then multiples of 8 up to 64, of 16
/// up to 256, of 32 beyond, and `most` itself. `None` for more than that.
pub(super) fn bucket(rows: usize, most: usize) -> Option<usize> {
    let up = match rows {
        0 => return None,
        1..=8 => rows.next_power_of_two(),
        9..=64 => rows.next_multiple_of(8),
        65..=256 => rows.next_multiple_of(16),
        _ => rows.next_multiple_of(32),
    };
    (rows <= most).then_some(up.min(most))
}

/// All buckets of steps of at most `rows` sequences, the largest first.
pub(super) fn all_buckets(rows: usize, most: usize) -> Vec<usize> {
    let mut all = Vec::new();
    let mut rows = rows;
    while let Some(largest) = bucket(rows, most) {
        all.push(largest);
        // The first that is a bucket's own, from above, is the next.
        rows = (1..rows.min(largest)).rev().find(|&fewer| bucket(fewer, most) != Some(largest)).unwrap_or(0);
    }
    all
}

/// The next power of two, which launches that grow with the lengths are filled up to.
pub(super) fn launch_size(items: usize, least: usize) -> Option<u32> {
    u32::try_from(items.max(least).max(1)).ok()?.checked_next_power_of_two()
}

/// Whether every sequence of a batch has one token, of which the logits are wanted.
pub(super) fn is_decode(batch: &StepBatch) -> bool {
    let rows = batch.rows();
    batch.seq_lens.len() == rows && batch.logit_rows.iter().copied().eq(0..rows)
}

/// Fills a batch of single tokens up to so many sequences.
pub(super) fn fill_up(batch: &mut StepBatch, rows: usize) {
    let first = batch.rows();
    if rows <= first {
        return;
    }
    batch.tokens.resize(rows, 0);
    batch.positions.resize(rows, 0);
    batch.seq_lens.resize(rows, 0);
    batch.query_start.extend((first..rows).map(|row| row as i32 + 1));
    batch.logit_rows.extend(first..rows);
    for group in &mut batch.groups {
        let end = group.indptr.last().copied().unwrap_or(0);
        group.indptr.resize(rows + 1, end);
        group.slots.resize(rows, -1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::GroupBatch;
    use pagewise_attention::{AttentionConfig, CacheLayout, DType, Problem};

    #[test]
    fn a_bucket_holds_its_rows_and_is_its_own() {
        for most in [1, 3, 8, 100, 256, 1000] {
            for rows in 1..=most {
                let bucket = bucket(rows, most).unwrap();
                assert!(bucket >= rows && bucket <= most, "{rows} rows of {most}: {bucket}");
                assert!(bucket <= 2 * rows);
                assert_eq!(super::bucket(bucket, most), Some(bucket));
                // Products of few rows and of many take different ways: a bucket does not lead from one to the other.
                assert_eq!(rows <= 8, bucket <= 8);
            }
            assert_eq!(bucket(most + 1, most), None);
        }
        assert_eq!(bucket(0, 8), None);
        let number =
            (1..=256).filter_map(|rows| bucket(rows, 256)).collect::<std::collections::BTreeSet<_>>();
        assert_eq!(number.len(), 4 + 7 + 12);
    }

    #[test]
    fn all_buckets_are_those_of_all_steps() {
        for most in [0, 1, 3, 8, 100, 256, 1000] {
            for rows in [0, 1, 5, 9, 64, 99, 100, 256, 700] {
                let rows = rows.min(most);
                let each: std::collections::BTreeSet<_> =
                    (1..=rows).filter_map(|rows| bucket(rows, most)).collect();
                assert_eq!(all_buckets(rows, most), each.into_iter().rev().collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn launches_are_powers_of_two() {
        assert_eq!(launch_size(0, 1), Some(1));
        assert_eq!(launch_size(5, 8), Some(8));
        assert_eq!(launch_size(9, 8), Some(16));
        assert_eq!(launch_size(1 << 31, 8), Some(1 << 31));
        assert_eq!(launch_size((1 << 31) + 1, 8), None);
    }

    #[test]
    fn filled_up_rows_are_a_sound_problem_without_keys() {
        let mut batch = StepBatch {
            tokens: vec![5, 6, 7],
            earlier: Vec::new(),
            positions: vec![20, 3, 0],
            query_start: vec![0, 1, 2, 3],
            seq_lens: vec![21, 4, 1],
            groups: vec![GroupBatch {
                indptr: vec![0, 2, 3, 4],
                indices: vec![4, 1, 2, 3],
                slots: vec![20, 35, 48],
            }],
            logit_rows: vec![0, 1, 2],
        };
        assert!(is_decode(&batch));
        let before = batch.clone();
        fill_up(&mut batch, 3);
        assert_eq!(batch, before);
        fill_up(&mut batch, 8);
        assert!(is_decode(&batch));
        assert_eq!(batch.rows(), 8);
        assert_eq!(batch.tokens[..3], before.tokens);
        assert_eq!(batch.groups[0].slots, [20, 35, 48, -1, -1, -1, -1, -1]);
        let config = AttentionConfig::new(4, 2, 16, DType::F32);
        let layout = CacheLayout::nhd(5, 16, &config);
        let problem = Problem::new(&config, layout, batch.paged(&batch.groups[0])).unwrap();
        assert_eq!(problem.total_queries(), 8);
        for index in 3..8 {
            let sequence = problem.sequence(index);
            assert_eq!((sequence.query_len, sequence.len, sequence.table.len()), (1, 0, 0));
            assert!(problem.batch().visible(config.mask, &sequence, 0).is_empty());
        }
    }

    #[test]
    fn only_steps_of_single_tokens_with_logits_are_decodes() {
        let mut batch = StepBatch {
            tokens: vec![1, 2],
            earlier: Vec::new(),
            positions: vec![0, 1],
            query_start: vec![0, 2],
            seq_lens: vec![2],
            groups: Vec::new(),
            logit_rows: vec![1],
        };
        assert!(!is_decode(&batch));
        batch.query_start = vec![0, 1, 2];
        batch.seq_lens = vec![1, 2];
        assert!(!is_decode(&batch), "the first sequence's logits are not wanted");
        batch.logit_rows = vec![0, 1];
        assert!(is_decode(&batch));
    }
}
