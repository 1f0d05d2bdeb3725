//# Variables: name, q, kv (element types); unit (WGSL type of four cache elements), half (whether that is vec4<f16>);
//# rows (of a tile), row_quads (of an invocation, four rows each), chunk (vec4<f32> of a row that are staged at a time),
//# q_stride, k_stride, p_stride (of staged rows), columns (vec4<f32> of an output row for a lane), value_keys (V rows
//# that are staged at a time), tile (vec4<f32> of workgroup memory); bits (boolean); workgroup_size.
//% import "lib/attention.wgsl" as attention_lib
//% import "lib/elements.wgsl" as elements_lib
//% import "lib/prefill.wgsl" as prefill_lib
//% set lane_rows = 4 * row_quads
//% set k_at = rows * q_stride
//% set v_at = rows * p_stride
//% set v_stride = 16 * columns
// ${ name }: many query rows of a sequence attend to a paged cache.
//
//   q        [rows, q_heads, head_dim_k]                      ${ q }
//   k_cache  [blocks, block_size, kv_heads, head_dim_k]       ${ kv }, any strides, in units of 4 elements
//   v_cache  [blocks, block_size, kv_heads, head_dim_v]       the same
//   plan     header, items, ranges, block tables, mask bits   see Plan in pagewise-attention
//   terms    slopes and sinks [q_heads], scales of K and V [kv_heads]
//   out      [rows, q_heads, head_dim_v]                      ${ q }
//   lse      [rows, q_heads]                                  f32, natural logarithm
//   partials [splits, q_heads, 1 + head_dim_v / 4]            maximum and sum, then the output they belong to
//
// A workgroup takes one item, some query rows of a sequence and the keys begin .. end, for the query heads that share
// a KV head: ${ rows } rows of a tile, each one head of one query. It goes through the keys by 64:
//
//             64 keys, 4 a lane                ${ v_stride } output vectors, ${ columns } a lane
//           +------------------+              +------------------+
//   ${ rows } rows |  scores Q * K^T  |  softmax ->  |  outputs P * V   |     ${ workgroup_size } invocations:
//           +------------------+              +------------------+     ${ workgroup_size // 16 } groups of 16 lanes, ${ lane_rows } rows a group
//
// Q and K come through workgroup memory ${ 4 * chunk } elements of the head dimension at a time, then the probabilities and V
// ${ value_keys } keys at a time. Scores and outputs stay in registers; so does the softmax's state, which the 16 lanes of a group
// share: a tile's maxima are exchanged, the sums only in the end.
//
// Operations: 4 * head_dim for each pair of a query head and a key. Bytes: K and V of an item once for each tile.
// Source: Dao, "FlashAttention-2" (2023), section 3, over the pages of Kwon et al. (SOSP 2023), section 4.1.
//% if half
enable f16;
//% endif

${ attention_lib.interface(unit) }
// What the queries' place says of a row that is none.
const NO_ROW: u32 = 0xffffffffu;

// Q [rows, ${ q_stride }] and K [64, ${ k_stride }]; then P [rows, ${ p_stride }] and V [${ value_keys }, ${ v_stride }].
var<workgroup> tile: array<vec4<f32>, ${ tile }>;
// Maxima, and in the end sums, of four rows for each invocation.
var<workgroup> states: array<vec4<f32>, ${ row_quads * workgroup_size }>;
// Where the rows of Q and of a tile's keys begin.
var<workgroup> q_places: array<u32, ${ rows }>;
var<workgroup> k_places: array<u32, 64>;
var<workgroup> v_places: array<u32, 64>;
// A bit for each key of a tile that some row sees.
var<workgroup> seen: array<atomic<u32>, 2>;

${ elements_lib.load_query(q) }

//% if half
fn elements(four: vec4<f16>) -> vec4<f32> {
    return vec4<f32>(four);
}
//% elif kv == "f32"
fn elements(four: vec4<u32>) -> vec4<f32> {
    return bitcast<vec4<f32>>(four);
}
//% else
${ elements_lib.widen(kv) }
fn elements(four: vec2<u32>) -> vec4<f32> {
    return vec4<f32>(widen(four.x), widen(four.y));
}
//% endif

