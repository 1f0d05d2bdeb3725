//# Variables: name, workgroup_size.
// ${ name }: rotary position embedding (Su et al. 2021) of heads in place, in the half-split form.
//
//   cos_sin [rows, 2, half]            f32, cosines and then sines of each row's position
//   x       [rows, heads, head_dim]    f32; of each head, element i < half is paired with element i + half
//
// An invocation rotates a pair.

struct Params {
    rows: u32,
    heads: u32,
    head_dim: u32,
    half: u32,
    x_offset: u32,
    x_stride: u32,
    unused_0: u32,
    unused_1: u32,
    unused_2: u32,
    unused_3: u32,
    unused_4: u32,
    unused_5: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> cos_sin: array<f32>;
@group(0) @binding(2) var<storage, read_write> x: array<f32>;

@compute @workgroup_size(${ workgroup_size })
fn rotary(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    // Workgroups continue along y where x has reached the device's limit.
    let index = (group.y * groups.x + group.x) * ${ workgroup_size }u + lane;
    let pair = index % params.half;
    let head = (index / params.half) % params.heads;
    let row = index / params.half / params.heads;
    if (row >= params.rows) {
        return;
    }
    let angles = row * 2u * params.half + pair;
    let cosine = cos_sin[angles];
    let sine = cos_sin[angles + params.half];
    let low = params.x_offset + row * params.x_stride + head * params.head_dim + pair;
    let high = low + params.half;
    let a = x[low];
    let b = x[high];
    x[low] = a * cosine - b * sine;
    x[high] = b * cosine + a * sine;
}
