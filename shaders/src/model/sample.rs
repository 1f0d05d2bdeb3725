//! `sample`: a token from each of some rows of logits, by temperature, top-k, top-p, min-p and a counted random number.

use minijinja::context;

use super::{Dispatched, PARAM_WORDS, Rows, WORKGROUP_SIZE, read, uniform, write};
use crate::shader::Shader;
use crate::{Error, template};

/// Family, template name and entry point.
const FAMILY: &str = "sample";

/// The answer for a row in which there is nothing but NaN and −∞.
pub const NO_TOKEN: u32 = u32::MAX;

/// Elements of the longest row: sums of so many weights of at most 2⁴⁴ units fit 64 bits.
pub const MAX_WIDTH: u32 = 1 << 19;

/// Words of a [`SampleJob`].
pub const JOB_WORDS: usize = 16;

/// One row's choice.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SampleJob {
    /// Which row.
    pub row: u32,
    /// 0 takes the largest logit, the lowest id among equals.
    pub temperature: f32,
    /// Keeps so many of the likeliest; 0 for all.
    pub top_k: u32,
    /// Keeps the smallest set of the likeliest that holds this share; 1 for all.
    pub top_p: f32,
    /// Keeps those at least this fraction as likely as the likeliest.
    pub min_p: f32,
    /// Key of the random number.
    pub seed: u64,
    /// The request's sample.
    pub sample: u32,
    /// Position in the sequence of the token that is chosen.
    pub position: u64,
    /// The row's [changes](super::penalties).
    pub changed: Changed,
    /// Where in the output the logit of the chosen token goes, as it was before the changes; `None` for nowhere.
    pub out: Option<u32>,
}

/// Where a row's changes are, once they are applied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changed {
    /// The first, in words of the jobs.
    pub start: u32,
    /// How many.
    pub count: u32,
    /// Place of the first one's former logit.
    pub saved: u32,
}

/// What one dispatch works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SampleArgs {
    /// Jobs.
    pub count: u32,
    /// Logits of a row.
    pub width: u32,
    /// The logits.
    pub x: Rows,
    /// First word of the jobs.
    pub jobs: u32,
    /// First id in the output.
    pub ids: u32,
}

impl SampleJob {
    /// As the kernel reads it.
    pub fn words(&self) -> [u32; JOB_WORDS] {
        let Self { row, temperature, top_k, top_p, min_p, seed, sample, position, changed, out } = *self;
        // Beyond the range of f32 there is nothing left to tell apart.
        let inverse = (1.0 / temperature).min(f32::MAX);
        let lowest = (-43.65 * temperature).max(f32::MIN / 2.0);
        // A share that rounds to nothing still keeps the likeliest token, as the smallest share does.
        let share = match top_p < 1.0 {
            true => ((f64::from(top_p) * 2f64.powi(32)) as u32).max(1),
            false => 0,
        };
        [
            row,
            u32::from(temperature == 0.0 || top_k == 1),
            inverse.to_bits(),
            lowest.to_bits(),
            top_k,
            share,
            min_p.to_bits(),
            seed as u32,
            (seed >> 32) as u32,
            sample,
            position as u32,
            (position >> 32) as u32,
            changed.start,
            changed.count,
            changed.saved,
            out.unwrap_or(u32::MAX),
        ]
    }
}

/// Renders the kernel. Bindings: x, jobs, saved, ids, out.
///
/// # Errors
/// [`Error::Template`]: a defect of this crate.
pub fn shader() -> Result<Shader, Error> {
    let variables = context! { name => FAMILY, workgroup_size => WORKGROUP_SIZE, job_words => JOB_WORDS };
    let text = template::render(FAMILY, include_str!("../../kernels/model/sample.wgsl"), variables)?;
    let bindings = vec![
        uniform(),
        read(1, "x", 4),
        read(2, "jobs", 4),
        read(3, "saved", 4),
        write(4, "ids"),
        write(5, "out"),
    ];
    Ok(super::shader(FAMILY, FAMILY.to_owned(), text, bindings))
}

impl SampleArgs {
    /// The contents of the uniform buffer.
    pub fn uniform(&self) -> [u32; PARAM_WORDS] {
        let Self { count, width, x, jobs, ids } = *self;
        [count, width, x.offset, x.stride, jobs, ids, 0, 0, 0, 0, 0, 0]
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
