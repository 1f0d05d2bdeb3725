//! Faults of attention in WGSL, in variants for heads of 64 elements.

use super::Fault;

const MATRIX: &str = "prefill_matrix";

/// Faults of `prefill_matrix`.
pub const PREFILL_MATRIX: &[Fault] = &[
    Fault {
        name: "mask's end",
        family: MATRIX,
        line: "var sees_1 = (keys_1 >= vec4<u32>(row_begin)) & (keys_1 < vec4<u32>(row_end));",
        instead: "var sees_1 = (keys_1 >= vec4<u32>(row_begin)) & (keys_1 <= vec4<u32>(row_end));",
        breaks: "a row sees one key more than it may",
    },
    Fault {
        name: "plain to the end",
        family: MATRIX,
        line: "let plain = first >= plain_begin && first + 32u <= plain_end;",
        instead: "let plain = first >= plain_begin && first < plain_end;",
        breaks: "tiles on the diagonal have no mask",
    },
    Fault {
        name: "plain from the beginning",
        family: MATRIX,
        line: "let plain = first >= plain_begin && first + 32u <= plain_end;",
        instead: "let plain = first + 32u <= plain_end;",
        breaks: "windows have no lower end",
    },
    Fault {
        name: "page of a key",
        family: MATRIX,
        line: "let block = plan[table + (key >> params.block_shift)];",
        instead: "let block = plan[table + (min(key + 1u, last) >> params.block_shift)];",
        breaks: "the last key of a block comes from the next block",
    },
    Fault {
        name: "keys of the third tile",
        family: MATRIX,
        line: "let key = min(first + 64u + thread, last);",
        instead: "let key = min(first + 32u + thread, last);",
        breaks: "tiles from the third on are those before them",
    },
    Fault {
        name: "places of a tile",
        family: MATRIX,
        line: "let third_slot = select(next_slot + 32u, 0u, next_slot == 64u);",
        instead: "let third_slot = select(next_slot + 32u, 0u, next_slot != 0u);",
        breaks: "a tile's places are lost before it is read",
    },
    Fault {
        name: "stride of V",
        family: MATRIX,
        line: "let at = 576u + key * 18u + v_i_0 % 16u;",
        instead: "let at = 576u + key * 16u + v_i_0 % 16u;",
        breaks: "rows of V are not where the matrices look for them",
    },
    Fault {
        name: "outputs not rescaled",
        family: MATRIX,
        line: "scores[s_at + 0u] *= rescale;",
        instead: "",
        breaks: "some elements keep the weight of an old maximum",
    },
    Fault {
        name: "sum not rescaled",
        family: MATRIX,
        line: "sum *= rescale;",
        instead: "",
        breaks: "a row's sum keeps the weight of an old maximum",
    },
    Fault {
        name: "maximum that moved",
        family: MATRIX,
        line: "if (moves && maximum != LOWEST) {",
        instead: "if (moves && maximum != LOWEST && lane == 0u) {",
        breaks: "outputs follow only when a row of the first lane moves",
    },
    Fault {
        name: "maximum of a row",
        family: MATRIX,
        line: "peaks = max(peaks, x_1);",
        instead: "",
        breaks: "some keys do not count for the maximum, and their probabilities leave the range of f16",
    },
    Fault {
        name: "sum of a row",
        family: MATRIX,
        line: "sums += p_1;",
        instead: "",
        breaks: "some keys do not count for the sum",
    },
    Fault {
        name: "keys that nobody sees",
        family: MATRIX,
        line: "tile[at] = select(vec4<f16>(), v_0, wanted);",
        instead: "tile[at] = v_0;",
        breaks: "NaN of a key that no row sees reaches the sums",
    },
    Fault {
        name: "bits of an earlier tile",
        family: MATRIX,
        line: "atomicStore(&flags[next_turn + thread], 0u);",
        instead: "",
        breaks: "keys that nobody sees pass for seen where an earlier tile's were",
    },
    Fault {
        name: "word of a row",
        family: MATRIX,
        line: "let word_1 = plan[mask + (min(keys_1.x, last) >> 5u)] >> (keys_1.x & 31u);",
        instead: "let word_1 = plan[mask] >> (keys_1.x & 31u);",
        breaks: "all tiles have the bits of the first",
    },
    Fault {
        name: "head of a row",
        family: MATRIX,
        line: "let head = first_head + row % heads;",
        instead: "let head = first_head;",
        breaks: "all rows take the query of their group's first head",
    },
    Fault {
        name: "partial result's row",
        family: MATRIX,
        line: "let at = ((first_partial + query * splits + split) * q_heads + head) * (params.v_vectors + 1u);",
        instead: "let at = ((first_partial + query * splits) * q_heads + head) * (params.v_vectors + 1u);",
        breaks: "the states of a row's splits overlap",
    },
    Fault {
        name: "natural logarithm",
        family: MATRIX,
        line: "let value = bitcast<u32>(LN_2 * (with_sink + log2(total)));",
        instead: "let value = bitcast<u32>(with_sink + log2(total));",
        breaks: "lse is in base 2",
    },
];

