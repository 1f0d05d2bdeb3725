//! WGSL kernels for PagedAttention, as text, with a typed description of each.
//!
//! This crate owns the kernels' text (`kernels/*.wgsl`, templates that are rendered once per variant) and what
//! a host must know to run them: bindings, features, parameters, workgroups. It makes no WebGPU calls; any
//! host code that can compile WGSL can use it.
//!
//! ```
//! use pagewise_shaders::{DType, write_kv::{Access, WriteKv, WriteKvSpec}};
//!
//! let spec = WriteKvSpec { source: DType::F32, cache: DType::Bf16, access: Access::Vec4 };
//! let write_kv = WriteKv::new(spec)?;
//! assert_eq!(write_kv.shader().name(), "write_kv_f32_bf16_vec4");
//! assert!(!write_kv.shader().needs_f16());
//! # Ok::<(), pagewise_shaders::Error>(())
//! ```
//!
//! | module | kernel |
//! |---|---|
//! | [`mod@copy_blocks`] | copies blocks within a cache |
//! | [`mod@decode`] | attends over a paged cache, keys split over workgroups, and merges the splits |
//! | [`model`] | the dense layers of a transformer: products, norms, activations, tables, argmax |
//! | [`mod@merge_states`] | merges attention over disjoint sets of keys by its log-sum-exp |
//! | [`mod@prefill`] | attends over a paged cache, many query rows of a sequence in tiles, on matrix units where there are some |
//! | [`mod@write_kv`] | stores new K and V rows into cache blocks, given by a slot mapping |

pub mod copy_blocks;
pub mod decode;
mod dispatch;
mod dtype;
mod error;
pub mod merge_states;
pub mod model;
pub mod prefill;
mod shader;
mod template;
pub mod write_kv;

pub use dtype::DType;
pub use error::Error;
pub use shader::{Binding, BindingKind, Shader};

/// Every variant of every kernel, rendered: what the tests validate and translate.
///
/// # Errors
/// [`Error::Template`] when a template does not render, which is a defect of this crate.
pub fn all_shaders() -> Result<Vec<Shader>, Error> {
    let mut shaders = Vec::new();
    for spec in write_kv::WriteKvSpec::all() {
        shaders.push(write_kv::WriteKv::new(spec)?.into_shader());
    }
    for spec in decode::DecodeSpec::all() {
        shaders.push(decode::Decode::new(spec)?.into_shader());
    }
    for kernel in prefill::PrefillKernel::all() {
        shaders.push(prefill::Prefill::new(kernel)?.into_shader());
    }
    for unit in copy_blocks::CopyUnit::ALL {
        shaders.push(copy_blocks::CopyBlocks::new(unit)?.into_shader());
    }
    for spec in merge_states::MergeStatesSpec::all() {
        shaders.push(merge_states::MergeStates::new(spec)?.into_shader());
    }
    for q in DType::ALL {
        shaders.push(decode::DecodeMerge::new(q)?.into_shader());
    }
    shaders.extend(model::all_shaders()?);
    Ok(shaders)
}
