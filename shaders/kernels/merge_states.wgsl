//# Variables: name, part, out (element types); elements (of a piece: 1, 2 or 4), part_words, out_words (of a piece);
//# workgroup_size.
//% import "lib/elements.wgsl" as elements_lib
// ${ name }: attention over disjoint sets of keys, put together by its log-sum-exp.
//
//   part_out [parts, rows, heads, head_dim]   ${ part }, any strides, in words of 4 bytes
//   part_lse [parts, rows, heads]             f32, natural logarithm; -inf where a part has no key
//   out      [rows, heads, head_dim]          ${ out }, any strides, in words
//   lse      [rows, heads]                    f32; -inf, and zeros in out, where every part is empty
//
// An invocation merges ${ elements } element${ "s" if elements > 1 } of one head; neighbours take neighbouring pieces of a row. The log-sum-exps of
// a head are read by all of its invocations, twice: once for the largest, once for the weights.
//
// Bytes: the parts that are not empty, once; their log-sum-exps; the output.
// Source: the merge of the online softmax, Milakov and Gimelshein (2018); for attention states Ye et al.,
// "FlashInfer" (2025), section 2.2.

struct Params {
    parts: u32,
    rows: u32,
    heads: u32,
    pieces: u32,           // of a head
    out_offset: u32,       // in words, as all that follow
    out_row_stride: u32,
    out_head_stride: u32,
    part_out_offset: u32,
    part_out_stride: u32,  // from a part to the next
    part_out_row_stride: u32,
    part_out_head_stride: u32,
    part_lse_offset: u32,
    part_lse_stride: u32,
    part_lse_row_stride: u32,
    part_lse_head_stride: u32,
    lse_offset: u32,
    lse_row_stride: u32,
    lse_head_stride: u32,
    has_lse: u32,
    unused: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> part_out: array<u32>;
@group(0) @binding(2) var<storage, read> part_lse: array<u32>;
@group(0) @binding(3) var<storage, read_write> out: array<u32>;
@group(0) @binding(4) var<storage, read_write> lse: array<u32>;

const LOG2_E: f32 = 1.4426950408889634;
const LN_2: f32 = 0.6931471805599453;
// Minus infinity by its bits: WGSL lets a compiler assume that no number is infinite.
const EMPTY: u32 = 0xff800000u;

//% if part != "f32"
${ elements_lib.widen(part) }
//% endif
//% if out != "f32"
${ elements_lib.narrow_one(out) }
${ elements_lib.narrow() }
//% endif

@compute @workgroup_size(${ workgroup_size })
fn merge_states(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    // Workgroups continue along y where x has reached the device's limit.
    let index = (group.y * groups.x + group.x) * ${ workgroup_size }u + lane;
    let piece = index % params.pieces;
    let head = (index / params.pieces) % params.heads;
    let row = index / params.pieces / params.heads;
    if (row >= params.rows) {
        return;
    }
    let part_lse_at = params.part_lse_offset + row * params.part_lse_row_stride + head * params.part_lse_head_stride;
    let part_out_at = params.part_out_offset + row * params.part_out_row_stride
        + head * params.part_out_head_stride + piece * ${ part_words }u;

    var largest = -3.4e38;
    var empty = true;
    for (var part = 0u; part < params.parts; part++) {
        let bits = part_lse[part_lse_at + part * params.part_lse_stride];
        if (bits != EMPTY) {
            largest = max(largest, bitcast<f32>(bits));
            empty = false;
        }
    }
    var sum = 0.0;
    var merged = vec4<f32>(0.0);
    for (var part = 0u; part < params.parts; part++) {
        let bits = part_lse[part_lse_at + part * params.part_lse_stride];
        // What an empty part has for an output does not matter: 0 * NaN is NaN.
        if (bits != EMPTY) {
            let weight = exp2(LOG2_E * (bitcast<f32>(bits) - largest));
            let at = part_out_at + part * params.part_out_stride;
//% if part == "f32" and elements == 4
            let x = bitcast<vec4<f32>>(vec4<u32>(part_out[at], part_out[at + 1u], part_out[at + 2u], part_out[at + 3u]));
//% elif part == "f32" and elements == 2
            let x = vec4<f32>(bitcast<f32>(part_out[at]), bitcast<f32>(part_out[at + 1u]), 0.0, 0.0);
//% elif part == "f32"
            let x = vec4<f32>(bitcast<f32>(part_out[at]), 0.0, 0.0, 0.0);
//% elif elements == 4
            let x = vec4<f32>(widen(part_out[at]), widen(part_out[at + 1u]));
//% else
            let x = vec4<f32>(widen(part_out[at]), 0.0, 0.0);
//% endif
            sum += weight;
            merged = fma(vec4<f32>(weight), x, merged);
        }
    }
    if (!empty) {
        merged /= sum;
    }
    let at = params.out_offset + row * params.out_row_stride + head * params.out_head_stride + piece * ${ out_words }u;
//% if out == "f32"
    let words = bitcast<vec4<u32>>(merged);
//% for i in range(elements)
    out[at + ${ i }u] = words[${ i }];
//% endfor
//% else
    out[at] = narrow(merged.xy);
//% if elements == 4
    out[at + 1u] = narrow(merged.zw);
//% endif
//% endif
    if (piece == 0u && params.has_lse != 0u) {
        let value = bitcast<u32>(largest + LN_2 * log2(max(sum, 1.0)));
        lse[params.lse_offset + row * params.lse_row_stride + head * params.lse_head_stride] = select(value, EMPTY, empty);
    }
}
