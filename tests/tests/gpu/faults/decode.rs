//! Faults of decode.

use super::Fault;

/// Faults of `decode`, of the variant that the cases of its test take: bf16 with head_dim 128 and the large ring.
pub const DECODE: &[Fault] = &[
    Fault {
        name: "log-sum-exp of a row",
        family: "decode",
        line: "lg2.approx.f32 %f_x, %f_sum0;",
        instead: "mov.f32 %f_x, %f_sum0;",
        breaks: "lse adds the sum and not its logarithm",
    },
    Fault {
        name: "block of a tile",
        family: "decode",
        line: "shfl.sync.idx.b32 %r_page, %r_entries, %r_x, 31, 0xffffffff;",
        instead: "xor.b32 %r_z, %r_x, 1;\nshfl.sync.idx.b32 %r_page, %r_entries, %r_z, 31, 0xffffffff;",
        breaks: "neighbouring tiles swap their blocks",
    },
    Fault {
        name: "place in the block",
        family: "decode",
        line: "and.b32 %r_place, %r_ahead, %r_block_mask;",
        instead: "mov.u32 %r_place, 0;",
        breaks: "every tile of a block is its first",
    },
    Fault {
        name: "keys before the window",
        family: "decode",
        line: "sub.s32 %r_x, %r_begin, %r_base;",
        instead: "mov.u32 %r_x, 0;",
        breaks: "keys of the first tile that the window hides weigh as zeros do",
    },
    Fault {
        name: "mask",
        family: "decode",
        line: "setp.eq.u32 %p_a, %r_x, 0;",
        instead: "setp.ne.u32 %p_a, %r_lane, %r_lane;",
        breaks: "keys past the end weigh as zeros do",
    },
    Fault {
        name: "scale",
        family: "decode",
        line: "mul.f32 %f_s0, %f_s0, %f_scale0;",
        instead: "",
        breaks: "half of the scores are not scaled",
    },
    Fault {
        name: "query of a lane",
        family: "decode",
        line: "add.u32 %r_y, %r_x, %r_g;",
        instead: "mov.u32 %r_y, %r_x;",
        breaks: "every query is the first of its group",
    },
    Fault {
        name: "arrival of a tile",
        family: "decode",
        line: "cp.async.wait_group 1;",
        instead: "cp.async.wait_group 2;",
        breaks: "a tile is read before it has arrived",
    },
    Fault {
        name: "next tile of the ring",
        family: "decode",
        line: "add.u32 %r_use, %r_use, 8192;",
        instead: "",
        breaks: "every tile is read from the first place of the ring",
    },
    Fault {
        name: "place of a chunk",
        family: "decode",
        line: "xor.b32 %r_x, %r_copy_chunk, %r_copy_row;",
        instead: "mov.b32 %r_x, %r_copy_chunk;",
        breaks: "chunks are not where the fragments look for them",
    },
    Fault {
        name: "rescaling of the output",
        family: "decode",
        line: "mul.f32 %f_o0, %f_o0, %f_alpha0;",
        instead: "",
        breaks: "a maximum that rises late leaves an element too large",
    },
    Fault {
        name: "rescaling of the sum",
        family: "decode",
        line: "mul.f32 %f_sum0, %f_sum0, %f_alpha0;",
        instead: "",
        breaks: "the same of the sum of probabilities",
    },
    Fault {
        name: "turning of P",
        family: "decode",
        line: "movmatrix.sync.aligned.m8n8.trans.b16 %r_p0, %r_x;",
        instead: "mov.b32 %r_p0, %r_x;",
        breaks: "probabilities meet the values of other keys",
    },
    Fault {
        name: "barrier before the warps meet",
        family: "decode",
        line: "bar.sync 0;",
        instead: "",
        breaks: "a warp's sums are read before they are there",
    },
    Fault {
        name: "empty row",
        family: "decode",
        line: "selp.f32 %f_weight0, 0f00000000, %f_weight0, %p_b;",
        instead: "",
        breaks: "0 / 0 is NaN where a row sees no key",
    },
    Fault {
        name: "place of a split",
        family: "decode",
        line: "add.u32 %r_key, %r_first_partial, %r_split;",
        instead: "mov.u32 %r_key, %r_first_partial;",
        breaks: "all splits of a row store their results in one place",
    },
    Fault {
        name: "last to arrive",
        family: "decode",
        line: "setp.ne.u32 %p_last, %r_x, %r_y;",
        instead: "setp.ne.u32 %p_last, %r_x, 0;",
        breaks: "the first thread block merges what the others have not stored yet",
    },
    Fault {
        name: "weight of a split",
        family: "decode",
        line: "sub.f32 %f_weight0, %f_x, %f_safe0;",
        instead: "sub.f32 %f_weight0, %f_safe0, %f_safe0;",
        breaks: "splits count alike, whatever their maxima",
    },
];

/// The dependent variant's family: the same types and head_dim.
const DEPENDENT: &str = "decode_bf16_bf16_d128_pdl";

/// Faults of dependent launches that read what the kernels before may still write.
pub const DECODE_READS: &[Fault] = &[
    Fault {
        name: "wait before the queries",
        family: DEPENDENT,
        line: "@%p_a bra QUERIES_KEPT;\ngriddepcontrol.wait;",
        instead: "@%p_a bra QUERIES_KEPT;",
        breaks: "queries are read that the kernel before still writes",
    },
    Fault {
        name: "wait before fresh keys",
        family: DEPENDENT,
        line: "@!%p_a bra SETTLED;\ngriddepcontrol.wait;",
        instead: "@!%p_a bra SETTLED;",
        breaks: "keys are read that the kernels before still write",
    },
    Fault {
        name: "fresh keys",
        family: DEPENDENT,
        line: "add.u32 %r_x, %r_ahead, 32;",
        instead: "add.u32 %r_x, %r_ahead, 16;",
        breaks: "a tile of which all keys are fresh is read early",
    },
    Fault {
        name: "first fresh key",
        family: DEPENDENT,
        line: "add.u32 %r_x, %r_ahead, 32;",
        instead: "add.u32 %r_x, %r_ahead, 31;",
        breaks: "a tile of which the last key is fresh is read early",
    },
];

/// Faults of dependent launches that end, or write, while the kernels before may still run. Results show them by chance
/// only: the interpreter sees the writes themselves.
pub const DECODE_WRITES: &[Fault] = &[
    Fault {
        name: "wait of warps without a tile",
        family: DEPENDENT,
        line: "WARP_DONE:\ngriddepcontrol.wait;",
        instead: "WARP_DONE:",
        breaks: "outputs are written before the kernels before have ended",
    },
    Fault {
        name: "wait of items without work",
        family: DEPENDENT,
        line: "@%p_a bra ITEM_COUNTS;\ngriddepcontrol.wait;",
        instead: "@%p_a bra ITEM_COUNTS;",
        breaks: "a launch without any work ends before the kernels before it",
    },
];
