//! The models rooms.