${ elements_lib.store_out(q) }

${ elements_lib.tanh_exact() }

${ elements_lib.add_dot() }

@compute @workgroup_size(${ workgroup_size })
fn prefill(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let lane = thread % 16u;
    let group = thread / 16u;

${ prefill_lib.item(rows, bits) }

    // Row i is head i % heads of query i / heads.
    for (var i = thread; i < ${ rows }u; i += ${ workgroup_size }u) {
        let place = params.q_offset + (first_row + i / heads) * params.q_row_stride
            + (first_head + i % heads) * params.q_head_stride;
        q_places[i] = select(NO_ROW, place, i < queries * heads);
    }

    // This group's rows, what they see, and what lies there.
    let first_mine = group * ${ lane_rows }u;
//% for i in range(lane_rows)
    let query_${ i } = (first_mine + ${ i }u) / heads;
    let head_${ i } = first_head + (first_mine + ${ i }u) % heads;
    let range_${ i } = ranges + 4u * min(query_${ i }, queries - 1u);
    let begin_${ i } = plan[range_${ i }];
    let end_${ i } = select(0u, plan[range_${ i } + 1u], query_${ i } < queries);
    let position_${ i } = bitcast<i32>(plan[range_${ i } + 2u]);
    let slope_${ i } = terms[params.terms_offset + head_${ i }];
//% if bits
    let mask_${ i } = plan[3] + (first_row + min(query_${ i }, queries - 1u)) * plan[4];
//% endif
//% for j in range(columns)
    var acc_${ i }_${ j } = vec4<f32>(0.0);
//% endfor
//% endfor
//% for g in range(row_quads)
    var maximum_${ g } = vec4<f32>(LOWEST);
    var sum_${ g } = vec4<f32>(0.0);
//% endfor

    let k_head = params.k_offset + kv_head * params.k_head_stride;
    let v_head = params.v_offset + kv_head * params.v_head_stride;
    let block_mask = (1u << params.block_shift) - 1u;

    for (var first = begin; first < end; first += 64u) {
        // Keys past the end are read as the last one, and count for nothing.
        if (thread < 64u) {
${ prefill_lib.find_places("min(first + thread, end - 1u)", "thread") | indent(4, true) }
        }
        if (thread < 2u) {
            atomicStore(&seen[thread], 0u);
        }

        // Scores: this lane's keys are 4 * lane to 4 * lane + 3 of the tile.
//% for i in range(lane_rows)
//% for r in range(4)
        var s_${ i }_${ r } = 0.0;
//% endfor
//% endfor
        for (var from_vector = 0u; from_vector < params.k_vectors; from_vector += ${ chunk }u) {
            // What lay in the tile is done with, and the places are there.
            workgroupBarrier();
            for (var i = thread; i < ${ rows * chunk }u; i += ${ workgroup_size }u) {
                let vector = from_vector + i % ${ chunk }u;
                let place = q_places[i / ${ chunk }u];
                var x = vec4<f32>(0.0);
                if (place != NO_ROW && vector < params.k_vectors) {
                    x = query_scale * load_query(place + vector * ${ 4 if q == "f32" else 2 }u);
                }
                tile[(i / ${ chunk }u) * ${ q_stride }u + i % ${ chunk }u] = x;
            }
            for (var i = thread; i < ${ 64 * chunk }u; i += ${ workgroup_size }u) {
                let vector = from_vector + i % ${ chunk }u;
                let key = i / ${ chunk }u;
                var x = vec4<f32>(0.0);
                if (vector < params.k_vectors) {
                    x = elements(k_cache[k_places[key] + vector]);
                }
                // A lane's keys lie 16 rows apart, so that those of neighbouring lanes are neighbours.
                let row = (key % 4u) * 16u + key / 4u;
                tile[${ k_at }u + row * ${ k_stride }u + i % ${ chunk }u] = x;
            }
            workgroupBarrier();
            for (var i = 0u; i < ${ chunk }u; i++) {
//% for r in range(4)
                let k_${ r } = tile[${ k_at + r * 16 * k_stride }u + lane * ${ k_stride }u + i];
//% endfor
//% for i in range(lane_rows)
                let q_${ i } = tile[(first_mine + ${ i }u) * ${ q_stride }u + i];
//% for r in range(4)
                s_${ i }_${ r } = add_dot(q_${ i }, k_${ r }, s_${ i }_${ r });
//% endfor
//% endfor
            }
        }

        let my_key = first + 4u * lane;
        let my_position = vec4<i32>(i32(my_key)) + vec4<i32>(0, 1, 2, 3);
//% for i in range(lane_rows)
        var score_${ i } = vec4<f32>(s_${ i }_0, s_${ i }_1, s_${ i }_2, s_${ i }_3);
//% endfor
        if (params.softcap > 0.0) {
//% for i in range(lane_rows)
            score_${ i } /= params.softcap;
            score_${ i } = params.softcap * vec4<f32>(tanh_exact(score_${ i }.x), tanh_exact(score_${ i }.y),
                tanh_exact(score_${ i }.z), tanh_exact(score_${ i }.w));
//% endfor
        }
//% for i in range(lane_rows)
        score_${ i } = LOG2_E * (score_${ i } + slope_${ i } * vec4<f32>(my_position - position_${ i }));
//% endfor
//% if bits
        {
//% else
        let plain = first >= plain_begin && first + 64u <= plain_end;
        if (!plain) {
//% endif
            let keys = vec4<u32>(my_position);
            var any_sees = vec4<bool>(false);
//% for i in range(lane_rows)
            var sees_${ i } = (keys >= vec4<u32>(begin_${ i })) & (keys < vec4<u32>(min(end_${ i }, end)));
//% if bits
            // A tile begins at a multiple of 64, so four keys have their bits in one word.
            let word_${ i } = plan[mask_${ i } + (min(my_key, end - 1u) >> 5u)] >> (my_key & 31u);
            sees_${ i } &= (vec4<u32>(word_${ i }) & vec4<u32>(1u, 2u, 4u, 8u)) != vec4<u32>(0u);
//% endif
            score_${ i } = select(vec4<f32>(LOWEST), score_${ i }, sees_${ i });
            any_sees |= sees_${ i };
//% endfor
            let found = select(vec4<u32>(0u), vec4<u32>(1u, 2u, 4u, 8u), any_sees);
            atomicOr(&seen[lane / 8u], (found.x | found.y | found.z | found.w) << (4u * (lane % 8u)));
        }

        // The group's maxima.
//% for g in range(row_quads)
        states[${ g * workgroup_size }u + thread] = vec4<f32>(
//% for i in range(4 * g, 4 * g + 4)
            max(max(score_${ i }.x, score_${ i }.y), max(score_${ i }.z, score_${ i }.w))${ ");" if i % 4 == 3 else "," }
//% endfor
//% endfor
        workgroupBarrier();
//% for g in range(row_quads)
        var new_maximum_${ g } = maximum_${ g };
        for (var i = 0u; i < 16u; i++) {
            new_maximum_${ g } = max(new_maximum_${ g }, states[${ g * workgroup_size }u + group * 16u + i]);
        }
        let rescale_${ g } = exp2(maximum_${ g } - new_maximum_${ g });
        maximum_${ g } = new_maximum_${ g };
        sum_${ g } *= rescale_${ g };
//% endfor

        // Probabilities. A row that has seen no key yet has LOWEST for a maximum, too.
//% for i in range(lane_rows)
//% set member = "xyzw"[i % 4]
        let p_${ i } = select(exp2(score_${ i } - maximum_${ i // 4 }.${ member }), vec4<f32>(0.0),
            score_${ i } == vec4<f32>(LOWEST));
        sum_${ i // 4 }.${ member } += (p_${ i }.x + p_${ i }.y) + (p_${ i }.z + p_${ i }.w);
        tile[(first_mine + ${ i }u) * ${ p_stride }u + lane] = p_${ i };
//% for j in range(columns)
        acc_${ i }_${ j } *= rescale_${ i // 4 }.${ member };
//% endfor
//% endfor

        let keys_here = min(64u, end - first);
        for (var from_key = 0u; from_key < keys_here; from_key += ${ value_keys }u) {
            for (var i = thread; i < ${ value_keys * v_stride }u; i += ${ workgroup_size }u) {
                let vector = i % ${ v_stride }u;
                let key = from_key + i / ${ v_stride }u;
                // A key that nobody sees may hold anything: 0 * NaN is NaN.
//% if bits
                let wanted = ((atomicLoad(&seen[key / 32u]) >> (key % 32u)) & 1u) != 0u;
//% else
                let wanted = plain || ((atomicLoad(&seen[key / 32u]) >> (key % 32u)) & 1u) != 0u;
//% endif
                var x = vec4<f32>(0.0);
                if (wanted && vector < params.v_vectors) {
                    x = elements(v_cache[v_places[key] + vector]);
                }
                tile[${ v_at }u + i] = x;
            }
            workgroupBarrier();
            for (var i = 0u; i < ${ value_keys }u; i += 4u) {
//% for i in range(lane_rows)
                let p_${ i } = tile[(first_mine + ${ i }u) * ${ p_stride }u + (from_key + i) / 4u];
//% endfor
//% for j in range(columns)
//% for r in range(4)
                let v_${ r }_${ j } = tile[${ v_at + r * v_stride + j * 16 }u + i * ${ v_stride }u + lane];
//% endfor
//% for i in range(lane_rows)
//% for r in range(4)
                acc_${ i }_${ j } = fma(vec4<f32>(p_${ i }.${ "xyzw"[r] }), v_${ r }_${ j }, acc_${ i }_${ j });
//% endfor
//% endfor
//% endfor
            }
            workgroupBarrier();
        }
    }

    // The group's sums.
//% for g in range(row_quads)
    states[${ g * workgroup_size }u + thread] = sum_${ g };
//% endfor
    workgroupBarrier();
//% for g in range(row_quads)
    var total_${ g } = vec4<f32>(0.0);
    for (var i = 0u; i < 16u; i++) {
        total_${ g } += states[${ g * workgroup_size }u + group * 16u + i];
    }
//% endfor
    let value_scale = terms[params.terms_offset + 2u * q_heads + params.kv_heads + kv_head];
//% for i in range(lane_rows)
//% set member = "xyzw"[i % 4]
    if (query_${ i } < queries) {
        let maximum = maximum_${ i // 4 }.${ member };
        let sum = total_${ i // 4 }.${ member };
        if (splits > 1u) {
            // Rows of partials: the state, then the output.
            let at = ((first_partial + query_${ i } * splits + split) * q_heads + head_${ i }) * (params.v_vectors + 1u);
            if (lane == 0u) {
                partials[at] = vec4<f32>(maximum, sum, 0.0, 0.0);
            }
//% for j in range(columns)
            if (lane + ${ 16 * j }u < params.v_vectors) {
                partials[at + ${ 1 + 16 * j }u + lane] = value_scale * acc_${ i }_${ j };
            }
//% endfor
        } else {
${ prefill_lib.with_sink("head_" ~ i) | indent(8, true) }
            let factor = value_scale * select(exp2(maximum - with_sink) / total, 0.0, empty);
            let row = first_row + query_${ i };
            let at = params.out_offset + row * params.out_row_stride + head_${ i } * params.out_head_stride;
//% for j in range(columns)
            if (lane + ${ 16 * j }u < params.v_vectors) {
                store_out(at + (lane + ${ 16 * j }u) * ${ 4 if q == "f32" else 2 }u, factor * acc_${ i }_${ j });
            }
//% endfor
            if (lane == 0u && params.has_lse != 0u) {
                let value = bitcast<u32>(LN_2 * (with_sink + log2(total)));
                lse[params.lse_offset + row * q_heads + head_${ i }] = select(value, 0xff800000u, empty);
            }
        }
    }
//% endfor
}
