//# Variables: name, unit (WGSL type), unit_bytes, workgroup_size.
//% set sides = ["key", "value"]
// ${ name }: copy blocks within a paged cache (copy-on-write).
//
//   pairs       [pairs, 2]                                     source and destination block, u32
//   key_cache   [blocks, block_size, kv_heads, head_dim_k]     any strides, in units of ${ unit_bytes } bytes
//   value_cache [blocks, block_size, kv_heads, head_dim_v]     the same
//
// An invocation moves a unit of one head of one token of one pair, first of K and then of V. Neighbouring invocations
// have neighbouring units, then heads, then tokens, then pairs. No block is written twice, or read and written: the
// order does not matter.
//
// Source: copy-on-write in Kwon et al., "Efficient Memory Management for Large Language Model Serving with
// PagedAttention" (SOSP 2023), sections 4.4 and 5.1.

struct Params {
    pairs: u32,
    pairs_offset: u32,
    kv_heads: u32,
    block_size: u32,
    units: u32,       // of the longer of a K and a V row
    key_units: u32,
    value_units: u32,
//% for side in sides
    ${ side }_offset: u32,
    ${ side }_block_stride: u32,
    ${ side }_token_stride: u32,
    ${ side }_head_stride: u32,
//% endfor
    unused: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> pairs: array<u32>;
@group(0) @binding(2) var<storage, read_write> key_cache: array<${ unit }>;
@group(0) @binding(3) var<storage, read_write> value_cache: array<${ unit }>;

@compute @workgroup_size(${ workgroup_size })
fn copy_blocks(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    // Workgroups continue along y where x has reached the device's limit.
    let index = (workgroup.y * workgroups.x + workgroup.x) * ${ workgroup_size }u + thread;
    let unit = index % params.units;
    let row = index / params.units;
    let head = row % params.kv_heads;
    let token = (row / params.kv_heads) % params.block_size;
    let pair = row / params.kv_heads / params.block_size;
    if (pair >= params.pairs) {
        return;
    }
    let source = pairs[params.pairs_offset + 2u * pair];
    let dest = pairs[params.pairs_offset + 2u * pair + 1u];
//% for side in sides
    if (unit < params.${ side }_units) {
        let place = params.${ side }_offset + token * params.${ side }_token_stride
            + head * params.${ side }_head_stride + unit;
        ${ side }_cache[place + dest * params.${ side }_block_stride] =
            ${ side }_cache[place + source * params.${ side }_block_stride];
    }
//% endfor
}
