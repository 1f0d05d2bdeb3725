//# Variables: name, op ("silu", "gelu", "gelu_tanh", "relu", "add", "scale", "softcap"), gated, workgroup_size.
//% set function = op in ["silu", "gelu", "gelu_tanh", "relu"]
//% set binary = op == "add"
// ${ name }: ${ formula }, element by element.
//
//% if function or binary
//   x    [rows, width]    f32
//% endif
//% if gated
//   y    [rows, width]    f32
//% endif
//   out  [rows, width]    f32
//
// An invocation has an element.

struct Params {
    rows: u32,
    width: u32,
    x_offset: u32,
    x_stride: u32,
    y_offset: u32,
    y_stride: u32,
    out_offset: u32,
    out_stride: u32,
    factor: f32,       // of scale and softcap
    unused_0: u32,
    unused_1: u32,
    unused_2: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
//% if function or binary
@group(0) @binding(1) var<storage, read> x: array<f32>;
//% endif
//% if gated
@group(0) @binding(2) var<storage, read> y: array<f32>;
//% endif
@group(0) @binding(3) var<storage, read_write> out: array<f32>;

//% if op == "silu"
fn f(v: f32) -> f32 {
    // Above 88 exp overflows, and WGSL lets a compiler assume that there is no infinity: the result is -0 there.
    return v / (1.0 + exp(min(-v, 88.0)));
}
//% elif op == "relu"
fn f(v: f32) -> f32 {
    return select(v, 0.0, v < 0.0);
}
//% elif op == "gelu_tanh"
fn f(v: f32) -> f32 {
    // v / 2 * (1 + tanh(u)) by (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)), u = sqrt(2 / pi) * (v + 0.044715 v^3)
    let cubic = 0.044715 * v * v * v + v;
    return v / (1.0 + exp(min(-1.5957691 * cubic, 88.0)));
}
//% elif op == "gelu"
fn f(v: f32) -> f32 {
    // The tail of the normal distribution, erfc(z) / 2, as t * exp(-z^2) * P(t) with t = 1 / (1 + z / 2).
    let z = abs(v) * 0.70710678;
    let t = 1.0 / (1.0 + 0.5 * z);
    var p = -0.05906635;
    p = p * t + 0.2845632;
    p = p * t - 0.4871776;
    p = p * t + 0.27804396;
    p = p * t - 0.026611252;
    p = p * t + 0.2026814;
    p = p * t + 0.24310498;
    p = p * t + 0.28237516;
    p = p * t + 0.28208643;
    let tail = 0.5 * t * exp(max(-z * z, -88.0)) * p;
    return v * select(1.0 - tail, tail, v < 0.0);
}
//% elif op == "softcap"
fn f(v: f32) -> f32 {
    // The hyperbolic tangent: near 0 by its series, elsewhere by exp, which must not overflow.
    let u = v / params.factor;
    let square = u * u;
    let series = ((62.0 / 2835.0 * square - 17.0 / 315.0) * square + 2.0 / 15.0) * square - 1.0 / 3.0;
    let near = series * square * u + u;
    let far = 1.0 - 2.0 / (exp(clamp(2.0 * u, -40.0, 40.0)) + 1.0);
    return params.factor * select(far, near, abs(u) < 0.25);
}
//% endif

@compute @workgroup_size(${ workgroup_size })
fn elementwise(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    // Workgroups continue along y where x has reached the device's limit.
    let index = (group.y * groups.x + group.x) * ${ workgroup_size }u + lane;
    let row = index / params.width;
    let column = index % params.width;
    if (row >= params.rows) {
        return;
    }
    let dest = params.out_offset + row * params.out_stride + column;
//% if function or binary
    let value = x[params.x_offset + row * params.x_stride + column];
//% endif
//% if binary
    out[dest] += value;
//% elif gated
    out[dest] = f(value) * y[params.y_offset + row * params.y_stride + column];
//% elif function
    out[dest] = f(value);
//% elif op == "softcap"
    out[dest] = f(out[dest]);
//% else
    out[dest] *= params.factor;
//% endif
}
