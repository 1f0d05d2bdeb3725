//! Renders the kernel templates. Owns the template syntax; knows no kernel.
//!
//! The delimiters are those of pagewise-ptx: `<% … %>` and `//% …` for statements, `${ … }` for values,
//! `<# … #>` and `//# …` for remarks that do not reach the kernel. To an editor, a template is WGSL with
//! comments. An undefined name is an error, never an empty string.

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, UndefinedBehavior, Value};

use crate::Error;

/// The shared idioms, which kernels import by these names.
const LIB: &[(&str, &str)] = &[
    ("lib/attention.wgsl", include_str!("../kernels/lib/attention.wgsl")),
    ("lib/dense.wgsl", include_str!("../kernels/lib/dense.wgsl")),
    ("lib/elements.wgsl", include_str!("../kernels/lib/elements.wgsl")),
    ("lib/prefill.wgsl", include_str!("../kernels/lib/prefill.wgsl")),
    ("lib/sampling.wgsl", include_str!("../kernels/lib/sampling.wgsl")),
    ("lib/wide.wgsl", include_str!("../kernels/lib/wide.wgsl")),
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
    fn delimiters_leave_wgsl_alone() {
        let source = "//% for i in range(2)\nif (a${ i } % 2u == 0u) { return; } // {# 100%\n//% endfor\n";
        let text = render("test", source, Value::default()).unwrap();
        assert_eq!(
            text,
            "if (a0 % 2u == 0u) { return; } // {# 100%\nif (a1 % 2u == 0u) { return; } // {# 100%\n"
        );
    }

    #[test]
    fn an_undefined_name_is_an_error() {
        let error = render("test", "line\n${ missing }\n", Value::default()).unwrap_err();
        assert!(error.to_string().contains("test:2"), "{error}");
    }
}
