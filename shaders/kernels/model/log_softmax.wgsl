//# Variables: name, workgroup_size, job_words.
//% import "lib/wide.wgsl" as wide
//% import "lib/sampling.wgsl" as sampling
// ${ name }: what log-probabilities of rows of logits follow from, and the logit of a token that is known.
//
//   x     [rows, width]    f32, read as their bits; width up to 2^19
//   jobs  [count, ${ job_words }]       u32: row, token (0xffffffff: none), out
//   out                    u32, from a job's place on: the largest logit; the sum of exp(x - largest) over the row in
//                          units of 2^-44, low word and high word; the token's logit
//
// log p(token) = x[token] - largest - log(sum): the logarithm is taken where there is f64. A workgroup has a row. The sum
// of whole numbers is the same in any order. Of a row of nothing but NaN and negative infinity the sum is 0; infinite
// logits share all of the probability.

${ sampling.interface() }
@group(0) @binding(3) var<storage, read_write> out: array<u32>;

var<workgroup> sums: array<vec2<u32>, ${ workgroup_size }>;
var<workgroup> found: Found;

${ wide.add() }

${ wide.compare() }

${ sampling.ordered() }

${ sampling.unordered() }

${ sampling.weights() }

${ sampling.found() }

${ sampling.prefix_sum(workgroup_size) }

${ sampling.find_largest(workgroup_size) }

@compute @workgroup_size(${ workgroup_size })
fn log_softmax(
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
    let token = jobs[job + 1u];
    let at = jobs[job + 2u];
    let best = find_largest(base, params.width, lane);
    let softmax = Softmax(number(best.value), 1.0, -43.65);
    var amount = vec2<u32>();
    for (var id = lane; id < params.width; id += ${ workgroup_size }u) {
        amount = add64(amount, mass(weight(softmax, x[base + id])));
    }
    let sum = prefix_sum(amount, lane);
    if (lane == ${ workgroup_size - 1 }u) {
        out[at] = softmax.largest;
        out[at + 1u] = sum.x;
        out[at + 2u] = sum.y;
        if (token < params.width) {
            out[at + 3u] = x[base + token];
        } else {
            out[at + 3u] = 0xff800000u;
        }
    }
}
