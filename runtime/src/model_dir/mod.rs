//! The model_dir rooms.
