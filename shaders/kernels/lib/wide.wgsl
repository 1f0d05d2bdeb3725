//# Whole numbers of 64 bits, as WGSL has none: vec2<u32>, the low word first.

//# A 64-bit product of two words.
<% macro multiply() %>
// All 64 bits of a product.
fn mul_wide(a: u32, b: u32) -> vec2<u32> {
    let low = (a & 0xffffu) * (b & 0xffffu);
    let first = (a >> 16u) * (b & 0xffffu) + (low >> 16u);
    let second = (a & 0xffffu) * (b >> 16u) + (first & 0xffffu);
    return vec2<u32>((second << 16u) | (low & 0xffffu), (a >> 16u) * (b >> 16u) + (first >> 16u) + (second >> 16u));
}
<%- endmacro %>

//# Sums modulo 2^64.
<% macro add() %>
fn add64(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    let low = a.x + b.x;
    return vec2<u32>(low, a.y + b.y + select(0u, 1u, low < b.x));
}
<%- endmacro %>

//# Differences and comparisons.
<% macro compare() %>
fn sub64(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    return vec2<u32>(a.x - b.x, a.y - b.y - select(0u, 1u, a.x < b.x));
}

fn less64(a: vec2<u32>, b: vec2<u32>) -> bool {
    return a.y < b.y || (a.y == b.y && a.x < b.x);
}
<%- endmacro %>

//# The high half of a product of 128 bits; needs multiply and add.
<% macro multiply_high() %>
// The upper 64 of the 128 bits of a product.
fn mul_high64(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    let first = add64(mul_wide(a.x, b.y), vec2<u32>(mul_wide(a.x, b.x).y, 0u));
    let second = add64(mul_wide(a.y, b.x), vec2<u32>(first.x, 0u));
    return add64(mul_wide(a.y, b.y), add64(vec2<u32>(first.y, 0u), vec2<u32>(second.y, 0u)));
}
<%- endmacro %>

//# The low half; needs multiply.
<% macro multiply_low() %>
// The lower 64 of the 128 bits of a product.
fn mul_low64(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    let low = mul_wide(a.x, b.x);
    return vec2<u32>(low.x, low.y + a.x * b.y + a.y * b.x);
}
<%- endmacro %>
