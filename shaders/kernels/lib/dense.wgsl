//# What the dense kernels share: products' parameters, rows of f32 four at a time, weights as they are stored, sums over a workgroup.

//# Parameters and bindings of a product, whose weight is read by this WGSL type: so many elements or bytes.
<% macro product_interface(vector, amount) %>
struct Params {
    rows: u32,
    in_features: u32,
    out_features: u32,
    x_offset: u32,       // vectors
    x_stride: u32,
    weight_offset: u32,  // vectors of ${ amount }
    weight_stride: u32,
    bias_offset: u32,
    out_offset: u32,     // elements
    out_stride: u32,
    flags: u32,
    unused: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> weight: array<${ vector }>;
@group(0) @binding(3) var<storage, read> bias: array<f32>;
@group(0) @binding(4) var<storage, read_write> out: array<f32>;
<%- endmacro %>

//# Four elements of a row of `x`, those past `in_features` as zeros.
<% macro load_x() %>
// Elements 4 i to 4 i + 3 of the row that begins at vector `base`; what lies past the row counts as 0, whatever it is.
fn load_x(base: u32, i: u32) -> vec4<f32> {
    let at = vec4<u32>(4u * i) + vec4<u32>(0u, 1u, 2u, 3u);
    if (4u * i >= params.in_features) {
        return vec4<f32>();
    }
    return select(vec4<f32>(), x[base + i], at < vec4<u32>(params.in_features));
}
<%- endmacro %>

//# One element of an array of words that holds them packed: the embedding's tables.
<% macro load_element(dtype, array) %>
//% if dtype == "f32"
fn load_element(index: u32) -> f32 {
    return bitcast<f32>(${ array }[index]);
}
//% else
fn load_element(index: u32) -> f32 {
    let pair = widen(${ array }[index / 2u]);
    return select(pair.x, pair.y, index % 2u == 1u);
}
//% endif
<%- endmacro %>

//# The sum of a number over all invocations; needs `sums` and `lane`.
<% macro sum_all(workgroup_size) %>
// The sum of `value` over the workgroup. All invocations must call it.
fn sum_all(value: f32, lane: u32) -> f32 {
    workgroupBarrier();
    sums[lane] = value;
    for (var half = ${ workgroup_size // 2 }u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if (lane < half) {
            sums[lane] += sums[lane + half];
        }
    }
    workgroupBarrier();
    return sums[0];
}
<%- endmacro %>
