//# Elements between memory and f32: functions that a kernel asks for by their dtype.

//# Two elements of a word, as f32.
<% macro widen(dtype) %>
//% if dtype == "f16"
// Two f16 of a word, as f32.
fn widen(word: u32) -> vec2<f32> {
    return unpack2x16float(word);
}
//% elif dtype == "bf16"
// Two bf16 of a word, as f32: the upper halves of their bits.
fn widen(word: u32) -> vec2<f32> {
    return vec2<f32>(bitcast<f32>(word << 16u), bitcast<f32>(word & 0xffff0000u));
}
//% endif
<%- endmacro %>

//# One f32 as the bits of an element.
<% macro narrow_one(dtype) %>
//% if dtype == "f16"
// An f32 as the bits of an f16: to nearest, ties to even. By hand, because a device may round
// pack2x16float either way and leaves numbers beyond 65504 undefined.
fn narrow_one(x: f32) -> u32 {
    let bits = bitcast<u32>(x);
    let sign = (bits >> 16u) & 0x8000u;
    let magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
        return sign | 0x7e00u; // NaN
    }
    if (magnitude >= 0x47800000u) {
        return sign | 0x7c00u; // 65536 and more: infinity
    }
    if (magnitude < 0x38800000u) {
        // Below 2^-14: next to 0.5, an f32 has the spacing of such an f16, so the addition rounds.
        return sign | (bitcast<u32>(bitcast<f32>(magnitude) + 0.5) - 0x3f000000u);
    }
    let rounded = magnitude + 0x0fffu + ((magnitude >> 13u) & 1u);
    return sign | ((rounded - 0x38000000u) >> 13u); // exponent bias 127 becomes 15
}
//% elif dtype == "bf16"
// An f32 as the bits of a bf16: to nearest, ties to even.
fn narrow_one(x: f32) -> u32 {
    let bits = bitcast<u32>(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return (bits >> 16u) | 0x40u; // NaN stays NaN
    }
    return (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
}
//% endif
<%- endmacro %>

//# Two f32 as a word; needs narrow_one.
<% macro narrow() %>
fn narrow(x: vec2<f32>) -> u32 {
    return narrow_one(x.x) | (narrow_one(x.y) << 16u);
}
<%- endmacro %>

//# Store four neighbouring elements of a row of `out`, from a word on.
<% macro store_out(dtype) %>
//% if dtype == "f32"
fn store_out(word: u32, x: vec4<f32>) {
    let bits = bitcast<vec4<u32>>(x);
    out[word] = bits.x;
    out[word + 1u] = bits.y;
    out[word + 2u] = bits.z;
    out[word + 3u] = bits.w;
}
//% else
${ narrow_one(dtype) }
${ narrow() }
fn store_out(word: u32, x: vec4<f32>) {
    out[word] = narrow(x.xy);
    out[word + 1u] = narrow(x.zw);
}
//% endif
<%- endmacro %>

//# Load four neighbouring elements of a row of `q`, from a word on.
<% macro load_query(dtype) %>
//% if dtype == "f32"
// Four elements of a row of q.
fn load_query(word: u32) -> vec4<f32> {
    return bitcast<vec4<f32>>(vec4<u32>(q[word], q[word + 1u], q[word + 2u], q[word + 3u]));
}
//% elif dtype == "f16"
// Four elements of a row of q.
fn load_query(word: u32) -> vec4<f32> {
    return vec4<f32>(unpack2x16float(q[word]), unpack2x16float(q[word + 1u]));
}
//% else
// Four elements of a row of q: the upper halves of their bits.
fn load_query(word: u32) -> vec4<f32> {
    let low = q[word];
    let high = q[word + 1u];
    return bitcast<vec4<f32>>(vec4<u32>(low << 16u, low & 0xffff0000u, high << 16u, high & 0xffff0000u));
}
//% endif
<%- endmacro %>

//# The soft cap's function.
<% macro tanh_exact() %>
// Hyperbolic tangent, as exact as exp2 is: the series where 1 - tanh would cancel.
fn tanh_exact(x: f32) -> f32 {
    let y = x * x;
    let series = x * (1.0 + y * (-1.0 / 3.0 + y * (2.0 / 15.0 + y * (-17.0 / 315.0 + y * (62.0 / 2835.0)))));
    let large = 1.0 - 2.0 / (exp2(2.0 * LOG2_E * min(abs(x), 16.0)) + 1.0);
    return select(sign(x) * large, series, abs(x) < 0.2);
}
<%- endmacro %>

//# A dot product that is added to a sum.
<% macro add_dot() %>
// sum + dot(x, y), without the addition of its own that dot needs.
fn add_dot(x: vec4<f32>, y: vec4<f32>, sum: f32) -> f32 {
    return fma(x.x, y.x, fma(x.y, y.y, fma(x.z, y.z, fma(x.w, y.w, sum))));
}
<%- endmacro %>
