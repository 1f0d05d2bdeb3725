//! Faults of one line each, planted in kernels to see that the tests find them.
//!
//! Owns the table and how a fault gets into a text. A fault must end (no endless loop) and stay within the memory that
//! the kernel may touch, so that it shows as a wrong result and not as a dead GPU.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// One line of a kernel family's text that becomes another.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    pub name: &'static str,
    /// The kernels that it is planted in: their entry points begin so.
    pub family: &'static str,
    /// The line as it is rendered, without indentation and comment. Its first occurrence is meant.
    pub line: &'static str,
    /// What stands there instead; may be nothing, or several lines.
    pub instead: &'static str,
    /// What is wrong then.
    pub breaks: &'static str,
}

impl Fault {
    /// A function that plants the fault wherever its line is, and a count of the kernels that had it.
    pub fn planted(self) -> (impl Fn(&str, &str) -> String + Send + Sync + 'static, Arc<AtomicUsize>) {
        let count = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&count);
        let alter = move |entry: &str, text: &str| {
            if !entry.starts_with(self.family) {
                return text.to_owned();
            }
            let mut found = false;
            let mut altered = String::with_capacity(text.len());
            for line in text.split_inclusive('\n') {
                let code = line.split_once("//").map_or(line, |(code, _)| code).trim();
                if !found && code == self.line {
                    found = true;
                    altered.push_str(self.instead);
                    altered.push('\n');
                } else {
                    altered.push_str(line);
                }
            }
            counted.fetch_add(usize::from(found), Ordering::Relaxed);
            altered
        };
        (alter, count)
    }
}

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
