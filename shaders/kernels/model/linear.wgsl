//# Variables: name, dtype (of the weight), tile_rows (16, 32 or 64), tile_features, workgroup_size.
//% import "lib/elements.wgsl" as elements_lib
//% import "lib/dense.wgsl" as dense_lib
//% set wide = dtype == "f32"
//% set own_rows = tile_rows // 16
//% set own_features = tile_features // 16
// ${ name }: products of many rows with a matrix, in tiles of ${ tile_rows } rows and ${ tile_features } features.
//
//   x       [rows, in_features]              f32, rows of whole vectors of 4
//   weight  [out_features, in_features]      ${ dtype }, rows of whole vectors of ${ 16 if wide else 8 } bytes, zeros behind their ends
//   bias    [out_features]                   f32, if flags has 1
//   out     [rows, out_features]             f32: x * transpose(weight) + bias, added to what is there if flags has 2
//
// A workgroup computes a tile: features along its x, rows along its y. It walks along in_features, 16 elements of each
// row and feature a turn in workgroup memory. Of 16 x 16 invocations each has ${ own_rows } row${ "s" if own_rows > 1 } and ${ own_features } features, 16 apart, so that
// neighbours read neighbouring rows of the tile. A row of a tile is 4 vectors in the place of 5, which keeps 8 rows in
// different banks.
//
// It must move the weight once for each ${ tile_rows } rows.

${ dense_lib.product_interface("vec4<u32>" if wide else "vec2<u32>", "4 elements") }

var<workgroup> x_tile: array<vec4<f32>, ${ tile_rows * 5 }>;
var<workgroup> weight_tile: array<vec4<f32>, ${ tile_features * 5 }>;

//% if not wide
${ elements_lib.widen(dtype) }
//% endif
${ dense_lib.load_x() }

fn load_weight(base: u32, i: u32) -> vec4<f32> {
    if (4u * i >= params.in_features) {
        return vec4<f32>();
    }
    let words = weight[base + i];
//% if wide
    return bitcast<vec4<f32>>(words);
//% else
    return vec4<f32>(widen(words.x), widen(words.y));
//% endif
}

@compute @workgroup_size(${ workgroup_size })
fn linear(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let first_row = group.y * ${ tile_rows }u;
    let first_feature = group.x * ${ tile_features }u;
    // What this invocation brings: a vector of a row, and of a feature.
    let brought = lane / 4u;
    let vector = lane % 4u;
    let x_base = params.x_offset + min(first_row + brought, params.rows - 1u) * params.x_stride;
    let weight_base = params.weight_offset
        + min(first_feature + brought, params.out_features - 1u) * params.weight_stride;
    // What it computes.
    let column = lane % 16u;
    let line = lane / 16u;
//% for r in range(own_rows)
//% for f in range(own_features)
    var sum_${ r }_${ f } = vec4<f32>();
//% endfor
//% endfor
    let vectors = (params.in_features + 3u) / 4u;
    for (var i = 0u; i < vectors; i += 4u) {
        workgroupBarrier();
        if (brought < ${ tile_rows }u) {
            x_tile[brought * 5u + vector] = load_x(x_base, i + vector);
        }
        weight_tile[brought * 5u + vector] = load_weight(weight_base, i + vector);
        workgroupBarrier();
        for (var v = 0u; v < 4u; v++) {
//% for r in range(own_rows)
            let a_${ r } = x_tile[(line + ${ 16 * r }u) * 5u + v];
//% endfor
//% for f in range(own_features)
            let w_${ f } = weight_tile[(column + ${ 16 * f }u) * 5u + v];
//% for r in range(own_rows)
            sum_${ r }_${ f } += a_${ r } * w_${ f };
//% endfor
//% endfor
        }
    }
//% for r in range(own_rows)
//% for f in range(own_features)
    store(first_row + line + ${ 16 * r }u, first_feature + column + ${ 16 * f }u, sum_${ r }_${ f });
//% endfor
//% endfor
}

fn store(row: u32, feature: u32, sums: vec4<f32>) {
    if (row >= params.rows || feature >= params.out_features) {
        return;
    }
    let at = params.out_offset + row * params.out_stride + feature;
    var value = (sums.x + sums.y) + (sums.z + sums.w);
    if ((params.flags & 1u) != 0u) {
        value += bias[params.bias_offset + feature];
    }
    if ((params.flags & 2u) != 0u) {
        value += out[at];
    }
    out[at] = value;
}
