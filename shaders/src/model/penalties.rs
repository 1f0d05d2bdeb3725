//! `penalties`: biases and penalties of single logits.

use minijinja::context;

use super::{PARAM_WORDS, Rows, WORKGROUP_SIZE, element_workgroups, read, uniform, write};
use crate::shader::Shader;
use crate::{Error, template};

/// Family, template name and entry point.
const FAMILY: &str = "penalties";

/// Words of a [`Change`].
pub const CHANGE_WORDS: usize = 4;

/// Words of a [`Rule`].
pub const RULE_WORDS: usize = 5;

/// What is done to the tokens of a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rule {
    /// Which row.
    pub row: u32,
    /// Divides positive numbers and multiplies others.
    pub repetition: f32,
    /// Subtracted for each time that the completion holds the token.
    pub frequency: f32,
    /// Subtracted once if the completion holds the token.
    pub presence: f32,
    /// Where [`log_softmax`](super::log_softmax) has put what makes log-probabilities of the row's logits, if they are
    /// what is changed.
    pub sums: Option<u32>,
}

/// A token to which a rule is applied. A row's changes lie one behind the other, each token once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Change {
    /// First word of the [`Rule`].
    pub rule: u32,
    /// Which token.
    pub token: u32,
    /// Added first.
    pub bias: f32,
    /// How often the completion holds it, if penalties apply to it.
    pub times: Option<u32>,
}

/// What one dispatch works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PenaltiesArgs {
    /// Changes.
    pub count: u32,
    /// Logits of a row.
    pub width: u32,
    /// The logits.
    pub x: Rows,
    /// First word of the changes.
    pub changes: u32,
    /// Place of the first former logit.
    pub saved: u32,
}

impl Rule {
    /// As the kernel reads it.
    pub fn words(&self) -> [u32; RULE_WORDS] {
        let Self { row, repetition, frequency, presence, sums } = *self;
        [row, repetition.to_bits(), frequency.to_bits(), presence.to_bits(), sums.unwrap_or(u32::MAX)]
    }
}

impl Change {
    /// As the kernel reads it.
    pub fn words(&self) -> [u32; CHANGE_WORDS] {
        let Self { rule, token, bias, times } = *self;
        [rule, token, bias.to_bits(), times.unwrap_or(u32::MAX)]
    }
}

/// Renders the kernel. Bindings: x, jobs, sums, saved.
///
/// # Errors
/// [`Error::Template`]: a defect of this crate.
pub fn shader() -> Result<Shader, Error> {
    let variables = context! {
        name => FAMILY,
        workgroup_size => WORKGROUP_SIZE,
        change_words => CHANGE_WORDS,
        rule_words => RULE_WORDS,
    };
    let text = template::render(FAMILY, include_str!("../../kernels/model/penalties.wgsl"), variables)?;
    let bindings = vec![uniform(), write(1, "x"), read(2, "jobs", 4), read(3, "sums", 4), write(4, "saved")];
    Ok(super::shader(FAMILY, FAMILY.to_owned(), text, bindings))
}

impl PenaltiesArgs {
    /// The contents of the uniform buffer.
    pub fn uniform(&self) -> [u32; PARAM_WORDS] {
        let Self { count, width, x, changes, saved } = *self;
        [count, width, x.offset, x.stride, changes, saved, 0, 0, 0, 0, 0, 0]
    }

    /// Workgroups on a device that allows `per_dimension` of them along one axis.
    ///
    /// # Errors
    /// [`Error::Zero`] without changes, [`Error::TooManyWorkgroups`] beyond the device's limit.
    pub fn workgroups(&self, per_dimension: u32) -> Result<[u32; 3], Error> {
        match self.count {
            0 => Err(Error::Zero { kernel: FAMILY, field: "changes" }),
            count => element_workgroups(FAMILY, count.into(), per_dimension),
        }
    }
}
