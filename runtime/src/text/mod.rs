//! The text rooms.
