//! Faults of the kernels that write, merge and copy without matrix products.

use super::Fault;

/// Faults of `write_kv`.
pub const WRITE_KV: &[Fault] = &[
    Fault {
        name: "place in the block",
        family: "write_kv",
        line: "sub.u32 %r_place, %r_slot, %r_place;",
        instead: "mov.u32 %r_place, 0;",
        breaks: "every token goes to the first place of its block",
    },
    Fault {
        name: "skipped token",
        family: "write_kv",
        line: "setp.lt.and.u64 %p_store, %rd_slot0, %rd_num_slots, %p_token0;",
        instead: "setp.ge.u64 %p_move, %rd_slot0, %rd_num_slots;\n@%p_move mov.u64 %rd_slot0, 0;\nand.pred %p_store, %p_token0, %p_token0;",
        breaks: "a token without a slot goes to slot 0",
    },
    Fault {
        name: "head of new K",
        family: "write_kv",
        line: "mad.lo.u64 %rd_offset, %rd_head, %rd_stride, %rd_element;",
        instead: "mov.u64 %rd_offset, %rd_element;",
        breaks: "every head stores K of head 0",
    },
    Fault {
        name: "second vector",
        family: "write_kv",
        line: "add.u64 %rd_to, %rd_to, %rd_key_out_b;",
        instead: "",
        breaks: "the second vector of a thread lands on its first",
    },
    Fault {
        name: "row too long",
        family: "write_kv",
        line: "setp.lt.u32 %p_value_b, %r_b, %r_limit;",
        instead: "setp.lt.u32 %p_value_b, %r_b, 0;",
        breaks: "the second half of V is not stored",
    },
    Fault {
        name: "scale the wrong way",
        family: "write_kv",
        line: "rcp.rn.f32 %f_key_scale, %f_key_scale;",
        instead: "",
        breaks: "an fp8 cache holds K times its scale",
    },
    Fault {
        name: "sense of turning",
        family: "write_kv",
        line: "neg.f32 %f_x, %f_x;",
        instead: "",
        breaks: "rotary embedding mirrors instead of turning",
    },
    Fault {
        name: "position",
        family: "write_kv",
        line: "mad.lo.u64 %rd_offset, %rd_position, %rd_stride, %rd_offset;",
        instead: "",
        breaks: "rotary embedding turns by the angles of position 0",
    },
];

/// Faults of `merge_states`.
pub const MERGE_STATES: &[Fault] = &[
    Fault {
        name: "rescaling of the sum",
        family: "merge_states",
        line: "mul.f32 %f_total, %f_total, %f_alpha;",
        instead: "",
        breaks: "a maximum that rises late leaves the sum of weights too large",
    },
    Fault {
        name: "rescaling of the output",
        family: "merge_states",
        line: "mul.f32 %f_sum0, %f_sum0, %f_alpha;",
        instead: "",
        breaks: "the same of the outputs",
    },
    Fault {
        name: "empty part",
        family: "merge_states",
        line: "setp.neu.f32 %p_full0, %f_lse0, 0fFF800000;",
        instead: "setp.eq.u32 %p_full0, %r_part, %r_part;",
        breaks: "the output of an empty part counts with weight 0, and 0 * NaN is NaN",
    },
    Fault {
        name: "empty row",
        family: "merge_states",
        line: "selp.f32 %f_safe, 0f00000000, %f_new, %p_empty;",
        instead: "mov.f32 %f_safe, %f_new;",
        breaks: "-inf - -inf is NaN where every part is empty",
    },
    Fault {
        name: "base of the exponential",
        family: "merge_states",
        line: "mul.f32 %f_weight1, %f_weight1, 0f3FB8AA3B;",
        instead: "",
        breaks: "the second part is weighed in base 2",
    },
    Fault {
        name: "base of the logarithm",
        family: "merge_states",
        line: "fma.rn.f32 %f_x, %f_x, 0f3F317218, %f_max;",
        instead: "add.f32 %f_x, %f_x, %f_max;",
        breaks: "lse counts its sum in base 2",
    },
    Fault {
        name: "next part",
        family: "merge_states",
        line: "add.u64 %rd_out, %rd_out, %rd_out_step;",
        instead: "",
        breaks: "outputs and weights belong to different parts",
    },
];

/// Faults of `copy_blocks`, some of them of the variant that moves 16 bytes at once.
pub const COPY_BLOCKS: &[Fault] = &[
    Fault {
        name: "number of pairs",
        family: "copy_blocks",
        line: "min.u32 %r_count, %r_count, %r_x;",
        instead: "",
        breaks: "all pairs are copied, whatever number stands in device memory",
    },
    Fault {
        name: "last chunk",
        family: "copy_blocks",
        line: "add.u32 %r_x, %r_x, 8191;",
        instead: "max.u32 %r_x, %r_x, 8192;",
        breaks: "the end of a block that is no multiple of a chunk is not copied",
    },
    Fault {
        name: "pair of an item",
        family: "copy_blocks",
        line: "sub.u32 %r_pair, %r_x, %r_y;",
        instead: "mov.u32 %r_pair, 0;",
        breaks: "only the first pair is copied",
    },
    Fault {
        name: "wide numbers",
        family: "copy_blocks",
        line: "@%p_wide ld.global.u32 %r_from_high, [%rd_x + 4];",
        instead: "",
        breaks: "2^32 of an s64 counts as block 0",
    },
    Fault {
        name: "skipped pair",
        family: "copy_blocks",
        line: "setp.lt.and.u32 %p_there, %r_to, %r_to_blocks, %p_there;",
        instead: "min.u32 %r_to, %r_to, 0;",
        breaks: "every pair, skipped ones too, is copied to block 0",
    },
    Fault {
        name: "stride of V",
        family: "copy_blocks",
        line: "selp.b64 %rd_to_block, %rd_x, %rd_to_block, %p_value;",
        instead: "min.u64 %rd_to_block, %rd_x, %rd_to_block;",
        breaks: "blocks of the longer of K and V are written too close to each other",
    },
    Fault {
        name: "length of V",
        family: "copy_blocks",
        line: "selp.b32 %r_units, %r_x, %r_units, %p_value;",
        instead: "min.u32 %r_units, %r_x, %r_units;",
        breaks: "the longer of K and V is cut",
    },
    Fault {
        name: "chunk of an item",
        family: "copy_blocks",
        line: "mad.lo.u32 %r_unit, %r_chunk, 512, %r_tid;",
        instead: "mov.u32 %r_unit, %r_tid;",
        breaks: "only the first chunk of a block is copied",
    },
    Fault {
        name: "gaps between rows",
        family: "copy_blocks",
        line: "@%p_whole bra WHOLE;",
        instead: "min.u32 %r_units, %r_units, %r_row_units;\n    bra WHOLE;",
        breaks: "of a block with gaps only the first row is copied",
    },
    Fault {
        name: "outer row",
        family: "copy_blocks",
        line: "mad.lo.u64 %rd_to1, %rd_x, %rd_to_outer, %rd_to1;",
        instead: "",
        breaks: "all outer rows are written over the first",
    },
    Fault {
        name: "move under way",
        family: "copy_blocks",
        line: "mad.wide.u32 %rd_from2, %r_unit, 16, %rd_from;",
        instead: "mov.u64 %rd_from2, %rd_from1;",
        breaks: "the third move of a thread stores what the second has loaded",
    },
    Fault {
        name: "next item",
        family: "copy_blocks",
        line: "add.u32 %r_item, %r_item, %r_step;",
        instead: "ret;",
        breaks: "a thread block that has several items does the first",
    },
];
