//# Variables: name, workgroup_size.
//% import "lib/wide.wgsl" as wide
//% import "lib/sampling.wgsl" as sampling
// ${ name }: chooses a token from each of some rows of logits: temperature, top-k, top-p, min-p and a counted random number.
//
//   x      [rows, width]       f32, read as their bits; width up to 2^19
//   jobs   [count, ${ job_words }]         u32: Job
//   saved  [changes]           u32: logits as they were before bias and penalties
//   ids    [rows]              u32: the chosen token; 0xffffffff for a row of nothing but NaN and negative infinity
//   out                        u32: where a job asks for it, the chosen token's logit as it was
//
// A workgroup has a row. Weights are whole numbers of 2^-44, so that their sums are exact: the same in any order, and the
// token that a random number picks is a comparison of integers. Nothing is sorted: top-k and top-p (Holtzman et al. 2019,
// section 3.1) end where a radix descent over the logits' bits finds them. The random number is Philox4x32-10 (Salmon et
// al. 2011, section 3.3) of seed, sample and position; it walks ids upwards. A row is read once for its largest logit,
// four to seven times for top-k and for top-p, and twice for the choice.

${ sampling.interface("ids_offset") }

struct Job {
    row: u32,
    greedy: u32,          // 1: the largest logit wins
    inverse: f32,         // 1 / temperature
    lowest: f32,          // -43.65 temperatures
    top_k: u32,           // 0: all
    top_p: u32,           // in units of 2^-32; 0: all
    min_p: f32,
    seed_low: u32,
    seed_high: u32,
    sample: u32,
    position_low: u32,
    position_high: u32,
    changes: u32,         // first of the row's changes, in words of jobs; a change begins with its row and its token
    change_count: u32,
    first_saved: u32,
    out: u32,             // 0xffffffff: not asked for
}

@group(0) @binding(3) var<storage, read> saved: array<u32>;
@group(0) @binding(4) var<storage, read_write> ids: array<u32>;
@group(0) @binding(5) var<storage, read_write> out: array<u32>;

var<workgroup> sums: array<vec2<u32>, ${ workgroup_size }>;
var<workgroup> bins_low: array<atomic<u32>, ${ workgroup_size }>;
var<workgroup> bins_high: array<atomic<u32>, ${ workgroup_size }>;
var<workgroup> found: Found;
var<workgroup> logit: u32;

${ wide.multiply() }

${ wide.add() }

${ wide.compare() }

${ wide.multiply_high() }

${ sampling.ordered() }

${ sampling.unordered() }

${ sampling.weights() }

${ sampling.found() }

${ sampling.prefix_sum(workgroup_size) }

${ sampling.find_largest(workgroup_size) }

${ sampling.cut(workgroup_size, true) }

// Ten rounds of Philox4x32; the first two words of the result.
fn philox(counter_: vec4<u32>, key_: vec2<u32>) -> vec2<u32> {
    var counter = counter_;
    var key = key_;
    for (var round = 0u; round < 10u; round++) {
        let first = mul_wide(counter.x, 0xd2511f53u);
        let second = mul_wide(counter.z, 0xcd9e8d57u);
        counter = vec4<u32>(second.y ^ counter.y ^ key.x, second.x, first.y ^ counter.w ^ key.y, first.x);
        key += vec2<u32>(0x9e3779b9u, 0xbb67ae85u);
    }
    return counter.xy;
}

fn job_at(at: u32) -> Job {
    return Job(
        jobs[at],
        jobs[at + 1u],
        bitcast<f32>(jobs[at + 2u]),
        bitcast<f32>(jobs[at + 3u]),
        jobs[at + 4u],
        jobs[at + 5u],
        bitcast<f32>(jobs[at + 6u]),
        jobs[at + 7u],
        jobs[at + 8u],
        jobs[at + 9u],
        jobs[at + 10u],
        jobs[at + 11u],
        jobs[at + 12u],
        jobs[at + 13u],
        jobs[at + 14u],
        jobs[at + 15u],
    );
}

