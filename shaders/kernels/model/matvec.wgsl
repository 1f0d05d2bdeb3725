//# Variables: name, dtype (of the weight), rows, features, lanes, teams, workgroup_size.
//% import "lib/elements.wgsl" as elements_lib
//% import "lib/dense.wgsl" as dense_lib
//% set wide = dtype == "f32"
// ${ name }: products of up to ${ rows } row${ "s" if rows > 1 } with a matrix, at the speed at which the matrix is read.
//
//   x       [rows, in_features]              f32, rows of whole vectors of 4
//   weight  [out_features, in_features]      ${ dtype }, rows of whole vectors of 16 bytes, zeros behind their ends
//   bias    [out_features]                   f32, if flags has 1
//   out     [rows, out_features]             f32: x * transpose(weight) + bias, added to what is there if flags has 2
//
// A team of ${ lanes } invocations computes ${ features } feature${ "s" if features > 1 } of ${ rows } row${ "s" if rows > 1 }, a workgroup ${ teams * features } features. The lanes of a
// team walk along the rows of the weight side by side, 16 bytes each, so that a weight is read once for all rows; their
// sums meet in workgroup memory. Rows beyond ${ rows } are other workgroups along y.
//
// It must move the weight once; x comes from the caches.

${ dense_lib.product_interface("vec4<u32>", "16 bytes") }

var<workgroup> sums: array<f32, ${ workgroup_size * features }>;
var<workgroup> parts: array<f32, ${ workgroup_size }>;

//% if not wide
${ elements_lib.widen(dtype) }
//% endif
${ dense_lib.load_x() }

@compute @workgroup_size(${ workgroup_size })
fn matvec(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let slice = lane % ${ lanes }u;
    let team = lane / ${ lanes }u;
    let first_row = group.y * ${ rows }u;
    let first_feature = (group.x * ${ teams }u + team) * ${ features }u;
    let last_row = params.rows - 1u;
    let last_feature = params.out_features - 1u;
//% for r in range(rows)
    let x_${ r } = params.x_offset + min(first_row + ${ r }u, last_row) * params.x_stride;
//% endfor
//% for f in range(features)
    let weight_${ f } = params.weight_offset + min(first_feature + ${ f }u, last_feature) * params.weight_stride;
//% for r in range(rows)
    var sum_${ r }_${ f } = 0.0;
//% endfor
//% endfor
    let vectors = (params.in_features + ${ 3 if wide else 7 }u) / ${ 4 if wide else 8 }u;
    for (var i = slice; i < vectors; i += ${ lanes }u) {
//% for f in range(features)
        let words_${ f } = weight[weight_${ f } + i];
//% endfor
//% for f in range(features)
//% if wide
        let w_${ f } = bitcast<vec4<f32>>(words_${ f });
//% else
        let w_${ f } = vec4<f32>(widen(words_${ f }.x), widen(words_${ f }.y));
        let v_${ f } = vec4<f32>(widen(words_${ f }.z), widen(words_${ f }.w));
//% endif
//% endfor
//% for r in range(rows)
//% if wide
        let a_${ r } = load_x(x_${ r }, i);
//% else
        let a_${ r } = load_x(x_${ r }, 2u * i);
        let b_${ r } = load_x(x_${ r }, 2u * i + 1u);
//% endif
//% for f in range(features)
        sum_${ r }_${ f } += dot(a_${ r }, w_${ f })${ "" if wide else " + dot(b_" ~ r ~ ", v_" ~ f ~ ")" };
//% endfor
//% endfor
    }

    // Each row's sums of ${ teams } teams and ${ features } feature${ "s" if features > 1 } in turn: first ${ workgroup_size // (teams * features) } invocations a sum, then one.
    let output = lane / ${ workgroup_size // (teams * features) }u;
    let part = lane % ${ workgroup_size // (teams * features) }u;
//% for r in range(rows)
    workgroupBarrier();
//% for f in range(features)
    sums[(team * ${ features }u + ${ f }u) * ${ lanes }u + slice] = sum_${ r }_${ f };
//% endfor
    workgroupBarrier();
    var part_${ r } = 0.0;
    for (var i = part; i < ${ lanes }u; i += ${ workgroup_size // (teams * features) }u) {
        part_${ r } += sums[output * ${ lanes }u + i];
    }
    parts[lane] = part_${ r };
    workgroupBarrier();
    if (lane < ${ teams * features }u) {
        let feature = group.x * ${ teams * features }u + lane;
        if (first_row + ${ r }u < params.rows && feature < params.out_features) {
            var total = 0.0;
            for (var i = 0u; i < ${ workgroup_size // (teams * features) }u; i++) {
                total += parts[lane * ${ workgroup_size // (teams * features) }u + i];
            }
            store(first_row + ${ r }u, feature, total);
        }
    }
//% endfor
}

fn store(row: u32, feature: u32, product: f32) {
    let at = params.out_offset + row * params.out_stride + feature;
    var value = product;
    if ((params.flags & 1u) != 0u) {
        value += bias[params.bias_offset + feature];
    }
    if ((params.flags & 2u) != 0u) {
        value += out[at];
    }
    out[at] = value;
}
