//! Dense layers of a transformer on the CPU: linear, norms, activations, rotary embedding, embeddings, argmax.
//!
//! Activations are f32, `[rows, features]` row-major; weights stay as they are stored (f32, f16 or bf16) and
//! are widened in registers. Threads are those of the ambient rayon pool. Owns no memory and no model.
//!
//! **Row invariance.** The bits of an output row depend on that row of the input and on the weights alone:
//! not on the number of rows, the tile a row fell into, the number of threads, or the instruction set among
//! those with fused multiply-add (AVX2, AVX-512, NEON). It holds by construction:
//!
//! - a dot product is sixteen chains of fused multiply-adds, lane `l` over the elements `k ≡ l (mod 16)` in
//!   ascending order, the last step filled up with zeros, and one tree over the lanes: `l + 8`, `l + 4`,
//!   `l + 2`, `l + 1`; `lanes` says how each instruction set holds the lanes;
//! - tiles (`tile`) only choose *which* dot products are computed side by side;
//! - everything else is element by element, with explicit fused multiply-adds.
//!
//! The portable path rounds products before it adds them, so its bits are its own, and invariant too.

mod elementwise;
mod instruction_set;
mod lanes;
mod linear;
mod norm;
mod rope;
mod share;
#[cfg(test)]
mod tests;
mod tile;
mod tokens;

pub use elementwise::{activate, add, gated_activation, scale, softcap};
pub use instruction_set::InstructionSet;
pub use linear::{Projection, linear, linear_many, linear_many_on};
pub use norm::{layer_norm, rms_norm};
pub use rope::{RopeAngles, rope};
pub use tokens::{add_positions, argmax, embed};

use pagewise_attention::DType;

/// Why a dense layer could not run. All are mistakes of the caller; nothing has been written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DenseError {
    /// A slice does not have the length its shape asks for.
    #[error("{what} has {len} elements where its shape asks for {expected}; pass exactly that many")]
    Length {
        /// Name of the slice.
        what: &'static str,
        /// Its length.
        len: usize,
        /// Length of its shape.
        expected: usize,
    },
    /// A length is not a multiple of its row's.
    #[error("{what} has {len} elements, which is not a whole number of rows of {row}; pass whole rows")]
    Rows {
        /// Name of the slice.
        what: &'static str,
        /// Its length.
        len: usize,
        /// Elements, or rows, that must divide it.
        row: usize,
    },
    /// Weights that the dense layers do not read.
    #[error(
        "{what} is stored as {dtype}; the dense layers read f32, f16 and bf16, so convert it to one of them"
    )]
    DType {
        /// Name of the tensor.
        what: &'static str,
        /// How it is stored.
        dtype: DType,
    },
    /// A token id outside of the vocabulary.
    #[error(
        "token id {id} is outside of the embedding, which has {vocabulary} rows; check the tokenizer's model"
    )]
    TokenId {
        /// The id.
        id: u32,
        /// Rows of the embedding.
        vocabulary: usize,
    },
    /// A position for which nothing was learned.
    #[error(
        "position {position} is outside of the table, which has {places} rows, the first {offset} of them unused; use shorter sequences"
    )]
    Position {
        /// The position.
        position: i32,
        /// Rows of the table.
        places: usize,
        /// Rows before that of position 0.
        offset: usize,
    },
}

/// `len` must be `expected`.
fn check_len(what: &'static str, len: usize, expected: usize) -> Result<(), DenseError> {
    if len == expected { Ok(()) } else { Err(DenseError::Length { what, len, expected }) }
}
