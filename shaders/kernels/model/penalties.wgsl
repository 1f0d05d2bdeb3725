//# Variables: name, workgroup_size, change_words, rule_words.
// ${ name }: adds biases to single logits and applies repetition, frequency and presence penalties to them.
//
//   x      [rows, width]      f32, read and written as their bits
//   jobs   [count, ${ change_words }]         u32: Change; each token of a row once
//          [rules, ${ rule_words }]         u32: Rule, where changes say
//   sums                      u32: of log_softmax, for rules that work on log-probabilities
//   saved  [count]            u32: each logit as it was
//
// An invocation has a change. A repetition penalty divides positive numbers and multiplies others (Keskar et al. 2019, CTRL,
// section 4.1); the bias comes before it, frequency and presence penalties come behind. NaN and infinities stay as they
// are. For beams the numbers are log-probabilities: they are turned back into logits of the same order afterwards; beside
// an infinite logit they stay as they are.

struct Params {
    count: u32,
    width: u32,
    x_offset: u32,
    x_stride: u32,
    changes_offset: u32,
    saved_offset: u32,
    unused_0: u32,
    unused_1: u32,
    unused_2: u32,
    unused_3: u32,
    unused_4: u32,
    unused_5: u32,
}

// Change: rule (where in jobs), token, bias (f32), times (how often the completion holds it; 0xffffffff: no penalty)
// Rule: row, repetition (f32), frequency (f32), presence (f32), sums (where; 0xffffffff: logits are changed)

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read_write> x: array<u32>;
@group(0) @binding(2) var<storage, read> jobs: array<u32>;
@group(0) @binding(3) var<storage, read> sums: array<u32>;
@group(0) @binding(4) var<storage, read_write> saved: array<u32>;

@compute @workgroup_size(${ workgroup_size })
fn penalties(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    // Workgroups continue along y where x has reached the device's limit.
    let index = (group.y * groups.x + group.x) * ${ workgroup_size }u + lane;
    if (index >= params.count) {
        return;
    }
    let change = params.changes_offset + ${ change_words }u * index;
    let rule = jobs[change];
    let token = jobs[change + 1u];
    let bias = bitcast<f32>(jobs[change + 2u]);
    let times = jobs[change + 3u];
    if (token >= params.width) {
        return;
    }
    let at = params.x_offset + jobs[rule] * params.x_stride + token;
    let bits = x[at];
    saved[params.saved_offset + index] = bits;
    if ((bits & 0x7fffffffu) >= 0x7f800000u) {
        return;
    }
    var value = bitcast<f32>(bits);
    // From log-probabilities to logits: the largest logit and the logarithm of the sum of all weights.
    var normaliser = 0.0;
    let sum = jobs[rule + 4u];
    if (sum != 0xffffffffu) {
        if ((sums[sum] & 0x7fffffffu) >= 0x7f800000u) {
            return;
        }
        let total = f32(sums[sum + 2u]) * 0x1p-12 + f32(sums[sum + 1u]) * 0x1p-44;
        normaliser = bitcast<f32>(sums[sum]) + log(total);
    }
    value = (value - normaliser) + bias;
    if (times != 0xffffffffu) {
        let repetition = bitcast<f32>(jobs[rule + 1u]);
        if (repetition != 1.0) {
            value = select(value * repetition, value / repetition, value > 0.0);
        }
        if (times > 0u) {
            value -= bitcast<f32>(jobs[rule + 2u]) * f32(times) + bitcast<f32>(jobs[rule + 3u]);
        }
    }
    x[at] = bitcast<u32>(value + normaliser);
}