/// Faults of `prefill` in tiles through workgroup memory.
pub const PREFILL_TILED: &[Fault] = &[
    Fault {
        name: "mask's end",
        family: "prefill",
        line: "var sees_0 = (keys >= vec4<u32>(begin_0)) & (keys < vec4<u32>(min(end_0, end)));",
        instead: "var sees_0 = (keys >= vec4<u32>(begin_0)) & (keys <= vec4<u32>(min(end_0, end)));",
        breaks: "some rows see one key more than they may",
    },
    Fault {
        name: "plain tile",
        family: "prefill",
        line: "let plain = first >= plain_begin && first + 64u <= plain_end;",
        instead: "let plain = first >= plain_begin && first < plain_end;",
        breaks: "a tile passes for one that all rows see where they see its first key",
    },
    Fault {
        name: "place in the block",
        family: "prefill",
        line: "let place = key & block_mask;",
        instead: "let place = key & (block_mask >> 2u);",
        breaks: "rows of K and V come from the first quarter of a block",
    },
    Fault {
        name: "row of a staged key",
        family: "prefill",
        line: "let row = (key % 4u) * 16u + key / 4u;",
        instead: "let row = key;",
        breaks: "keys are not where their lanes look for them",
    },
    Fault {
        name: "outputs not rescaled",
        family: "prefill",
        line: "acc_0_0 *= rescale_0.x;",
        instead: "",
        breaks: "an output keeps the weight of an old maximum",
    },
    Fault {
        name: "sum not rescaled",
        family: "prefill",
        line: "sum_0 *= rescale_0;",
        instead: "",
        breaks: "sums keep the weight of an old maximum",
    },
    Fault {
        name: "keys that nobody sees",
        family: "prefill",
        line: "let wanted = ((atomicLoad(&seen[key / 32u]) >> (key % 32u)) & 1u) != 0u;",
        instead: "let wanted = true;",
        breaks: "NaN of a key that no row sees reaches the sums",
    },
    Fault {
        name: "partial result's row",
        family: "prefill",
        line: "let at = ((first_partial + query_0 * splits + split) * q_heads + head_0) * (params.v_vectors + 1u);",
        instead: "let at = ((first_partial + query_0 * splits) * q_heads + head_0) * (params.v_vectors + 1u);",
        breaks: "partial results of a row overlap",
    },
];

/// Faults of `decode` in WGSL, where four query heads share a KV head.
pub const DECODE_WGSL: &[Fault] = &[
    Fault {
        name: "place of a key",
        family: "decode",
        line: "let place_0 = min(key_0, last) & block_mask;",
        instead: "let place_0 = min(key_0, last) & (block_mask >> 2u);",
        breaks: "rows of V come from the first quarter of a block",
    },
    Fault {
        name: "keys past the end",
        family: "decode",
        line: "let seen_0 = key_0 < end;",
        instead: "let seen_0 = true;",
        breaks: "the last key counts once more for each that is not there",
    },
    Fault {
        name: "sum not rescaled",
        family: "decode",
        line: "sum *= rescale;",
        instead: "",
        breaks: "a group's sum keeps the weight of an old maximum",
    },
    Fault {
        name: "output not rescaled",
        family: "decode",
        line: "acc_0_0 *= rescale_0;",
        instead: "",
        breaks: "a group's outputs keep the weight of an old maximum",
    },
    Fault {
        name: "weight of a group",
        family: "decode",
        line: "let weight_1 = exp2(states[group * 4u + 1u].x - maximum_1);",
        instead: "let weight_1 = 1.0;",
        breaks: "groups count alike, whatever their maxima",
    },
    Fault {
        name: "split's place",
        family: "decode",
        line: "let at = ((first_partial + split) * q_heads + head) * (params.v_vectors + 1u);",
        instead: "let at = (first_partial * q_heads + head) * (params.v_vectors + 1u);",
        breaks: "all splits of a row store their results in the same place",
    },
];