// What a candidate weighs in the choice.
fn kept_mass(cut: Cut, min_p: f32, softmax: Softmax, bits: u32, id: u32) -> vec2<u32> {
    if (!is_kept(cut, order(bits), id)) {
        return vec2<u32>();
    }
    let w = weight(softmax, bits);
    if (w < min_p) {
        return vec2<u32>();
    }
    return mass(w);
}

// The first id whose cumulated mass passes a part of all of it: the part is a number of 64 bits, in units of 2^-64.
// Each lane sums a stretch of ids; the stretch in which it lies is divided once more, and walked.
fn pick(cut: Cut, min_p: f32, softmax: Softmax, part: vec2<u32>, base: u32, width: u32, lane: u32) -> u32 {
    var start = 0u;
    var end = width;
    var rest = vec2<u32>();
    for (var level = 0u; level < 2u; level++) {
        let stretch = (end - start + ${ workgroup_size - 1 }u) / ${ workgroup_size }u;
        let from_ = min(start + lane * stretch, end);
        let to = min(from_ + stretch, end);
        var amount = vec2<u32>();
        for (var id = from_; id < to; id++) {
            amount = add64(amount, kept_mass(cut, min_p, softmax, x[base + id], id));
        }
        let sum = prefix_sum(amount, lane);
        if (level == 0u) {
            rest = mul_high64(sums[${ workgroup_size - 1 }], part);
        }
        let before = sub64(sum, amount);
        if (!less64(rest, before) && less64(rest, sum)) {
            found = Found(from_, to, sub64(rest, before));
        }
        let place = workgroupUniformLoad(&found);
        start = place.at;
        end = place.value;
        rest = place.rest;
    }
    for (var id = start; id < end; id++) {
        let amount = kept_mass(cut, min_p, softmax, x[base + id], id);
        if (less64(rest, amount)) {
            return id;
        }
        rest = sub64(rest, amount);
    }
    return 0xffffffffu;
}

@compute @workgroup_size(${ workgroup_size })
fn sample(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    // Workgroups continue along y where x has reached the device's limit.
    let index = group.y * groups.x + group.x;
    if (index >= params.count) {
        return;
    }
    let job = job_at(params.jobs_offset + index * ${ job_words }u);
    let base = params.x_offset + job.row * params.x_stride;
    let width = params.width;
    let best = find_largest(base, width, lane);
    var id = best.at;
    if (best.value > 0u && job.greedy == 0u) {
        let softmax = Softmax(number(best.value), job.inverse, job.lowest);
        var cut = EVERYTHING;
        if (job.top_k > 0u && job.top_k < width) {
            cut = cut_at(cut, base, width, job.top_k, 0u, softmax, lane);
        }
        if (job.top_p > 0u) {
            cut = cut_at(cut, base, width, 0u, job.top_p, softmax, lane);
        }
        let key = vec2<u32>(job.seed_low, job.seed_high);
        let random = philox(vec4<u32>(job.position_low, job.position_high, job.sample, 0u), key);
        // 53 bits of it, as the host takes.
        let part = vec2<u32>(random.x & 0xfffff800u, random.y);
        id = pick(cut, job.min_p, softmax, part, base, width, lane);
    }
    if (job.out != 0xffffffffu) {
        if (lane == 0u && id < width) {
            logit = x[base + id];
        }
        workgroupBarrier();
        for (var i = lane; i < job.change_count; i += ${ workgroup_size }u) {
            if (jobs[job.changes + 4u * i + 1u] == id) {
                logit = saved[job.first_saved + i];
            }
        }
        workgroupBarrier();
        if (lane == 0u) {
            out[job.out] = logit;
        }
    }
    if (lane == 0u) {
        ids[params.ids_offset + job.row] = id;
    }
}
