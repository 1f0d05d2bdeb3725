//! The engine rooms.
