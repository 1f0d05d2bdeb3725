//! Faults of attention in WGSL: prefill on matrix units, in variants of heads of 64 elements.

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
