//! What the sweeps of the benches may try assembles too, without spills.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use common::{ARCHS, Job, Ptxas, assemble_jobs, faults};
use pagewise_ptx::copy_blocks::{CopyBlocks, CopyBlocksSpec, CopyBlocksTuning};
use pagewise_ptx::decode::{Decode, DecodeSpec, DecodeTuning, Prefetch, Ring};
use pagewise_ptx::write_kv::{self, StoreHint, WriteKv, WriteKvSpec, WriteKvTuning};
use pagewise_ptx::{DType, Kernel};

fn assemble_for_hopper(kernels: &[Kernel]) {
    let Some(ptxas) = Ptxas::find() else { return };
    let hopper = ARCHS.into_iter().find(|arch| arch.name == "sm_90a").unwrap();
    let jobs: Vec<Job<'_>> = kernels.iter().map(|kernel| (kernel, hopper)).collect();
    for (job, result) in jobs.iter().zip(assemble_jobs(&ptxas, &jobs)) {
        let faults = faults(*job, result.unwrap());
        assert!(faults.is_empty(), "{faults:?}");
    }
}

#[test]
fn other_tunings_of_decode_assemble_without_spills() {
    let usual = DecodeSpec::for_head(DType::Bf16, DType::Bf16, 128, Ring::Large).unwrap();
    let rings = [(8, 3, 1), (4, 3, 2), (4, 2, 3), (4, 4, 1), (4, 6, 1), (1, 6, 4)];
    let rings = rings.map(|(warps, stages, blocks_per_multiprocessor)| DecodeTuning {
        warps,
        stages,
        blocks_per_multiprocessor,
        ..usual.tuning
    });
    let hints = Prefetch::ALL.map(|prefetch| DecodeTuning { prefetch, ..usual.tuning });
    let merges = [2, 1 << 20].map(|merge_group| DecodeTuning { merge_group, ..usual.tuning });
    let tuned = |tuning| Decode::new(DecodeSpec { tuning, ..usual }).unwrap().into_kernel();
    let kernels: Vec<Kernel> = rings.into_iter().chain(hints).chain(merges).map(tuned).collect();
    assemble_for_hopper(&kernels);
}

#[test]
fn other_tunings_of_write_kv_assemble_without_spills() {
    let spec = WriteKvSpec::vectorised(DType::Bf16, DType::Bf16);
    let loads = [write_kv::LoadHint::Plain, write_kv::LoadHint::Stream, write_kv::LoadHint::Once];
    let stores = [StoreHint::Plain, StoreHint::Stream, StoreHint::Once];
    let tunings = [1, 2, 4].into_iter().flat_map(|tokens| {
        loads
            .into_iter()
            .flat_map(move |load| stores.into_iter().map(move |store| WriteKvTuning { tokens, load, store }))
    });
    let kernels: Vec<Kernel> =
        tunings.map(|tuning| WriteKv::new(WriteKvSpec { tuning, ..spec }).unwrap().into_kernel()).collect();
    assemble_for_hopper(&kernels);
}

#[test]
fn other_tunings_of_copy_blocks_assemble_without_spills() {
    let tunings = [64, 128, 256, 512]
        .into_iter()
        .flat_map(|threads| [1, 2, 4, 8].map(|in_flight| CopyBlocksTuning { threads, in_flight }));
    let kernels: Vec<Kernel> = tunings
        .map(|tuning| CopyBlocks::new(CopyBlocksSpec { bytes: 16, tuning }).unwrap().into_kernel())
        .collect();
    assemble_for_hopper(&kernels);
}
