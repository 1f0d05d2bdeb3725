//# Variables: name, q (element type); workgroup_size, max_splits, few (splits that a thread merges by itself).
//% import "lib/elements.wgsl" as elements_lib
// ${ name }: merge the partial results of query rows that `decode` split.
//
//   plan     header, rows to merge, and more                  see Plan in pagewise-attention
//   terms    slopes and sinks [q_heads], ...                  f32
//   out      [rows, q_heads, head_dim_v]                      ${ q }
//   lse      [rows, q_heads]                                  f32, natural logarithm
//   partials [splits, q_heads, 1 + head_dim_v / 4]            maximum and sum, then the output they belong to
//
// Where no row has more than ${ few } splits, a thread merges four elements of one head by itself. Else a workgroup
// merges one query head of one row: all ${ workgroup_size } invocations find the maximum of up to ${ max_splits } splits
// and their weights; then each takes four elements of every so-manieth split, four splits on their way at a time.
//
// Bytes: the partial results, once.
// Source: the online softmax's merge, Milakov and Gimelshein (2018), as used by Flash-Decoding (Dao et al., 2023).

struct Params {
    kv_heads: u32,
    group_size: u32,
    v_vectors: u32,       // head_dim_v / 4
    padded_vectors: u32,  // the next power of two
    out_offset: u32,      // in words
    out_row_stride: u32,
    out_head_stride: u32,
    lse_offset: u32,
    has_lse: u32,
    terms_offset: u32,
    unused_0: u32,
    unused_1: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> plan: array<u32>;
@group(0) @binding(2) var<storage, read> terms: array<f32>;
@group(0) @binding(3) var<storage, read> partials: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> out: array<u32>;
@group(0) @binding(5) var<storage, read_write> lse: array<u32>;

// Below every score. WGSL lets a compiler assume that there are no infinities, so none takes part.
const LOWEST: f32 = -3.4e38;
const LN_2: f32 = 0.6931471805599453;

var<workgroup> weights: array<f32, ${ max_splits }>;
var<workgroup> tree: array<f32, ${ workgroup_size }>;
var<workgroup> outputs: array<vec4<f32>, ${ workgroup_size }>;

${ elements_lib.store_out(q) }

// Where a sum of outputs belongs, and what it is divided by.
struct Merged {
    row: u32,
    head: u32,
    vector: u32,
    empty: bool, // a row that sees no key gives zeros, whatever its sink
    maximum: f32,
    total: f32,
}

fn store_merged(merged: Merged, x: vec4<f32>) {
    let place = params.out_offset + merged.row * params.out_row_stride + merged.head * params.out_head_stride;
    store_out(place + merged.vector * ${ 4 if q == "f32" else 2 }u,
        select(x / merged.total, vec4<f32>(0.0), merged.empty));
    if (merged.vector == 0u && params.has_lse != 0u) {
        let q_heads = params.kv_heads * params.group_size;
        let value = bitcast<u32>(LN_2 * (merged.maximum + log2(merged.total)));
        lse[params.lse_offset + merged.row * q_heads + merged.head] = select(value, 0xff800000u, merged.empty);
    }
}

// Vector `vector` of head `index % q_heads` of row `index / q_heads`, of at most ${ few } splits.
fn merge_few(index: u32, vector: u32) {
    let q_heads = params.kv_heads * params.group_size;
    if (index >= plan[1] * q_heads || vector >= params.v_vectors) {
        return;
    }
    let head = index % q_heads;
    let merge = plan[5] + 4u * (index / q_heads);
    let row = plan[merge];
    let splits = plan[merge + 2u];
    let stride = q_heads * (params.v_vectors + 1u);
    let at = plan[merge + 1u] * stride + head * (params.v_vectors + 1u);
    // Past the last split, the last one with weight zero.
//% for i in range(few)
    let at_${ i } = at + min(${ i }u, splits - 1u) * stride;
    let state_${ i } = partials[at_${ i }];
    let y_${ i } = partials[at_${ i } + 1u + vector];
//% endfor
    let sink = terms[params.terms_offset + q_heads + head];
    var seen_maximum = state_0.x;
//% for i in range(1, few)
    seen_maximum = max(seen_maximum, state_${ i }.x);
//% endfor
    let maximum = max(seen_maximum, sink);
    var total = exp2(sink - maximum);
    var x = vec4<f32>(0.0);
//% for i in range(few)
    let weight_${ i } = select(0.0, exp2(state_${ i }.x - maximum), ${ i }u < splits);
    total += weight_${ i } * state_${ i }.y;
    x += weight_${ i } * y_${ i };
//% endfor
    store_merged(Merged(row, head, vector, seen_maximum == LOWEST, maximum, total), x);
}

@compute @workgroup_size(${ workgroup_size })
fn decode_merge(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    // Workgroups continue along y where x has reached the device's limit.
    let index = workgroup.y * workgroups.x + workgroup.x;
    let q_heads = params.kv_heads * params.group_size;
    // What the first row says of all: whether they have few splits.
    if (plan[plan[5] + 3u] != 0u) {
        let heads = ${ workgroup_size }u / params.padded_vectors;
        merge_few(index * heads + thread / params.padded_vectors, thread % params.padded_vectors);
        return;
    }
    if (index >= plan[1] * q_heads) {
        return;
    }
    let head = index % q_heads;
    let merge = plan[5] + 4u * (index / q_heads);
    let row = plan[merge];
    let first = plan[merge + 1u];
    let splits = min(plan[merge + 2u], ${ max_splits }u);
    // From a split to the next.
    let stride = q_heads * (params.v_vectors + 1u);
    let at = first * stride + head * (params.v_vectors + 1u);

    var maximum = LOWEST;
    for (var split = thread; split < splits; split += ${ workgroup_size }u) {
        maximum = max(maximum, partials[at + split * stride].x);
    }
    tree[thread] = maximum;
    workgroupBarrier();
//% for level in levels
    if (thread < ${ level }u) {
        tree[thread] = max(tree[thread], tree[thread + ${ level }u]);
    }
    workgroupBarrier();
//% endfor
    let seen_maximum = tree[0];
    let sink = terms[params.terms_offset + q_heads + head];
    maximum = max(seen_maximum, sink);
    workgroupBarrier();

    var sum = 0.0;
    for (var split = thread; split < splits; split += ${ workgroup_size }u) {
        let state = partials[at + split * stride];
        let weight = exp2(state.x - maximum);
        weights[split] = weight;
        sum += weight * state.y;
    }
    tree[thread] = sum;
    workgroupBarrier();
//% for level in levels
    if (thread < ${ level }u) {
        tree[thread] += tree[thread + ${ level }u];
    }
    workgroupBarrier();
//% endfor
    let seen_sum = tree[0];
    let total = seen_sum + exp2(sink - maximum);
    let empty = seen_maximum == LOWEST;

    let vector = thread % params.padded_vectors;
    let slots = ${ workgroup_size }u / params.padded_vectors;
    let from_vector = at + 1u + min(vector, params.v_vectors - 1u);
    var x = vec4<f32>(0.0);
    for (var split = thread / params.padded_vectors; split < splits; split += 4u * slots) {
        // Past the last split, the last one with weight zero.
//% for i in range(4)
        let split_${ i } = min(split + ${ i }u * slots, splits - 1u);
        let y_${ i } = partials[from_vector + split_${ i } * stride];
        let weight_${ i } = select(0.0, weights[split_${ i }], split + ${ i }u * slots < splits);
//% endfor
        x += weight_0 * y_0 + weight_1 * y_1 + weight_2 * y_2 + weight_3 * y_3;
    }
    outputs[thread] = x;
    workgroupBarrier();
    if (thread < params.v_vectors) {
        for (var slot = 1u; slot < slots; slot++) {
            x += outputs[slot * params.padded_vectors + thread];
        }
        store_merged(Merged(row, head, thread, empty, maximum, total), x);
    }
}
