//! Faults of one line each, planted in the dense kernels in WGSL, one at a time: each must make its kernel's cases fail, by
//! what they compare and not because the kernel no longer compiles.

use super::super::faults::Fault;
use super::machine::Machine;
use super::{elementwise, made_up, products, rows, sampling};
use pagewise_attention::wgpu::Context;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;

/// Cases of one kernel.
type Cases = fn(&mut Machine, u64);

const FAULTS: &[(Fault, Cases)] = &[
    (
        Fault {
            name: "elements past the row",
            family: "matvec",
            line: "return select(vec4<f32>(), x[base + i], at < vec4<u32>(params.in_features));",
            instead: "return x[base + i];",
            breaks: "what lies behind a row counts",
        },
        products::products,
    ),
    (
        Fault {
            name: "what is there already",
            family: "linear",
            line: "value += out[at];",
            instead: "value = out[at];",
            breaks: "the residual stream loses the product",
        },
        products::products,
    ),
    (
        Fault {
            name: "mean of the squares",
            family: "norm",
            line: "let factor = 1.0 / sqrt(sum_all(squares, lane) / width + params.eps);",
            instead: "let factor = 1.0 / sqrt(sum_all(squares, lane) / (width + 1.0) + params.eps);",
            breaks: "the variance is that of one element more",
        },
        rows::norms,
    ),
    (
        Fault {
            name: "row of a part",
            family: "lookup",
            line: "let source = params.table_offset + (number - params.first_row) * params.table_stride + column;",
            instead: "let source = params.table_offset + number * params.table_stride + column;",
            breaks: "every part of a table is taken for the first",
        },
        rows::lookups,
    ),
    (
        Fault {
            name: "partner of an element",
            family: "rotary",
            line: "x[high] = b * cosine + a * sine;",
            instead: "x[high] = b * cosine - a * sine;",
            breaks: "half of a head turns the other way",
        },
        rows::rotations,
    ),
    (
        Fault {
            name: "tail of the normal distribution",
            family: "elementwise",
            line: "return v * select(1.0 - tail, tail, v < 0.0);",
            instead: "return v * (1.0 - tail);",
            breaks: "GELU of negative numbers",
        },
        elementwise::element_by_element,
    ),
    (
        Fault {
            name: "carry of a sum",
            family: "log_softmax",
            line: "return vec2<u32>(low, a.y + b.y + select(0u, 1u, low < b.x));",
            instead: "return vec2<u32>(low, a.y + b.y);",
            breaks: "sums of weights lose what goes beyond 32 bits",
        },
        sampling::log_probabilities,
    ),
    (
        Fault {
            name: "token that crosses the line",
            family: "sample",
            line: "if (less64(before, wanted) && !less64(sum, wanted)) {",
            instead: "if (!less64(wanted, before) && less64(wanted, sum)) {",
            breaks: "top-k and top-p end one bin late where they end with a bin",
        },
        sampling::chosen_tokens,
    ),
    (
        Fault {
            name: "order of ids",
            family: "sample",
            line: "bin = (id >> (48u - 8u * level)) & 255u;",
            instead: "bin = 255u - ((id >> (48u - 8u * level)) & 255u);",
            breaks: "of equal logits the higher ids are kept",
        },
        sampling::chosen_tokens,
    ),
    (
        Fault {
            name: "key of a round",
            family: "sample",
            line: "key += vec2<u32>(0x9e3779b9u, 0xbb67ae85u);",
            instead: "key += vec2<u32>(0x9e3779b9u, 0xbb67ae86u);",
            breaks: "other random numbers",
        },
        sampling::chosen_tokens,
    ),
    (
        Fault {
            name: "middle of a product",
            family: "sample",
            line: "let second = (a & 0xffffu) * (b >> 16u) + (first & 0xffffu);",
            instead: "let second = (a & 0xffffu) * (b >> 16u);",
            breaks: "products of two words lose a carry",
        },
        sampling::chosen_tokens,
    ),
    (
        Fault {
            name: "sign of what is penalised",
            family: "penalties",
            line: "value = select(value * repetition, value / repetition, value > 0.0);",
            instead: "value = value / repetition;",
            breaks: "repeated tokens with negative logits become likelier",
        },
        sampling::biases_and_penalties,
    ),
    (
        Fault {
            name: "fraction of a weight",
            family: "log_softmax",
            line: "return vec2<u32>(digits << shift, (digits >> 1u) >> (31u - shift));",
            instead: "return vec2<u32>(0u, (digits >> 1u) >> (31u - shift));",
            breaks: "weights lose what is below 2^-12",
        },
        sampling::log_probabilities,
    ),
    (
        Fault {
            name: "last of equal ones",
            family: "candidates",
            line: "return key > cut.key || (key == cut.key && id <= cut.id);",
            instead: "return key > cut.key || (key == cut.key && id < cut.id);",
            breaks: "the last of equal candidates is left out",
        },
        sampling::likeliest_of_many,
    ),
    (
        Fault {
            name: "number of an element",
            family: "fill_weights",
            line: "let place = add64(mul_wide(row, params.width), vec2<u32>(column, 0u));",
            instead: "let place = vec2<u32>(row * params.stride + column, 0u);",
            breaks: "what fills a row up takes part in the numbers",
        },
        made_up::made_up_weights,
    ),
];

/// Plants each fault and wants its cases to fail with what they compare.
pub fn every_fault_is_found(context: &Context, seed: u64) {
    let mut survivors = Vec::new();
    for &(fault, cases) in FAULTS {
        let (alter, count) = fault.planted();
        let device = Context::new(context.device().clone(), context.queue().clone()).unwrap();
        let mut machine = Machine::new(device.with_altered_kernels(alter));
        let result = catch_unwind(AssertUnwindSafe(|| cases(&mut machine, seed)));
        let said = result.err().map(|panic| {
            let text = panic.downcast_ref::<String>().cloned();
            text.or_else(|| panic.downcast_ref::<&str>().map(|&text| text.to_owned())).unwrap_or_default()
        });
        assert!(count.load(Ordering::Relaxed) > 0, "{}: no kernel that ran has the line", fault.name);
        match said {
            None => survivors.push(format!("{}: {} ({})", fault.family, fault.name, fault.breaks)),
            // A comparison names its seed; a kernel that does not compile says something else.
            Some(said) => assert!(said.contains("PAGEWISE_SEED="), "{}: {said}", fault.name),
        }
    }
    assert!(survivors.is_empty(), "PAGEWISE_SEED={seed}: not found: {survivors:#?}");
    eprintln!("{} faults found", FAULTS.len());
}
