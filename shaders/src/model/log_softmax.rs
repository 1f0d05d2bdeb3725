//! `log_softmax`: what the log-probabilities of rows of logits follow from.

use minijinja::context;

use super::{Dispatched, PARAM_WORDS, Rows, WORKGROUP_SIZE, read, sample::MAX_WIDTH, uniform, write};
use crate::shader::Shader;
use crate::{Error, template};

/// Family, template name and entry point.
const FAMILY: &str = "log_softmax";

/// Words of a [`LogSoftmaxJob`].
pub const JOB_WORDS: usize = 3;

/// Words of what a job gives.
pub const OUT_WORDS: usize = 4;

/// One row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogSoftmaxJob {
    /// Which.
    pub row: u32,
    /// A token whose logit is wanted.
    pub token: Option<u32>,
    /// First word of the output.
    pub out: u32,
}

/// What a job gives.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LogSoftmaxOut {
    /// The largest logit; −∞ for a row of nothing but NaN and −∞.
    pub max: f32,
    /// Σ exp(logit − max).
    pub sum: f64,
    /// The token's logit; −∞ where the row does not hold it.
    pub logit: f32,
}

/// What one dispatch works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogSoftmaxArgs {
    /// Jobs.
    pub count: u32,
    /// Logits of a row.
    pub width: u32,
    /// The logits.
    pub x: Rows,
    /// First word of the jobs.
    pub jobs: u32,
}

impl LogSoftmaxJob {
    /// As the kernel reads it.
    pub fn words(&self) -> [u32; JOB_WORDS] {
        [self.row, self.token.unwrap_or(u32::MAX), self.out]
    }
}

impl LogSoftmaxOut {
    /// From the words that the kernel writes.
    pub fn from_words(words: [u32; OUT_WORDS]) -> Self {
        let [max, low, high, logit] = words;
        let sum = (u64::from(high) << 32 | u64::from(low)) as f64 * 2f64.powi(-44);
        Self { max: f32::from_bits(max), sum, logit: f32::from_bits(logit) }
    }
}

/// Renders the kernel. Bindings: x, jobs, out.
///
/// # Errors
/// [`Error::Template`]: a defect of this crate.
pub fn shader() -> Result<Shader, Error> {
    let variables = context! { name => FAMILY, workgroup_size => WORKGROUP_SIZE, job_words => JOB_WORDS };
    let text = template::render(FAMILY, include_str!("../../kernels/model/log_softmax.wgsl"), variables)?;
    let bindings = vec![uniform(), read(1, "x", 4), read(2, "jobs", 4), write(3, "out")];
    Ok(super::shader(FAMILY, FAMILY.to_owned(), text, bindings))
}

impl LogSoftmaxArgs {
    /// The contents of the uniform buffer.
    pub fn uniform(&self) -> [u32; PARAM_WORDS] {
        let Self { count, width, x, jobs } = *self;
        [count, width, x.offset, x.stride, jobs, 0, 0, 0, 0, 0, 0, 0]
    }

    /// Workgroups on a device that allows `per_dimension` of them along one axis.
    ///
    /// # Errors
    /// [`Error::Zero`] without jobs, [`Error::TooLarge`] beyond [`MAX_WIDTH`], [`Error::TooManyWorkgroups`] beyond the
    /// device's limit.
    pub fn workgroups(&self, per_dimension: u32) -> Result<[u32; 3], Error> {
        Dispatched { kernel: FAMILY, jobs: self.count, width: self.width, most: MAX_WIDTH }
            .workgroups(per_dimension)
    }
}
