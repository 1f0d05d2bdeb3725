//# Variables: name, workgroup_size, job_words.
//% import "lib/wide.wgsl" as wide
//% import "lib/sampling.wgsl" as sampling
// ${ name }: the likeliest tokens of rows of logits, lower ids first among equals, in no order.
//
//   x      [rows, width]      f32, read as their bits; width up to 2^24
//   jobs   [count, ${ job_words }]         u32: row, how many, changes, their count, the first of saved, out
//   saved  [changes]          u32: logits as they were before bias and penalties
//   out                       u32, from a job's place on: how many there are, then id, logit, and logit as it was, of each
//
// A workgroup has a row. NaN and negative infinity are no candidates. Nothing is sorted: where the set ends is found by a
// radix descent over the logits' bits, which reads the row up to seven times; whoever wants an order has few to sort.

${ sampling.interface() }
@group(0) @binding(3) var<storage, read> saved: array<u32>;
@group(0) @binding(4) var<storage, read_write> out: array<u32>;

var<workgroup> sums: array<vec2<u32>, ${ workgroup_size }>;
var<workgroup> bins_low: array<atomic<u32>, ${ workgroup_size }>;
var<workgroup> found: Found;
var<workgroup> taken: atomic<u32>;

${ wide.add() }

${ wide.compare() }

${ sampling.ordered() }

${ sampling.found() }

${ sampling.prefix_sum(workgroup_size) }

${ sampling.cut(workgroup_size, false) }

@compute @workgroup_size(${ workgroup_size })
fn candidates(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    // Workgroups continue along y where x has reached the device's limit.
    let index = group.y * groups.x + group.x;
    if (index >= params.count) {
        return;
    }
    let job = params.jobs_offset + index * ${ job_words }u;
    let base = params.x_offset + jobs[job] * params.x_stride;
    let count = jobs[job + 1u];
    let changes = jobs[job + 2u];
    let change_count = jobs[job + 3u];
    let first_saved = jobs[job + 4u];
    let at = jobs[job + 5u];
    var cut = Cut(0xffffffffu, 0u);
    if (count > 0u) {
        cut = cut_at(EVERYTHING, base, params.width, count, lane);
    }
    if (lane == 0u) {
        atomicStore(&taken, 0u);
    }
    workgroupBarrier();
    for (var id = lane; id < params.width; id += ${ workgroup_size }u) {
        let bits = x[base + id];
        if (is_kept(cut, order(bits), id)) {
            let place = at + 1u + 3u * atomicAdd(&taken, 1u);
            out[place] = id;
            out[place + 1u] = bits;
            var before = bits;
            for (var i = 0u; i < change_count; i++) {
                if (jobs[changes + 4u * i + 1u] == id) {
                    before = saved[first_saved + i];
                }
            }
            out[place + 2u] = before;
        }
    }
    workgroupBarrier();
    if (lane == 0u) {
        out[at] = atomicLoad(&taken);
    }
}
