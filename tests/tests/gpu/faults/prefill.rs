//! Faults of prefill, in both of its forms.

use super::Fault;

/// Faults of `prefill` by `mma.sync`, and of the merge of its splits.
pub const PREFILL: &[Fault] = &[
    Fault {
        name: "mask's end",
        family: "prefill_bf16_d128",
        line: "setp.lt.u32 %p_a, %r_w, %r_z;",
        instead: "setp.le.u32 %p_a, %r_w, %r_z;",
        breaks: "a row sees one key more than it may",
    },
    Fault {
        name: "place in the block",
        family: "prefill_bf16_d128",
        line: "and.b32 %r_place, %r_key, %r_block_mask;",
        instead: "and.b32 %r_place, %r_key, 3;",
        breaks: "rows come from the first quarter of a block",
    },
    Fault {
        name: "accumulator not rescaled",
        family: "prefill_bf16_d128",
        line: "mul.f32 %f_o0, %f_o0, %f_alpha0;",
        instead: "",
        breaks: "an element keeps the weight of an old maximum",
    },
    Fault {
        name: "sum not rescaled",
        family: "prefill_bf16_d128",
        line: "mul.f32 %f_sum0, %f_sum0, %f_alpha0;",
        instead: "",
        breaks: "a row's sum keeps the weight of an old maximum",
    },
    Fault {
        name: "wait for the tile",
        family: "prefill_bf16_d128",
        line: "cp.async.wait_group 0;",
        instead: "cp.async.wait_group 1;",
        breaks: "a tile is read before it has arrived",
    },
    Fault {
        name: "plain to the end",
        family: "prefill_bf16_d128",
        line: "setp.le.and.u32 %p_plain, %r_x, %r_plain_end, %p_plain;",
        instead: "",
        breaks: "tiles on the diagonal have no mask",
    },
    Fault {
        name: "plain from the beginning",
        family: "prefill_bf16_d128",
        line: "setp.ge.u32 %p_plain, %r_base, %r_plain_begin;",
        instead: "setp.eq.u32 %p_plain, %r_lane, %r_lane;",
        breaks: "windows have no lower end",
    },
    Fault {
        name: "query head",
        family: "prefill_bf16_d128",
        line: "mad.lo.u32 %r_x, %r_head, %r_group, %r_x;",
        instead: "",
        breaks: "every KV head writes the query heads of the first",
    },
    Fault {
        name: "natural logarithm",
        family: "prefill_bf16_d128",
        line: "mul.f32 %f_x, %f_x, 0f3F317218;",
        instead: "",
        breaks: "lse is in base 2",
    },
    Fault {
        name: "partial result's row",
        family: "prefill_bf16_d128",
        line: "mad.lo.u32 %r_x, %r_partial, 128, %r_x;",
        instead: "mad.lo.u32 %r_x, %r_partial, 64, %r_x;",
        breaks: "partial results overlap",
    },
    Fault {
        name: "maximum of a row",
        family: "prefill_bf16_d128",
        line: "max.f32 %f_new, %f_new, %f_x;",
        instead: "",
        breaks: "half of the keys do not count for the maximum",
    },
    Fault {
        name: "P rounded from the wrong row",
        family: "prefill_bf16_d128",
        line: "cvt.rn.bf16x2.f32 %r_p1, %f_s3, %f_s2;",
        instead: "cvt.rn.bf16x2.f32 %r_p1, %f_s1, %f_s0;",
        breaks: "a row takes another's probabilities",
    },
    Fault {
        name: "bits of a row",
        family: "prefill_bf16_d128_bits",
        line: "mad.lo.u32 %r_y, %r_mine, 4, %r_y;",
        instead: "",
        breaks: "all warps' rows have the bits of the first row",
    },
    Fault {
        name: "bit of a key",
        family: "prefill_bf16_d128_bits",
        line: "shr.u32 %r_bits0, %r_bits0, %r_x;",
        instead: "",
        breaks: "all lanes of a row test the first lane's bits",
    },
    Fault {
        name: "word of a row",
        family: "prefill_bf16_d128_bits",
        line: "mul.wide.u32 %rd_y, %r_y, %r_z;",
        instead: "mov.u64 %rd_y, 0;",
        breaks: "every row has the words of the first",
    },
    Fault {
        name: "bits past the end",
        family: "prefill_bf16_d128_bits",
        line: "and.b32 %r_bits1, %r_bits1, %r_x;",
        instead: "",
        breaks: "garbage behind the last key counts",
    },
    Fault {
        name: "keys that nobody sees",
        family: "prefill_bf16_d128_bits",
        line: "redux.sync.or.b32 %r_some0, %r_bits0, 0xffffffff;",
        instead: "mov.u32 %r_some0, %r_x;",
        breaks: "NaN of a key that no row sees reaches the sums",
    },
    Fault {
        name: "all of a tile seen",
        family: "prefill_bf16_d128_bits",
        line: "ld.shared.u32 %r_x, [%r_y + 12];",
        instead: "mov.u32 %r_x, 0xffffffff;",
        breaks: "half of a tile seen by all passes for a whole one",
    },
    Fault {
        name: "nothing of a tile seen",
        family: "prefill_bf16_d128_bits",
        line: "or.b32 %r_z, %r_z, %r_x;",
        instead: "",
        breaks: "tiles of whose first half alone a warp's rows see keys are left out",
    },
    Fault {
        name: "weight of a split",
        family: "prefill_merge",
        line: "ex2.approx.f32 %f_weight, %f_x;",
        instead: "mov.f32 %f_weight, 0f3F800000;",
        breaks: "splits are added without their weights",
    },
    Fault {
        name: "sum of the splits",
        family: "prefill_merge",
        line: "shfl.sync.bfly.b32 %f_y, %f_sum, 1, 31, 0xffffffff;",
        instead: "mov.f32 %f_y, 0f00000000;",
        breaks: "half of the splits do not count for the sum",
    },
];

