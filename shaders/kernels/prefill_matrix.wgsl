//# Variables: name; size (of a matrix: rows and columns), subgroup (its
//# invocations), strips (subgroups of a workgroup, `size` rows each), keys (of a tile), k_parts and v_parts (matrices that
//# a row of K and of V takes), stride, s_stride, p_stride (vectors from a row of K or V, of scores, of probabilities to the
//# next); bits (boolean); workgroup_size.
//% import "lib/attention.wgsl" as attention_lib
//% import "lib/elements.wgsl" as elements_lib
//% import "lib/prefill.wgsl" as prefill_lib
//% set rows = size * strips
//% set share = subgroup // size
//% set part = size // 4
//% set row_vectors = keys // 4
//% set mine = row_vectors // share
//% set k_row = k_parts * part
//% set v_row = v_parts * part
//% set v_at = keys * stride
//% set a = "coop_mat" ~ size ~ "x" ~ size ~ "<f16, A>"
//% set b = "coop_mat" ~ size ~ "x" ~ size ~ "<f16, B>"
//% set c = "coop_mat" ~ size ~ "x" ~ size ~ "<f32, C>"
//% set round = keys // size
//% set moved = 2 * (keys // 32)
// ${ name }: many query rows of a sequence attend to a paged cache, on matrix units.
//
//   q        [rows, q_heads, head_dim_k]                      f16
//   k_cache  [blocks, block_size, kv_heads, head_dim_k]       f16, any strides, in units of 4 elements
//   v_cache  [blocks, block_size, kv_heads, head_dim_v]       the same
//   plan     header, items, ranges, block tables, mask bits   see Plan in pagewise-attention
//   terms    slopes and sinks [q_heads], scales of K and V [kv_heads]
//   out      [rows, q_heads, head_dim_v]                      f16
//   lse      [rows, q_heads]                                  f32, natural logarithm
//   partials [splits, q_heads, 1 + head_dim_v / 4]            maximum and sum, then the output they belong to
//
// The items are those of prefill: ${ rows } rows of a tile, each one head of one query, ${ size } for each subgroup, whose
// matrices of queries and outputs stay in registers. For ${ keys } keys at a time:
//
//   scores Q * K^T go to workgroup memory, where ${ share } lane${ "" if share == 1 else "s" } ha${ "s" if share == 1 else "ve" } a row: mask, maximum, probabilities,
//   which come back as f16 and meet V. Sums and products are added up in f32.
//
// A matrix in registers has no rows that could be scaled. So probabilities stay relative to an old maximum until a score
// passes it by 2^12: only then are the outputs written to workgroup memory, scaled and read back. A row's largest
// probability is 2^4 when its maximum is new: f16 goes from 2^-24 to 2^16.
//
// Operations: 4 * head_dim for each pair of a query head and a key. Bytes: K and V of an item once for each tile.
// Source: Dao, "FlashAttention-2" (2023), section 3, over the pages of Kwon et al. (SOSP 2023), section 4.1.
enable f16;
enable wgpu_cooperative_matrix;

${ attention_lib.interface("vec4<f16>") }
// By how much, as a power of two, a score may pass the maximum before that follows, and where a new one lies.
const LIMIT: f32 = 12.0;
const HEADROOM: f32 = 4.0;

