//# Variables: name, dtype, workgroup_size.
//% import "lib/elements.wgsl" as elements_lib
//% import "lib/wide.wgsl" as wide
// ${ name }: random weights, the same for a seed on every device: center + spread * u(first + element).
//
//   out  [rows, stride]    ${ dtype }${ "" if dtype == "f32" else ", two to a word" }; behind `width` elements a row is filled up with zeros
//
// u(n) is uniform in [-1, 1): with z = seed + (n + 1) * 0x9e3779b97f4a7c15 (modulo 2^64), mixed as SplitMix64 does (Steele,
// Lea and Flood 2014), its upper 24 bits as a whole number from -2^23 up, divided by 2^23. An invocation has a word.

struct Params {
    words: u32,
    width: u32,
    stride: u32,
    offset: u32,          // words
    first_low: u32,
    first_high: u32,
    seed_low: u32,
    seed_high: u32,
    center: f32,
    spread: f32,
    unused_0: u32,
    unused_1: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read_write> out: array<u32>;

${ wide.multiply() }

${ wide.add() }

${ wide.multiply_low() }

//% if dtype != "f32"
${ elements_lib.narrow_one(dtype) }

${ elements_lib.narrow() }

//% endif
fn xor_shifted(z: vec2<u32>, bits: u32) -> vec2<u32> {
    return z ^ vec2<u32>((z.x >> bits) | (z.y << (32u - bits)), z.y >> bits);
}

// An element by its number in the buffer.
fn element(index: u32) -> f32 {
    let row = index / params.stride;
    let column = index % params.stride;
    if (column >= params.width) {
        return 0.0;
    }
    let place = add64(mul_wide(row, params.width), vec2<u32>(column, 0u));
    let place_in_tensor = add64(place, vec2<u32>(params.first_low, params.first_high));
    let n = add64(place_in_tensor, vec2<u32>(1u, 0u));
    var z = mul_low64(n, vec2<u32>(0x7f4a7c15u, 0x9e3779b9u));
    z = add64(z, vec2<u32>(params.seed_low, params.seed_high));
    z = mul_low64(xor_shifted(z, 30u), vec2<u32>(0x1ce4e5b9u, 0xbf58476du));
    z = mul_low64(xor_shifted(z, 27u), vec2<u32>(0x133111ebu, 0x94d049bbu));
    z = xor_shifted(z, 31u);
    let uniform_ = (f32(z.y >> 8u) - 8388608.0) * 0x1p-23;
    return params.center + params.spread * uniform_;
}

@compute @workgroup_size(${ workgroup_size })
fn fill_weights(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    // Workgroups continue along y where x has reached the device's limit.
    let index = (group.y * groups.x + group.x) * ${ workgroup_size }u + lane;
    if (index >= params.words) {
        return;
    }
//% if dtype == "f32"
    out[params.offset + index] = bitcast<u32>(element(index));
//% else
    out[params.offset + index] = narrow(vec2<f32>(element(2u * index), element(2u * index + 1u)));
//% endif
}
