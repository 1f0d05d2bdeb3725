//! The backend rooms.
