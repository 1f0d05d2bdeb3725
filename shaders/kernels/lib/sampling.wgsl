//# What the kernels share that read rows of logits. Logits are read as their bits: NaN and infinities, which WGSL lets a
//# compiler assume away, are told apart as integers.

//# Parameters and the first bindings of kernels whose jobs say which rows they read; `own`: one more parameter's name.
<% macro interface(own="") %>
struct Params {
    count: u32,
    width: u32,
    x_offset: u32,
    x_stride: u32,
    jobs_offset: u32,
//% if own
    ${ own }: u32,
//% endif
//% for i in range(6 if own else 7)
    unused_${ i }: u32,
//% endfor
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<u32>;
@group(0) @binding(2) var<storage, read> jobs: array<u32>;
<%- endmacro %>

//# Numbers and integers of the same order.
<% macro ordered() %>
// Rises with the number: 0 for NaN and negative infinity, at least 1 for all others. The two zeros are equal.
fn order(bits: u32) -> u32 {
    let magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u || bits == 0xff800000u) {
        return 0u;
    }
    return select(0x80000000u + magnitude, 0x80000000u - magnitude, (bits & 0x80000000u) != 0u);
}
<%- endmacro %>

//# The way back.
<% macro unordered() %>
// The bits of the number of an order; negative infinity for 0.
fn number(key: u32) -> u32 {
    if (key == 0u) {
        return 0xff800000u;
    }
    return select(0x80000000u | (0x80000000u - key), key - 0x80000000u, key >= 0x80000000u);
}
<%- endmacro %>

//# Softmax weights as whole numbers; needs order.
<% macro weights() %>
// How weights follow from logits: that of the largest one is 1, that of x is exp((x - largest) / temperature).
struct Softmax {
    largest: u32,   // its bits
    inverse: f32,   // 1 / temperature
    lowest: f32,    // half of the difference below which a weight is 0: 87.3 temperatures, where exp leaves the normal f32
}

// exp(x) for -87.3 <= x <= 0 within 2 units of the last place: x = n ln 2 + r with |r| <= ln 2 / 2, exp(r) by its Taylor
// polynomial of degree 7, 2^n put into the exponent's bits. WGSL's own exp is within 3 + 2 |x| units only.
fn exp_of_negative(x: f32) -> f32 {
    let n = round(x * 1.44269504);
    let r = fma(n, -1.4286068e-6, fma(n, -0.69314575, x));
    var sum = 1.0 / 5040.0;
    sum = fma(sum, r, 1.0 / 720.0);
    sum = fma(sum, r, 1.0 / 120.0);
    sum = fma(sum, r, 1.0 / 24.0);
    sum = fma(sum, r, 1.0 / 6.0);
    sum = fma(sum, r, 0.5);
    sum = fma(sum, r, 1.0);
    sum = fma(sum, r, 1.0);
    return sum * bitcast<f32>(u32(i32(n) + 127) << 23u);
}

// The weight of a logit; 0 for NaN and negative infinity. Infinite logits share everything where there are any.
fn weight(softmax: Softmax, bits: u32) -> f32 {
    let key = order(bits);
    if (key == 0u) {
        return 0.0;
    }
    if (key == order(softmax.largest)) {
        return 1.0;
    }
    if (softmax.largest == 0x7f800000u) {
        return 0.0;
    }
    // Halves, so that no difference leaves the range.
    let half = 0.5 * bitcast<f32>(bits) - 0.5 * bitcast<f32>(softmax.largest);
    if (half < softmax.lowest) {
        return 0.0;
    }
    return exp_of_negative(max(2.0 * half * softmax.inverse, -87.3));
}

// A weight in units of 2^-44, rounded down: sums of 2^19 weights fit 64 bits and are the same in any order.
fn mass(weight: f32) -> vec2<u32> {
    let bits = bitcast<u32>(weight);
    let digits = (bits & 0x7fffffu) | 0x800000u;
    let exponent = bits >> 23u;
    if (exponent < 83u) {
        return vec2<u32>();
    }
    if (exponent < 106u) {
        return vec2<u32>(digits >> (106u - exponent), 0u);
    }
    let shift = exponent - 106u;
    return vec2<u32>(digits << shift, (digits >> 1u) >> (31u - shift));
}
<%- endmacro %>

//# Sums over a workgroup; needs `sums` and add64.
<% macro prefix_sum(workgroup_size) %>
// The sum over the lanes up to and with this one; sums[${ workgroup_size - 1 }] is then that of all. All invocations must call it.
fn prefix_sum(value: vec2<u32>, lane: u32) -> vec2<u32> {
    workgroupBarrier();
    sums[lane] = value;
    for (var distance = 1u; distance < ${ workgroup_size }u; distance *= 2u) {
        workgroupBarrier();
        var sum = sums[lane];
        if (lane >= distance) {
            sum = add64(sum, sums[lane - distance]);
        }
        workgroupBarrier();
        sums[lane] = sum;
    }
    workgroupBarrier();
    return sums[lane];
}
<%- endmacro %>

//# What one lane found, for all of them.
<% macro found() %>
// What one lane has found for all: an id or a bin, an order or whether the bin is taken whole, and what is left to find.
struct Found {
    at: u32,
    value: u32,
    rest: vec2<u32>,
}
<%- endmacro %>

