//! Faults of one line each, planted in the dense layers' kernels; the interpreter runs them, so that no GPU is needed to
//! see that the cases find them.

use super::Fault;

/// Faults of what is made of logits.
pub const CHOICE: &[Fault] = &[
    Fault {
        name: "NaN in the sum",
        family: "log_softmax",
        line: "max.f32 %f_x0, %f_x0, 0fFF800000;",
        instead: "",
        breaks: "a NaN logit makes NaN of every log-probability",
    },
    Fault {
        name: "weights of another maximum",
        family: "log_softmax",
        line: "fma.rn.f32 %f_sum, %f_other_sum, %f_t, %f_sum;",
        instead: "add.f32 %f_sum, %f_sum, %f_other_sum;",
        breaks: "sums relative to different maxima are added up",
    },
    Fault {
        name: "the one beside",
        family: "argmax",
        line: "selp.b64 %rd_key, 0, %rd_key, %p_x;",
        instead: "xor.b64 %rd_key, %rd_key, 1;\nselp.b64 %rd_key, 0, %rd_key, %p_x;",
        breaks: "the token beside the likeliest one is chosen",
    },
    Fault {
        name: "repetition of negative logits",
        family: "penalize",
        line: "setp.gt.f32 %p_x, %f_x, 0f00000000;",
        instead: "setp.eq.f32 %p_x, %f_x, %f_x;",
        breaks: "a negative logit is divided, which makes its token likelier",
    },
    Fault {
        name: "penalty of the prompt",
        family: "penalize",
        line: "@%p_often sub.rn.f32 %f_x, %f_x, %f_y;",
        instead: "sub.rn.f32 %f_x, %f_x, %f_y;",
        breaks: "the presence penalty is taken from tokens of the prompt",
    },
    Fault {
        name: "one tie too many",
        family: "sample",
        line: "sub.u64 %rd_target, %rd_target, 1;",
        instead: "",
        breaks: "top-k keeps k + 1 tokens where the last ones are equal",
    },
    Fault {
        name: "a bound for few used for many",
        family: "sample",
        line: "setp.le.u32 %p_x, %r_top_k, 32;",
        instead: "setp.ne.u32 %p_x, %r_top_k, 0;",
        breaks: "top-k looks for k tokens above a bound that only 32 need to reach",
    },
    Fault {
        name: "share of the whole row",
        family: "sample",
        line: "mul.hi.u64 %rd_target, %rd_top_p, %rd_total;",
        instead: "mul.hi.u64 %rd_target, %rd_uniform, %rd_total;",
        breaks: "top-p keeps a random share",
    },
    Fault {
        name: "temperature the wrong way",
        family: "sample",
        line: "ld.global.f32 %f_inverse, [%rd_draw + 4];",
        instead: "ld.global.f32 %f_inverse, [%rd_draw + 4];\nrcp.rn.f32 %f_inverse, %f_inverse;",
        breaks: "logits are multiplied by the temperature",
    },
    Fault {
        name: "reached is not passed",
        family: "top_candidates",
        line: "setp.ge.u64 %p_x, %rd_x, %rd_target;",
        instead: "setp.gt.u64 %p_x, %rd_x, %rd_target;",
        breaks: "a set that is full at the end of a warp's bins goes on",
    },
    Fault {
        name: "halves sorted alike",
        family: "top_candidates",
        line: "and.b32 %r_x, %r_tid, %r_size;",
        instead: "mov.u32 %r_x, 0;",
        breaks: "the bitonic sort merges what is no bitonic sequence",
    },
    Fault {
        name: "bias of another token",
        family: "penalize",
        line: "add.u64 %rd_x, %rd_x, %rd_y;",
        instead: "",
        breaks: "every change of a row is made to its first token",
    },
    Fault {
        name: "cap forgotten",
        family: "scale",
        line: "mul.f32 %f_x0, %f_t, %f_cap;",
        instead: "mov.f32 %f_x0, %f_t;",
        breaks: "a capped logit lies between -1 and 1",
    },
    Fault {
        name: "row of its own",
        family: "gather_rows",
        line: "@%p_listed ld.global.u32 %r_index, [%rd_index];",
        instead: "",
        breaks: "the list of rows is not looked at",
    },
    Fault {
        name: "one token twice",
        family: "carry_tokens",
        line: "mad.wide.u32 %rd_x, %r_from, 4, %rd_tokens;",
        instead: "mad.wide.u32 %rd_x, 0, 4, %rd_tokens;",
        breaks: "every sequence goes on with the first one's token",
    },
];
