//! What every backend is checked with: one table of cases, one oracle in plain `f64`, one runner.
//!
//! - A [`Case`] is one line of text, `attention q=f32 kv=bf16 heads=8/2 dim=64 … seed=7`; reading the line back
//!   gives the same data, so a failure is re-run by pasting its line.
//! - [`quick`] and [`full`] are the case table; benches draw their shapes from it.
//! - [`AttentionData`] and its siblings generate a case's inputs, with NaN, infinities and wild block table
//!   entries wherever a backend has no business.
//! - A backend implements [`Subject`]; [`run`] gives a [`Report`].
//!
//! The oracle shares no code with any backend. It knows nothing of speed.

#[cfg(any(feature = "cuda", feature = "wgpu"))]
mod alteration;
mod buffer;
mod case;
mod check;
#[cfg(feature = "cpu")]
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod data;
mod masks;
mod oracle;
mod random;
mod runner;
mod subject;
mod table;
#[cfg(feature = "wgpu")]
mod wgpu;

#[cfg(any(feature = "cuda", feature = "wgpu"))]
pub(crate) use alteration::Alteration;
pub use buffer::Buffer;
pub use case::{Case, CaseMask, Layout, Operation, ParseCaseError, Rows, ScaleKind, SequenceShape, Tables};
pub use check::{Agreement, Tolerance};
#[cfg(feature = "cpu")]
pub use cpu::Cpu;
#[cfg(feature = "cuda")]
pub use cuda::{Cuda, Pinned, PlannedMemory, Upload, cuda_rounding, place_attention};
pub use data::{AttentionData, CopyData, MergeData, SwapData, WriteData};
pub use oracle::{Reference, RowReference};
pub use random::{Random, fresh_seed};
pub use runner::{CaseResult, Observe, Outcome, Report, run, run_case, run_case_observed, try_case};
pub use subject::{
    AttentionTask, CopyTask, MergePart, MergeTask, ProbabilityRounding, Refusal, Scale, Subject, SwapTask,
    WriteTask,
};
pub use table::{full, quick, random_case};
#[cfg(feature = "wgpu")]
pub use wgpu::Wgpu;
