//! What the GPU backends' planners share: which keys each query row sees, and how they are cut into pieces.
//!
//! Pure host arithmetic over lengths. How large pieces should be is each backend's own business.

mod rows;
mod split;

pub(crate) use rows::{Keys, visible_rows};
#[cfg(any(feature = "cuda", feature = "wgpu"))]
pub(crate) use rows::{count, first_entry};
pub(crate) use split::{Cut, MAX_PIECE_KEYS, Piece, TILE_KEYS, split};

/// A size beyond what 32-bit indices hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TooLarge {
    /// Which size.
    pub(crate) what: &'static str,
    /// Its value.
    pub(crate) value: u64,
    /// Largest allowed.
    pub(crate) max: u64,
}
