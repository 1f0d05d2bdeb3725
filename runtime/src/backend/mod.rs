//! The backend rooms.

pub mod cpu;
