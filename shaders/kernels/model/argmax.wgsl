//# Variables: name, workgroup_size.
//% import "lib/sampling.wgsl" as sampling
// ${ name }: the likeliest token of each row of logits, the lowest id of equal ones.
//
//   x    [rows, width]    f32, read as their bits
//   out  [rows]           u32; 0xffffffff for a row of nothing but NaN and negative infinity, which are never chosen
//
// A workgroup searches a row. Numbers are compared by their bits as integers of the same order, so that NaN, which
// WGSL lets a compiler assume away, is told apart and never wins; the two zeros are equal.

struct Params {
    rows: u32,
    width: u32,
    x_offset: u32,
    x_stride: u32,
    out_offset: u32,
    unused_0: u32,
    unused_1: u32,
    unused_2: u32,
    unused_3: u32,
    unused_4: u32,
    unused_5: u32,
    unused_6: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<u32>;
@group(0) @binding(2) var<storage, read_write> out: array<u32>;

var<workgroup> best_key: array<u32, ${ workgroup_size }>;
var<workgroup> best_id: array<u32, ${ workgroup_size }>;

${ sampling.ordered() }

@compute @workgroup_size(${ workgroup_size })
fn argmax(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    // Workgroups continue along y where x has reached the device's limit.
    let row = group.y * groups.x + group.x;
    if (row >= params.rows) {
        return;
    }
    let base = params.x_offset + row * params.x_stride;
    var key = 0u;
    var id = 0xffffffffu;
    for (var i = lane; i < params.width; i += ${ workgroup_size }u) {
        let other = order(x[base + i]);
        if (other > key) {
            key = other;
            id = i;
        }
    }
    best_key[lane] = key;
    best_id[lane] = id;
    for (var half = ${ workgroup_size // 2 }u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if (lane < half) {
            let other = lane + half;
            let larger = best_key[other] > best_key[lane];
            let lower = best_key[other] == best_key[lane] && best_id[other] < best_id[lane];
            if (larger || lower) {
                best_key[lane] = best_key[other];
                best_id[lane] = best_id[other];
            }
        }
    }
    if (lane == 0u) {
        out[params.out_offset + row] = best_id[0];
    }
}
