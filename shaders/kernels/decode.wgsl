//# Variables: name, q, kv (element types); unit (WGSL type of the cache's elements), unit_words; lanes, chunks,
//# vectors (vec4<f32> of a unit), queries, rows, groups, workgroup_size; subgroups, bits, kept, ahead, half (booleans);
//# gather_queries (queries whose outputs the groups add up at a time), scratch (vec4<f32> of workgroup memory).
//% import "lib/attention.wgsl" as attention_lib
//% import "lib/elements.wgsl" as elements_lib
//% set parts = chunks * vectors
//% set share = lanes // queries
// ${ name }: query rows attend to a paged cache.
//
//   q        [rows, q_heads, head_dim_k]                      ${ q }
//   k_cache  [blocks, block_size, kv_heads, head_dim_k]       ${ kv }, any strides, in units of ${ 4 * unit_words } bytes
//   v_cache  [blocks, block_size, kv_heads, head_dim_v]       the same
//   plan     header, work items, block tables, mask bits      see Plan in pagewise-attention
//   terms    slopes and sinks [q_heads], scales of K and V [kv_heads]
//   out      [rows, q_heads, head_dim_v]                      ${ q }
//   lse      [rows, q_heads]                                  f32, natural logarithm
//   partials [splits, q_heads, 1 + head_dim_v / 4]            maximum and sum, then the output they belong to
//
// A workgroup takes one work item, the keys begin .. end of one query row, for up to ${ queries } query head${ "s" if queries > 1 } of one
// KV head, so that K and V are read once for all of them:
//
//   ${ workgroup_size } invocations = ${ groups } groups x ${ lanes } lanes;  a lane holds ${ chunks } unit${ "s" if chunks > 1 } of a K or V row,
//   a group takes ${ rows } key${ "s" if rows > 1 } at a time, and has a softmax of its own until the end.
//
//% if ahead
// A round's V is asked for before its K is used, the next round's K before this one's probabilities are, and block
// table entries a round earlier.
//% else
// All loads of a round, K and V, are issued before the first is used, and the next round's block table entries with
// them.
//% endif
// After a dot product's sum over the lanes, lane i holds the scores of query i / ${ share } alone: each
// probability is computed ${ "once" if share == 1 else "by " ~ share ~ " lanes" }, and dealt out again for the second product.
//
// Bytes: every K and V element of an item once for each ${ queries } query heads.
// Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention"
// (SOSP 2023), section 4.1; splits as in Flash-Decoding (Dao et al., 2023); softmax as Milakov and Gimelshein (2018).

//% if half
enable f16;

//% endif
//% if half and vectors == 2
// Eight elements of the cache.
struct Unit {
    @align(16) low: vec4<f16>,
    high: vec4<f16>,
}

//% endif
${ attention_lib.interface(unit) }

// First the queries, [queries, ${ parts }, lanes]; in the end the groups' outputs.
var<workgroup> scratch: array<vec4<f32>, ${ scratch }>;
// Maximum and sum of each group and query, [groups, queries].
var<workgroup> states: array<vec2<f32>, ${ groups * queries }>;
//% if not subgroups
// Parts of dot products, [rows, queries, workgroup].
var<workgroup> sums: array<f32, ${ rows * queries * workgroup_size }>;
// Probabilities and a factor for what came before, [rows + 1, queries, groups].
var<workgroup> weights: array<f32, ${ (rows + 1) * queries * groups }>;
//% endif

${ elements_lib.load_query(q) }

//% if kv != "f32"
//% if not half
${ elements_lib.widen(kv) }
//% endif
//% endif

${ elements_lib.store_out(q) }

${ elements_lib.tanh_exact() }

${ elements_lib.add_dot() }

@compute @workgroup_size(${ workgroup_size })
fn decode(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
//% if subgroups
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_size) subgroup_size: u32,
    @builtin(subgroup_invocation_id) subgroup_lane: u32,
//% else
    @builtin(local_invocation_index) thread: u32,
