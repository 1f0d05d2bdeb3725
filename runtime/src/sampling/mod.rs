//! The sampling rooms.
