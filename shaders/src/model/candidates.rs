//! `candidates`: the likeliest tokens of rows of logits.

use minijinja::context;

use super::sample::Changed;
use super::{Dispatched, PARAM_WORDS, Rows, WORKGROUP_SIZE, read, uniform, write};
use crate::shader::Shader;
use crate::{Error, template};

/// Family, template name and entry point.
const FAMILY: &str = "candidates";

/// Elements of the longest row: the descent looks at 24 bits of an id.
pub const MAX_WIDTH: u32 = 1 << 24;

/// Words of a [`CandidatesJob`].
pub const JOB_WORDS: usize = 6;

/// One row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CandidatesJob {
    /// Which.
    pub row: u32,
    /// How many of its likeliest tokens, where there are as many.
    pub count: u32,
    /// The row's [changes](super::penalties), where they have been applied.
    pub changed: Changed,
    /// First word of the output, of [`out_words`].
    pub out: u32,
}

/// One of the likeliest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// Which.
    pub id: u32,
    /// Its logit.
    pub logit: f32,
    /// Its logit before bias and penalties.
    pub before: f32,
}

/// Words of the output of a job for `count` candidates.
pub fn out_words(count: u32) -> usize {
    1 + 3 * count as usize
}

/// What a job found, in no order.
pub fn found(out: &[u32]) -> Vec<Candidate> {
    let (&count, rest) = out.split_first().unwrap_or((&0, &[]));
    let candidate = |&[id, logit, before]: &[u32; 3]| Candidate {
        id,
        logit: f32::from_bits(logit),
        before: f32::from_bits(before),
    };
    rest.as_chunks().0.iter().take(count as usize).map(candidate).collect()
}

/// What one dispatch works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CandidatesArgs {
    /// Jobs.
    pub count: u32,
    /// Logits of a row.
    pub width: u32,
    /// The logits.
    pub x: Rows,
    /// First word of the jobs.
    pub jobs: u32,
}

impl CandidatesJob {
    /// As the kernel reads it.
    pub fn words(&self) -> [u32; JOB_WORDS] {
        let Self { row, count, changed: Changed { start, count: changes, saved }, out } = *self;
        [row, count, start, changes, saved, out]
    }
}

/// Renders the kernel. Bindings: x, jobs, saved, out.
///
/// # Errors
/// [`Error::Template`]: a defect of this crate.
pub fn shader() -> Result<Shader, Error> {
    let variables = context! { name => FAMILY, workgroup_size => WORKGROUP_SIZE, job_words => JOB_WORDS };
    let text = template::render(FAMILY, include_str!("../../kernels/model/candidates.wgsl"), variables)?;
    let bindings = vec![uniform(), read(1, "x", 4), read(2, "jobs", 4), read(3, "saved", 4), write(4, "out")];
    Ok(super::shader(FAMILY, FAMILY.to_owned(), text, bindings))
}

impl CandidatesArgs {
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
