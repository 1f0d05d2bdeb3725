//# Variables: name, source, cache (element types); access ("vec4", "word", "half"); elements,
//# source_units, cache_units (what an invocation moves); source_type, cache_type (element types of the
//# arrays); workgroup_size.
//% import "lib/elements.wgsl" as elements_lib
//% set converts = source != cache
//% set sides = ["key", "value"]
// ${ name }: store the K and V rows of new tokens into the blocks of a paged cache.
//
//   key         [tokens, kv_heads, head_dim_k]                ${ source }
//   value       [tokens, kv_heads, head_dim_v]                ${ source }
//   slots       [tokens]                                      block * block_size + place in the block
//   key_cache   [blocks, block_size, kv_heads, head_dim_k]    ${ cache }
//   value_cache [blocks, block_size, kv_heads, head_dim_v]    ${ cache }
//
// Every tensor has strides of its own. Offsets and strides count the arrays' elements: ${ source_type }
// (${ elements // source_units } x ${ source }) in key and value, ${ cache_type } (${ elements // cache_units } x ${ cache }) in the caches.
// A slot that is not below num_slots, which includes a negative one read as u32, skips its token.
//
// An invocation moves a piece: ${ elements } element${ "s" if elements > 1 } of one head of one token, first of K and then of V.
// Neighbouring invocations have neighbouring pieces, then heads, then tokens. Rows start at whole array
// elements, so no two invocations ever write the same word.
//
// Source: the fused reshape and block write of Kwon et al., "Efficient Memory Management for Large
// Language Model Serving with PagedAttention" (SOSP 2023), section 5.1.
//% if access == "half"
enable f16;
//% endif

struct Params {
    tokens: u32,
    kv_heads: u32,
    block_size: u32,
    num_slots: u32,    // blocks * block_size
    slots_offset: u32,
    pieces: u32,       // of the longer of a K and a V row
    key_pieces: u32,
    value_pieces: u32,
//% for side in sides
    ${ side }_offset: u32,
    ${ side }_token_stride: u32,
    ${ side }_head_stride: u32,
//% endfor
//% for side in sides
    ${ side }_cache_offset: u32,
    ${ side }_cache_block_stride: u32,
    ${ side }_cache_token_stride: u32,
    ${ side }_cache_head_stride: u32,
//% endfor
    unused_0: u32,
    unused_1: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> key: array<${ source_type }>;
@group(0) @binding(2) var<storage, read> value: array<${ source_type }>;
@group(0) @binding(3) var<storage, read> slots: array<u32>;
@group(0) @binding(4) var<storage, read_write> key_cache: array<${ cache_type }>;
@group(0) @binding(5) var<storage, read_write> value_cache: array<${ cache_type }>;

//% if converts and (source == "bf16" or (source == "f16" and access != "half"))
${ elements_lib.widen(source) }
//% endif
//% if converts and cache != "f32"
${ elements_lib.narrow_one(cache) }
//% endif
//% if converts and cache != "f32" and access != "half"
${ elements_lib.narrow() }
//% endif
@compute @workgroup_size(${ workgroup_size })
fn write_kv(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    // Workgroups continue along y where x has reached the device's limit.
    let index = (group.y * groups.x + group.x) * ${ workgroup_size }u + lane;
    let piece = index % params.pieces;
    let row = index / params.pieces;
    let head = row % params.kv_heads;
    let token = row / params.kv_heads;
    if (token >= params.tokens) {
        return;
    }
    let slot = slots[params.slots_offset + token];
    if (slot >= params.num_slots) {
        return;
    }
    let block = slot / params.block_size;
    let place = slot % params.block_size;
//% for side in sides

    if (piece < params.${ side }_pieces) {
        let source = params.${ side }_offset + token * params.${ side }_token_stride
            + head * params.${ side }_head_stride + piece * ${ source_units }u;
        let dest = params.${ side }_cache_offset + block * params.${ side }_cache_block_stride
            + place * params.${ side }_cache_token_stride + head * params.${ side }_cache_head_stride
            + piece * ${ cache_units }u;
//% if not converts
        ${ side }_cache[dest] = ${ side }[source];
//% elif access == "half" and cache == "f16"
        ${ side }_cache[dest] = f16(unpack2x16float(narrow_one(bitcast<f32>(${ side }[source]))).x);
//% elif access == "half"
        ${ side }_cache[dest] = bitcast<u32>(f32(${ side }[source]));
//% elif access == "word" and source == "f32"
        ${ side }_cache[dest] = narrow(vec2<f32>(bitcast<f32>(${ side }[source]), bitcast<f32>(${ side }[source + 1u])));
//% elif access == "word" and cache == "f32"
        let pair = bitcast<vec2<u32>>(widen(${ side }[source]));
        ${ side }_cache[dest] = pair.x;
        ${ side }_cache[dest + 1u] = pair.y;
//% elif access == "word"
        ${ side }_cache[dest] = narrow(widen(${ side }[source]));
//% elif source == "f32"
        let low = bitcast<vec4<f32>>(${ side }[source]);
        let high = bitcast<vec4<f32>>(${ side }[source + 1u]);
        ${ side }_cache[dest] = vec4<u32>(narrow(low.xy), narrow(low.zw), narrow(high.xy), narrow(high.zw));
//% elif cache == "f32"
        let words = ${ side }[source];
        ${ side }_cache[dest] = bitcast<vec4<u32>>(vec4<f32>(widen(words.x), widen(words.y)));
        ${ side }_cache[dest + 1u] = bitcast<vec4<u32>>(vec4<f32>(widen(words.z), widen(words.w)));
//% else
        let words = ${ side }[source];
        ${ side }_cache[dest] = vec4<u32>(
            narrow(widen(words.x)), narrow(widen(words.y)), narrow(widen(words.z)), narrow(widen(words.w)));
//% endif
    }
//% endfor
}
