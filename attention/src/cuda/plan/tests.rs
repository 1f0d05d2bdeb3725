//! What the order of a launch depends on.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use super::*;
use crate::{DType, PagedBatch};

/// The plan of sequences with so many query rows and 400 keys each.
fn plan(queries: &[i32], options: PlanOptions) -> Result<DecodePlan, CudaError> {
    let config = AttentionConfig::new(8, 2, 128, DType::Bf16);
    let mut query_start = vec![0];
    query_start.extend(queries.iter().scan(0, |sum, rows| {
        *sum += rows;
        Some(*sum)
    }));
    let lens = vec![400; queries.len()];
    let entries: Vec<i32> = (0..25 * queries.len() as i32).collect();
    let layout = CacheLayout::nhd(entries.len(), 16, &config);
    let batch = PagedBatch::padded(&query_start, &lens, &entries, 25);
    DecodePlan::new(&Problem::new(&config, layout, batch).unwrap(), &Device::h100(), options)
}

#[test]
fn many_fresh_keys_make_the_launch_an_ordinary_one() {
    let options = PlanOptions { order: Order::Dependent, ..PlanOptions::default() };
    let most = FRESH_KEYS as i32;
    assert!(plan(&[1, most, 3], options).unwrap().variant().ends_with("_pdl"));
    assert!(!plan(&[1, most + 1, 3], options).unwrap().variant().ends_with("_pdl"));
    assert!(!plan(&[1, 1], PlanOptions::default()).unwrap().variant().ends_with("_pdl"));

    // A captured graph repeats the kernel that it was captured with.
    let fixed = PlanOptions { grid_items: Some(4000), ..options };
    assert!(plan(&[1, most, 3], fixed).unwrap().variant().ends_with("_pdl"));
    let refused = plan(&[1, most + 1, 3], fixed).unwrap_err().to_string();
    assert!(refused.contains("17 query rows of a sequence"), "{refused}");
}

#[test]
fn rows_that_fill_a_step_up_are_no_sequence() {
    let config = AttentionConfig::new(8, 2, 128, DType::Bf16);
    let (query_start, mut lens, mut indptr) = ((0..=40).collect::<Vec<i32>>(), vec![0; 40], vec![2; 41]);
    (lens[0], indptr[0]) = (20, 0);
    let layout = CacheLayout::nhd(2, 16, &config);
    let batch = PagedBatch::csr(&query_start, &lens, &indptr, &[0, 1]);
    let options = PlanOptions { order: Order::Dependent, grid_items: Some(4000), ..PlanOptions::default() };
    let problem = Problem::new(&config, layout, batch).unwrap();
    let plan = DecodePlan::new(&problem, &Device::h100(), options).unwrap();
    assert!(plan.variant().ends_with("_pdl"));
}
