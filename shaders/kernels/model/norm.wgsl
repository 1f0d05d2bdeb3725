//# Variables: name, kind ("rms" or "layer"), in_place, workgroup_size.
//% import "lib/dense.wgsl" as dense_lib
//% set source = "out" if in_place else "x"
// ${ name }: ${ "RMSNorm (Zhang and Sennrich 2019)" if kind == "rms" else "LayerNorm (Ba et al. 2016)" }${ " in place" if in_place }.
//
//% if not in_place
//   x       [rows, parts, width]    f32
//% endif
//   weight  [width]                 f32
//% if kind == "layer"
//   bias    [width]                 f32
//% endif
//   out     [rows, parts, width]    f32: ${ "x / sqrt(mean(x^2) + eps) * weight" if kind == "rms" else "(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias" }
//
// A workgroup norms a part of a row (a head, or the whole row); its invocations take the elements in turn.

struct Params {
    count: u32,       // rows * parts
    parts: u32,
    width: u32,
    eps: f32,
    x_offset: u32,
    x_stride: u32,
    out_offset: u32,
    out_stride: u32,
    weight_offset: u32,
    bias_offset: u32,
    unused_0: u32,
    unused_1: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> weight: array<f32>;
//% if kind == "layer"
@group(0) @binding(2) var<storage, read> bias: array<f32>;
//% endif
//% if not in_place
@group(0) @binding(3) var<storage, read> x: array<f32>;
//% endif
@group(0) @binding(4) var<storage, read_write> out: array<f32>;

var<workgroup> sums: array<f32, ${ workgroup_size }>;

${ dense_lib.sum_all(workgroup_size) }

@compute @workgroup_size(${ workgroup_size })
fn norm(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    // Workgroups continue along y where x has reached the device's limit.
    let index = group.y * groups.x + group.x;
    if (index >= params.count) {
        return;
    }
    let row = index / params.parts;
    let part = (index % params.parts) * params.width;
    let dest = params.out_offset + row * params.out_stride + part;
//% if in_place
    let source = dest;
//% else
    let source = params.x_offset + row * params.x_stride + part;
//% endif
    let width = f32(params.width);
//% if kind == "layer"
    var total = 0.0;
    for (var i = lane; i < params.width; i += ${ workgroup_size }u) {
        total += ${ source }[source + i];
    }
    let mean = sum_all(total, lane) / width;
//% endif
    var squares = 0.0;
    for (var i = lane; i < params.width; i += ${ workgroup_size }u) {
        let value = ${ source }[source + i]${ " - mean" if kind == "layer" };
        squares += value * value;
    }
    let factor = 1.0 / sqrt(sum_all(squares, lane) / width + params.eps);
    for (var i = lane; i < params.width; i += ${ workgroup_size }u) {
//% if kind == "layer"
        let normed = (${ source }[source + i] - mean) * factor;
        out[dest + i] = normed * weight[params.weight_offset + i] + bias[params.bias_offset + i];
//% else
        out[dest + i] = weight[params.weight_offset + i] * (${ source }[source + i] * factor);
//% endif
    }
}