// Matrices come from workgroup memory 16 bytes at a time, and WGSL aligns vec4<f16> to 8. Which variable lies where is the
// driver's choice: so that each begins at a multiple of 16, all are multiples of 16 bytes long.
//
// K [${ keys }, ${ stride }], then V [${ keys }, ${ stride }].
var<workgroup> tile: array<vec4<f16>, ${ 2 * keys * stride }>;
// Scores [rows, ${ s_stride }]; and outputs, where their rows are to be reached.
var<workgroup> scores: array<vec4<f32>, ${ rows * s_stride }>;
// Probabilities [rows, ${ p_stride }]; before the first, queries.
var<workgroup> weights: array<vec4<f16>, ${ rows * p_stride }>;
// Where the keys of three tiles begin: the one that is worked on, and the next two.
var<workgroup> k_places: array<u32, ${ 3 * keys }>;
var<workgroup> v_places: array<u32, ${ 3 * keys }>;
// A bit for each key of this tile and of the next that some row sees; then, in word ${ moved }, whether some row's maximum moved.
var<workgroup> flags: array<atomic<u32>, ${ (moved + 4) // 4 * 4 }>;
// In the end: what each row's outputs are multiplied with.
var<workgroup> factors: array<f32, ${ rows }>;

${ elements_lib.load_query("f16") }

${ elements_lib.store_out("f16") }

${ elements_lib.tanh_exact() }

<# This thread's vectors of a tile of K or V, from memory to registers. #>
<% macro load_tile(side, slot, vectors) %>
//% for n in range((keys * vectors + workgroup_size - 1) // workgroup_size)
        let ${ side }_i_${ n } = thread + ${ n * workgroup_size }u;
        var ${ side }_${ n } = vec4<f16>();
        if (${ side }_i_${ n } % ${ vectors }u < params.${ side }_vectors<% if (n + 1) * workgroup_size > keys * vectors %> && ${ side }_i_${ n } < ${ keys * vectors }u<% endif %>) {
            let place = ${ side }_places[${ slot } + ${ side }_i_${ n } / ${ vectors }u];
            ${ side }_${ n } = ${ side }_cache[place + ${ side }_i_${ n } % ${ vectors }u];
        }
//% endfor
<%- endmacro %>
<# And from there to workgroup memory. #>
<% macro store_tile(side, vectors) %>
//% for n in range((keys * vectors + workgroup_size - 1) // workgroup_size)
//% set guarded = (n + 1) * workgroup_size > keys * vectors
        <% if guarded %>if (${ side }_i_${ n } < ${ keys * vectors }u) <% endif %>{
            let key = ${ side }_i_${ n } / ${ vectors }u;
            let at = ${ v_at if side == "v" else 0 }u + key * ${ stride }u + ${ side }_i_${ n } % ${ vectors }u;
//% if side == "v"
            let wanted = <% if not bits %>plain || <% endif %>((atomicLoad(&flags[turn + key / 32u]) >> (key % 32u)) & 1u) != 0u;
            tile[at] = select(vec4<f16>(), v_${ n }, wanted);
//% else
            tile[at] = k_${ n };
//% endif
        }
//% endfor
<%- endmacro %>
@compute @workgroup_size(${ workgroup_size })
fn prefill_matrix(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    let thread = subgroup * ${ subgroup }u + lane;

${ prefill_lib.item(rows, bits) }
    let score_scale = query_scale * select(LOG2_E, 1.0 / params.softcap, params.softcap > 0.0);

    // This lane's row, head row % heads of query row / heads, and what it sees.
    let row = subgroup * ${ size }u + lane / ${ share }u;
    let query = row / heads;
    let head = first_head + row % heads;
    let there = query < queries;
    let range = ranges + 4u * min(query, queries - 1u);
    let row_begin = plan[range];
    let row_end = select(0u, min(plan[range + 1u], end), there);
    let position = bitcast<i32>(plan[range + 2u]);
    let slope = LOG2_E * terms[params.terms_offset + head];
//% if bits
    let mask = plan[3] + (first_row + min(query, queries - 1u)) * plan[4];
//% endif
    let first_vector = lane % ${ share }u;
    let s_at = row * ${ s_stride }u + first_vector;
    let p_at = row * ${ p_stride }u + first_vector;
    // Where this subgroup's matrices begin.
    let strip_s = subgroup * ${ size * s_stride }u;
    let strip_p = subgroup * ${ size * p_stride }u;
    var maximum = LOWEST;
    var sum = 0.0;

    let k_head = params.k_offset + kv_head * params.k_head_stride;
    let v_head = params.v_offset + kv_head * params.v_head_stride;
    let block_mask = (1u << params.block_shift) - 1u;

    // Places of the first two tiles. Keys past the end are read as the last one, and count for nothing.
    let last = max(end, begin + 1u) - 1u;
    for (var i = thread; i < ${ 2 * keys }u; i += ${ workgroup_size }u) {
${ prefill_lib.find_places("min(begin + i, last)", "i") }
    }
    if (thread <= ${ moved }u) {
        atomicStore(&flags[thread], 0u);
    }

    // The queries, ${ round } matri${ "x" if round == 1 else "ces" } of a row at a time.
    let q_row = params.q_offset + (first_row + query) * params.q_row_stride + head * params.q_head_stride;
//% for from in range(0, k_parts, round)
//% for j in range(mine)
    {
        let vector = ${ from * part + share * j }u + first_vector;
        var x = vec4<f32>(0.0);
        if (there && vector < params.k_vectors) {
            x = load_query(q_row + 2u * vector);
        }
        weights[p_at + ${ share * j }u] = vec4<f16>(x);
    }
//% endfor
    workgroupBarrier();
//% for d in range(from, [from + round, k_parts] | min)
    let q_${ d } = coopLoadT<${ a }>(&weights[strip_p + ${ (d - from) * part }u], ${ p_stride }u);
//% endfor
    workgroupBarrier();
//% endfor
    {
${ load_tile("k", "0u", k_row) }
${ store_tile("k", k_row) }
    }
    workgroupBarrier();

//% for d in range(v_parts)
    var out_${ d } = ${ c }();
//% endfor
    var slot = 0u; // of this tile's places
    var turn = 0u; // of its bits
    for (var first = begin; first < end; first += ${ keys }u) {
        let next_slot = select(slot + ${ keys }u, 0u, slot == ${ 2 * keys }u);
        let third_slot = select(next_slot + ${ keys }u, 0u, next_slot == ${ 2 * keys }u);
        let next_turn = ${ keys // 32 }u - turn;

        // Scores.
//% for n in range(round)
        var s_${ n } = ${ c }();
//% endfor
//% for d in range(k_parts)
//% for n in range(round)
        s_${ n } = coopMultiplyAdd(q_${ d }, coopLoad<${ b }>(&tile[${ n * size * stride + d * part }u], ${ stride }u), s_${ n });
//% endfor
//% endfor
//% for n in range(round)
        coopStoreT(s_${ n }, &scores[strip_s + ${ n * part }u], ${ s_stride }u);
//% endfor
        if (thread < ${ keys // 32 }u) {
            atomicStore(&flags[next_turn + thread], 0u);
        }
        workgroupBarrier();

        // This lane's part of its row.
//% for j in range(mine)
        var x_${ j } = score_scale * scores[s_at + ${ share * j }u];
//% endfor
        if (params.softcap > 0.0) {
            let cap = LOG2_E * params.softcap;
//% for j in range(mine)
            x_${ j } = cap * vec4<f32>(tanh_exact(x_${ j }.x), tanh_exact(x_${ j }.y), tanh_exact(x_${ j }.z), tanh_exact(x_${ j }.w));
//% endfor
        }
        let my_key = first + 4u * first_vector;
        if (slope != 0.0) {
            let distance = vec4<f32>(f32(bitcast<i32>(my_key) - position)) + vec4<f32>(0.0, 1.0, 2.0, 3.0);
//% for j in range(mine)
            x_${ j } = fma(vec4<f32>(slope), distance + ${ 4 * share * j }.0, x_${ j });
//% endfor
        }
//% if bits
        {
//% else
        let plain = first >= plain_begin && first + ${ keys }u <= plain_end;
        if (!plain) {
//% endif
//% for word in range(keys // 32)
            var found_${ word } = 0u;
//% endfor
//% for j in range(mine)
            let keys_${ j } = vec4<u32>(my_key + ${ 4 * share * j }u) + vec4<u32>(0u, 1u, 2u, 3u);
            var sees_${ j } = (keys_${ j } >= vec4<u32>(row_begin)) & (keys_${ j } < vec4<u32>(row_end));
//% if bits
            // A tile begins at a multiple of 32, so four keys have their bits in one word.
            let word_${ j } = plan[mask + (min(keys_${ j }.x, last) >> 5u)] >> (keys_${ j }.x & 31u);
            sees_${ j } &= (vec4<u32>(word_${ j }) & vec4<u32>(1u, 2u, 4u, 8u)) != vec4<u32>(0u);
//% endif
            x_${ j } = select(vec4<f32>(LOWEST), x_${ j }, sees_${ j });
            let bits_${ j } = select(vec4<u32>(0u), vec4<u32>(1u, 2u, 4u, 8u), sees_${ j });
            found_${ share * j // 8 } |= (bits_${ j }.x | bits_${ j }.y | bits_${ j }.z | bits_${ j }.w) << (4u * (first_vector + ${ share * j % 8 }u));
//% endfor
//% for word in range(keys // 32)
            atomicOr(&flags[turn + ${ word }u], found_${ word });
//% endfor
        }
        var peaks = x_0;
//% for j in range(1, mine)
        peaks = max(peaks, x_${ j });
//% endfor
        var peak = max(max(peaks.x, peaks.y), max(peaks.z, peaks.w));
//% for bit in share_bits
        peak = max(peak, subgroupShuffleXor(peak, ${ bit }u));
//% endfor
        let moves = peak > maximum + LIMIT;
        let new_maximum = select(maximum, peak - HEADROOM, moves);
        let rescale = exp2(maximum - new_maximum);
        sum *= rescale;
        if (moves && maximum != LOWEST) {
            atomicStore(&flags[${ moved }], 1u);
        }
        maximum = new_maximum;
        // A row that has seen no key yet has LOWEST for a maximum, too: its probabilities must become 0.
        let shift = select(maximum, 0.0, maximum == LOWEST);
        var sums = vec4<f32>(0.0);
//% for j in range(mine)
        let p_${ j } = exp2(x_${ j } - shift);
        sums += p_${ j };
        weights[p_at + ${ share * j }u] = vec4<f16>(p_${ j });
//% endfor
        sum += (sums.x + sums.y) + (sums.z + sums.w);
        workgroupBarrier();

        // V of this tile and K of the next. A key that nobody sees may hold anything: 0 * NaN is NaN.
        {
${ load_tile("v", "slot", v_row) }
${ load_tile("k", "next_slot", k_row) }
${ store_tile("v", v_row) }
${ store_tile("k", k_row) }
        }
        // Also a barrier.
        let some_moved = workgroupUniformLoad(&flags[${ moved }]);
        if (thread < ${ keys }u) {
${ prefill_lib.find_places("min(first + " ~ 2 * keys ~ "u + thread, last)", "third_slot + thread") | indent(4, true) }
        }

        if (some_moved != 0u) {
            atomicStore(&flags[${ moved }], 0u);
//% for from in range(0, v_parts, round)
//% for d in range(from, [from + round, v_parts] | min)
            coopStoreT(out_${ d }, &scores[strip_s + ${ (d - from) * part }u], ${ s_stride }u);
//% endfor
            workgroupBarrier();
//% for j in range(mine)
            scores[s_at + ${ share * j }u] *= rescale;
//% endfor
            workgroupBarrier();
//% for d in range(from, [from + round, v_parts] | min)
            out_${ d } = coopLoadT<${ c }>(&scores[strip_s + ${ (d - from) * part }u], ${ s_stride }u);
//% endfor
            workgroupBarrier();
//% endfor
        }
//% for n in range(round)
        let p_${ n }_all = coopLoadT<${ a }>(&weights[strip_p + ${ n * part }u], ${ p_stride }u);
//% for d in range(v_parts)
        out_${ d } = coopMultiplyAdd(p_${ n }_all, coopLoadT<${ b }>(&tile[${ v_at + n * size * stride + d * part }u], ${ stride }u), out_${ d });
//% endfor
//% endfor
        slot = next_slot;
        turn = next_turn;
    }

    // What a row's outputs are multiplied with, and its state.
//% for bit in share_bits
    sum += subgroupShuffleXor(sum, ${ bit }u);
//% endfor
    let value_scale = terms[params.terms_offset + 2u * q_heads + params.kv_heads + kv_head];
${ prefill_lib.with_sink("head") }
    if (first_vector == 0u) {
        factors[row] = value_scale * select(select(exp2(maximum - with_sink) / total, 0.0, empty), 1.0, splits > 1u);
        if (there && splits > 1u) {
            // Rows of partials: the state, then the output.
            let at = ((first_partial + query * splits + split) * q_heads + head) * (params.v_vectors + 1u);
            partials[at] = vec4<f32>(maximum, sum, 0.0, 0.0);
        }
        if (there && splits <= 1u && params.has_lse != 0u) {
            let value = bitcast<u32>(LN_2 * (with_sink + log2(total)));
            lse[params.lse_offset + (first_row + query) * q_heads + head] = select(value, 0xff800000u, empty);
        }
    }

    // Outputs, ${ keys } columns at a time.
//% for from in range(0, v_parts, round)
    workgroupBarrier();
//% for d in range(from, [from + round, v_parts] | min)
    coopStoreT(out_${ d }, &scores[strip_s + ${ (d - from) * part }u], ${ s_stride }u);
//% endfor
    workgroupBarrier();
    for (var i = thread; i < ${ rows * row_vectors }u; i += ${ workgroup_size }u) {
        let out_row = i / ${ row_vectors }u;
        let vector = ${ from * part }u + i % ${ row_vectors }u;
        let out_query = out_row / heads;
        let out_head = first_head + out_row % heads;
        if (out_query < queries && vector < params.v_vectors) {
            let x = factors[out_row] * scores[out_row * ${ s_stride }u + i % ${ row_vectors }u];
            if (splits > 1u) {
                let at = ((first_partial + out_query * splits + split) * q_heads + out_head) * (params.v_vectors + 1u);
                partials[at + 1u + vector] = x;
            } else {
                store_out(params.out_offset + (first_row + out_query) * params.out_row_stride
                    + out_head * params.out_head_stride + 2u * vector, x);
            }
        }
    }
//% endfor
}
