//! The CPU backend: PagedAttention and the cache operations over ordinary slices, multi-threaded on the rayon
//! pool that the caller is in.
//!
//! It owns the plan (which thread does what), the inner loops and their instruction sets. It does not own
//! memory: queries, caches and outputs are the caller's slices.
//!
//! **Row invariance.** The bits of an output row depend on that row alone: its query, its keys and values and
//! its mask; not on the other rows of the batch, the chunking of a prompt, the block size, the layout or the
//! number of threads. Three decisions give that:
//! - a dot product is summed in sixteen lanes (`d mod 16`) and one fixed tree, whatever the register width;
//! - the softmax runs over chunks of [`CHUNK`] keys that begin at absolute positions 0, 128, 256 …, and the
//!   chunks of each absolute [`SEGMENT`] are merged first, then segments in rising order, whether or not
//!   segments were computed by different threads;
//! - a key that a row does not see takes part in no arithmetic of that row.
//!
//! The same bits come out on AVX2, AVX-512 and NEON, which all have fused multiply-add; the portable path
//! rounds twice and differs in the last bits.
//!
//! # Example
//! ```
//! use pagewise_attention::{AttentionConfig, CacheLayout, DType, HostTensor, HostTensorMut, PagedBatch, Problem};
//! use pagewise_attention::cpu::{Inputs, Outputs, Plan};
//!
//! // Two query heads share one key-value head; three keys lie in block 1 of a cache of two blocks.
//! let config = AttentionConfig::new(2, 1, 4, DType::F32);
//! let layout = CacheLayout::nhd(2, 4, &config);
//! let (k, v) = (vec![0.5f32; 32], vec![2.0f32; 32]);
//! let (q, mut out) = (vec![1.0f32; 8], vec![0.0f32; 8]);
//!
//! let problem = Problem::new(&config, layout, PagedBatch::padded(&[0, 1], &[3], &[1], 1))?;
//! let plan = Plan::new(problem);
//! let inputs = Inputs::new(HostTensor::F32(&q), HostTensor::F32(&k), HostTensor::F32(&v));
//! plan.run(&inputs, &mut Outputs::new(HostTensorMut::F32(&mut out)))?;
//! assert_eq!(out, [2.0; 8]);
//! # Ok::<(), pagewise_attention::ProblemError>(())
//! ```

mod ahead;
mod blocks;
mod elements;
mod gather;
mod io;
mod kernel;
mod lanes;
mod math;
mod merge;
mod plan;
mod run;
mod tile;
mod write;

pub use blocks::{copy_blocks, swap_blocks};
pub use io::{Inputs, KvPair, KvScale, Outputs};
pub use lanes::Level;
pub use merge::{Partial, merge_states};
pub use plan::Plan;
pub use write::{write_keys, write_kv, write_values};

/// Keys of a chunk: its scores are held at once, and its softmax is rescaled as a whole.
pub const CHUNK: usize = 128;

/// Keys of a segment: the unit in which a long sequence is split over threads.
pub const SEGMENT: usize = 4 * CHUNK;