/// Faults of `prefill` by `mma.sync` over fp8 caches, beside those that it shares with the others.
pub const PREFILL_FP8: &[Fault] = &[
    Fault {
        name: "scale of K",
        family: "prefill_bf16_e4m3_d128",
        line: "mul.f32 %f_scale, %f_scale, %f_x;",
        instead: "",
        breaks: "scores are those of what the cache holds",
    },
    Fault {
        name: "scale of V",
        family: "prefill_bf16_e4m3_d128",
        line: "mul.f32 %f_o1, %f_o1, %f_x;",
        instead: "",
        breaks: "an element of the output is not scaled",
    },
    Fault {
        name: "head of a scale",
        family: "prefill_bf16_e4m3_d128",
        line: "mul.lo.u32 %r_x, %r_x, %r_head;",
        instead: "mov.u32 %r_x, 0;",
        breaks: "all KV heads have the first one's scale of K",
    },
    Fault {
        name: "halves of a chunk",
        family: "prefill_bf16_e4m3_d128",
        line: "xor.b32 %r_to1, %r_to0, 16;",
        instead: "mov.u32 %r_to1, %r_to0;",
        breaks: "the second half of a chunk lands on its first",
    },
    Fault {
        name: "wait for the chunks",
        family: "prefill_bf16_e4m3_d128",
        line: "cp.async.wait_group 0;",
        instead: "cp.async.wait_group 1;",
        breaks: "chunks are converted before they have arrived",
    },
    Fault {
        name: "numbers of a pair",
        family: "prefill_bf16_e4m3_d128",
        line: "cvt.rn.bf16x2.f32 %r_m0, %f_y, %f_x;",
        instead: "cvt.rn.bf16x2.f32 %r_m0, %f_x, %f_y;",
        breaks: "neighbours change places",
    },
];

/// Faults in the order of its steps, which on a GPU may go well by chance.
pub const PREFILL_FP8_ORDER: &[Fault] = &[
    Fault {
        name: "barrier before the tile is read",
        family: "prefill_bf16_e4m3_d128",
        line: "NO_MORE:\nbar.sync 0;",
        instead: "NO_MORE:",
        breaks: "a warp reads chunks that others have not converted yet",
    },
    Fault {
        name: "barrier before the tile is overwritten",
        family: "prefill_bf16_e4m3_d128",
        line: "cp.async.wait_group 0;\nbar.sync 0;",
        instead: "cp.async.wait_group 0;",
        breaks: "a warp converts the next tile while others read this one",
    },
];

/// Faults of `prefill`'s Hopper form.
pub const PREFILL_HOPPER: &[Fault] = &[
    Fault {
        name: "mask's end",
        family: "prefill_bf16_d128_hopper",
        line: "setp.lt.u32 %p_a, %r_w, %r_z;",
        instead: "setp.le.u32 %p_a, %r_w, %r_z;",
        breaks: "a row sees one key more than it may",
    },
    Fault {
        name: "zero before the first key",
        family: "prefill_bf16_d128_hopper",
        line: "st.shared.v4.u32 [%r_x + 0], {%r_w, %r_w, %r_w, %r_w};",
        instead: "",
        breaks: "NaN before a window reaches the sums",
    },
    Fault {
        name: "zero after the last key",
        family: "prefill_bf16_d128_hopper",
        line: "setp.ge.u32 %p_a, %r_z, 16384;",
        instead: "setp.ge.u32 %p_a, %r_z, 0;",
        breaks: "NaN behind the last key reaches the sums",
    },
    Fault {
        name: "second place for Q",
        family: "prefill_bf16_d128_hopper",
        line: "mul.wide.u32 %rd_q, %r_turn, 2048;",
        instead: "mov.u64 %rd_q, 0;",
        breaks: "the second item of a thread block takes the first one's queries",
    },
    Fault {
        name: "columns of V",
        family: "prefill_bf16_d128_hopper",
        line: "or.b32 %r_x, %r_x, 67108864;",
        instead: "",
        breaks: "the second 64 columns are read elsewhere",
    },
    Fault {
        name: "rows of the second item",
        family: "prefill_bf16_d128_hopper",
        line: "mad.lo.u32 %r_rows_at, %r_turn, 4096, %r_smem;",
        instead: "mov.u32 %r_rows_at, %r_smem;",
        breaks: "rows are described where the next item's will be",
    },
    Fault {
        name: "accumulator not rescaled",
        family: "prefill_bf16_d128_hopper",
        line: "mul.f32 %f_o0, %f_o0, %f_alpha0;",
        instead: "",
        breaks: "an element keeps the weight of an old maximum",
    },
    Fault {
        name: "row's half",
        family: "prefill_bf16_d128_hopper",
        line: "shr.u32 %r_y, %r_chunk, 3;",
        instead: "mov.u32 %r_y, 0;",
        breaks: "both halves of Q go to the first",
    },
    Fault {
        name: "box's place",
        family: "prefill_bf16_d128_hopper",
        line: "and.b32 %r_place, %r_key, %r_block_mask;",
        instead: "mov.u32 %r_place, 0;",
        breaks: "the second half of a block of 256 is the first again",
    },
    Fault {
        name: "plain to the end",
        family: "prefill_bf16_d128_hopper",
        line: "setp.le.and.u32 %p_plain, %r_x, %r_plain_end, %p_plain;",
        instead: "",
        breaks: "tiles on the diagonal have no mask",
    },
];
