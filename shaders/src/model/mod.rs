//! The dense layers of a transformer: products, norms, activations, rotary embedding, tables; and what is made of logits.
//!
//! Activations are f32 throughout, weights f32, f16 or bf16 as they are stored. Every tensor has an offset and a row
//! stride of its own, so that queries, keys and values can be parts of the same rows. Each kernel takes its parameters
//! from a uniform buffer of [`PARAM_WORDS`] words at most, which hosts bind with a dynamic offset: then a bind group
//! depends on buffers alone.
//!
//! | module | kernel |
//! |---|---|
//! | [`product`] | `matvec` for few rows, `linear` in tiles for many |
//! | [`norm`] | RMSNorm and LayerNorm |
//! | [`lookup`] | embedding, learned positions, rows of a tensor |
//! | [`rotary`] | rotary position embedding |
//! | [`elementwise`] | activations, sums, scaling, soft cap |
//! | [`argmax`] | the likeliest token |
//! | [`sample`] | a token by temperature, top-k, top-p, min-p and a counted random number |
//! | [`penalties`] | biases and penalties of single logits |
//! | [`log_softmax`] | what log-probabilities follow from |
//! | [`candidates`] | the likeliest tokens, for beams and log-probabilities |
//! | [`fill_weights`] | random weights |
//!
//! The kernels that read logits take what is wanted of each row from a list of jobs, words in a storage buffer.

pub mod argmax;
pub mod candidates;
pub mod elementwise;
pub mod fill_weights;
pub mod log_softmax;
pub mod lookup;
pub mod norm;
pub mod penalties;
pub mod product;
pub mod rotary;
pub mod sample;

use crate::dispatch::{Invocations, in_units, workgroups};
use crate::shader::{Binding, BindingKind, Shader};
use crate::{DType, Error};

/// Words of the largest parameters.
pub const PARAM_WORDS: usize = 12;

/// Invocations of a workgroup.
const WORKGROUP_SIZE: u32 = 256;

/// Where the rows of a tensor lie in its binding, in elements.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Rows {
    /// First element.
    pub offset: u32,
    /// From a row to the next.
    pub stride: u32,
}

impl Rows {
    /// The same in units of `unit` elements.
    fn in_units(
        self,
        kernel: &'static str,
        [offset, stride]: [&'static str; 2],
        unit: u32,
    ) -> Result<[u32; 2], Error> {
        let in_units = |field, value: u32| in_units(kernel, field, value.into(), unit);
        Ok([in_units(offset, self.offset)?, in_units(stride, self.stride)?])
    }
}

/// Workgroups of a kernel whose invocations have an element each.
fn element_workgroups(kernel: &'static str, elements: u64, per_dimension: u32) -> Result<[u32; 3], Error> {
    let field = "rows * width";
    Invocations { kernel, field, count: elements, workgroup_size: WORKGROUP_SIZE }.workgroups(per_dimension)
}

/// A dispatch with a workgroup a job, each of which reads a row.
struct Dispatched {
    kernel: &'static str,
    jobs: u32,
    width: u32,
    /// Elements of the longest row.
    most: u32,
}

impl Dispatched {
    fn workgroups(&self, per_dimension: u32) -> Result<[u32; 3], Error> {
        let &Self { kernel, jobs, width, most } = self;
        if jobs == 0 {
            return Err(Error::Zero { kernel, field: "jobs" });
        }
        if width > most {
            return Err(Error::TooLarge { kernel, field: "width", value: width.into() });
        }
        workgroups(kernel, jobs.into(), per_dimension)
    }
}

fn uniform() -> Binding {
    let kind = BindingKind::Uniform { size: 4 * PARAM_WORDS as u32 };
    Binding { index: 0, name: "params", kind, element_size: 4 }
}

fn read(index: u32, name: &'static str, element_size: u32) -> Binding {
    Binding { index, name, kind: BindingKind::ReadOnly, element_size }
}

fn write(index: u32, name: &'static str) -> Binding {
    Binding { index, name, kind: BindingKind::ReadWrite, element_size: 4 }
}

fn shader(family: &'static str, name: String, text: String, bindings: Vec<Binding>) -> Shader {
    Shader {
        family,
        name,
        text,
        bindings,
        workgroup_size: WORKGROUP_SIZE,
        needs_f16: false,
        needs_subgroups: false,
        needs_matrices: false,
    }
}

/// Every variant of every dense kernel, rendered.
///
/// # Errors
/// [`Error::Template`]: a defect of this crate.
pub fn all_shaders() -> Result<Vec<Shader>, Error> {
    let mut shaders = Vec::new();
    for dtype in DType::ALL {
        for form in product::Form::ALL {
            shaders.push(product::ProductSpec { dtype, form }.shader()?);
        }
        shaders.push(fill_weights::FillWeightsSpec { dtype }.shader()?);
        for adds in [false, true] {
            shaders.push(lookup::LookupSpec { dtype, adds }.shader()?);
        }
    }
    for kind in [norm::NormKind::Rms, norm::NormKind::Layer] {
        for in_place in [false, true] {
            shaders.push(norm::NormSpec { kind, in_place }.shader()?);
        }
    }
    for spec in elementwise::Elementwise::ALL {
        shaders.push(spec.shader()?);
    }
    shaders.push(rotary::shader()?);
    shaders.push(argmax::shader()?);
    shaders.push(sample::shader()?);
    shaders.push(penalties::shader()?);
    shaders.push(log_softmax::shader()?);
    shaders.push(candidates::shader()?);
    Ok(shaders)
}
