//# What both prefill kernels do alike: a workgroup's item and heads, where keys lie, what a row's outputs are divided by.

//# The item of this workgroup and the heads of its tile, whose rows are so many; `bits`: whether keys are masked by bits.
<% macro item(rows, bits) %>
    // Workgroups continue along y where x has reached the device's limit.
    let index = workgroup.y * workgroups.x + workgroup.x;
    let head_tiles = (params.group_size + ${ rows - 1 }u) / ${ rows }u;
    let tiles = params.kv_heads * head_tiles;
    if (index >= plan[6] * tiles) {
        return;
    }

    // Neighbouring workgroups share an item: its heads lie next to each other in the cache.
    let item = plan[7] + 12u * (index / tiles);
    let table = plan[2] + plan[item];
    let first_row = plan[item + 1u];
    let queries = plan[item + 2u];
    let begin = plan[item + 3u];
    let end = min(plan[item + 4u], 0x7fffffffu); // so that no loop to it can wrap around
//% if not bits
    // The keys that every row sees.
    let plain_begin = plan[item + 5u];
    let plain_end = plan[item + 6u];
//% endif
    let split = plan[item + 7u];
    let splits = plan[item + 8u];
    let first_partial = plan[item + 9u];
    let ranges = plan[item + 10u];

    let kv_head = (index % tiles) % params.kv_heads;
    let head_tile = (index % tiles) / params.kv_heads;
    let first_head = kv_head * params.group_size + head_tile * ${ rows }u;
    let heads = min(${ rows }u, params.group_size - head_tile * ${ rows }u);
    let q_heads = params.kv_heads * params.group_size;
    let query_scale = params.scale * terms[params.terms_offset + 2u * q_heads + kv_head];
<%- endmacro %>

//# Puts where a key's rows lie into the arrays `k_places` and `v_places`.
<% macro find_places(key, slot) %>
        let key = ${ key };
        let block = plan[table + (key >> params.block_shift)];
        let place = key & block_mask;
        k_places[${ slot }] = k_head + block * params.k_block_stride + place * params.k_token_stride;
        v_places[${ slot }] = v_head + block * params.v_block_stride + place * params.v_token_stride;
<%- endmacro %>

//# The sum of a row with `head`'s sink, and the larger of its maximum and the sink, which that sum is relative to.
<% macro with_sink(head) %>
    // A row that sees no key gives zeros, whatever its sink.
    let sink = terms[params.terms_offset + q_heads + ${ head }];
    let with_sink = max(maximum, sink);
    let total = sum * exp2(maximum - with_sink) + exp2(sink - with_sink);
    let empty = sum == 0.0;
<%- endmacro %>
