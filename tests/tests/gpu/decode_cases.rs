//! Random cases of decode, and random plans for them.

use pagewise_attention::conformance::{
    Case, CaseMask, Layout, Operation, Rows, ScaleKind, SequenceShape, Tables,
};
use pagewise_attention::cuda::ptx::decode::{DecodeTuning, Prefetch, Ring};
use pagewise_attention::cuda::{Device, GridHeads, Order, PlanOptions, Shrink};
use pagewise_attention::{DType, MAX_HEAD_DIM};

use super::random::Random;

/// Types of queries and cache that the kernel takes.
const TYPES: [(DType, DType); 7] = [
    (DType::Bf16, DType::Bf16),
    (DType::F16, DType::F16),
    (DType::F32, DType::F32),
    (DType::Bf16, DType::F8E4M3),
    (DType::F16, DType::F8E4M3),
    (DType::Bf16, DType::F8E5M2),
    (DType::F16, DType::F8E5M2),
];

/// A random case of what the kernel takes, of at most so many keys a sequence: `turn` walks through types and rooms for
/// heads.
pub fn decode_case(random: &mut Random, turn: usize, longest: usize) -> Case {
    let (q_dtype, kv_dtype) = TYPES[turn % TYPES.len()];
    // 16 bytes, to which rows of the cache are aligned.
    let multiple = 16 / kv_dtype.size();
    let room = [64, 128, 256][turn / TYPES.len() % 3];
    let dim = |random: &mut Random| match random.below(3) {
        0 => (room / 2 + multiple + multiple * random.below(room / 2 / multiple)).min(room),
        _ => room,
    };
    let head_dim_qk = dim(random);
    let head_dim_v = match random.below(6) {
        0 => multiple * (1 + random.below(head_dim_qk / multiple)),
        _ => head_dim_qk,
    };
    let kv_heads = random.pick(&[1, 2, 2, 3, 4, 4, 5, 8]);
    let sequences = (0..1 + random.below(8))
        .map(|_| SequenceShape {
            queries: random.pick(&[0, 1, 1, 1, 1, 1, 1, 2, 5]),
            keys: match random.below(8) {
                0 => random.below(3),
                1 => 16 * random.below(1 + longest.min(320) / 16),
                2 => random.below(1 + longest),
                _ => random.below(1 + longest.min(600)),
            },
        })
        .collect();
    let layouts = [Layout::Nhd, Layout::Nhd, Layout::Hnd, Layout::Gaps, Layout::Interleaved, Layout::Shared];
    let scale = if kv_dtype.is_fp8() || random.one_in(6) { ScaleKind::Tensor } else { ScaleKind::One };
    Case {
        operation: Operation::Attention,
        q_dtype,
        kv_dtype,
        q_heads: kv_heads * random.pick(&[1, 1, 2, 3, 4, 5, 7, 8, 9, 16, 20]),
        kv_heads,
        head_dim_qk,
        head_dim_v,
        block_size: random.pick(&[16, 16, 32, 64, 128, 256, 1, 2, 4, 8]),
        layout: random.pick(&layouts),
        rows: random.pick(&[Rows::Packed, Rows::Fused]),
        tables: random.pick(&[Tables::Padded, Tables::Csr]),
        mask: match random.below(6) {
            0 => CaseMask::None,
            1 => CaseMask::Window(1 + random.below(300)),
            2 => CaseMask::Bits,
            _ => CaseMask::Causal,
        },
        positions: random.one_in(6),
        shared_prefix: random.one_in(4),
        poison_unseen: random.one_in(2),
        softcap: random.one_in(5).then(|| random.pick(&[2.0, 30.0, 50.0])),
        alibi: random.one_in(5),
        sinks: random.one_in(5),
        scale: if scale == ScaleKind::Tensor && random.one_in(2) { ScaleKind::Head } else { scale },
        scores: random.pick(&[0.5, 8.0, 8.0, 60.0, 1e5]),
        sequences,
        seed: random.next() % 1_000_000_000,
        ..Case::default()
    }
}

/// How a case is planned: mostly as by default, so that the receipts are about that.
pub fn random_options(random: &mut Random, case: &Case, device: &Device) -> PlanOptions {
    let room = [64, 128, 256].into_iter().find(|room| case.head_dim_qk.max(case.head_dim_v) <= *room);
    let room = room.unwrap_or(MAX_HEAD_DIM);
    let ring = random.pick(&Ring::ALL);
    let usual = DecodeTuning::for_row_bytes((room * case.kv_dtype.size()) as u32, ring);
    let tuning = DecodeTuning {
        warps: random.pick(&[1, 2, 4, 8]).min(usual.warps),
        stages: random.pick(&[2, 3]).min(usual.stages),
        blocks_per_multiprocessor: 1,
        merge_group: random.pick(&[2, 4, 16, 1 << 20]),
        prefetch: random.pick(&Prefetch::ALL),
    };
    let tuning = random.one_in(5).then_some(tuning);
    let warps = tuning.unwrap_or(usual).warps;
    let block_heads: Vec<u32> = [1, 2, 4, 8]
        .into_iter()
        .filter(|heads| *heads <= warps && case.kv_heads.is_multiple_of(*heads as usize))
        .collect();
    let block_heads = random.one_in(2).then(|| random.pick(&block_heads));
    let tiles = random.pick(&[1, 2, 8, 64, 1024]);
    let item_keys = random.one_in(2).then(|| 16 * (1 + random.next() as u32 % tiles));
    let shares = 1 + random.below(4) as u32;
    let smallest = random.pick(&[1, 64, 256]);
    let shrink = random.one_in(2).then_some(Shrink { shares, smallest });
    let grid_items = random.one_in(3).then(|| 40_000 + random.below(1000) as u32);
    let early = device.launches_dependently() && random.one_in(2);
    let order = if early { Order::Dependent } else { Order::Stream };
    let grid_heads = random.pick(&[GridHeads::One, GridHeads::OneOrMost, GridHeads::Any]);
    PlanOptions { item_keys, shrink, tuning, ring: Some(ring), block_heads, grid_items, grid_heads, order }
}
