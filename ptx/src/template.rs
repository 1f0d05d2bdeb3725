//! Renders the kernel templates. Owns the template syntax; knows no kernel.
//!
//! PTX is full of `{` and `%`, so the delimiters differ from Jinja's: `<% … %>` and `//% …` for
//! statements, `${ … }` for values, `<# … #>` and `//# …` for remarks that do not reach the kernel.
//! An undefined name is an error, never an empty string.

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, UndefinedBehavior, Value};

use crate::Error;

/// The shared idioms and the parts of long kernels, which kernels import or include by these names.
const LIB: &[(&str, &str)] = &[
    ("lib/barriers.ptx", include_str!("../kernels/lib/barriers.ptx")),
    ("lib/dependent.ptx", include_str!("../kernels/lib/dependent.ptx")),
    ("lib/elements.ptx", include_str!("../kernels/lib/elements.ptx")),
    ("decode/fill.ptx", include_str!("../kernels/decode/fill.ptx")),
    ("decode/queries.ptx", include_str!("../kernels/decode/queries.ptx")),
    ("decode/scores.ptx", include_str!("../kernels/decode/scores.ptx")),
    ("decode/values.ptx", include_str!("../kernels/decode/values.ptx")),
    ("decode/merge.ptx", include_str!("../kernels/decode/merge.ptx")),
    ("model/elementwise.ptx", include_str!("../kernels/model/elementwise.ptx")),
    ("model/block_sum.ptx", include_str!("../kernels/model/block_sum.ptx")),
    ("model/activation.ptx", include_str!("../kernels/model/activation.ptx")),
    ("model/matvec/copy.ptx", include_str!("../kernels/model/matvec/copy.ptx")),
    ("model/matvec/multiply.ptx", include_str!("../kernels/model/matvec/multiply.ptx")),
    ("model/matvec/norm.ptx", include_str!("../kernels/model/matvec/norm.ptx")),
    ("model/matvec/registers.ptx", include_str!("../kernels/model/matvec/registers.ptx")),
    ("model/matvec/results.ptx", include_str!("../kernels/model/matvec/results.ptx")),
    ("model/select.ptx", include_str!("../kernels/model/select.ptx")),
    ("model/vocab.ptx", include_str!("../kernels/model/vocab.ptx")),
    ("prefill/bits.ptx", include_str!("../kernels/prefill/bits.ptx")),
    ("prefill/contract.ptx", include_str!("../kernels/prefill/contract.ptx")),
    ("prefill/fp8.ptx", include_str!("../kernels/prefill/fp8.ptx")),
    ("prefill/params.ptx", include_str!("../kernels/prefill/params.ptx")),
    ("prefill/rows.ptx", include_str!("../kernels/prefill/rows.ptx")),
    ("prefill/softmax.ptx", include_str!("../kernels/prefill/softmax.ptx")),
    ("prefill/output.ptx", include_str!("../kernels/prefill/output.ptx")),
];

/// Renders `source` (the template named `name`) with the map `variables`.
pub(crate) fn render(name: &'static str, source: &str, variables: Value) -> Result<String, Error> {
    render_text(name, source, variables)
        .map_err(|error| Error::Template { kernel: name, reason: format!("{error:#}") })
}

fn render_text(name: &str, source: &str, variables: Value) -> Result<String, minijinja::Error> {
    let syntax = SyntaxConfig::builder()
        .block_delimiters("<%", "%>")
        .variable_delimiters("${", "}")
        .comment_delimiters("<#", "#>")
        .line_statement_prefix("//%")
        .line_comment_prefix("//#")
        .trim_blocks(true)
        .lstrip_blocks(true)
        .keep_trailing_newline(true)
        .build()?;
    let mut environment = Environment::new();
    environment.set_syntax(syntax);
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    for (name, source) in LIB {
        environment.add_template(name, source)?;
    }
    environment.add_template(name, source)?;
    environment.get_template(name)?.render(variables).map(|text| without_double_blanks(&text))
}

/// Branches of a template that are left out leave their blank lines behind; this takes them away.
fn without_double_blanks(text: &str) -> String {
    let mut result = String::with_capacity(text.len());
    let mut after_blank = false;
    for line in text.split_inclusive('\n') {
        let blank = line.trim().is_empty();
        if !(blank && after_blank) {
            result.push_str(line);
        }
        after_blank = blank;
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delimiters_leave_ptx_alone() {
        let source = "//% for i in range(2)\nmov.b32 {%h${i}, %h2}, %r<1>; // 100%\n//% endfor\n";
        let text = render("test", source, Value::default()).unwrap();
        assert_eq!(text, "mov.b32 {%h0, %h2}, %r<1>; // 100%\nmov.b32 {%h1, %h2}, %r<1>; // 100%\n");
    }

    #[test]
    fn an_undefined_name_is_an_error() {
        let error = render("test", "line\n${ missing }\n", Value::default()).unwrap_err();
        assert!(error.to_string().contains("test:2"), "{error}");
    }
}