//% endif
) {
    // Workgroups continue along y where x has reached the device's limit.
    let index = workgroup.y * workgroups.x + workgroup.x;
    let num_items = plan[0];
    if (index >= num_items * params.tiles) {
        return;
    }
//% if subgroups
    let thread = subgroup * subgroup_size + subgroup_lane;
    let first_lane = subgroup_lane - subgroup_lane % ${ lanes }u; // of this group, within the subgroup
//% endif
    let lane = thread % ${ lanes }u;
    let group = thread / ${ lanes }u;

    // Neighbouring workgroups share an item: its heads lie next to each other in the cache.
    let tile = index % params.tiles;
    let item = 8u + 8u * (index / params.tiles);
    let table = plan[2] + plan[item];
    let row = plan[item + 1u];
    let begin = plan[item + 2u];
    let end = min(plan[item + 3u], 0x7fffffffu); // so that no loop to it can wrap around
    let split = plan[item + 4u];
    let splits = plan[item + 5u];
    let first_partial = plan[item + 6u];
    let position = bitcast<i32>(plan[item + 7u]);
//% if bits
    let mask_row = plan[3] + row * plan[4];
//% endif

    let kv_head = tile % params.kv_heads;
    let query_tile = tile / params.kv_heads;
    let first_head = kv_head * params.group_size + query_tile * ${ queries }u;
    let heads = min(${ queries }u, params.group_size - query_tile * ${ queries }u);
    let q_heads = params.kv_heads * params.group_size;
    let query_scale = params.scale * terms[params.terms_offset + 2u * q_heads + kv_head];

    // The queries, with zeros past the heads and past the head dimension.
    for (var i = thread; i < ${ queries * parts * lanes }u; i += ${ workgroup_size }u) {
        let query = i / ${ parts * lanes }u;
        let part = (i / ${ lanes }u) % ${ parts }u;
        let vector = ((part / ${ vectors }u) * ${ lanes }u + i % ${ lanes }u) * ${ vectors }u + part % ${ vectors }u;
        var x = vec4<f32>(0.0);
        if (query < heads && vector < params.k_vectors) {
            x = query_scale * load_query(params.q_offset + row * params.q_row_stride
                + (first_head + query) * params.q_head_stride + vector * ${ 4 if q == "f32" else 2 }u);
        }
        scratch[i] = x;
    }
    workgroupBarrier();

//% if kept
//% for g in range(queries)
//% for j in range(parts)
    let q_${ g }_${ j } = scratch[${ (g * parts + j) * lanes }u + lane];
//% endfor
//% endfor
//% endif

    // This lane's query, for what is done once a score.
    let my_query = lane / ${ share }u;
    let slope = terms[params.terms_offset + min(first_head + my_query, q_heads - 1u)];
    var maximum = LOWEST;
    var sum = 0.0;
//% for g in range(queries)
//% for j in range(parts)
    var acc_${ g }_${ j } = vec4<f32>(0.0);
//% endfor
//% endfor

    // Places past a row's last unit read that unit again: their queries are zero, their outputs are dropped.
    let k_head = params.k_offset + kv_head * params.k_head_stride;
    let v_head = params.v_offset + kv_head * params.v_head_stride;
//% for c in range(chunks)
    let k_unit_${ c } = k_head + min(lane + ${ c * lanes }u, params.k_units - 1u);
    let v_unit_${ c } = v_head + min(lane + ${ c * lanes }u, params.v_units - 1u);
//% endfor
    let block_mask = (1u << params.block_shift) - 1u;
    // Keys past the end are read as the last one, and count for nothing.
    let last = max(end, begin + 1u) - 1u;
//% for r in range(rows)
    var key_${ r } = begin + group + ${ r * groups }u;
    var block_${ r } = plan[table + (min(key_${ r }, last) >> params.block_shift)];
//% endfor
//% if ahead
//% for r in range(rows)
    let first_row_${ r } = block_${ r } * params.k_block_stride + (min(key_${ r }, last) & block_mask) * params.k_token_stride;
//% for c in range(chunks)
    var k_${ r }_${ c } = k_cache[first_row_${ r } + k_unit_${ c }];
//% endfor
//% endfor
//% endif

    for (var first = begin; first < end; first += ${ rows * groups }u) {
//% for r in range(rows)
        let place_${ r } = min(key_${ r }, last) & block_mask;
//% if not ahead
        let k_row_${ r } = block_${ r } * params.k_block_stride + place_${ r } * params.k_token_stride;
//% for c in range(chunks)
        let k_${ r }_${ c } = k_cache[k_row_${ r } + k_unit_${ c }];
//% endfor
//% endif
//% endfor
//% for r in range(rows)
        let v_row_${ r } = block_${ r } * params.v_block_stride + place_${ r } * params.v_token_stride;
//% for c in range(chunks)
        var v_${ r }_${ c } = v_cache[v_row_${ r } + v_unit_${ c }];
//% endfor
//% endfor
//% for r in range(rows)
        block_${ r } = plan[table + (min(key_${ r } + ${ rows * groups }u, last) >> params.block_shift)];
//% endfor

        // Dot products over this lane's units.
//% for r in range(rows)
//% for c in range(chunks)
//% if kv == "f32"
        let x_${ r }_${ c } = bitcast<vec4<f32>>(k_${ r }_${ c });
//% elif half and vectors == 1
        let x_${ r }_${ c } = vec4<f32>(k_${ r }_${ c });
//% elif half
        let x_${ r }_${ 2 * c } = vec4<f32>(k_${ r }_${ c }.low);
        let x_${ r }_${ 2 * c + 1 } = vec4<f32>(k_${ r }_${ c }.high);
//% elif vectors == 1
        let x_${ r }_${ c } = vec4<f32>(widen(k_${ r }_${ c }.x), widen(k_${ r }_${ c }.y));
//% else
        let x_${ r }_${ 2 * c } = vec4<f32>(widen(k_${ r }_${ c }.x), widen(k_${ r }_${ c }.y));
        let x_${ r }_${ 2 * c + 1 } = vec4<f32>(widen(k_${ r }_${ c }.z), widen(k_${ r }_${ c }.w));
//% endif
//% endfor
//% endfor
//% for g in range(queries)
//% for j in range(parts)
//% if not kept
        let q_${ g }_${ j } = scratch[${ (g * parts + j) * lanes }u + lane];
//% endif
//% for r in range(rows)
        <% if j == 0 %>var <% endif %>dot_${ r }_${ g } = add_dot(x_${ r }_${ j }, q_${ g }_${ j }, <% if j == 0 %>0.0<% else %>dot_${ r }_${ g }<% endif %>);
//% endfor
//% endfor
//% endfor
//% if ahead
//% for r in range(rows)
        let next_place_${ r } = min(key_${ r } + ${ rows * groups }u, last) & block_mask;
        let next_row_${ r } = block_${ r } * params.k_block_stride + next_place_${ r } * params.k_token_stride;
//% for c in range(chunks)
        k_${ r }_${ c } = k_cache[next_row_${ r } + k_unit_${ c }];
//% endfor
//% endfor
//% endif

        // Sums over the lanes; each lane keeps those of its own query.
//% if subgroups
//% for r in range(rows)
//% if queries == 8
        let high_${ r } = (lane & ${ lanes // 2 }u) != 0u;
        let low4_${ r } = vec4<f32>(dot_${ r }_0, dot_${ r }_1, dot_${ r }_2, dot_${ r }_3);
        let high4_${ r } = vec4<f32>(dot_${ r }_4, dot_${ r }_5, dot_${ r }_6, dot_${ r }_7);
        let four_${ r } = select(low4_${ r }, high4_${ r }, high_${ r })
            + subgroupShuffleXor(select(high4_${ r }, low4_${ r }, high_${ r }), ${ lanes // 2 }u);
//% elif queries == 4
        let four_${ r } = vec4<f32>(dot_${ r }_0, dot_${ r }_1, dot_${ r }_2, dot_${ r }_3);
//% endif
//% if queries >= 4
//% set offset = 2 * lanes // queries
        let upper_${ r } = (lane & ${ offset }u) != 0u;
        let two_${ r } = select(four_${ r }.xy, four_${ r }.zw, upper_${ r })
            + subgroupShuffleXor(select(four_${ r }.zw, four_${ r }.xy, upper_${ r }), ${ offset }u);
//% elif queries == 2
        let two_${ r } = vec2<f32>(dot_${ r }_0, dot_${ r }_1);
//% endif
//% if queries >= 2
        let odd_${ r } = (lane & ${ share }u) != 0u;
        var score_${ r } = select(two_${ r }.x, two_${ r }.y, odd_${ r })
            + subgroupShuffleXor(select(two_${ r }.y, two_${ r }.x, odd_${ r }), ${ share }u);
//% else
        var score_${ r } = dot_${ r }_0;
//% endif
//% for offset in offsets
        score_${ r } += subgroupShuffleXor(score_${ r }, ${ offset }u);
//% endfor
//% endfor
//% else
//% for r in range(rows)
//% for g in range(queries)
        sums[${ (r * queries + g) * workgroup_size }u + thread] = dot_${ r }_${ g };
//% endfor
//% endfor
        workgroupBarrier();
//% for r in range(rows)
        let sums_${ r } = (${ r * queries }u + my_query) * ${ workgroup_size }u + group * ${ lanes }u;
        var score_${ r } = sums[sums_${ r }];
//% for i in range(1, lanes)
        score_${ r } += sums[sums_${ r } + ${ i }u];
//% endfor
//% endfor
//% endif

        if (params.softcap > 0.0) {
//% for r in range(rows)
            score_${ r } = params.softcap * tanh_exact(score_${ r } / params.softcap);
//% endfor
        }
        var new_maximum = maximum;
//% for r in range(rows)
//% if bits
        let word_${ r } = plan[mask_row + (min(key_${ r }, last) >> 5u)];
        let seen_${ r } = key_${ r } < end && ((word_${ r } >> (key_${ r } & 31u)) & 1u) != 0u;
        // A key that nobody sees may hold anything: 0 * NaN is NaN.
//% for c in range(chunks)
//% if half
        if (!seen_${ r }) {
            v_${ r }_${ c } = ${ unit }();
        }
//% else
        v_${ r }_${ c } = select(${ unit }(0u), v_${ r }_${ c }, seen_${ r });
//% endif
//% endfor
//% else
        let seen_${ r } = key_${ r } < end;
//% endif
        score_${ r } = LOG2_E * (score_${ r } + slope * f32(i32(key_${ r }) - position));
        score_${ r } = select(LOWEST, score_${ r }, seen_${ r });
        new_maximum = max(new_maximum, score_${ r });
        key_${ r } += ${ rows * groups }u;
//% endfor
//% if subgroups
        // The maximum follows only when a score passes it by a factor of 2^8: until then nothing need be rescaled, and
        // sums of at most 2^8 times as much lose nothing in f32.
        if (subgroupAny(new_maximum > maximum + 8.0)) {
            let rescale = exp2(maximum - new_maximum);
            maximum = new_maximum;
            sum *= rescale;
//% for g in range(queries)
            let rescale_${ g } = subgroupShuffle(rescale, first_lane + ${ g * share }u);
//% for j in range(parts)
            acc_${ g }_${ j } *= rescale_${ g };
//% endfor
//% endfor
        }
//% else
        let rescale = exp2(maximum - new_maximum);
        maximum = new_maximum;
        sum *= rescale;
//% endif
//% for r in range(rows)
        let p_${ r } = select(0.0, exp2(score_${ r } - maximum), seen_${ r });
//% endfor
        sum += <% for r in range(rows) %>${ " + " if r > 0 }p_${ r }<% endfor %>;

        // Every lane needs the probabilities of all queries.
//% if not subgroups
        if (lane % ${ share }u == 0u) {
            weights[my_query * ${ groups }u + group] = rescale;
//% for r in range(rows)
            weights[(${ (r + 1) * queries }u + my_query) * ${ groups }u + group] = p_${ r };
//% endfor
        }
        workgroupBarrier();
//% endif
//% for r in range(rows)
//% for c in range(chunks)
//% if kv == "f32"
        let y_${ r }_${ c } = bitcast<vec4<f32>>(v_${ r }_${ c });
//% elif half and vectors == 1
        let y_${ r }_${ c } = vec4<f32>(v_${ r }_${ c });
//% elif half
        let y_${ r }_${ 2 * c } = vec4<f32>(v_${ r }_${ c }.low);
        let y_${ r }_${ 2 * c + 1 } = vec4<f32>(v_${ r }_${ c }.high);
//% elif vectors == 1
        let y_${ r }_${ c } = vec4<f32>(widen(v_${ r }_${ c }.x), widen(v_${ r }_${ c }.y));
//% else
        let y_${ r }_${ 2 * c } = vec4<f32>(widen(v_${ r }_${ c }.x), widen(v_${ r }_${ c }.y));
        let y_${ r }_${ 2 * c + 1 } = vec4<f32>(widen(v_${ r }_${ c }.z), widen(v_${ r }_${ c }.w));
//% endif
//% endfor
//% endfor
//% for g in range(queries)
//% if subgroups
//% for r in range(rows)
        let p_${ r }_${ g } = subgroupShuffle(p_${ r }, first_lane + ${ g * share }u);
//% endfor
//% else
        let rescale_${ g } = weights[${ g * groups }u + group];
//% for r in range(rows)
        let p_${ r }_${ g } = weights[${ ((r + 1) * queries + g) * groups }u + group];
//% endfor
//% endif
//% for j in range(parts)
//% if not subgroups
        acc_${ g }_${ j } *= rescale_${ g };
//% endif
//% for r in range(rows)
        acc_${ g }_${ j } = fma(vec4<f32>(p_${ r }_${ g }), y_${ r }_${ j }, acc_${ g }_${ j });
//% endfor
//% endfor
//% endfor
    }

    // The groups' softmaxes become one.
    if (lane % ${ share }u == 0u) {
        states[group * ${ queries }u + my_query] = vec2<f32>(maximum, sum);
    }
    workgroupBarrier();
//% for g in range(queries)
    var maximum_${ g } = states[${ g }u].x;
//% for i in range(1, groups)
    maximum_${ g } = max(maximum_${ g }, states[${ i * queries + g }u].x);
//% endfor
    var sum_${ g } = 0.0;
//% for i in range(groups)
    sum_${ g } += states[${ i * queries + g }u].y * exp2(states[${ i * queries + g }u].x - maximum_${ g });
//% endfor
    let weight_${ g } = exp2(states[group * ${ queries }u + ${ g }u].x - maximum_${ g });
//% endfor
    let value_scale = terms[params.terms_offset + 2u * q_heads + params.kv_heads + kv_head];

    // Their outputs are added up ${ gather_queries } quer${ "y" if gather_queries == 1 else "ies" } at a time, [queries, ${ parts }, groups, lanes].
//% for start in range(0, queries, gather_queries)
//% for g in range(gather_queries)
//% for j in range(parts)
    scratch[${ (g * parts + j) * workgroup_size }u + thread] = weight_${ start + g } * acc_${ start + g }_${ j };
//% endfor
//% endfor
    workgroupBarrier();
    for (var i = thread; i < ${ gather_queries * parts * lanes }u; i += ${ workgroup_size }u) {
        let query = i / ${ parts * lanes }u;
        let part = (i / ${ lanes }u) % ${ parts }u;
        let vector = ((part / ${ vectors }u) * ${ lanes }u + i % ${ lanes }u) * ${ vectors }u + part % ${ vectors }u;
        var x = vec4<f32>(0.0);
        for (var from_group = 0u; from_group < ${ groups }u; from_group++) {
            x += scratch[(i / ${ lanes }u) * ${ workgroup_size }u + from_group * ${ lanes }u + i % ${ lanes }u];
        }
        let head = first_head + ${ start }u + query;
        var state = vec2<f32>(maximum_${ start }, sum_${ start });
//% for g in range(1, gather_queries)
        if (query == ${ g }u) {
            state = vec2<f32>(maximum_${ start + g }, sum_${ start + g });
        }
//% endfor
        if (${ start }u + query < heads && vector < params.v_vectors) {
            x *= value_scale;
            if (splits > 1u) {
                // Rows of partials: the state, then the output.
                let at = ((first_partial + split) * q_heads + head) * (params.v_vectors + 1u);
                partials[at + 1u + vector] = x;
                if (vector == 0u) {
                    partials[at] = vec4<f32>(state, 0.0, 0.0);
                }
            } else {
                // A row that sees no key gives zeros, whatever its sink.
                let sink = terms[params.terms_offset + q_heads + head];
                let with_sink = max(state.x, sink);
                let total = state.y * exp2(state.x - with_sink) + exp2(sink - with_sink);
                let empty = state.y == 0.0;
                let factor = select(exp2(state.x - with_sink) / total, 0.0, empty);
                store_out(params.out_offset + row * params.out_row_stride + head * params.out_head_stride
                    + vector * ${ 4 if q == "f32" else 2 }u, factor * x);
                if (vector == 0u && params.has_lse != 0u) {
                    let value = bitcast<u32>(LN_2 * (with_sink + log2(total)));
                    lse[params.lse_offset + row * q_heads + head] = select(value, 0xff800000u, empty);
                }
            }
        }
    }
//% if start + gather_queries < queries
    workgroupBarrier();
//% endif
//% endfor
}
