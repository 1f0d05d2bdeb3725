//! Random attention cases of what the wgpu kernels take, and cases that share a kernel variant: a software driver takes a
//! second or two to compile one.

use pagewise_attention::DType;
use pagewise_attention::conformance::{Case, CaseMask, Layout, Rows, ScaleKind, SequenceShape, Tables};

use super::random::Random;

const TYPES: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];

/// What differs between cases for decode and for prefill.
pub struct Kind<'a> {
    /// Longest heads.
    pub rooms: &'a [usize],
    /// KV heads.
    pub kv_heads: &'a [usize],
    /// Query heads that share one.
    pub groups: &'a [usize],
    /// Longest window.
    pub window: usize,
    /// Which type of the cache goes with which of the queries: `turn` walks through the pairs.
    pub kv_turn: fn(usize) -> usize,
    /// Draws the sequences.
    pub sequences: fn(&mut Random) -> Vec<SequenceShape>,
}

/// A random case of a kind: `turn` walks through the types.
pub fn random_case(random: &mut Random, turn: usize, kind: &Kind<'_>) -> Case {
    let room = random.pick(kind.rooms);
    let head_dim_qk = match random.below(3) {
        0 => 4 * (1 + random.below(room / 4)),
        _ => room,
    };
    let head_dim_v = match random.below(6) {
        0 => 4 * (1 + random.below(head_dim_qk / 4)),
        _ => head_dim_qk,
    };
    let kv_heads = random.pick(kind.kv_heads);
    let layouts = [Layout::Nhd, Layout::Nhd, Layout::Hnd, Layout::Gaps, Layout::Interleaved, Layout::Shared];
    Case {
        q_dtype: TYPES[turn % 3],
        kv_dtype: TYPES[(kind.kv_turn)(turn) % 3],
        q_heads: kv_heads * random.pick(kind.groups),
        kv_heads,
        head_dim_qk,
        head_dim_v,
        block_size: random.pick(&[16, 16, 32, 64, 128, 256, 1, 2, 4, 8]),
        layout: random.pick(&layouts),
        rows: random.pick(&[Rows::Packed, Rows::Fused]),
        tables: random.pick(&[Tables::Padded, Tables::Csr]),
        mask: match random.below(7) {
            0 => CaseMask::None,
            1 | 2 => CaseMask::Window(1 + random.below(kind.window)),
            3 => CaseMask::Bits,
            _ => CaseMask::Causal,
        },
        positions: random.one_in(4),
        shared_prefix: random.one_in(4),
        poison_unseen: random.one_in(2),
        softcap: random.one_in(5).then(|| random.pick(&[2.0, 30.0, 50.0])),
        alibi: random.one_in(4),
        sinks: random.one_in(4),
        scale: random.pick(&[ScaleKind::One, ScaleKind::One, ScaleKind::Tensor, ScaleKind::Head]),
        scores: random.pick(&[0.5, 8.0, 8.0, 60.0, 1e5]),
        sequences: (kind.sequences)(random),
        seed: random.next() % 1_000_000_000,
        ..Case::default()
    }
}

/// A case with the other's data that is computed by the same variants as `kind`.
pub fn other_case(kind: &Case, other: Case) -> Case {
    let group = kind.q_heads / kind.kv_heads;
    let bits = |case: &Case| case.mask == CaseMask::Bits;
    Case {
        q_dtype: kind.q_dtype,
        kv_dtype: kind.kv_dtype,
        q_heads: other.kv_heads * group,
        head_dim_qk: kind.head_dim_qk,
        head_dim_v: kind.head_dim_v,
        mask: if bits(kind) == bits(&other) { other.mask } else { kind.mask },
        ..other
    }
}