//# The largest logit of a row; needs `sums`, `found`, order and less64.
<% macro find_largest(workgroup_size) %>
// The order of the row's largest logit, and the lowest id that has it. All invocations must call it.
fn find_largest(base: u32, width: u32, lane: u32) -> Found {
    // The larger 64-bit number is the better candidate.
    var best = vec2<u32>();
    for (var id = lane; id < width; id += ${ workgroup_size }u) {
        let key = order(x[base + id]);
        if (key > best.y) {
            best = vec2<u32>(0xffffffffu - id, key);
        }
    }
    workgroupBarrier();
    sums[lane] = best;
    for (var half = ${ workgroup_size // 2 }u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if (lane < half && less64(sums[lane], sums[lane + half])) {
            sums[lane] = sums[lane + half];
        }
    }
    if (lane == 0u) {
        found = Found(0xffffffffu - sums[0].x, sums[0].y, vec2<u32>());
    }
    return workgroupUniformLoad(&found);
}
<%- endmacro %>

//# The best candidates of a row without sorting it; needs `bins_low`, with masses `bins_high` too, and all of the above.
<% macro cut(workgroup_size, masses) %>
// The candidates that are kept: all of a larger order than `key`, and those of that order up to `id`.
struct Cut {
    key: u32,
    id: u32,
}

// NaN and negative infinity are no candidates.
const EVERYTHING = Cut(1u, 0xffffffffu);

fn is_kept(cut: Cut, key: u32, id: u32) -> bool {
    return key > cut.key || (key == cut.key && id <= cut.id);
}

// The best `count` candidates of those kept so far, or all where there are fewer; lower ids are better among equals.
//% if masses
// With a share it is the smallest set of the best that holds this part of their mass, in units of 2^-32.
//% endif
//
// A radix descent: eight bits of the order a level, then of the id, into ${ workgroup_size } bins, the best first; the bin in
// which the set ends is what the next level looks at. All invocations must call it.
//% if masses
fn cut_at(kept: Cut, base: u32, width: u32, count: u32, share: u32, softmax: Softmax, lane: u32) -> Cut {
//% else
fn cut_at(kept: Cut, base: u32, width: u32, count: u32, lane: u32) -> Cut {
//% endif
    var wanted = vec2<u32>(count, 0u);
    var prefix = 0u;
    var cut = EVERYTHING;
    for (var level = 0u; level < 7u; level++) {
        workgroupBarrier();
        atomicStore(&bins_low[lane], 0u);
//% if masses
        atomicStore(&bins_high[lane], 0u);
//% endif
        if (lane == 0u) {
            // Where there is less than is wanted, all of it.
            found = Found(${ workgroup_size - 1 }u, 1u, vec2<u32>());
        }
        workgroupBarrier();
        for (var id = lane; id < width; id += ${ workgroup_size }u) {
            let bits = x[base + id];
            let key = order(bits);
            if (!is_kept(kept, key, id)) {
                continue;
            }
            var bin = 0u;
            if (level < 4u) {
                if (level > 0u && (key >> (32u - 8u * level)) != prefix) {
                    continue;
                }
                bin = 255u - ((key >> (24u - 8u * level)) & 255u);
            } else {
                if (key != cut.key || (level > 4u && (id >> (56u - 8u * level)) != prefix)) {
                    continue;
                }
                bin = (id >> (48u - 8u * level)) & 255u;
            }
//% if masses
            var amount = vec2<u32>(1u, 0u);
            if (share > 0u) {
                amount = mass(weight(softmax, bits));
            }
            let before = atomicAdd(&bins_low[bin], amount.x);
            let high = amount.y + select(0u, 1u, before + amount.x < before);
            if (high > 0u) {
                atomicAdd(&bins_high[bin], high);
            }
//% else
            atomicAdd(&bins_low[bin], 1u);
//% endif
        }
        workgroupBarrier();
//% if masses
        let amount = vec2<u32>(atomicLoad(&bins_low[lane]), atomicLoad(&bins_high[lane]));
//% else
        let amount = vec2<u32>(atomicLoad(&bins_low[lane]), 0u);
//% endif
        let sum = prefix_sum(amount, lane);
//% if masses
        if (level == 0u && share > 0u) {
            // Rounded up, and never nothing: the token that crosses the line stays.
            let all = sums[${ workgroup_size - 1 }];
            let fraction = mul_wide(all.x, share);
            wanted = add64(mul_wide(all.y, share), vec2<u32>(fraction.y, 0u));
            if (fraction.x > 0u || (wanted.x | wanted.y) == 0u) {
                wanted = add64(wanted, vec2<u32>(1u, 0u));
            }
        }
//% endif
        let before = sub64(sum, amount);
        if (less64(before, wanted) && !less64(sum, wanted)) {
            var whole = all(sum == wanted);
//% if masses
            if (level == 3u && share > 0u) {
                // A logit that no other equals needs no choice among ids.
                let key = (prefix << 8u) | (255u - lane);
                whole = whole || all(amount == mass(weight(softmax, number(key))));
            }
//% endif
            found = Found(lane, select(0u, 1u, whole), sub64(wanted, before));
        }
        let bin = workgroupUniformLoad(&found);
        wanted = bin.rest;
        if (level < 4u) {
            prefix = (prefix << 8u) | (255u - bin.at);
            cut.key = prefix << (24u - 8u * level);
        } else {
            prefix = (prefix << 8u) | bin.at;
            cut.id = (prefix << (48u - 8u * level)) | ((1u << (48u - 8u * level)) - 1u);
        }
        if (bin.value == 1u) {
            break;
        }
        if (level == 3u) {
            prefix = 0u;
        }
    }
    cut.key = max(cut.key, 1u);
    return cut;
}
<%- endmacro %>
